// The gradients' oracle: explicit formulas in plain TypeScript, in double precision from the inputs alone.
// Memory beyond the inputs and gradients is that of one KV head of one segment, and one row of scores.

import type { HostGradients } from "../op/mla_gradients.ts";
import { type HostInputs, mapTensors, type MlaProblem, type TensorName } from "../op/mla_problem.ts";
import { segments } from "../op/segments.ts";
import { elementCount, type Tensor } from "../op/tensor.ts";
import { attendBackward } from "./attend_backward.ts";
import { expand } from "./expand.ts";
import { expandBackward } from "./expand_backward.ts";

export type { HostGradients };

/**
 * The gradients of Σ output · gradOutput.
 *
 * @param inputs The tensors of the call.
 * @param problem The dimensions that `mlaProblem` made from these inputs.
 * @param gradOutput ∂output, `[batch, queryLength, queryHeads, vHeadDim]`.
 * @returns One tensor for each tensor of numbers among the inputs, of its shape.
 */
export function referenceMlaAttentionBackward(
  inputs: HostInputs,
  problem: MlaProblem,
  gradOutput: Tensor,
): HostGradients {
  const sums = {} as Record<TensorName, Float64Array>;
  mapTensors(inputs, (tensor, name) => {
    sums[name] = new Float64Array(elementCount(tensor.shape));
    return tensor;
  });
  const { qkNopeHeadDim, vHeadDim, kvHeads, queryHeads } = problem;
  const headsPerKvHead = queryHeads / kvHeads;

  for (const segment of segments(problem)) {
    const keys = segment.keyEnd - segment.keyStart;
    if (segment.queryStart === segment.queryEnd || keys === 0) continue;
    for (let g = 0; g < kvHeads; g++) {
      const expanded = expand(inputs, problem, segment, g);
      const gradExpanded = {
        keyNope: new Float64Array(keys * qkNopeHeadDim),
        value: new Float64Array(keys * vHeadDim),
      };
      for (let h = g * headsPerKvHead; h < (g + 1) * headsPerKvHead; h++) {
        attendBackward(inputs, problem, segment, h, expanded, gradOutput.data, gradExpanded, sums);
      }
      expandBackward(inputs, problem, segment, g, gradExpanded, sums);
    }
  }
  const gradients: Partial<Record<TensorName, Tensor>> = {};
  mapTensors(inputs, (tensor, name) => {
    gradients[name] = { data: Float32Array.from(sums[name]), shape: [...tensor.shape] };
    return tensor;
  });
  return gradients as HostGradients;
}
