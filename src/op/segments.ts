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
    }));
  }
  return Array.from({ length: batch }, (_, b) => ({
    queryStart: b * queryLength,
    queryEnd: (b + 1) * queryLength,
    keyStart: b * keyLength,
    keyEnd: (b + 1) * keyLength,
  }));
}

/**
 * One past the last key row that a query row sees: the segment's end, or the bottom-right aligned diagonal.
 * Never below `keyStart`, so that an empty range means a row that sees nothing.
 */
export function visibleKeyEnd(segment: Segment, queryRow: number, causal: boolean): number {
  if (!causal) return segment.keyEnd;
  return Math.max(segment.keyStart, segment.keyEnd - (segment.queryEnd - 1 - queryRow));
}
