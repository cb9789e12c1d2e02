// Cutting a call's queries and outputs into ranges of rows that each fit one binding.

import type { MlaProblem } from "../op/mla_problem.ts";
import type { GpuLimits } from "./capabilities.ts";
import { limitError } from "./limit_checks.ts";
import {
  batchGap,
  type OperandLayout,
  type OperandLayouts,
  rowWindow,
  termWindow,
  windowSlack,
} from "./operand_layout.ts";
import type { RowRange } from "./schedule.ts";

/** Elements from the first to one past the last of a row of queries or outputs, all heads included. */
export function rowWidth(layout: OperandLayout, problem: MlaProblem, which: "query" | "output"): number {
  const { queryHeads, qkNopeHeadDim, qkRopeHeadDim, vHeadDim, rope } = problem;
  const headDim = which === "output" ? vHeadDim : qkNopeHeadDim + (rope === "in_query" ? qkRopeHeadDim : 0);
  return (queryHeads - 1) * layout.head + headDim;
}

/** Rows of an operand that is cut into ranges. */
export interface SplitRows {
  /** Where the operand lies. */
  readonly layout: OperandLayout;
  /** Elements from the first to one past the last of a row. */
  readonly width: number;
}

/**
 * Ranges of query rows whose queries and outputs each fit one binding.
 *
 * @param more What else is cut, by rows of queries, or like the bias and mask.
 */
export function splitQueries(
  problem: MlaProblem,
  layouts: OperandLayouts,
  limits: GpuLimits,
  more: { readonly rows?: readonly SplitRows[]; readonly terms?: readonly OperandLayout[] } = {},
): RowRange[] {
  const { batch, queryLength, qkRopeHeadDim } = problem;
  const { query, output, bQ } = layouts as Required<OperandLayouts>;
  const split = [
    { layout: query, width: rowWidth(query, problem, "query") },
    { layout: output, width: rowWidth(output, problem, "output") },
    ...(problem.rope === "shared" ? [{ layout: bQ, width: qkRopeHeadDim }] : []),
    ...(more.rows ?? []),
  ];
  const limit = limits.maxStorageBufferBindingSize;
  const term = layouts.bias ?? layouts.attentionMask;
  const heads = { start: 0, end: problem.queryHeads };
  // A bias or mask too large for one binding is bound for one batch item and as few heads as it takes.
  const terms = [...(term === undefined ? [] : [term]), ...(more.terms ?? [])];
  const wholeTerm = terms.every((layout) =>
    termWindow(layout, problem, { start: 0, end: batch * queryLength }, heads).size <= limit
  );
  const oneHead = { start: 0, end: 1 };
  const fits = (count: number) =>
    (wholeTerm ||
      terms.every((layout) =>
        termWindow(layout, problem, { start: 0, end: count }, oneHead).size + windowSlack <= limit
      )) &&
    split.every(({ layout, width }) => {
      // A later range may begin within its window.
      const slack = layout.resident && count < batch * queryLength ? windowSlack : 0;
      return rowWindow(layout, queryLength, 0, count, width).size + slack <= limit;
    });
  // The largest power-of-two share of a batch item that fits; without gaps, rows of several items make one range.
  const rows = batch * queryLength;
  if (fits(rows) && wholeTerm) return [{ start: 0, end: rows }];
  const gapless = wholeTerm && split.every(({ layout }) => batchGap(layout, queryLength) === 0);
  const whole = gapless ? rows : queryLength;
  let perRange = whole;
  while (perRange > 1 && !fits(perRange)) perRange = Math.ceil(perRange / 2);
  if (!fits(perRange)) {
    const [bytes] = [
      ...split.map(({ layout, width }) => rowWindow(layout, queryLength, 0, 1, width).size),
      ...terms.map((layout) => termWindow(layout, problem, { start: 0, end: 1 }, oneHead).size),
    ].sort((a, b) => b - a);
    throw limitError(
      `one row of query, output, bias or mask needs ${bytes} bytes`,
      "maxStorageBufferBindingSize",
      limits,
    );
  }
  return Array.from({ length: rows / whole }, (_, item) => item * whole).flatMap((start) =>
    chunks(whole, perRange).map(([first, length]) => ({ start: start + first, end: start + first + length }))
  );
}

/** Cuts `count` things into runs of at most `atMost`. */
export function chunks(count: number, atMost: number): [first: number, length: number][] {
  return Array.from(
    { length: Math.ceil(count / atMost) },
    (_, i) => [i * atMost, Math.min(atMost, count - i * atMost)],
  );
}
