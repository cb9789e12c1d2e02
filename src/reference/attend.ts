// Step 2: attention of one query head over the expanded keys and values of one segment.
//
//   p_j = exp(s_j − m) / ( Σ_k exp(s_k − m) + Σ_n exp(aux_n − m) )       m = max over s and the sinks aux
//   out = Σ_j p_j · d_j · V[j]                                          d_j = dropout's factor, 1 without
//   lse = log of the denominator, m included; −∞ for a row that sees no key

import { dropoutFactors } from "../op/dropout.ts";
import type { HostInputs, MlaProblem } from "../op/mla_problem.ts";
import type { Segment } from "../op/segments.ts";
import type { ExpandedHead } from "./expand.ts";
import { headScores } from "./scores.ts";
import { headSinks } from "./sinks.ts";

/** What attention gives, for all heads and rows. */
export interface AttentionRows {
  /** The whole result, `[batch, queryLength, queryHeads, vHeadDim]`. */
  readonly output: Float32Array | Float64Array;
  /** The log-sum-exp, `[batch, queryHeads, queryLength]`. */
  readonly lse: Float32Array | Float64Array;
}

/**
 * Attends with the query rows of one head and one segment.
 *
 * @param inputs The tensors of the call.
 * @param problem The call's dimensions.
 * @param segment The sequence whose query rows attend.
 * @param head h, the query head.
 * @param expanded Keys and values of the head's KV head over the same segment.
 * @param into Where the rows of this head and segment are written; a row that sees no key becomes zero.
 */
export function attend(
  inputs: HostInputs,
  problem: MlaProblem,
  segment: Segment,
  head: number,
  expanded: ExpandedHead,
  into: AttentionRows,
): void {
  const { queryHeads: H, queryLength, vHeadDim: V, dropout } = problem;
  const { value } = expanded;
  const { score, compute } = headScores(inputs, problem, segment, head, expanded);
  const sinks = headSinks(inputs.softmaxAux, problem.queryHeads, head);
  const factor = dropout && dropoutFactors(dropout, segment.item, head);
  const accumulator = new Float64Array(V);

  for (let i = segment.queryStart; i < segment.queryEnd; i++) {
    const range = compute(i);
    const [first, last] = [range.start - segment.keyStart, range.end - segment.keyStart];
    const position = i - segment.item * queryLength;
    const seen = largest(score, first, last);
    const max = sinks.reduce((most, sink) => Math.max(most, sink), seen);
    let sum = 0;
    accumulator.fill(0);
    // A row whose keys are all hidden by minus infinity sees none.
    for (let j = first; j < last && seen !== -Infinity; j++) {
      if (score[j] === -Infinity) continue;
      const weight = Math.exp(score[j] - max);
      sum += weight;
      const kept = factor === null
        ? weight
        : weight * factor(position, j + segment.keyStart - keyOrigin(problem, segment));
      if (kept === 0) continue;
      for (let v = 0, at = j * V; v < V; v++) accumulator[v] += kept * value[at + v];
    }
    for (const sink of sinks) sum += Math.exp(sink - max);

    const row = (i * H + head) * V;
    for (let v = 0; v < V; v++) into.output[row + v] = seen === -Infinity ? 0 : accumulator[v] / sum;
    into.lse[(segment.item * H + head) * queryLength + position] = seen === -Infinity ? seen : max + Math.log(sum);
  }
}

/** The largest of some scores, NaN if any is NaN; −∞ where a row sees no key. */
export function largest(score: Float64Array, first: number, last: number): number {
  let seen = -Infinity;
  for (let j = first; j < last; j++) seen = score[j] > seen || score[j] !== score[j] ? score[j] : seen;
  return seen;
}

/** The key row that a segment's batch item begins with. */
export function keyOrigin({ keyLength }: MlaProblem, { item }: Segment): number {
  return item * keyLength;
}
