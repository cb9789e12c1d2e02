// Which query rows each workgroup of the attention kernel owns, and which keys they see. Batch items, packed sequences,
// causal alignment and splits by row all end here: the kernel knows only blocks.

import type { MlaProblem } from "../op/mla_problem.ts";
import { segments, visibleKeyEnd } from "../op/segments.ts";

/** Words of one block in the schedule buffer; the WGSL struct `Block`. */
export const blockWords = 8;

/** A diagonal past every key, for problems without a causal mask; adding a row to it stays within an i32. */
const noDiagonal = 2 ** 30;

/** A half-open range of query rows. */
export interface RowRange {
  /** First row. */
  readonly start: number;
  /** One past the last row. */
  readonly end: number;
}

/**
 * Cuts query rows into blocks that stay within one sequence.
 *
 * @param problem The problem.
 * @param blockQ Rows of one block at most.
 * @param rows The query rows to cover; the blocks count rows from its start.
 * @returns The schedule buffer's words, blocks with the most keys first, so that no long one starts last.
 */
export function schedule(problem: MlaProblem, blockQ: number, rows: RowRange): Uint32Array<ArrayBuffer> {
  const blocks: { readonly keys: number; readonly words: readonly number[] }[] = [];
  // Packed sequences are all in batch item 0.
  const itemOf = (row: number) => problem.cuSeqlens === null ? Math.floor(row / problem.queryLength) : 0;
  for (const segment of segments(problem)) {
    const end = Math.min(segment.queryEnd, rows.end);
    // Blocks are cut backwards, so that under a causal mask the partial block is the cheap one at the start.
    for (let blockEnd = end; blockEnd > Math.max(segment.queryStart, rows.start); blockEnd -= blockQ) {
      const blockStart = Math.max(blockEnd - blockQ, segment.queryStart, rows.start);
      const keyEnd = visibleKeyEnd(segment, blockEnd - 1, problem.causal);
      const sharedEnd = visibleKeyEnd(segment, blockStart, problem.causal);
      const diagonal = problem.causal ? segment.keyEnd - segment.queryEnd + 1 + rows.start : noDiagonal;
      blocks.push({
        keys: keyEnd - segment.keyStart,
        words: [
          blockStart - rows.start,
          blockEnd - rows.start,
          segment.keyStart,
          keyEnd,
          sharedEnd,
          diagonal >>> 0,
          itemOf(blockStart),
          itemOf(blockStart) - itemOf(rows.start),
        ],
      });
    }
  }
  blocks.sort((a, b) => b.keys - a.keys);
  return Uint32Array.from(blocks.flatMap((block) => block.words));
}
