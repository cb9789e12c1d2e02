// The gradients' plan, the part of attention: row statistics, staging, ∂query, ∂K and ∂V, ∂bias and the sinks.

import type { MlaProblem } from "../op/mla_problem.ts";
import {
  addAttend,
  addHeadSum,
  expandedBases,
  type Group,
  headsOf,
  mostHeads,
  nowhere,
  type Planning,
  rangeWindow,
  stagedWindow,
} from "./backward_planning.ts";
import type { Bound } from "./dispatch_plan.ts";
import { attendBackwardBindings as at, wordsOf } from "./kernels/attend_backward_operands.ts";
import * as magnitude from "./kernels/matrix_magnitude.ts";
import * as stage from "./kernels/matrix_stage.ts";
import * as rowStats from "./kernels/row_stats.ts";
import { scoreFloats } from "./kernels/score_terms.ts";
import * as sinkGradient from "./kernels/sink_gradient.ts";
import { checkWindow, limitError } from "./limit_checks.ts";
import {
  batchGap,
  denseWindow,
  type OperandLayout,
  type OperandLayouts,
  plainWindow,
  rowWindow,
  termWindow,
} from "./operand_layout.ts";
import { chunks } from "./query_ranges.ts";
import { blockWords } from "./schedule.ts";
import { scoreWords, termHeads } from "./score_params.ts";

/** Whether a bias has several batch items to serve. */
export function sharesItems({ batch }: OperandLayout, problem: MlaProblem): boolean {
  return batch === 0 && problem.batch > 1;
}

/** A schedule with the blocks of each batch item together. */
export function byItem(words: Uint32Array<ArrayBuffer>): Uint32Array<ArrayBuffer> {
  const blocks = chunks(words.length, blockWords).map(([start, length]) => [...words.subarray(start, start + length)]);
  return Uint32Array.from(blocks.sort((a, b) => a[itemWord] - b[itemWord]).flat());
}

/** Words of a block, as schedule.ts orders them. */
const [startWord, endWord, itemWord] = [2, 3, 8];

/** Adds what is known of the query rows of a range, and the gradients of the sinks. */
export function addStats(planning: Planning, range: number): void {
  const { list, problem, limits, layouts, scratch, queryRanges } = planning;
  const { batch, queryLength, queryHeads, vHeadDim, sinks } = problem;
  const { output, gradOutput, lse, softmaxAux } = layouts as Required<OperandLayouts>;
  const { start, end } = queryRanges[range];
  const outputs = rangeWindow(planning, "output", range);
  const grads = rangeWindow(planning, "gradOutput", range);
  const logSums = checkWindow("the log-sum-exp", plainWindow(lse, batch, queryHeads, queryLength), limits);
  if (queryHeads > limits.maxComputeWorkgroupsPerDimension) {
    throw limitError(`${queryHeads} query heads`, "maxComputeWorkgroupsPerDimension", limits);
  }
  const tiles = Math.ceil((end - start) / rowStats.rowsPerWorkgroup);
  for (const [firstTile, count] of chunks(tiles, limits.maxComputeWorkgroupsPerDimension)) {
    list.add(
      { kernel: "rowStats", range, workgroups: [count, queryHeads] },
      [[1, "output", outputs], [2, "gradOutput", grads], [3, "lse", logSums], [4, "stats", scratch.stats[range]]],
      [],
      rowStats.wordsOf({
        rows: [end - start, start],
        sizes: [queryLength, vHeadDim],
        firstTile,
        output: [outputs.base, output.row, output.head, batchGap(output, queryLength)],
        gradOutput: [grads.base, gradOutput.row, gradOutput.head, batchGap(gradOutput, queryLength)],
        lse: [logSums.base, lse.batch, lse.head],
      }),
    );
  }
  if (sinks === 0) return;
  const auxRows = softmaxAux.head === 0 ? 1 : queryHeads;
  const aux = plainWindow({ ...softmaxAux, row: 1 }, 1, auxRows, sinks);
  const gradient = denseWindow(layouts["grad.softmaxAux"]!, auxRows * sinks);
  list.add(
    { kernel: "sinkGradient", range, workgroups: [sinks, auxRows] },
    [[1, "softmaxAux", aux], [2, "stats", scratch.stats[range]], [3, "grad.softmaxAux", gradient]],
    [],
    sinkGradient.wordsOf({
      ...{ rows: end - start, heads: queryHeads / auxRows, sinks },
      aux: [aux.base, softmaxAux.head],
      gradientBase: gradient.base,
      accumulate: true,
    }),
  );
}

/** Adds the copy of the rotary keys, from wherever they lie, behind the values. */
export function addRopeKeys(planning: Planning): void {
  const { problem, limits, layouts, scratch } = planning;
  const { batch, keyLength, qkRopeHeadDim: R } = problem;
  const bK = layouts.bK!;
  const keyRows = batch * keyLength;
  const window = checkWindow("bK", rowWindow(bK, keyLength, 0, keyRows, R), limits);
  addHeadSum(planning, "ropeKeys", 0, [1, "bK", window], [2, "expanded", scratch.expanded.rope], {
    sizes: [keyRows, 1, 1, R],
    from: [window.base, bK.row, 0, 0, keyLength, batchGap(bK, keyLength)],
    into: [0, R, 0],
    accumulate: false,
  });
}

/** Makes ∂K, ∂V and the parts of ∂bK zero, before several ranges add to them. */
export function addZeros(planning: Planning): void {
  const { gradExpanded } = planning.scratch;
  addHeadSum(
    planning,
    "headSum",
    0,
    [1, "expanded", { offset: 0, size: 16 }],
    [2, "gradExpanded", { offset: 0, size: gradExpanded.bytes }],
    {
      sizes: [1, 1, 0, Math.floor(gradExpanded.bytes / 4)],
      from: [0, 0, 0, 0, 1, 0],
      into: [0, 0, 0],
      accumulate: false,
    },
  );
}

/** Adds the dispatches that bring a range's queries and output gradients to halves, scaled by the group's values. */
export function addStaging(planning: Planning, range: number, group: Group): void {
  const { list, problem, layouts, scratch, queryRanges } = planning;
  const { queryLength, queryHeads, kvHeads, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V, rope } = problem;
  const { query, gradOutput, bQ } = layouts as Required<OperandLayouts>;
  const rows = queryRanges[range];
  const queries = rangeWindow(planning, "query", range);
  const grads = rangeWindow(planning, "gradOutput", range);
  const ropeQueries = rope === "shared" ? rangeWindow(planning, "bQ", range) : null;
  const staged = stagedWindow(planning, range);
  const words = [
    ...scoreWords(problem, rows, null),
    ...wordsOf({
      ...{ firstHead: 0, headCount: 1, firstKvHead: group.first, groupKvHeads: group.heads },
      ...expandedBases(planning, group),
      ...{ firstBlock: 0, groupSize: queryHeads / kvHeads, widths: [P, R, V], rangeRows: rows.end - rows.start },
      query: [queries.base, query.row, query.head, batchGap(query, queryLength)],
      gradOutput: [grads.base, gradOutput.row, gradOutput.head, batchGap(gradOutput, queryLength)],
      ropeQuery: ropeQueries === null ? [0, 0, 0] : [ropeQueries.base, bQ.row, batchGap(bQ, queryLength)],
      gradient: [0, 0, 0, 0],
      ...nowhere,
      columnTiles: 1,
    }),
  ];
  list.add(
    { kernel: "magnitude", range, workgroups: magnitude.workgroups },
    [
      [magnitude.magnitudeBindings.gradOutput, "gradOutput", grads],
      [magnitude.magnitudeBindings.expanded, "expanded", { offset: 0, size: scratch.expanded.bytes }],
      [magnitude.magnitudeBindings.staged, "staged", staged],
    ],
    scoreFloats(problem),
    words,
  );
  const bound: (Bound | null)[] = [
    [stage.stageBindings.query, "query", queries],
    [stage.stageBindings.gradOutput, "gradOutput", grads],
    [stage.stageBindings.staged, "staged", staged],
    ropeQueries && [stage.stageBindings.bQ, "bQ", ropeQueries],
  ];
  list.add(
    { kernel: "stage", range, workgroups: [stage.workgroups, 1] },
    bound.filter((operand) => operand !== null),
    scoreFloats(problem),
    words,
  );
}

/** Adds ∂query of a group's heads, and ∂bQ where heads share it. */
export function addQueryGradient(planning: Planning, range: number, group: Group): void {
  const { problem, layouts, queryRanges } = planning;
  const { queryHeads, qkNopeHeadDim: P, qkRopeHeadDim: R, rope } = problem;
  const heads = headsOf(group, problem);
  const window = rangeWindow(planning, "grad.query", range);
  const rows = queryRanges[range].end - queryRanges[range].start;
  const width = P + R;
  const shared = rope === "shared";
  const bytes = rows * heads.count * width * 4;
  const gradient: Bound = shared
    ? [at.gradient, "gradQuery", { offset: 0, size: bytes }]
    : [at.gradient, "grad.query", window];
  for (const [offset, count] of chunks(heads.count, mostHeads(planning, range, heads.count))) {
    addAttend(planning, "query", range, group, {
      ...{ heads: { start: heads.start + offset, count }, headCount: 1, gradient },
      words: {
        ...nowhere,
        gradient: shared
          ? [-heads.start * width, 0, width, heads.count * width]
          : [window.base, 0, width, queryHeads * width],
      },
    });
  }
  if (!shared) return;
  const from: Bound = [1, "gradQuery", { offset: 0, size: bytes }];
  addHeadSum(planning, "headSum", range, from, [2, "grad.query", window], {
    sizes: [rows, heads.count, 1, P],
    from: [0, heads.count * width, width, 0, rows, 0],
    into: [window.base + heads.start * P, queryHeads * P, P],
    accumulate: false,
  });
  const ropeWindow = rangeWindow(planning, "grad.bQ", range);
  addHeadSum(planning, "headSum", range, from, [2, "grad.bQ", ropeWindow], {
    sizes: [rows, 1, heads.count, R],
    from: [P, heads.count * width, 0, width, rows, 0],
    into: [ropeWindow.base, layouts["grad.bQ"]!.row, 0],
    accumulate: true,
  });
}

/** Adds ∂K, ∂V and each head's part of ∂bK. */
export function addKeyGradients(planning: Planning, range: number, group: Group): void {
  const { problem, scratch, queryRanges } = planning;
  const { queryHeads, kvHeads } = problem;
  const { gradExpanded } = scratch;
  const groupSize = queryHeads / kvHeads;
  const heads = headsOf(group, problem);
  const gradient: Bound = [at.gradient, "gradExpanded", { offset: 0, size: gradExpanded.bytes }];
  const add = (start: number, count: number, headCount: number, accumulate: boolean) =>
    addAttend(planning, "keys", range, group, {
      ...{ heads: { start, count }, headCount, gradient },
      words: {
        gradient: [0, 0, 0, 0],
        gradientValues: gradExpanded.values.offset / 4,
        gradientRope: gradExpanded.rope.offset / 4,
        accumulate,
      },
    });
  const several = queryRanges.length > 1;
  const most = mostHeads(planning, range, heads.count);
  if (most >= groupSize) {
    for (const [offset, count] of chunks(group.heads, Math.floor(most / groupSize))) {
      add(heads.start + offset * groupSize, count * groupSize, groupSize, several);
    }
    return;
  }
  // The query heads of one KV head, a few at a time.
  for (let kvHead = 0; kvHead < group.heads; kvHead++) {
    for (const [offset, count] of chunks(groupSize, most)) {
      add(heads.start + kvHead * groupSize + offset, count, count, several || offset > 0);
    }
  }
}

/** Adds ∂bias. */
export function addBiasGradient(planning: Planning, range: number, group: Group): void {
  const { problem, layouts, limits, queryRanges, tiles } = planning;
  const layout = layouts["grad.bias"]!;
  const rows = queryRanges[range];
  const heads = headsOf(group, problem);
  const words = planning.blocks.bias[range];
  const blocks = chunks(words.length, blockWords).map(([start]) => ({
    columns: words[start + endWord] - words[start + startWord],
    item: words[start + itemWord],
  }));
  const columnTiles = Math.ceil(Math.max(0, ...blocks.map(({ columns }) => columns)) / tiles.bias.columns);
  if (columnTiles === 0) return;
  if (columnTiles > limits.maxComputeWorkgroupsPerDimension) {
    throw limitError(`${columnTiles} tiles of keys`, "maxComputeWorkgroupsPerDimension", limits);
  }
  // Batch items that share a bias add to it one after another.
  const items = sharesItems(layout, problem) ? [...new Set(blocks.map(({ item }) => item))] : [null];
  const runs = items.map((item) => {
    if (item === null) return { first: 0, count: blocks.length };
    const first = blocks.findIndex((block) => block.item === item);
    return { first, count: blocks.filter((block) => block.item === item).length };
  });
  const shared = layout.head === 0;
  const most = Math.min(
    mostHeads(planning, range, heads.count),
    termHeads(layout, problem, rows, heads.count, limits),
    shared ? Infinity : Math.floor(limits.maxComputeWorkgroupsPerDimension / columnTiles),
  );
  for (const [offset, count] of chunks(heads.count, most)) {
    const start = heads.start + offset;
    const window = checkWindow(
      "the bias's gradient",
      termWindow(layout, problem, rows, { start, end: start + count }),
      limits,
    );
    for (const run of runs) {
      addAttend(planning, "bias", range, group, {
        ...{ heads: { start, count }, headCount: shared ? count : 1, columnTiles, blocks: run },
        gradient: [at.gradient, "grad.bias", window],
        words: { ...nowhere, gradient: [window.base, layout.batch, layout.head, layout.row] },
      });
    }
  }
}
