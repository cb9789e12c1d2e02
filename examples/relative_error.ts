/** How far numbers are from the expected ones: ‖actual − expected‖ / ‖expected‖, NaN where one of them is. */
export function relL2(actual: Float32Array, expected: Float32Array): number {
  if (actual.length !== expected.length) return NaN;
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i] - expected[i]) ** 2;
    norm += expected[i] ** 2;
  }
  return Math.sqrt(difference / norm);
}
