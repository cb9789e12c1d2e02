// What the gradients of a call will dispatch, worked out on the host:
//
//   once            stats of every query row; rotary keys, dense; gradients of the sinks
//   by head group   keys and values, as forward expands them
//     by range      ∂query (and ∂bQ); ∂K, ∂V and each head's part of ∂bK, added up over the ranges; ∂bias
//                   ∂c += ∂K·wKcᵀ + ∂V·wVcᵀ;  ∂wKc += cᵀ·∂K;  ∂wVc += cᵀ·∂V;  ∂bK += Σ over heads
//
// Every gradient is dense float32 in one buffer for the whole call, and zero before the first piece of it: all but ∂query
// are added to, in the order of the dispatches, so that two runs give the same bits.
//
// Memory: the inputs, the output, its gradient and the log-sum-exp; all gradients in float32; and the scratch of
// backward_scratch.ts. Nothing is as large as queries × keys but ∂bias, where a call has a bias. No GPU is touched.

import type { FlashMLAConfig } from "../op/config.ts";
import type { MlaProblem } from "../op/mla_problem.ts";
import { type BackwardScratch, backwardScratch } from "./backward_scratch.ts";
import type { Capabilities, GpuLimits } from "./capabilities.ts";
import { type Bound, DispatchList, type DispatchPlan } from "./dispatch_plan.ts";
import { addExpansion, expansionKernels, headGroups, quads, type Region } from "./expansion.ts";
import {
  attendBackwardSource,
  expandBackwardSource,
  headSumSource,
  matrixGradSource,
  matrixMagnitudeSource,
  matrixMaximaSource,
  matrixProjectSource,
  matrixStageSource,
  rowStatsSource,
  sinkGradientSource,
} from "./kernel_sources.ts";
import { type GradTile, gradTile, whyInvalid as whyAttendInvalid } from "./kernels/attend_backward.ts";
import {
  attendBackwardBindings as at,
  type AttendBackwardShape,
  type BackwardWords,
  type GradTarget,
  wordsOf,
} from "./kernels/attend_backward_operands.ts";
import { type ExpandTile, expandTile } from "./kernels/expand.ts";
import * as expandBackward from "./kernels/expand_backward.ts";
import * as headSum from "./kernels/head_sum.ts";
import * as rowStats from "./kernels/row_stats.ts";
import { scoreFloats, scoreTerms } from "./kernels/score_terms.ts";
import * as sinkGradient from "./kernels/sink_gradient.ts";
import { matrixGradBindings, type MatrixGradTarget, type MatrixGradTile } from "./kernels/matrix_attend_backward.ts";
import { maximaBinding } from "./kernels/matrix_expand_backward.ts";
import * as magnitude from "./kernels/matrix_magnitude.ts";
import { maximaBytes, workgroups as maximaWorkgroups } from "./kernels/matrix_maxima.ts";
import { matrixScratch } from "./kernels/matrix_scratch.ts";
import * as stage from "./kernels/matrix_stage.ts";
import { stagedBytes } from "./kernels/matrix_staged.ts";
import { checkBinding, checkWindow, limitError } from "./limit_checks.ts";
import { gradTile as matrixGradTile, projectTile, whyMatrixBackwardInvalid } from "./matrix_config.ts";
import { addMatrixExpansion, matrixExpansionKernels } from "./matrix_expansion.ts";
import {
  batchGap,
  type BindingWindow,
  denseWindow,
  type GradientName,
  type OperandLayout,
  type OperandLayouts,
  plainWindow,
  rowWindow,
  type StorageType,
  termWindow,
} from "./operand_layout.ts";
import { chunks, rowWidth, splitQueries } from "./query_ranges.ts";
import { blockWords, type RowRange, schedule } from "./schedule.ts";
import { scoreWords, termHeads } from "./score_params.ts";

/** Why this configuration cannot compute this problem's gradients on such a device, or null when it can. */
export function whyBackwardInvalid(
  config: FlashMLAConfig,
  problem: MlaProblem,
  capabilities: Capabilities,
): string | null {
  if (onMatrixUnits(config, problem, capabilities)) return null;
  const { limits } = capabilities;
  for (const target of targets(problem)) {
    const why = whyAttendInvalid(target, config, problem, limits);
    if (why !== null) return why;
  }
  return null;
}

/** Whether a problem's gradients run on matrix units; what these cannot do, plain kernels do. */
function onMatrixUnits(config: FlashMLAConfig, problem: MlaProblem, capabilities: Capabilities): boolean {
  return config.matrixUnits && whyMatrixBackwardInvalid(problem, capabilities) === null;
}

function targets({ scoreTerm }: MlaProblem): GradTarget[] {
  return ["query", "keys", ...(scoreTerm === "bias" ? ["bias" as const] : [])];
}

/** A group of KV heads. */
interface Group {
  readonly first: number;
  readonly heads: number;
}

/** What the parts of the plan share. */
interface Planning {
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

const scheduleOf = { query: "queryBlocks", keys: "keyBlocks", bias: "biasBlocks" } as const;

/**
 * Plans the gradients of one call.
 *
 * @param problem The validated problem; batch, lengths and heads must not be empty.
 * @param config A configuration that {@link whyBackwardInvalid} accepts.
 * @param capabilities The device's capabilities.
 * @param layouts Where inputs, output, gradOutput, log-sum-exp and gradients lie; gradients are dense in float32.
 * @throws {FlashMLAError} With code `limit`, naming it, when an operand cannot be cut into pieces that fit.
 */
export function backwardPlan(
  problem: MlaProblem,
  config: FlashMLAConfig,
  capabilities: Capabilities,
  layouts: OperandLayouts,
): DispatchPlan {
  const { limits } = capabilities;
  const { keyLength, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V, rope } = problem;
  const { query, bQ, bK, keyValue, wKc, wVc, output, gradOutput } = layouts as Required<OperandLayouts>;
  const matrix = onMatrixUnits(config, problem, capabilities) ? capabilities : null;
  const queryRanges = backwardRanges(problem, layouts, limits, matrix !== null);
  const scratch = backwardScratch(problem, limits, queryRanges, matrix !== null);
  const wanted = targets(problem);
  const tiles = Object.fromEntries(
    wanted.map((target) => [
      target,
      matrix === null
        ? gradTile(target, config, problem, limits)!
        : matrixGradTile(target as MatrixGradTarget, problem, matrix),
    ]),
  ) as unknown as Planning["tiles"];
  const blocks = Object.fromEntries(wanted.map((target) => [
    target,
    queryRanges.map((range) => {
      const words = schedule(problem, tiles[target].rows, range, target === "keys" ? "keys" : "queries");
      return target === "bias" && sharesItems(layouts["grad.bias"]!, problem) ? byItem(words) : words;
    }),
  ])) as unknown as Planning["blocks"];
  const list = new DispatchList();
  const planning: Planning = { list, problem, config, limits, layouts, scratch, queryRanges, tiles, blocks, matrix };

  queryRanges.forEach((_, range) => addStats(planning, range));
  if (rope !== "none" && matrix === null) addRopeKeys(planning);
  for (const group of headGroups(problem, scratch.expanded)) {
    if (matrix === null) addExpansion(list, problem, config, capabilities, layouts, scratch.expanded, group);
    else addMatrixExpansion(list, problem, matrix, layouts, group);
    if (queryRanges.length > 1) addZeros(planning);
    queryRanges.forEach((_, range) => {
      if (matrix !== null) addStaging(planning, range, group);
      addQueryGradient(planning, range, group);
      addKeyGradients(planning, range, group);
      if (wanted.includes("bias")) addBiasGradient(planning, range, group);
    });
    addExpansionGradients(planning, group);
    if (rope !== "none") addRopeKeyGradient(planning, group);
  }

  const terms = scoreTerms(problem, layouts.bias?.dtype === "f16" ? "f16" : "f32");
  const shape: AttendBackwardShape = {
    ...{ qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V, rope, terms },
    query: quads(query, P, rope === "in_query" ? R : 0),
    ropeQuery: rope === "shared" ? quads(bQ, R) : "f32",
    gradOutput: quads(gradOutput, V),
    expanded: scratch.element,
  };
  const gapped = batchGap(keyValue, keyLength) !== 0;
  const projections = (side: "keys" | "values", width: number, weight: OperandLayout) => {
    const gradients = width % 4 === 0 ? "vec4<f32>" as const : "f32" as const;
    const shapes = {
      latents: {
        left: gradients,
        right: quads(weight, width),
        gradient: problem.kvLoraRank % 4 === 0 ? "vec4<f32>" as const : "f32" as const,
        gapped: false,
      },
      weights: { left: quads(keyValue, problem.kvLoraRank), right: gradients, gradient: gradients, gapped },
    };
    const source = (which: expandBackward.ExpandGradient) =>
      matrix === null
        ? expandBackwardSource(which, plainProjectTile(planning, which, width), shapes[which])
        : matrixProjectSource(which, projectTile(which, matrix), { ...shapes[which], side }, matrix.matrixUnits!);
    return { latents: source("latents"), weights: source("weights") };
  };
  const [fromKeys, fromValues] = [projections("keys", P, wKc), projections("values", V, wVc)];
  const attendKernels = matrix === null
    ? {
      ...(rope !== "none" && { ropeKeys: headSumSource(bK.dtype as StorageType) }),
      ...expansionKernels(problem, config, capabilities, layouts),
      ...Object.fromEntries(
        wanted.map((target) => [target, attendBackwardSource(target, tiles[target] as GradTile, shape)]),
      ),
    }
    : {
      ...matrixExpansionKernels(problem, matrix, layouts),
      magnitude: matrixMagnitudeSource(shape.gradOutput),
      stage: matrixStageSource(shape),
      maxima: matrixMaximaSource(),
      ...Object.fromEntries((["query", "keys"] as const).map((target) => [
        target,
        matrixGradSource(target, tiles[target] as MatrixGradTile, {
          ...{ qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V, terms },
          gradient: scratch.element,
        }, matrix.matrixUnits!),
      ])),
    };
  return {
    kernels: {
      rowStats: rowStatsSource({ output: quads(output, V), gradOutput: quads(gradOutput, V) }),
      ...(problem.sinks > 0 && { sinkGradient: sinkGradientSource(layouts.softmaxAux!.dtype as StorageType) }),
      ...((rope !== "none" || queryRanges.length > 1) && { headSum: headSumSource("f32") }),
      ...attendKernels,
      latentsFromKeys: fromKeys.latents,
      latentsFromValues: fromValues.latents,
      weightsFromKeys: fromKeys.weights,
      weightsFromValues: fromValues.weights,
    },
    dispatches: list.dispatches,
    params: list.packParams(),
    layouts,
    queryRanges,
    schedules: Object.fromEntries(wanted.map((target) => [scheduleOf[target], blocks[target]])),
    scratch: {
      expanded: scratch.expanded.bytes,
      gradExpanded: scratch.gradExpanded.bytes,
      stats: scratch.stats.at(-1)!.offset + scratch.stats.at(-1)!.size,
      ...(rope === "shared" && { gradQuery: scratch.gradQueryBytes }),
      ...(matrix !== null && {
        staged: Math.max(...queryRanges.map(({ start, end }) => stagedBytes(problem, end - start, problem.queryHeads))),
        maxima: maximaBytes,
      }),
    },
  };
}

/** Ranges of query rows: each of what forward cuts, of its gradients, and of the scratch by rows, has to fit a binding. */
function backwardRanges(
  problem: MlaProblem,
  layouts: OperandLayouts,
  limits: GpuLimits,
  matrixUnits: boolean,
): RowRange[] {
  const { queryLength, queryHeads, qkNopeHeadDim: P, qkRopeHeadDim: R } = problem;
  const gradQuery = layouts["grad.query"]!;
  const dense = (width: number) => ({
    layout: { dtype: "f32", resident: false, offset: 0, batch: queryLength * width, row: width, head: width } as const,
    width,
  });
  return splitQueries(problem, layouts, limits, {
    rows: [
      { layout: layouts.gradOutput!, width: rowWidth(layouts.gradOutput!, problem, "output") },
      { layout: gradQuery, width: rowWidth(gradQuery, problem, "query") },
      dense(queryHeads * 2),
      ...(problem.rope === "shared" ? [dense(queryHeads * (P + R))] : []),
      // Staged halves, and the header before them.
      ...(matrixUnits ? [dense(Math.ceil(stagedBytes(problem, 1, queryHeads) / 4))] : []),
    ],
    terms: layouts["grad.bias"] === undefined ? [] : [layouts["grad.bias"]],
  });
}

/** Whether a bias has several batch items to serve. */
function sharesItems({ batch }: OperandLayout, problem: MlaProblem): boolean {
  return batch === 0 && problem.batch > 1;
}

/** A schedule with the blocks of each batch item together. */
function byItem(words: Uint32Array<ArrayBuffer>): Uint32Array<ArrayBuffer> {
  const blocks = chunks(words.length, blockWords).map(([start, length]) => [...words.subarray(start, start + length)]);
  return Uint32Array.from(blocks.sort((a, b) => a[itemWord] - b[itemWord]).flat());
}

/** Words of a block, as schedule.ts orders them. */
const [startWord, endWord, itemWord] = [2, 3, 8];

/** The rows of an operand in one query range. */
function rangeWindow(
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

function addStats(planning: Planning, range: number): void {
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

/** Adds a dispatch of the kernel that sums strided rows over heads. */
function addHeadSum(
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

/** Adds the copy of the rotary keys, from wherever they lie, behind the values. */
function addRopeKeys(planning: Planning): void {
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
function addZeros(planning: Planning): void {
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

/** A run of query heads. */
interface HeadRun {
  readonly start: number;
  readonly count: number;
}

/** Adds the dispatches of one attention kernel over some heads of one range. */
function addAttend(
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
function expandedBases({ problem, scratch, matrix }: Planning, group: Group) {
  if (matrix !== null) {
    const { valuesBase, ropeBase } = matrixScratch(problem, problem.batch * problem.keyLength, group.heads);
    return { valuesBase, ropeBase };
  }
  return { valuesBase: scratch.expanded.values.offset / 4, ropeBase: scratch.expanded.rope.offset / 4 };
}

/** The staged queries and output gradients of a range. */
function stagedWindow({ problem, limits, queryRanges }: Planning, range: number): Region {
  const { start, end } = queryRanges[range];
  const size = stagedBytes(problem, end - start, problem.queryHeads);
  checkBinding("the staged queries", size, limits);
  return { offset: 0, size };
}

/** Adds the dispatches that bring a range's queries and output gradients to halves, scaled by the group's values. */
function addStaging(planning: Planning, range: number, group: Group): void {
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

/** Query heads of a group. */
function headsOf(group: Group, { queryHeads, kvHeads }: MlaProblem): HeadRun {
  return { start: group.first * (queryHeads / kvHeads), count: group.heads * (queryHeads / kvHeads) };
}

/** The most query heads whose part of the bias or mask fits a binding. */
function mostHeads({ problem, layouts, limits, queryRanges }: Planning, range: number, heads: number): number {
  return termHeads(layouts.bias ?? layouts.attentionMask, problem, queryRanges[range], heads, limits);
}

const nowhere = { gradientValues: 0, gradientRope: 0, accumulate: false } as const;

function addQueryGradient(planning: Planning, range: number, group: Group): void {
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

function addKeyGradients(planning: Planning, range: number, group: Group): void {
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

function addBiasGradient(planning: Planning, range: number, group: Group): void {
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

/** The tile of the expansion's gradients without matrix units. */
function plainProjectTile(planning: Planning, which: expandBackward.ExpandGradient, width: number): ExpandTile {
  return which === "latents" ? gradientTile(planning.config, planning.limits) : weightsTile(planning, width);
}

/** The tile of the expansion's gradients. */
function gradientTile(config: Pick<FlashMLAConfig, "expandBlock" | "unrollDepth">, limits: GpuLimits): ExpandTile {
  const tile = expandTile(config, limits);
  // The smallest block is for small problems and for devices that compile slowly: short slices are short code.
  return config.expandBlock === 32 ? { ...tile, depth: 4, numStages: 1 } : tile;
}

/** Workgroups below which the weights' gradients are cut into smaller tiles: a large card would be half idle. */
const wantedWorkgroups = 256;

/** The tile of the weights' gradients, whose product has few rows and columns and is summed over all keys. */
function weightsTile({ problem, config, limits, scratch }: Planning, width: number): ExpandTile {
  const tile = gradientTile(config, limits);
  const columns = scratch.expanded.groupKvHeads * width;
  const workgroups = Math.ceil(problem.kvLoraRank / tile.blockM) * Math.ceil(columns / tile.blockN);
  if (workgroups >= wantedWorkgroups || config.expandBlock !== 128) return tile;
  return expandTile({ ...config, expandBlock: 64 }, limits);
}

function addExpansionGradients(planning: Planning, group: Group): void {
  const { list, problem, limits, layouts, scratch, matrix } = planning;
  const { batch, keyLength, kvHeads, kvLoraRank: L, qkNopeHeadDim, vHeadDim } = problem;
  const { keyValue } = layouts as Required<OperandLayouts>;
  const keyRows = batch * keyLength;
  const latents = checkWindow("keyValue", rowWindow(keyValue, keyLength, 0, keyRows, L), limits);
  const gradLatents = checkWindow(
    "the gradient of keyValue",
    denseWindow(layouts["grad.keyValue"]!, keyRows * L),
    limits,
  );
  const sides = [
    { from: "Keys", region: scratch.gradExpanded.keys, name: "wKc", width: qkNopeHeadDim },
    { from: "Values", region: scratch.gradExpanded.values, name: "wVc", width: vHeadDim },
  ] as const;
  const add = (
    kernel: string,
    tile: Pick<ExpandTile, "blockM" | "blockN">,
    bound: readonly Bound[],
    words: Omit<expandBackward.ExpandBackwardWords, "firstTile" | "accumulate">,
  ) => {
    const [rows, columns] = words.sizes;
    const columnTiles = Math.ceil(columns / tile.blockN);
    if (columnTiles > limits.maxComputeWorkgroupsPerDimension) {
      throw limitError(`${columnTiles} column tiles of a gradient`, "maxComputeWorkgroupsPerDimension", limits);
    }
    for (const [firstTile, tiles] of chunks(Math.ceil(rows / tile.blockM), limits.maxComputeWorkgroupsPerDimension)) {
      list.add(
        { kernel, range: 0, workgroups: [columnTiles, tiles] },
        bound,
        [],
        expandBackward.wordsOf({ ...words, firstTile, accumulate: true }),
      );
    }
  };
  const matrixBound: readonly Bound[] = matrix === null
    ? []
    : [[maximaBinding, "maxima", { offset: 0, size: maximaBytes }]];
  if (matrix !== null) {
    const { keys, values, bytes } = scratch.gradExpanded;
    list.add(
      { kernel: "maxima", range: 0, workgroups: maximaWorkgroups },
      [[1, "gradExpanded", { offset: 0, size: bytes }], [2, "maxima", { offset: 0, size: maximaBytes }]],
      [],
      [
        keys.offset / 4 + keyRows * group.heads * qkNopeHeadDim,
        values.offset / 4,
        values.offset / 4 + keyRows * group.heads * vHeadDim,
      ],
    );
  }
  const tileOf = (which: expandBackward.ExpandGradient, width: number) =>
    matrix === null ? plainProjectTile(planning, which, width) : projectTile(which, matrix);
  for (const { from, region, name, width } of sides) {
    const columns = group.heads * width;
    const weights = checkWindow(name, denseWindow(layouts[name]!, L * kvHeads * width), limits);
    const gradName: GradientName = `grad.${name}`;
    const gradWeights = checkWindow(
      `the gradient of ${name}`,
      denseWindow(layouts[gradName]!, L * kvHeads * width),
      limits,
    );
    const gradRows: Region = { offset: region.offset, size: keyRows * columns * 4 };
    add(
      `latentsFrom${from}`,
      tileOf("latents", width),
      [[1, "gradExpanded", gradRows], [2, name, weights], [3, "grad.keyValue", gradLatents], ...matrixBound],
      {
        sizes: [keyRows, L, columns],
        left: [0, columns, keyRows, 0],
        right: [weights.base + group.first * width, kvHeads * width],
        gradient: [gradLatents.base, L],
      },
    );
    add(
      `weightsFrom${from}`,
      tileOf("weights", width),
      [[1, "keyValue", latents], [2, "gradExpanded", gradRows], [3, gradName, gradWeights], ...matrixBound],
      {
        sizes: [L, columns, keyRows],
        left: [latents.base, keyValue.row, keyLength, batchGap(keyValue, keyLength)],
        right: [0, columns],
        gradient: [gradWeights.base + group.first * width, kvHeads * width],
      },
    );
  }
}

function addRopeKeyGradient(planning: Planning, group: Group): void {
  const { problem, limits, layouts, scratch } = planning;
  const { batch, keyLength, qkRopeHeadDim: R } = problem;
  const keyRows = batch * keyLength;
  const window = checkWindow("the gradient of bK", denseWindow(layouts["grad.bK"]!, keyRows * R), limits);
  addHeadSum(planning, "headSum", 0, [1, "gradExpanded", scratch.gradExpanded.rope], [2, "grad.bK", window], {
    sizes: [keyRows, 1, group.heads, R],
    from: [0, group.heads * R, 0, R, keyRows, 0],
    into: [window.base, R, 0],
    accumulate: true,
  });
}
