// Which rows each workgroup of an attention kernel owns, and which columns they meet. Batch items, packed sequences, causal
// alignment, windows and splits by row all end here: the kernels know only blocks. Forward and towards the queries, rows are
// queries and columns keys; backward towards the keys, rows are keys and columns queries.

import type { MlaProblem } from "../op/mla_problem.ts";
import { reach, type Segment, segments } from "../op/segments.ts";

/** Words of one block in the schedule buffer; the WGSL struct `Block`. */
export const blockWords = 10;

/** A diagonal past every row, for sides that nothing bounds; adding a row to it stays within an i32. */
const noDiagonal = 2 ** 30;

/** A half-open range of rows. */
export interface RowRange {
  /** First row. */
  readonly start: number;
  /** One past the last row. */
  readonly end: number;
}

/** Which side's rows the workgroups own. */
export type BlockOwner = "queries" | "keys";

/** One side of a segment. */
interface Side {
  readonly start: number;
  readonly end: number;
}

/**
 * Cuts rows into blocks that stay within one sequence.
 *
 * @param problem The problem.
 * @param blockRows Rows of one block at most.
 * @param queries The query rows of the dispatch; blocks count query rows from its start.
 * @param owner The side that is cut into blocks; the other one's rows are the columns.
 * @returns The schedule buffer's words, blocks with the most columns first, so that no long one starts last. Blocks of
 * queries that see nothing are there, since their rows must be written; blocks of keys that nobody sees are, too.
 */
export function schedule(
  problem: MlaProblem,
  blockRows: number,
  queries: RowRange,
  owner: BlockOwner = "queries",
): Uint32Array<ArrayBuffer> {
  const blocks: { readonly columns: number; readonly words: readonly number[] }[] = [];
  const [before, after] = reach(problem);
  // Packed sequences are all in batch item 0.
  const rangeItem = problem.cuSeqlens === null ? Math.floor(queries.start / problem.queryLength) : 0;
  for (const segment of segments(problem)) {
    const inRange = {
      start: Math.max(segment.queryStart, queries.start),
      end: Math.min(segment.queryEnd, queries.end),
    };
    if (inRange.start >= inRange.end) continue;
    // Query row i stands on key row i + aligned. Rows and columns as the kernel counts them: queries from the range's start.
    const aligned = segment.keyEnd - segment.queryEnd + queries.start;
    const querySide = { start: inRange.start - queries.start, end: inRange.end - queries.start };
    const keySide = { start: segment.keyStart, end: segment.keyEnd };
    const [rows, columns] = owner === "queries" ? [querySide, keySide] : [keySide, querySide];
    // A row sees columns from row + first to row + last, both included.
    const first = owner === "queries" ? aligned - before : -aligned - after;
    const last = owner === "queries" ? aligned + after : -aligned + before;
    // Blocks are cut backwards, so that under a causal mask the partial block is the cheap one at the start.
    for (let end = rows.end; end > rows.start; end -= blockRows) {
      blocks.push(
        block({ start: Math.max(end - blockRows, rows.start), end }, columns, first, last, segment, rangeItem),
      );
    }
  }
  blocks.sort((a, b) => b.columns - a.columns);
  return Uint32Array.from(blocks.flatMap((block) => block.words));
}

function block(rows: Side, columns: Side, first: number, last: number, { item }: Segment, rangeItem: number) {
  const clamp = (column: number) => Math.min(Math.max(column, columns.start), columns.end);
  const start = clamp(rows.start + first);
  const end = Math.max(start, clamp(rows.end + last));
  const shared = { start: clamp(rows.end - 1 + first), end: clamp(rows.start + last + 1) };
  const diagonal = (column: number) => Math.max(-noDiagonal, Math.min(noDiagonal, column)) >>> 0;
  return {
    columns: end - start,
    words: [
      ...[rows.start, rows.end, start, end],
      ...[shared.start, shared.end, diagonal(first), diagonal(last + 1)],
      ...[item, item - rangeItem],
    ],
  };
}

/** WGSL of a block. */
export const blockStruct = `struct Block {
  rowStart: u32,
  rowEnd: u32,
  columnStart: u32,   // first column that any row sees
  columnEnd: u32,     // one past the last one
  sharedStart: u32,   // every row sees the columns from here …
  sharedEnd: u32,     // … to one before here
  diagonalStart: i32, // row i sees columns from i + diagonalStart …
  diagonalEnd: i32,   // … to one before i + diagonalEnd
  item: u32,          // batch item
  rangeItem: u32,     // batch item, counted from that of the query range's first row
}`;
