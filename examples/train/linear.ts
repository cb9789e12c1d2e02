import type { Layer, Weight } from "./layer.ts";
import { multiply } from "./matrix.ts";

/**
 * `y = x · w`.
 *
 * @param x `[rows, inputs]`.
 * @param w `[inputs, outputs]`.
 * @param outputs The width of a row of the output.
 */
export function linear(x: Float32Array, w: Weight, outputs: number): Layer {
  const inputs = w.value.length / outputs;
  const rows = x.length / inputs;
  return {
    output: multiply(x, w.value, { rows, depth: inputs, columns: outputs }),
    backward(gradOutput) {
      multiply(x, gradOutput, { rows: inputs, depth: rows, columns: outputs }, { a: true }, w.grad);
      return multiply(gradOutput, w.value, { rows, depth: outputs, columns: inputs }, { b: true });
    },
  };
}
