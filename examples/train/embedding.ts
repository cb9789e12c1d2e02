// One table turns tokens into vectors and, transposed, vectors into logits.

import type { Layer, Weight } from "./layer.ts";
import { multiply } from "./matrix.ts";

/** The rows of the table for some tokens, `[tokens, width]`. */
export function embed(tokens: Uint8Array, table: Weight, width: number): Float32Array {
  const output = new Float32Array(tokens.length * width);
  tokens.forEach((token, i) => output.set(table.value.subarray(token * width, (token + 1) * width), i * width));
  return output;
}

/** Adds ∂output to the gradient of the table, after {@link unembed} has written it. */
export function embedBackward(tokens: Uint8Array, table: Weight, gradOutput: Float32Array): void {
  const width = gradOutput.length / tokens.length;
  for (let i = 0; i < tokens.length; i++) {
    const row = tokens[i] * width;
    for (let j = 0; j < width; j++) table.grad[row + j] += gradOutput[i * width + j];
  }
}

/** `logits = x · tableᵀ`, `[rows, kinds]`. */
export function unembed(x: Float32Array, table: Weight, width: number): Layer {
  const rows = x.length / width;
  const kinds = table.value.length / width;
  return {
    output: multiply(x, table.value, { rows, depth: width, columns: kinds }, { b: true }),
    backward(gradLogits) {
      multiply(gradLogits, x, { rows: kinds, depth: rows, columns: width }, { a: true }, table.grad);
      return multiply(gradLogits, table.value, { rows, depth: kinds, columns: width });
    },
  };
}
