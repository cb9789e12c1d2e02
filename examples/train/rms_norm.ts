import type { Layer, Weight } from "./layer.ts";

// Keeps a row of zeros finite.
const epsilon = 1e-6;

/**
 * `y = gain · x / rms(x)`, row by row.
 *
 * @param x `[rows, width]`.
 * @param gain `[width]`.
 */
export function rmsNorm(x: Float32Array, gain: Weight): Layer {
  const width = gain.value.length;
  const rows = x.length / width;
  const output = new Float32Array(x.length);
  const inverse = new Float64Array(rows);
  for (let row = 0, at = 0; row < rows; row++, at += width) {
    let squares = 0;
    for (let i = 0; i < width; i++) squares += x[at + i] * x[at + i];
    inverse[row] = 1 / Math.sqrt(squares / width + epsilon);
    for (let i = 0; i < width; i++) output[at + i] = gain.value[i] * x[at + i] * inverse[row];
  }
  return {
    output,
    // With n = x / rms:   ∂x = (g − n · mean(g · n)) / rms   for g = gain · ∂y;   ∂gain = Σ_rows ∂y · n.
    backward(gradOutput) {
      const gradX = new Float32Array(x.length);
      const gradGain = new Float64Array(width);
      for (let row = 0, at = 0; row < rows; row++, at += width) {
        const scale = inverse[row];
        let mean = 0;
        for (let i = 0; i < width; i++) {
          const normal = x[at + i] * scale;
          gradGain[i] += gradOutput[at + i] * normal;
          mean += gain.value[i] * gradOutput[at + i] * normal;
        }
        mean /= width;
        for (let i = 0; i < width; i++) {
          gradX[at + i] = (gain.value[i] * gradOutput[at + i] - x[at + i] * scale * mean) * scale;
        }
      }
      gain.grad.set(gradGain);
      return gradX;
    },
  };
}
