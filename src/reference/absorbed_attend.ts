// Attention of one head's absorbed query over latent rows.
//
//   s_j = cap( scale · ( q_c · c[j] + q_r · k_r[j] ) )          c[j] and k_r[j] lie in one row of the cache
//   o   = Σ_j exp(s_j − m) · c[j] / ( Σ_j exp(s_j − m) + Σ_n exp(aux_n − m) )
//
// Rows that are not seen are never read.

import type { DecodeProblem } from "../op/decode_problem.ts";
import type { KeyRange } from "../op/segments.ts";
import { largest } from "./attend.ts";
import { dot } from "./scores.ts";

/** A sequence's rows: where each key's begins. */
export interface CachedRows {
  /** The cache. */
  readonly data: Float32Array;
  /** Index of the first element of a key's row. */
  at(key: number): number;
}

/**
 * Attends with one query.
 *
 * @param query q_c and, behind it, q_r, `[L + R]`.
 * @param rows The sequence's rows.
 * @param range The keys that the query sees.
 * @param problem The call's dimensions.
 * @param sinks The head's sink logits.
 * @param into Takes o, `[L]`; zeros where the query sees no key.
 * @returns The log-sum-exp; −∞ where the query sees no key.
 */
export function absorbedAttend(
  query: Float64Array,
  rows: CachedRows,
  { start: first, end: last }: KeyRange,
  { kvLoraRank: L, qkRopeHeadDim: R, softmaxScale, logitsSoftCap: cap }: DecodeProblem,
  sinks: Float32Array,
  into: Float64Array,
): number {
  into.fill(0);
  if (first >= last) return -Infinity;
  const scores = new Float64Array(last - first);
  for (let key = first; key < last; key++) {
    const scaled = softmaxScale * dot(query, 0, rows.data, rows.at(key), L + R);
    scores[key - first] = cap === null ? scaled : cap * Math.tanh(scaled / cap);
  }
  const max = sinks.reduce((most, sink) => Math.max(most, sink), largest(scores, 0, scores.length));
  let sum = 0;
  for (let key = first; key < last; key++) {
    const weight = Math.exp(scores[key - first] - max);
    sum += weight;
    const at = rows.at(key);
    for (let l = 0; l < L; l++) into[l] += weight * rows.data[at + l];
  }
  for (const sink of sinks) sum += Math.exp(sink - max);
  for (let l = 0; l < L; l++) into[l] /= sum;
  return max + Math.log(sum);
}
