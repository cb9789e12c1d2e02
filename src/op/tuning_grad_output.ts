// The gradient of the output that configurations are compared with when they are measured.

import { type MlaProblem, outputShape } from "./mla_problem.ts";
import { elementCount, type Tensor } from "./tensor.ts";

/**
 * A gradient of the output that looks random and is the same everywhere and every time: multiples of 1/512 from −1 up to
 * but not including 1, which float32 and half precision hold exactly.
 *
 * @param problem The problem.
 * @returns The gradient, `[batch, queryLength, queryHeads, vHeadDim]`.
 */
export function tuningGradOutput(problem: MlaProblem): Tensor {
  const shape = outputShape(problem);
  const data = new Float32Array(elementCount(shape));
  for (let i = 0; i < data.length; i++) data[i] = (scrambled(i) >>> 22) / 512 - 1;
  return { data, shape };
}

/** The finalizer of MurmurHash3: neighbouring numbers become unlike ones. 5 ns each, where Threefry takes 90. */
function scrambled(index: number): number {
  let bits = Math.imul(index + 1, 0x9e3779b9);
  bits = Math.imul(bits ^ (bits >>> 16), 0x85ebca6b);
  bits = Math.imul(bits ^ (bits >>> 13), 0xc2b2ae35);
  return bits ^ (bits >>> 16);
}
