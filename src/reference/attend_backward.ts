// Gradients of step 2: from ∂out to ∂query, ∂K_nope, ∂bK, ∂V, ∂bias and the sinks, of one query head over one segment.
//
//   ∂V[j]  = Σ_i p_ij · d_ij · ∂out_i
//   ∂p_ij  = d_ij · ∂out_i · V[j]                   d = dropout's factor
//   D_i    = Σ_j p_ij · ∂p_ij                       = ∂out_i · out_i
//   ∂s_ij  = p_ij · (∂p_ij − D_i)                   = ∂bias_ij
//   ∂x_ij  = ∂s_ij · (1 − (z_ij / cap)²)            z: capped score; without a cap ∂x = ∂s
//   ∂q_i   = scale · Σ_j ∂x_ij · k_j                k_j = K_nope[j] and bK[j]
//   ∂k_j   = scale · Σ_i ∂x_ij · q_i
//   ∂aux_n = −Σ_i exp(aux_n − lse_i) · D_i
//
// Pairs that the row does not see take no part, whatever stands in them.

import { dropoutFactors } from "../op/dropout.ts";
import type { HostInputs, MlaProblem } from "../op/mla_problem.ts";
import type { Segment } from "../op/segments.ts";
import { keyOrigin, largest } from "./attend.ts";
import { headSinks } from "./sinks.ts";
import type { ExpandedHead } from "./expand.ts";
import { dot, headScores } from "./scores.ts";

/** Sums of gradients in double precision; each call adds to them. Absent: not wanted. */
export interface AttentionGradients {
  /** ∂query as it is stored. */
  readonly query: Float64Array;
  /** ∂bQ, `[batch, queryLength, qkRopeHeadDim]`. */
  readonly bQ?: Float64Array;
  /** ∂bK, `[batch, keyLength, qkRopeHeadDim]`. */
  readonly bK?: Float64Array;
  /** ∂bias, of the bias's shape. */
  readonly bias?: Float64Array;
  /** ∂softmaxAux, `[queryHeads or 1, sinks]`. */
  readonly softmaxAux?: Float64Array;
}

/**
 * Adds the gradients of one head and one segment.
 *
 * @param inputs The tensors of the call.
 * @param problem The call's dimensions.
 * @param segment The sequence.
 * @param head h, the query head.
 * @param expanded Keys and values of the head's KV head over the segment.
 * @param gradOutput ∂out, `[batch, queryLength, queryHeads, vHeadDim]`.
 * @param gradExpanded Sums of ∂K_nope and ∂V of the KV head over the segment.
 * @param gradients The other sums.
 */
export function attendBackward(
  inputs: HostInputs,
  problem: MlaProblem,
  segment: Segment,
  head: number,
  expanded: ExpandedHead,
  gradOutput: Float32Array,
  gradExpanded: ExpandedHead,
  gradients: AttentionGradients,
): void {
  const { queryHeads: H, queryLength, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = problem;
  const { softmaxScale, logitsSoftCap: cap, dropout, rope } = problem;
  const { keyNope, value } = expanded;
  const { query, scaled, score, keyRope, compute, termIndex } = headScores(inputs, problem, segment, head, expanded);
  const sinks = headSinks(inputs.softmaxAux, problem.queryHeads, head);
  const factor = dropout && dropoutFactors(dropout, segment.item, head);
  const queryWidth = rope === "in_query" ? P + R : P;
  const keys = segment.keyEnd - segment.keyStart;
  const probability = new Float64Array(keys);
  const gradProbability = new Float64Array(keys);
  const kept = new Float64Array(keys);
  const sinkRow = sinks.length === 0 || gradients.softmaxAux!.length === sinks.length ? 0 : head * sinks.length;

  for (let i = segment.queryStart; i < segment.queryEnd; i++) {
    const range = compute(i);
    const [first, last] = [range.start - segment.keyStart, range.end - segment.keyStart];
    const position = i - segment.item * queryLength;
    const seen = largest(score, first, last);
    if (seen === -Infinity) continue;
    const max = sinks.reduce((most, sink) => Math.max(most, sink), seen);
    let sum = 0;
    for (let j = first; j < last; j++) sum += probability[j] = Math.exp(score[j] - max);
    for (const sink of sinks) sum += Math.exp(sink - max);

    const gradRow = (i * H + head) * V;
    let delta = 0;
    for (let j = first; j < last; j++) {
      if (score[j] === -Infinity) continue;
      probability[j] /= sum;
      kept[j] = factor === null ? 1 : factor(position, j + segment.keyStart - keyOrigin(problem, segment));
      gradProbability[j] = kept[j] === 0 ? 0 : kept[j] * dot(gradOutput, gradRow, value, j * V, V);
      delta += probability[j] * gradProbability[j];
    }
    sinks.forEach((sink, n) => gradients.softmaxAux![sinkRow + n] -= Math.exp(sink - max) / sum * delta);

    const nope = (i * H + head) * queryWidth;
    const [gradRope, ropeRow] = rope === "shared" ? [gradients.bQ!, i * R] : [gradients.query, nope + P];
    for (let j = first; j < last; j++) {
      if (score[j] === -Infinity) continue;
      const gradScore = probability[j] * (gradProbability[j] - delta);
      if (gradients.bias !== undefined) gradients.bias[termIndex(i, j + segment.keyStart)] += gradScore;
      const weight = probability[j] * kept[j];
      for (let v = 0; v < V; v++) gradExpanded.value[j * V + v] += weight * gradOutput[gradRow + v];
      let gradDot = softmaxScale * gradScore;
      if (cap !== null) gradDot *= 1 - Math.tanh(scaled[j] / cap) ** 2;
      for (let p = 0; p < P; p++) {
        gradients.query[nope + p] += gradDot * keyNope[j * P + p];
        gradExpanded.keyNope[j * P + p] += gradDot * query[p];
      }
      const keyRow = (j + segment.keyStart) * R;
      for (let r = 0; r < R; r++) {
        gradRope[ropeRow + r] += gradDot * keyRope[j * R + r];
        gradients.bK![keyRow + r] += gradDot * query[P + r];
      }
    }
  }
}
