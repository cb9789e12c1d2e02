// The oracle of the norm: y[i] = x[i] / √(mean(x²) + ε) · weight[i], in double precision.

/**
 * Rows over their root mean square, times a weight.
 *
 * @param rows `[rows, width]`.
 * @param weight `[width]`.
 * @param epsilon ε.
 * @returns `[rows, width]`, in new memory.
 */
export function rmsNorm(rows: Float32Array, weight: Float32Array, epsilon: number): Float32Array<ArrayBuffer> {
  const width = weight.length;
  const result = new Float32Array(rows.length);
  for (let start = 0; start < rows.length; start += width) {
    let squares = 0;
    for (let i = 0; i < width; i++) squares += rows[start + i] ** 2;
    const factor = 1 / Math.sqrt(squares / width + epsilon);
    for (let i = 0; i < width; i++) result[start + i] = rows[start + i] * factor * weight[i];
  }
  return result;
}
