// Step 1: latents → keys and values of one KV head over one segment.
//
//   K_nope[t, p] = Σ_l c[t, l] · wKc[l, g, p]          c = keyValue, g = KV head
//   V[t, v]      = Σ_l c[t, l] · wVc[l, g, v]
//
// A key row depends on its own latent row alone, so a NaN in a row that nobody sees stays in that row.

import type { HostInputs, MlaProblem } from "../op/mla_problem.ts";
import type { Segment } from "../op/segments.ts";
import type { Tensor } from "../op/tensor.ts";

/** Keys and values of one KV head over one segment; row 0 is the segment's first key. */
export interface ExpandedHead {
  /** K_nope, `[keys, qkNopeHeadDim]`. */
  readonly keyNope: Float64Array;
  /** V, `[keys, vHeadDim]`. */
  readonly value: Float64Array;
}

/**
 * Rebuilds one KV head's keys and values from the latent rows of one segment.
 *
 * @param inputs The tensors of the call.
 * @param problem The call's dimensions.
 * @param segment The sequence whose key rows are expanded.
 * @param kvHead g, the KV head.
 * @returns K_nope and V, accumulated in double precision.
 */
export function expand(inputs: HostInputs, problem: MlaProblem, segment: Segment, kvHead: number): ExpandedHead {
  const L = problem.kvLoraRank;
  const latents = inputs.keyValue.data.subarray(segment.keyStart * L, segment.keyEnd * L);
  return {
    keyNope: multiply(latents, headWeight(inputs.wKc, kvHead), L, problem.qkNopeHeadDim),
    value: multiply(latents, headWeight(inputs.wVc, kvHead), L, problem.vHeadDim),
  };
}

/** One head of a `[rank, heads, width]` weight as a dense `[rank, width]` matrix. */
function headWeight(weight: Tensor, head: number): Float32Array {
  const [rank, heads, width] = weight.shape;
  const gathered = new Float32Array(rank * width);
  for (let l = 0; l < rank; l++) {
    const start = (l * heads + head) * width;
    gathered.set(weight.data.subarray(start, start + width), l * width);
  }
  return gathered;
}

/**
 * `rows [n, L] · weight [L, width]`, by whole weight rows, so that the inner loop is contiguous. Four weight rows at a time
 * read and write the sums a quarter as often: 19 ms instead of 31 ms in V8 for n 512, L 512, width 128.
 */
function multiply(rows: Float32Array, weight: Float32Array, L: number, width: number): Float64Array {
  const product = new Float64Array((rows.length / L) * width);
  for (let c = 0, t = 0; c < rows.length; c += L, t += width) {
    let l = 0;
    for (; l + 3 < L; l += 4) {
      const c0 = rows[c + l], c1 = rows[c + l + 1], c2 = rows[c + l + 2], c3 = rows[c + l + 3];
      const w0 = l * width, w1 = w0 + width, w2 = w1 + width, w3 = w2 + width;
      for (let p = 0; p < width; p++) {
        product[t + p] += c0 * weight[w0 + p] + c1 * weight[w1 + p] + (c2 * weight[w2 + p] + c3 * weight[w3 + p]);
      }
    }
    for (; l < L; l++) {
      for (let p = 0; p < width; p++) product[t + p] += rows[c + l] * weight[l * width + p];
    }
  }
  return product;
}
