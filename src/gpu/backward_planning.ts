// What the parts of the gradients' plan share: the call, its scratch and ranges, and the dispatches of one attention kernel.

import type { FlashMLAConfig } from "../op/config.ts";
import type { MlaProblem } from "../op/mla_problem.ts";
import type { BackwardScratch } from "./backward_scratch.ts";
import type { Capabilities, GpuLimits } from "./capabilities.ts";
import type { Bound, DispatchList } from "./dispatch_plan.ts";
import type { Region } from "./regions.ts";
import type { GradTile } from "./kernels/attend_backward.ts";
import {
  attendBackwardBindings as at,
  type BackwardWords,
  type GradTarget,
  wordsOf,
} from "./kernels/attend_backward_operands.ts";
import * as headSum from "./kernels/head_sum.ts";
import { matrixGradBindings } from "./kernels/matrix_attend_backward.ts";
import { matrixScratch } from "./kernels/matrix_scratch.ts";
import { stagedBytes } from "./kernels/matrix_staged.ts";
import { scoreFloats } from "./kernels/score_terms.ts";
import { checkBinding, checkWindow } from "./limit_checks.ts";
import { batchGap, type BindingWindow, type OperandLayouts, rowWindow, termWindow } from "./operand_layout.ts";
import { chunks, rowWidth } from "./query_ranges.ts";
import { blockWords, type RowRange } from "./schedule.ts";
import { scoreWords, termHeads } from "./score_params.ts";

/** A group of KV heads. */
export interface Group {
  readonly first: number;
  readonly heads: number;
}

/** What the parts of the plan share. */
export interface Planning {
  readonly list: DispatchList;
  readonly problem: MlaProblem;
  readonly config: FlashMLAConfig;
  readonly limits: GpuLimits;
  readonly layouts: OperandLayouts;
  readonly scratch: BackwardScratch;
  readonly queryRanges: readonly RowRange[];
  readonly tiles: Readonly<Record<GradTarget, Pick<GradTile, "rows" | "columns">>>;
  /** The schedules of each range. */
  readonly blocks: Readonly<Record<GradTarget, readonly Uint32Array<ArrayBuffer>[]>>;
  /** The device, where the gradients run on its matrix units. */
  readonly matrix: Capabilities | null;
}

export const scheduleOf = { query: "queryBlocks", keys: "keyBlocks", bias: "biasBlocks" } as const;

/** The rows of an operand in one query range. */
export function rangeWindow(
  { problem, limits, queryRanges, layouts }: Planning,
  name: "query" | "output" | "gradOutput" | "bQ" | "grad.query" | "grad.bQ",
  range: number,
): BindingWindow {
  const layout = layouts[name]!;
  const { start, end } = queryRanges[range];
  const width = name === "bQ" || name === "grad.bQ"
    ? problem.qkRopeHeadDim
    : rowWidth(layout, problem, name === "query" || name === "grad.query" ? "query" : "output");
  return checkWindow(name, rowWindow(layout, problem.queryLength, start, end, width), limits);
}

/** Adds a dispatch of the kernel that sums strided rows over heads. */
export function addHeadSum(
  { list, limits }: Planning,
  kernel: "headSum" | "ropeKeys",
  range: number,
  from: Bound,
  into: Bound,
  words: headSum.HeadSumWords,
): void {
  const [rows, slots, , columns] = words.sizes;
  const groups = Math.ceil((rows * slots * columns) / headSum.workgroupSize);
  const workgroups = [Math.min(groups, limits.maxComputeWorkgroupsPerDimension), 1] as const;
  list.add({ kernel, range, workgroups }, [from, into], [], headSum.wordsOf(words));
}

/** A run of query heads. */
export interface HeadRun {
  readonly start: number;
  readonly count: number;
}

/** Adds the dispatches of one attention kernel over some heads of one range. */
export function addAttend(
  planning: Planning,
  target: GradTarget,
  range: number,
  group: Group,
  run: {
    /** All heads of the dispatch, whose part of the bias or mask is bound. */
    readonly heads: HeadRun;
    /** Heads that one workgroup goes through. */
    readonly headCount: number;
    /** Tiles of columns along x. */
    readonly columnTiles?: number;
    /** Blocks of the schedule, all when absent. */
    readonly blocks?: { readonly first: number; readonly count: number };
    readonly gradient: Bound;
    readonly words: Pick<BackwardWords, "gradient" | "gradientValues" | "gradientRope" | "accumulate">;
  },
): void {
  const { list, problem, limits, layouts, scratch, queryRanges } = planning;
  const { queryLength, queryHeads, kvHeads, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V, rope } = problem;
  const { query, gradOutput, bQ } = layouts as Required<OperandLayouts>;
  const rows = queryRanges[range];
  const schedule = planning.blocks[target][range];
  const { heads, headCount, columnTiles = 1, gradient, words } = run;
  const { first, count } = run.blocks ?? { first: 0, count: schedule.length / blockWords };
  const term = layouts.bias ?? layouts.attentionMask;
  const termName = layouts.bias === undefined ? "attentionMask" : "bias";
  const window = term &&
    checkWindow(
      termName,
      termWindow(term, problem, rows, { start: heads.start, end: heads.start + heads.count }),
      limits,
    );
  const queries = rangeWindow(planning, "query", range);
  const grads = rangeWindow(planning, "gradOutput", range);
  const ropeQueries = rope === "shared" ? rangeWindow(planning, "bQ", range) : null;
  const streamed: (Bound | null)[] = planning.matrix === null
    ? [[at.query, "query", queries], [at.gradOutput, "gradOutput", grads], ropeQueries && [at.bQ, "bQ", ropeQueries]]
    : [[matrixGradBindings.staged, "staged", stagedWindow(planning, range)]];
  const bound: (Bound | null)[] = [
    [at.blocks, scheduleOf[target], { offset: 0, size: schedule.byteLength }],
    ...streamed,
    [at.stats, "stats", scratch.stats[range]],
    [at.expanded, "expanded", { offset: 0, size: scratch.expanded.bytes }],
    gradient,
    window ? [at.term, termName, window] : null,
  ];
  for (const [offset, tiles] of chunks(count, limits.maxComputeWorkgroupsPerDimension)) {
    list.add(
      { kernel: target, range, workgroups: [heads.count / headCount * columnTiles, tiles] },
      bound.filter((operand) => operand !== null),
      scoreFloats(problem),
      [
        ...scoreWords(problem, rows, term && window ? { layout: term, window } : null),
        ...wordsOf({
          ...{ firstHead: heads.start, headCount, firstKvHead: group.first, groupKvHeads: group.heads },
          ...expandedBases(planning, group),
          ...{ firstBlock: first + offset, groupSize: queryHeads / kvHeads, widths: [P, R, V] },
          rangeRows: rows.end - rows.start,
          query: [queries.base, query.row, query.head, batchGap(query, queryLength)],
          gradOutput: [grads.base, gradOutput.row, gradOutput.head, batchGap(gradOutput, queryLength)],
          ropeQuery: ropeQueries === null ? [0, 0, 0] : [ropeQueries.base, bQ.row, batchGap(bQ, queryLength)],
          columnTiles,
          ...words,
        }),
      ],
    );
  }
}

/** Elements from the first key of a group to its first value and to the first rotary key. */
export function expandedBases({ problem, scratch, matrix }: Planning, group: Group) {
  if (matrix !== null) {
    const { valuesBase, ropeBase } = matrixScratch(problem, problem.batch * problem.keyLength, group.heads);
    return { valuesBase, ropeBase };
  }
  return { valuesBase: scratch.expanded.values.offset / 4, ropeBase: scratch.expanded.rope.offset / 4 };
}

/** The staged queries and output gradients of a range. */
export function stagedWindow({ problem, limits, queryRanges }: Planning, range: number): Region {
  const { start, end } = queryRanges[range];
  const size = stagedBytes(problem, end - start, problem.queryHeads);
  checkBinding("the staged queries", size, limits);
  return { offset: 0, size };
}

/** Query heads of a group. */
export function headsOf(group: Group, { queryHeads, kvHeads }: MlaProblem): HeadRun {
  return { start: group.first * (queryHeads / kvHeads), count: group.heads * (queryHeads / kvHeads) };
}

/** The most query heads whose part of the bias or mask fits a binding. */
export function mostHeads({ problem, layouts, limits, queryRanges }: Planning, range: number, heads: number): number {
  return termHeads(layouts.bias ?? layouts.attentionMask, problem, queryRanges[range], heads, limits);
}

export const nowhere = { gradientValues: 0, gradientRope: 0, accumulate: false } as const;
