// The oracle of a linear layer, as checkpoints keep it: y[row, o] = Σ_i x[row, i] · W[o, i] + b[o], in double precision. The
// kernels that answer to it are expand.ts, matrix_expand.ts and linear_rows.ts.

/**
 * Rows times a weight, plus its bias.
 *
 * @param rows `[rows, inputs]`.
 * @param weight `[outputs, inputs]`.
 * @param inputs Columns of a row.
 * @param bias `[outputs]`; none when absent.
 * @returns `[rows, outputs]`.
 */
export function linear(
  rows: Float32Array,
  weight: Float32Array,
  inputs: number,
  bias?: Float32Array,
): Float32Array<ArrayBuffer> {
  const outputs = weight.length / inputs;
  const count = rows.length / inputs;
  const result = new Float32Array(count * outputs);
  for (let row = 0; row < count; row++) {
    for (let o = 0; o < outputs; o++) {
      let sum = bias === undefined ? 0 : bias[o];
      for (let i = 0; i < inputs; i++) sum += rows[row * inputs + i] * weight[o * inputs + i];
      result[row * outputs + o] = sum;
    }
  }
  return result;
}
