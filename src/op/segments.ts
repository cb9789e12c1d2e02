// A segment is one sequence in row coordinates: batch items and packed sequences look alike from here on.
// Query rows count through [batch, queryLength], key rows through [batch, keyLength].

import type { MlaProblem } from "./mla_problem.ts";

/** One sequence: its half-open ranges of query rows and key rows. */
export interface Segment {
  /** First query row. */
  readonly queryStart: number;
  /** One past the last query row. */
  readonly queryEnd: number;
  /** First key row. */
  readonly keyStart: number;
  /** One past the last key row. */
  readonly keyEnd: number;
  /** Batch item; packed sequences are all in item 0. */
  readonly item: number;
}

/** The sequences of a problem, in order; empty ones included. */
export function segments(problem: MlaProblem): Segment[] {
  const { batch, queryLength, keyLength, cuSeqlens } = problem;
  if (cuSeqlens !== null) {
    return cuSeqlens.slice(1).map((end, i) => ({
      queryStart: cuSeqlens[i],
      queryEnd: end,
      keyStart: cuSeqlens[i],
      keyEnd: end,
      item: 0,
    }));
  }
  return Array.from({ length: batch }, (_, item) => ({
    queryStart: item * queryLength,
    queryEnd: (item + 1) * queryLength,
    keyStart: item * keyLength,
    keyEnd: (item + 1) * keyLength,
    item,
  }));
}

/** A half-open range of key rows. */
export interface KeyRange {
  /** First key row. */
  readonly start: number;
  /** One past the last key row; never below `start`. */
  readonly end: number;
}

/** How far a query sees from its own position: keys before and after it; infinite where nothing bounds it. */
export function reach({ causal, slidingWindow }: Pick<MlaProblem, "causal" | "slidingWindow">): [number, number] {
  const [left, right] = slidingWindow ?? [Infinity, Infinity];
  return [left, causal ? 0 : right];
}

/**
 * The key rows that a query row may see by the window and the causal mask. Its own position is aligned bottom-right: the
 * segment's last query stands on its last key.
 */
export function visibleKeys(
  segment: Segment,
  queryRow: number,
  options: Pick<MlaProblem, "causal" | "slidingWindow">,
): KeyRange {
  const [before, after] = reach(options);
  const position = segment.keyEnd - segment.queryEnd + queryRow;
  const start = Math.min(Math.max(segment.keyStart, position - before), segment.keyEnd);
  return { start, end: Math.max(start, Math.min(segment.keyEnd, position + after + 1)) };
}
