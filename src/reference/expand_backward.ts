// Gradients of step 1: from ∂K_nope and ∂V of one KV head over one segment to the latents and the weights.
//
//   ∂c[t, l]       = Σ_p ∂K_nope[t, p] · wKc[l, g, p] + Σ_v ∂V[t, v] · wVc[l, g, v]        summed over the KV heads g
//   ∂wKc[l, g, p]  = Σ_t c[t, l] · ∂K_nope[t, p]
//   ∂wVc[l, g, v]  = Σ_t c[t, l] · ∂V[t, v]
//
// A row that nobody saw has no gradient: whatever its latents are, NaN among them, they take no part in the weights'.

import type { HostInputs, MlaProblem } from "../op/mla_problem.ts";
import type { Segment } from "../op/segments.ts";
import type { Tensor } from "../op/tensor.ts";
import type { ExpandedHead } from "./expand.ts";

/** Sums of gradients in double precision; each call adds to them. */
export interface ExpansionGradients {
  /** ∂c, `[batch, keyLength, kvLoraRank]`. */
  readonly keyValue: Float64Array;
  /** ∂wKc, `[kvLoraRank, kvHeads, qkNopeHeadDim]`. */
  readonly wKc: Float64Array;
  /** ∂wVc, `[kvLoraRank, kvHeads, vHeadDim]`. */
  readonly wVc: Float64Array;
}

/**
 * Adds the gradients of one KV head and one segment.
 *
 * @param inputs The tensors of the call.
 * @param problem The call's dimensions.
 * @param segment The sequence.
 * @param kvHead g, the KV head.
 * @param gradExpanded ∂K_nope and ∂V of the head over the segment.
 * @param gradients The sums.
 */
export function expandBackward(
  inputs: HostInputs,
  problem: MlaProblem,
  segment: Segment,
  kvHead: number,
  gradExpanded: ExpandedHead,
  gradients: ExpansionGradients,
): void {
  const L = problem.kvLoraRank;
  const latents = inputs.keyValue.data;
  const add = (weight: Tensor, gradWeight: Float64Array, gradRows: Float64Array) => {
    const [, heads, width] = weight.shape;
    for (let t = 0; t < segment.keyEnd - segment.keyStart; t++) {
      const latent = (segment.keyStart + t) * L;
      const row = gradRows.subarray(t * width, (t + 1) * width);
      if (row.every((gradient) => gradient === 0)) continue;
      for (let l = 0; l < L; l++) {
        const start = (l * heads + kvHead) * width;
        const c = latents[latent + l];
        let sum = 0;
        for (let p = 0; p < width; p++) {
          sum += row[p] * weight.data[start + p];
          gradWeight[start + p] += c * row[p];
        }
        gradients.keyValue[latent + l] += sum;
      }
    }
  };
  add(inputs.wKc, gradients.wKc, gradExpanded.keyNope);
  add(inputs.wVc, gradients.wVc, gradExpanded.value);
}
