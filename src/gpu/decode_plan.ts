// How one call of decoding runs: which kernels, over which memory, in which order.
//
//   absorb queries (or bind them as they are) → attention over latents, one dispatch for each buffer of the cache
//   → merge splits, where there are any → project by wVc, where weights are given → store, where widths are odd

import type { DecodeConfig } from "../op/decode_config.ts";
import type { DecodeInputs } from "../op/decode_implementation.ts";
import type { DecodeProblem } from "../op/decode_problem.ts";
import { reach } from "../op/segments.ts";
import type { GpuTensor } from "../op/tensor.ts";
import { boundIndices } from "./bound_tensor.ts";
import { type BoundCache, boundCaches } from "./decode_caches.ts";
import type { DecodeCall } from "./decode_call.ts";
import { type Attends, attendsBy, decodeShape } from "./decode_configs.ts";
import { type QueryRows, queryRows, sinkRow } from "./decode_queries.ts";
import { resultPlace, type ResultRows, resultRows } from "./decode_results.ts";
import { boundWork } from "./decode_work.ts";
import type { GpuContext } from "./device.ts";
import { mergeSplitsSource } from "./kernel_sources.ts";
import { type KernelStep, KernelSteps } from "./kernel_steps.ts";
import {
  absorbedBindings as at,
  type AbsorbedParams,
  absorbedParams,
  type AbsorbedShape,
  resultQuads,
} from "./kernels/absorbed_operands.ts";
import * as merge from "./kernels/merge_splits.ts";
import { checkBinding } from "./limit_checks.ts";

/** Where results go, on the GPU. */
export interface DecodeResults {
  /** Takes the result; dense. */
  readonly output: GpuTensor;
  /** Takes the log-sum-exp in float32; dense. */
  readonly lse?: GpuTensor;
}

/**
 * Plans, compiles and binds one call.
 *
 * @param context The device.
 * @param problem The call's dimensions; there is at least one token.
 * @param inputs The call's tensors; those on the host are uploaded.
 * @param cfg A valid configuration.
 * @param results Where the results go.
 * @returns What is to be recorded. Whoever asked disposes of it.
 * @throws {FlashMLAError} When a limit would be passed (`limit`) or a kernel does not compile (`device`).
 */
export async function prepareDecode(
  context: GpuContext,
  problem: DecodeProblem,
  inputs: DecodeInputs,
  cfg: DecodeConfig,
  results: DecodeResults,
): Promise<KernelSteps> {
  const steps = new KernelSteps(context);
  try {
    await steps.bind("decode", await kernels({ context, problem, inputs, cfg, steps }, results));
    return steps;
  } catch (error) {
    steps.discard();
    throw error;
  }
}

async function kernels(call: DecodeCall, { output, lse }: DecodeResults): Promise<KernelStep[]> {
  const { context, problem, cfg } = call;
  const before: KernelStep[] = [];
  const after: KernelStep[] = [];
  const attends = attendsBy(cfg, context.capabilities);
  const query = queryRows(call, attends.query, before);
  const sinks = await sinkRow(call, before);
  const rows = resultRows(call, output, after);
  const shape: AbsorbedShape = {
    ...decodeShape(problem, cfg),
    query: query.storage,
    output: rows.storage,
    sinkQuads: sinks === null ? 0 : Math.ceil(problem.queryHeads / 4),
    lse: lse !== undefined,
  };
  const attended = attention(call, attends, shape, query, rows, sinks, lse, before);
  return [...before, ...attended, ...after];
}

/** Attention over every part of the cache, and the merging of its splits. */
function attention(
  call: DecodeCall,
  attends: Attends,
  shape: AbsorbedShape,
  query: QueryRows,
  rows: ResultRows,
  sinks: GPUBufferBinding | null,
  lse: GpuTensor | undefined,
  before: KernelStep[],
): KernelStep[] {
  const { context, problem, inputs, cfg, steps } = call;
  const { limits } = context.capabilities;
  const { softmaxScale, logitsSoftCap, queryHeads, queryLength, maxPages } = problem;
  const caches = boundCaches(call, before);
  const table = inputs.blockTable && boundIndices(steps, inputs.blockTable);
  const schedule = boundWork(call, caches.length, before);
  const { blockRows } = cfg;
  const partialBytes = Math.max(16, schedule.slots * schedule.slotBytes);
  checkBinding("partial results", partialBytes, limits);
  const partial = { buffer: steps.borrow(partialBytes), size: partialBytes };
  const statsBytes = Math.max(16, schedule.slots * blockRows * 8);
  const stats = { buffer: steps.borrow(statsBytes), size: statsBytes };
  const lsePlace = lse === undefined ? null : resultPlace(call, lse);
  const most = limits.maxComputeWorkgroupsPerDimension;
  const gridX = Math.max(1, Math.min(schedule.itemCount, most));
  const [left, right] = reach(problem);
  const params = (cache: BoundCache): AbsorbedParams => ({
    softmaxScale,
    logitsSoftCap,
    left,
    right,
    heads: queryHeads,
    queryLength,
    itemCount: schedule.itemCount,
    gridX,
    queryBase: query.base,
    outputBase: rows.base,
    lseBase: lsePlace?.base ?? 0,
    maxPages,
    tableBase: table?.base ?? 0,
    cacheBase: cache.base,
    cacheRow: cache.row,
    sequenceRows: cache.sequenceRows,
    firstPage: cache.firstPage,
    pageCount: cache.pageCount,
  });
  const ends = {
    [at.partial]: partial,
    [at.stats]: stats,
    [at.output]: rows.binding,
    ...(lsePlace && { [at.lse]: lsePlace.binding }),
    ...(sinks && { [at.sinks]: sinks }),
  };
  const whole = { ...shape, sharded: caches.length > 1 };
  const attended = caches.map((cache, shard): KernelStep => ({
    label: "attend",
    code: attends.wgsl(whole),
    bindings: {
      0: steps.params(absorbedParams(params(cache))),
      [at.items]: schedule.items[shard],
      [at.query]: query.binding,
      [at.cache]: cache.binding,
      ...(table && { [at.table]: table.binding }),
      ...ends,
    },
    workgroups: [gridX, Math.ceil(schedule.itemCount / gridX)],
  }));
  if (schedule.mergeCount === 0) return attended;
  // Lanes decide in which order splits are added up: with splits of a fixed length nothing of the batch may.
  const lanes = problem.splitKeys === null ? merge.mergeLanes(schedule.mostSplits) : merge.fixedLanes;
  const merging: KernelStep = {
    label: "merge splits",
    code: mergeSplitsSource(whole, blockRows, lanes),
    bindings: { 0: steps.params(absorbedParams(params(caches[0]))), 1: schedule.merges, ...ends },
    workgroups: [
      Math.min(schedule.mergeCount, most),
      blockRows * Math.ceil(schedule.mergeCount / most),
      Math.ceil(resultQuads(problem) / merge.mergeQuads(lanes)),
    ],
  };
  return [...attended, merging];
}
