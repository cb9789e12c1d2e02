// Which of two equal ways of computing attention takes fewer multiplications.

import type { DecodeProblem } from "./decode_problem.ts";
import { visibleKeys } from "./segments.ts";

/** `absorbed` works on latents alone; `expanded` rebuilds keys and values first. */
export type Formulation = "absorbed" | "expanded";

/** The widths that it depends on. */
type Widths = Pick<DecodeProblem, "queryHeads" | "kvHeads" | "kvLoraRank" | "qkRopeHeadDim" | "vHeadDim"> & {
  readonly qkNopeHeadDim: number;
};

/** Pairs of a query and a key that it sees, of one head of one sequence. */
export function visiblePairs(
  queries: number,
  keys: number,
  options: Pick<DecodeProblem, "causal" | "slidingWindow">,
): number {
  const segment = { queryStart: 0, queryEnd: queries, keyStart: 0, keyEnd: keys, item: 0 };
  let pairs = 0;
  for (let row = 0; row < queries; row++) {
    const { start, end } = visibleKeys(segment, row, options);
    pairs += end - start;
  }
  return pairs;
}

/**
 * FLOPs of one sequence.
 *
 * ```text
 * absorbed   2 · queries · H · L · (P + V) + 2 · pairs · H · (2L + R)
 * expanded   2 · keys · Hkv · L · (P + V)  + 2 · pairs · H · (P + R + V)
 * ```
 */
export function flopsOf(
  formulation: Formulation,
  widths: Widths,
  queries: number,
  keys: number,
  pairs: number,
): number {
  const { queryHeads: H, kvHeads, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = widths;
  const weights = 2 * L * (P + V);
  return formulation === "absorbed"
    ? queries * H * weights + 2 * pairs * H * (2 * L + R)
    : keys * kvHeads * weights + 2 * pairs * H * (P + R + V);
}

/** The one that takes fewer. */
export function fewerFlops(widths: Widths, queries: number, keys: number, pairs: number): Formulation {
  const of = (formulation: Formulation) => flopsOf(formulation, widths, queries, keys, pairs);
  return of("expanded") < of("absorbed") ? "expanded" : "absorbed";
}
