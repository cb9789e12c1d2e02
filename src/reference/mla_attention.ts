// The oracle: the operation as the formulas state it, in plain TypeScript, accumulated in double precision.
// One KV head of one segment is expanded at a time, so memory beyond the inputs is O(keyLength · (P + V)).

import { type HostInputs, type MlaProblem, outputShape } from "../op/mla_problem.ts";
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
  const shape = outputShape(problem);
  const data = new Float32Array(elementCount(shape));
  const headsPerKvHead = problem.queryHeads / problem.kvHeads;

  for (const segment of segments(problem)) {
    if (segment.queryStart === segment.queryEnd) continue;
    for (let g = 0; g < problem.kvHeads; g++) {
      const expanded = expand(inputs, problem, segment, g);
      for (let h = g * headsPerKvHead; h < (g + 1) * headsPerKvHead; h++) {
        attend(inputs, problem, segment, h, expanded, data);
      }
    }
  }
  return { data, shape };
}
