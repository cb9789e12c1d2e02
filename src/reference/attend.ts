// Step 2: attention of one query head over the expanded keys and values of one segment.
//
//   s_j = scale · ( q_nope · K_nope[j] + q_rope · bK[j] )
//   out = Σ_j exp(s_j − m) · V[j] / Σ_j exp(s_j − m)                m = max_j s_j
//
// Streaming softmax: keys pass once, with the running maximum m, the sum and the accumulator relative to it; when m grows,
// both are scaled by exp(m_old − m_new). Keys that a row must not see are never read: no product can carry their NaN.

import type { HostInputs, MlaProblem } from "../op/mla_problem.ts";
import { type Segment, visibleKeyEnd } from "../op/segments.ts";
import type { ExpandedHead } from "./expand.ts";

// Below every finite score; finite like the kernels' sentinel, so that exp(score − m) is 0 and not NaN for a score of −∞.
const LOWEST = -Number.MAX_VALUE;

/**
 * Attends with the query rows of one head and one segment.
 *
 * @param inputs The tensors of the call.
 * @param problem The call's dimensions.
 * @param segment The sequence whose query rows attend.
 * @param queryHead h, the query head.
 * @param expanded Keys and values of the head's KV head over the same segment.
 * @param output The whole result, `[batch, queryLength, queryHeads, vHeadDim]`; the rows of this head and segment are
 * written, a row that sees no key becomes zero.
 */
export function attend(
  inputs: HostInputs,
  problem: MlaProblem,
  segment: Segment,
  queryHead: number,
  expanded: ExpandedHead,
  output: Float32Array,
): void {
  const { queryHeads: H, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V, softmaxScale, causal } = problem;
  const { keyNope, value } = expanded;
  const keyRope = keyRopeRows(inputs, problem, segment);
  const query = new Float64Array(P + R);
  const accumulator = new Float64Array(V);

  for (let i = segment.queryStart; i < segment.queryEnd; i++) {
    gatherQuery(inputs, problem, i, queryHead, query);
    const keys = visibleKeyEnd(segment, i, causal) - segment.keyStart;
    let max = LOWEST;
    let sum = 0;
    accumulator.fill(0);

    for (let j = 0; j < keys; j++) {
      const score = softmaxScale * (dot(query, 0, keyNope, j * P, P) + dot(query, P, keyRope, j * R, R));
      if (score > max) {
        const shrink = Math.exp(max - score);
        sum *= shrink;
        for (let v = 0; v < V; v++) accumulator[v] *= shrink;
        max = score;
      }
      const weight = Math.exp(score - max);
      sum += weight;
      for (let v = 0, at = j * V; v < V; v++) accumulator[v] += weight * value[at + v];
    }

    const row = (i * H + queryHead) * V;
    // A row without a visible key has sum 0. A NaN sum is not 0: it must reach the output.
    for (let v = 0; v < V; v++) output[row + v] = sum === 0 ? 0 : accumulator[v] / sum;
  }
}

/** Copies q_nope and, behind it, q_rope of one query row into `query`, wherever the rotary part comes from. */
function gatherQuery(inputs: HostInputs, problem: MlaProblem, row: number, head: number, query: Float64Array): void {
  const { queryHeads: H, qkNopeHeadDim: P, qkRopeHeadDim: R, rope } = problem;
  const width = rope === "in_query" ? P + R : P;
  const start = (row * H + head) * width;
  query.set(inputs.query.data.subarray(start, start + width));
  if (rope === "shared") query.set(inputs.bQ!.data.subarray(row * R, (row + 1) * R), P);
}

/** The rotary key rows of a segment, `[keys, R]`, shared by all heads; empty without a rotary part. */
function keyRopeRows(inputs: HostInputs, problem: MlaProblem, segment: Segment): Float64Array {
  const R = problem.qkRopeHeadDim;
  if (R === 0) return new Float64Array(0);
  return new Float64Array(inputs.bK!.data.subarray(segment.keyStart * R, segment.keyEnd * R));
}

/** `a[aStart…] · b[bStart…]` over `length` elements. Four sums, since one alone waits for each addition to finish. */
function dot(a: Float64Array, aStart: number, b: Float64Array, bStart: number, length: number): number {
  let sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
  let i = 0;
  for (; i + 3 < length; i += 4) {
    sum0 += a[aStart + i] * b[bStart + i];
    sum1 += a[aStart + i + 1] * b[bStart + i + 1];
    sum2 += a[aStart + i + 2] * b[bStart + i + 2];
    sum3 += a[aStart + i + 3] * b[bStart + i + 3];
  }
  for (; i < length; i++) sum0 += a[aStart + i] * b[bStart + i];
  return sum0 + sum1 + (sum2 + sum3);
}
