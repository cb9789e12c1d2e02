// The oracle: the operation as the formulas state it, in plain TypeScript, accumulated in double precision.
// One KV head of one segment is expanded at a time, so memory beyond the inputs is O(keyLength · (P + V)).

import { type HostInputs, lseShape, type MlaProblem, outputShape } from "../op/mla_problem.ts";
import { segments } from "../op/segments.ts";
import { elementCount, type Tensor } from "../op/tensor.ts";
import { attend } from "./attend.ts";
import { expand } from "./expand.ts";

/**
 * Multi-head Latent Attention on the processor that runs the script: slow, and right to the last bits of float32.
 *
 * @param inputs The tensors of the call.
 * @param problem The dimensions that `mlaProblem` made from these inputs.
 * @returns The attended values, `[batch, queryLength, queryHeads, vHeadDim]`; a query that sees no key has a zero row.
 */
export function referenceMlaAttention(inputs: HostInputs, problem: MlaProblem): Tensor {
  return referenceMlaAttentionWithLse(inputs, problem).output;
}

/**
 * The same with the log-sum-exp of each row.
 *
 * @param inputs The tensors of the call.
 * @param problem The dimensions that `mlaProblem` made from these inputs.
 * @returns The output, and the natural logarithm of each softmax's denominator, `[batch, queryHeads, queryLength]`.
 */
export function referenceMlaAttentionWithLse(
  inputs: HostInputs,
  problem: MlaProblem,
): { readonly output: Tensor; readonly lse: Tensor } {
  const shapes = { output: outputShape(problem), lse: lseShape(problem) };
  const into = {
    output: new Float32Array(elementCount(shapes.output)),
    lse: new Float32Array(elementCount(shapes.lse)),
  };
  const headsPerKvHead = problem.queryHeads / problem.kvHeads;

  for (const segment of segments(problem)) {
    if (segment.queryStart === segment.queryEnd) continue;
    for (let g = 0; g < problem.kvHeads; g++) {
      const expanded = expand(inputs, problem, segment, g);
      for (let h = g * headsPerKvHead; h < (g + 1) * headsPerKvHead; h++) {
        attend(inputs, problem, segment, h, expanded, into);
      }
    }
  }
  return { output: { data: into.output, shape: shapes.output }, lse: { data: into.lse, shape: shapes.lse } };
}
