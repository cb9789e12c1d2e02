// The scores of one query row against the keys that it sees.
//
//   x_j = scale · ( q_nope · K_nope[j] + q_rope · bK[j] )
//   z_j = cap · tanh(x_j / cap)                                   with a soft cap, else x_j
//   s_j = z_j + bias[j],   or −∞ where the mask hides j,   else z_j
//
// Keys outside the window and past the causal diagonal are never read, nor is what the mask or a bias of −∞ hides: no
// product can carry their NaN.

import type { HostInputs, MlaProblem } from "../op/mla_problem.ts";
import { hidingBias } from "../op/score_options.ts";
import { type KeyRange, type Segment, visibleKeys } from "../op/segments.ts";
import type { MaskTensor } from "../op/tensor.ts";
import type { ExpandedHead } from "./expand.ts";

/** The scores of one head's rows over one segment. Index 0 of every array is the segment's first key. */
export interface HeadScores {
  /** q_nope and, behind it, q_rope of the row that was computed last, `[qkNopeHeadDim + qkRopeHeadDim]`. */
  readonly query: Float64Array;
  /** x of that row, `[keys]`; arbitrary where a mask hides and outside of the row's range. */
  readonly scaled: Float64Array;
  /** s of that row, `[keys]`; −∞ where a mask hides, arbitrary outside of the row's range. */
  readonly score: Float64Array;
  /** Rotary keys, `[keys, qkRopeHeadDim]`. */
  readonly keyRope: Float64Array;
  /** Computes a query row; the key rows that it may see. */
  compute(row: number): KeyRange;
  /** Where an element of the bias, or of its gradient, lies. */
  termIndex(row: number, key: number): number;
}

/**
 * Prepares the scores of one head over one segment.
 *
 * @param inputs The tensors of the call.
 * @param problem The call's dimensions.
 * @param segment The sequence.
 * @param head h, the query head.
 * @param expanded Keys and values of the head's KV head over the same segment.
 */
export function headScores(
  inputs: HostInputs,
  problem: MlaProblem,
  segment: Segment,
  head: number,
  expanded: ExpandedHead,
): HeadScores {
  const { qkNopeHeadDim: P, qkRopeHeadDim: R, softmaxScale, logitsSoftCap: cap, scoreTerm } = problem;
  const { keyNope } = expanded;
  const keyRope = keyRopeRows(inputs, problem, segment);
  const query = new Float64Array(P + R);
  const scaled = new Float64Array(segment.keyEnd - segment.keyStart);
  const score = new Float64Array(segment.keyEnd - segment.keyStart);
  const bias = scoreTerm === "bias" ? inputs.bias!.data : null;
  const mask = scoreTerm === "mask" ? (inputs.attentionMask as MaskTensor).data : null;
  const termRow = termRows(inputs, problem, segment, head);

  return {
    query,
    scaled,
    score,
    keyRope,
    termIndex: (row, key) => termRow(row) + key,
    compute(row) {
      gatherQuery(inputs, problem, row, head, query);
      const range = visibleKeys(segment, row, problem);
      const term = termRow(row);
      for (let key = range.start; key < range.end; key++) {
        const j = key - segment.keyStart;
        if (mask !== null ? mask[term + key] === 0 : bias !== null && bias[term + key] <= hidingBias) {
          score[j] = -Infinity;
          continue;
        }
        scaled[j] = softmaxScale * (dot(query, 0, keyNope, j * P, P) + dot(query, P, keyRope, j * R, R));
        const capped = cap === null ? scaled[j] : cap * Math.tanh(scaled[j] / cap);
        score[j] = bias === null ? capped : capped + bias[term + key];
      }
      return range;
    },
  };
}

/** Where the elements of a query row begin in the bias or mask, so that adding a key row gives an element's index. */
function termRows(
  inputs: HostInputs,
  { queryLength, keyLength, scoreTerm }: MlaProblem,
  { item }: Segment,
  head: number,
): (row: number) => number {
  const term = scoreTerm === "bias" ? inputs.bias : inputs.attentionMask;
  if (scoreTerm === "none" || term === undefined) return () => 0;
  const [batch, heads] = term.shape;
  const plane = (batch === 1 ? 0 : item) * heads + (heads === 1 ? 0 : head);
  return (row) => (plane * queryLength + row - item * queryLength) * keyLength - item * keyLength;
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
export function dot(
  a: Float64Array | Float32Array,
  aStart: number,
  b: Float64Array | Float32Array,
  bStart: number,
  length: number,
): number {
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
