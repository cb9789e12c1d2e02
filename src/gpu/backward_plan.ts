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
import {
  addBiasGradient,
  addKeyGradients,
  addQueryGradient,
  addRopeKeys,
  addStaging,
  addStats,
  addZeros,
  byItem,
  sharesItems,
} from "./backward_attention.ts";
import { type Planning, scheduleOf } from "./backward_planning.ts";
import { addExpansionGradients, addRopeKeyGradient, plainProjectTile } from "./backward_projections.ts";
import { backwardScratch } from "./backward_scratch.ts";
import type { Capabilities, GpuLimits } from "./capabilities.ts";
import { DispatchList, type DispatchPlan } from "./dispatch_plan.ts";
import { addExpansion, expansionKernels, headGroups, quads } from "./expansion.ts";
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
import type { AttendBackwardShape, GradTarget } from "./kernels/attend_backward_operands.ts";
import type * as expandBackward from "./kernels/expand_backward.ts";
import type { MatrixGradTarget, MatrixGradTile } from "./kernels/matrix_attend_backward.ts";
import { maximaBytes } from "./kernels/matrix_maxima.ts";
import { stagedBytes } from "./kernels/matrix_staged.ts";
import { scoreTerms } from "./kernels/score_terms.ts";
import { gradTile as matrixGradTile, projectTile, whyMatrixBackwardInvalid } from "./matrix_config.ts";
import { addMatrixExpansion, matrixExpansionKernels } from "./matrix_expansion.ts";
import { batchGap, type OperandLayout, type OperandLayouts, type StorageType } from "./operand_layout.ts";
import { rowWidth, splitQueries } from "./query_ranges.ts";
import { type RowRange, schedule } from "./schedule.ts";

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
