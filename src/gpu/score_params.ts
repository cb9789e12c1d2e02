// What the plans put into the parameter blocks of kernels that score, and the heads that one dispatch may have.

import { dropoutThreshold, seedWords } from "../op/dropout.ts";
import type { MlaProblem } from "../op/mla_problem.ts";
import type { GpuLimits } from "./capabilities.ts";
import { halvedUntil } from "./limit_checks.ts";
import { type BindingWindow, type OperandLayout, termWindow, windowSlack } from "./operand_layout.ts";
import type { RowRange } from "./schedule.ts";

/**
 * The values of the word fields that score_terms.ts declares.
 *
 * @param problem The call's dimensions.
 * @param queries The query rows of the dispatch.
 * @param term The bias's or mask's layout and the window that is bound, if there is one.
 */
export function scoreWords(
  problem: MlaProblem,
  queries: RowRange,
  term: { readonly layout: OperandLayout; readonly window: BindingWindow } | null,
): number[] {
  const { queryLength, keyLength, queryHeads, dropout } = problem;
  const seed = seedWords(dropout?.seed ?? 0);
  return [
    ...[queries.start, queryLength, keyLength, queryHeads],
    ...(term === null ? [0, 0, 0, 0] : [term.window.base, term.layout.batch, term.layout.head, term.layout.row]),
    ...[dropoutThreshold(dropout?.rate ?? 0), ...seed, dropout?.firstItem ?? 0, dropout?.firstPosition ?? 0],
  ];
}

/** The most query heads whose part of the bias or mask fits one binding; all without either. */
export function termHeads(
  layout: OperandLayout | undefined,
  problem: MlaProblem,
  queries: RowRange,
  heads: number,
  limits: GpuLimits,
): number {
  if (layout === undefined) return heads;
  const fits = (count: number) =>
    // Later heads may begin within their window.
    termWindow(layout, problem, queries, { start: 0, end: count }).size + windowSlack <=
      limits.maxStorageBufferBindingSize;
  return halvedUntil(heads, fits);
}
