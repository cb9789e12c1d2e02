// The oracle of the rotary embedding on rows of heads, of which only the last columns turn; src/model/rotary.ts has the formula.

import { type RotaryTable, rotate } from "../model/rotary.ts";
import type { RopeLayout } from "../model/rope_config.ts";

/** How rows lie, and what turns. */
export interface HeadRows {
  /** Heads of a row. */
  readonly heads: number;
  /** Columns of a head before those that turn. */
  readonly before: number;
  /** R, the columns that turn. */
  readonly dim: number;
  /** Which columns are a pair; null where none turns. */
  readonly layout: RopeLayout | null;
  /** The turns of each row; null where none turns. */
  readonly table: RotaryTable | null;
  /** A factor on each row; 1 when absent. */
  readonly factors?: ArrayLike<number>;
}

/**
 * Turns, and multiplies, rows of heads.
 *
 * @param rows `[rows, heads, before + dim]`.
 * @param how How they lie, and what turns.
 * @returns The same in new memory.
 */
export function rotateHeads(
  rows: Float32Array,
  { heads, before, dim, layout, table, factors }: HeadRows,
): Float32Array<ArrayBuffer> {
  const width = before + dim;
  const result = new Float32Array(rows);
  const count = rows.length / width;
  if (table !== null && layout !== null) {
    const columns = new Float32Array(count * dim);
    for (let i = 0; i < count; i++) columns.set(rows.subarray(i * width + before, (i + 1) * width), i * dim);
    const turned = rotate(columns, table, layout);
    for (let i = 0; i < count; i++) result.set(turned.subarray(i * dim, (i + 1) * dim), i * width + before);
  }
  if (factors === undefined) return result;
  for (let i = 0; i < result.length; i++) result[i] *= factors[Math.floor(i / (width * heads))];
  return result;
}
