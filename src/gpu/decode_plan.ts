// How one call of decoding runs: which kernels, over which memory, in which order.
//
//   absorb queries (or bind them as they are) → attention over latents, one dispatch for each buffer of the cache
//   → merge splits, where there are any → project by wVc, where weights are given → store, where widths are odd

import type { DecodeConfig } from "../op/decode_config.ts";
import type { DecodeInputs } from "../op/decode_implementation.ts";
import type { DecodeProblem } from "../op/decode_problem.ts";
import { reach } from "../op/segments.ts";
import { sinksPerHead } from "../op/score_options.ts";
import { type AnyTensor, denseStrides, elementBytes, elementCount, type GpuTensor, isGpuTensor } from "../op/tensor.ts";
import { boundIndices, boundTensor } from "./bound_tensor.ts";
import { type Attends, attendsBy, decodeShape } from "./decode_configs.ts";
import { decodeSchedule, splitLength } from "./decode_schedule.ts";
import type { GpuContext } from "./device.ts";
import { type KernelStep, KernelSteps } from "./kernel_steps.ts";
import * as absorb from "./kernels/absorb_query.ts";
import * as append from "./kernels/append_latents.ts";
import {
  absorbedBindings as at,
  type AbsorbedParams,
  absorbedParams,
  type AbsorbedShape,
  quadElements,
  resultQuads,
  rowQuads,
  type RowStorage,
  unbounded,
} from "./kernels/absorbed_operands.ts";
import { productColumns, productTokens } from "./kernels/head_product.ts";
import * as merge from "./kernels/merge_splits.ts";
import * as project from "./kernels/project_output.ts";
import * as sinksKernel from "./kernels/sinks.ts";
import * as split from "./kernels/split_keys.ts";
import * as store from "./kernels/store_rows.ts";
import { GpuLatentStore } from "./latent_store.ts";
import { checkBinding, limitError } from "./limit_checks.ts";
import { sinkSums } from "./sink_sums.ts";

/** Where results go, on the GPU. */
export interface DecodeResults {
  /** Takes the result; dense. */
  readonly output: GpuTensor;
  /** Takes the log-sum-exp in float32; dense. */
  readonly lse?: GpuTensor;
}

/** Bytes that partial results may take: beyond that splits become longer. */
const partialLimit = 256 * 2 ** 20;

/** Workgroups of kernels that stride over their work. */
const stridingWorkgroups = 2048;

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
    const plan = new DecodePlan(context, problem, inputs, cfg, steps);
    await steps.bind("decode", await plan.kernels(results));
    return steps;
  } catch (error) {
    steps.discard();
    throw error;
  }
}

/** A part of the cache that one dispatch reads. */
interface BoundCache {
  readonly binding: GPUBufferBinding;
  readonly base: number;
  readonly row: number;
  readonly sequenceRows: number;
  readonly firstPage: number;
  readonly pageCount: number;
}

/** Rows of results on their way. */
interface ResultRows {
  readonly binding: GPUBufferBinding;
  /** Quads of four elements from the binding's start to the first row. */
  readonly base: number;
  readonly storage: RowStorage;
}

class DecodePlan {
  readonly #context: GpuContext;
  readonly #problem: DecodeProblem;
  readonly #inputs: DecodeInputs;
  readonly #cfg: DecodeConfig;
  readonly #steps: KernelSteps;
  readonly #attends: Attends;
  readonly #tokens: number;

  constructor(
    context: GpuContext,
    problem: DecodeProblem,
    inputs: DecodeInputs,
    cfg: DecodeConfig,
    steps: KernelSteps,
  ) {
    this.#context = context;
    this.#problem = problem;
    this.#inputs = inputs;
    this.#cfg = cfg;
    this.#steps = steps;
    this.#attends = attendsBy(cfg, context.capabilities);
    this.#tokens = problem.batch * problem.queryLength;
  }

  async kernels(results: DecodeResults): Promise<KernelStep[]> {
    const { output, lse } = results;
    const before: KernelStep[] = [];
    const after: KernelStep[] = [];
    const query = this.#query(before);
    const sinks = await this.#sinks(before);
    const rows = this.#inputs.wVc === undefined
      ? this.#storedRows(output, resultQuads(this.#problem) * 4, after)
      : this.#projected(output, after);
    const shape: AbsorbedShape = {
      ...decodeShape(this.#problem, this.#cfg),
      query: query.storage,
      output: rows.storage,
      sinkQuads: sinks === null ? 0 : Math.ceil(this.#problem.queryHeads / 4),
      lse: lse !== undefined,
    };
    const attended = this.#attention(shape, query, rows, sinks, lse, before);
    return [...before, ...attended, ...after];
  }

  /** Query rows as the kernel reads them: the caller's where they are so already. */
  #query(
    before: KernelStep[],
  ): { readonly binding: GPUBufferBinding; readonly base: number; readonly storage: RowStorage } {
    const { query, wKc } = this.#inputs;
    const { queryHeads, queryLength, kvHeads, kvLoraRank, qkNopeHeadDim, qkRopeHeadDim } = this.#problem;
    const { limits } = this.#context.capabilities;
    const bound = boundTensor(this.#steps, "query", query, limits);
    const { storage } = bound.elements;
    const wanted = this.#attends.query;
    const perQuad = quadElements(storage);
    const width = query.shape[3];
    const isDense = bound.strides.every((stride, axis) =>
      stride === denseStrides(query.shape)[axis] || query.shape[axis] === 1
    );
    const isAligned = width % perQuad === 0 && bound.base % perQuad === 0;
    if (wKc === undefined && isDense && isAligned && (wanted === "either" || wanted === storage)) {
      return { binding: bound.binding, base: bound.base / perQuad, storage };
    }
    const result: RowStorage = wanted === "halves" ? "halves" : "floats";
    const weight = wKc === undefined ? null : boundTensor(this.#steps, "wKc", wKc, limits);
    const quads = rowQuads(this.#problem, result);
    const size = this.#tokens * queryHeads * quads * 16;
    checkBinding("the absorbed query", size, limits);
    const binding = { buffer: this.#steps.borrow(size), size };
    const [item, row, head] = bound.strides;
    before.push({
      label: "absorb query",
      code: absorb.wgsl({
        query: bound.elements,
        weight: weight && weight.elements,
        result,
        kvLoraRank,
        qkNopeHeadDim: qkNopeHeadDim ?? 0,
        qkRopeHeadDim,
      }),
      bindings: {
        0: this.#steps.params(
          Uint32Array.of(
            ...[this.#tokens, queryLength, queryHeads, kvHeads, bound.base, item, row, head, weight?.base ?? 0],
          ),
        ),
        [absorb.absorbQueryBindings.query]: bound.binding,
        ...(weight && { [absorb.absorbQueryBindings.weight]: weight.binding }),
        [absorb.absorbQueryBindings.rows]: binding,
      },
      workgroups: weight === null
        ? [Math.min(stridingWorkgroups, Math.ceil(this.#tokens * queryHeads * quads * quadElements(result) / 256))]
        : this.#productGrid(quads * quadElements(result)),
    });
    return { binding, base: 0, storage: result };
  }

  #productGrid(columns: number): [number, number, number] {
    const { limits } = this.#context.capabilities;
    const grid: [number, number, number] = [
      Math.ceil(columns / productColumns),
      Math.ceil(this.#tokens / productTokens),
      this.#problem.queryHeads,
    ];
    if (grid.some((groups) => groups > limits.maxComputeWorkgroupsPerDimension)) {
      throw limitError(`${grid.join(" × ")} workgroups`, "maxComputeWorkgroupsPerDimension", limits);
    }
    return grid;
  }

  /** The sinks' sums as a uniform, or null without sinks. */
  async #sinks(before: KernelStep[]): Promise<GPUBufferBinding | null> {
    const { softmaxAux } = this.#inputs;
    const { queryHeads, sinks } = this.#problem;
    if (softmaxAux === undefined) return null;
    const size = Math.ceil(queryHeads / 4) * 16;
    const readable = isGpuTensor(softmaxAux) && (softmaxAux.dtype === "f32" || this.#context.capabilities.f16);
    if (!isGpuTensor(softmaxAux) || !readable) {
      const sums = new Float32Array(size / 4);
      sums.set(await sinkSums(softmaxAux, queryHeads));
      return { buffer: this.#steps.upload(sums.buffer, "storageAndUniform"), size };
    }
    const { binding, base, strides } = boundTensor(
      this.#steps,
      "softmaxAux",
      softmaxAux,
      this.#context.capabilities.limits,
    );
    const own = { buffer: this.#steps.borrow(size, "storageAndUniform"), size };
    const perHead = sinksPerHead(softmaxAux.shape, queryHeads) ? strides[0] : 0;
    before.push({
      label: "sinks",
      code: sinksKernel.wgsl(softmaxAux.dtype),
      bindings: {
        0: this.#steps.params(Uint32Array.of(queryHeads, sinks, base, perHead)),
        1: binding,
        2: own,
      },
      workgroups: [Math.ceil(queryHeads / sinksKernel.workgroupSize)],
    });
    return own;
  }

  /** The dense tensor that takes the result, as a binding. */
  #place(output: GpuTensor): { readonly binding: GPUBufferBinding; readonly base: number } {
    const { buffer, offset = 0, dtype, shape } = output;
    const start = Math.floor(offset / 256) * 256;
    const size = Math.ceil((offset - start + elementCount(shape) * elementBytes(dtype)) / 4) * 4;
    checkBinding("the result", size, this.#context.capabilities.limits);
    return { binding: { buffer, offset: start, size }, base: (offset - start) / elementBytes(dtype) };
  }

  /** Rows of the result's width, in the result itself where whole quads fit; else stored from memory of ours afterwards. */
  #storedRows(output: GpuTensor, stride: number, after: KernelStep[]): ResultRows {
    const { binding, base } = this.#place(output);
    const width = output.shape[3];
    const storage: RowStorage = output.dtype === "f16" ? "halves" : "floats";
    const quadBytes = 4 * elementBytes(output.dtype);
    if (width % 4 === 0 && base % 4 === 0 && binding.size! % quadBytes === 0) {
      return { binding, base: base / 4, storage };
    }
    const rows = this.#tokens * this.#problem.queryHeads;
    const size = Math.max(16, rows * stride * 4);
    checkBinding("the result", size, this.#context.capabilities.limits);
    const own = { buffer: this.#steps.borrow(size), size };
    const words = output.dtype === "f16" ? base / 2 : base;
    after.push({
      label: "store rows",
      code: store.wgsl(storage),
      bindings: {
        0: this.#steps.params(Uint32Array.of(rows * width, width, stride, words)),
        1: own,
        2: binding,
      },
      workgroups: [Math.min(stridingWorkgroups, Math.ceil(rows * width / store.workgroupSize))],
    });
    return { binding: own, base: 0, storage: "floats" };
  }

  /** Latent rows that are projected into the result afterwards. */
  #projected(output: GpuTensor, after: KernelStep[]): ResultRows {
    const { limits } = this.#context.capabilities;
    const { queryHeads, kvHeads, kvLoraRank, vHeadDim } = this.#problem;
    const size = this.#tokens * queryHeads * resultQuads(this.#problem) * 16;
    checkBinding("the attended latents", size, limits);
    const attended = { buffer: this.#steps.borrow(size), size };
    const weight = boundTensor(this.#steps, "wVc", this.#inputs.wVc!, limits);
    const stored: KernelStep[] = [];
    const isDirect = output.dtype === "f32";
    const place = isDirect ? this.#place(output) : null;
    const into: ResultRows = place === null
      ? this.#storedRows(output, vHeadDim, stored)
      : { binding: place.binding, base: 0, storage: "floats" };
    after.push({
      label: "project output",
      code: project.wgsl({ attended: "floats", weight: weight.elements, result: into.storage, kvLoraRank, vHeadDim }),
      bindings: {
        0: this.#steps.params(
          Uint32Array.of(this.#tokens, queryHeads, kvHeads, weight.base, place?.base ?? into.base * 4),
        ),
        [project.projectOutputBindings.attended]: attended,
        [project.projectOutputBindings.weight]: weight.binding,
        [project.projectOutputBindings.output]: into.binding,
      },
      workgroups: this.#productGrid(vHeadDim),
    }, ...stored);
    return { binding: attended, base: 0, storage: "floats" };
  }

  #caches(before: KernelStep[]): BoundCache[] {
    const { cache } = this.#inputs;
    if (cache instanceof GpuLatentStore) {
      return cache.shards.map(({ buffer, firstPage, pages }) => ({
        binding: { buffer },
        base: 0,
        row: cache.rowQuads,
        sequenceRows: 0,
        firstPage,
        pageCount: pages,
      }));
    }
    return [this.#tensorCache(cache as AnyTensor, before)];
  }

  /** A tensor without pages: the caller's where its rows begin at whole quads; else a copy whose rows do. */
  #tensorCache(cache: AnyTensor, before: KernelStep[]): BoundCache {
    const { limits } = this.#context.capabilities;
    const [sequences, keyLength, width] = cache.shape;
    const bound = boundTensor(this.#steps, "cache", cache, limits);
    const { storage } = bound.elements;
    const perQuad = quadElements(storage);
    const [item, row] = bound.strides;
    const fixed = { firstPage: 0, pageCount: 0 };
    const aligned = bound.base % perQuad === 0 && row % perQuad === 0 && (sequences === 1 || item % row === 0);
    if (aligned && bound.binding.size! % 16 === 0) {
      const sequenceRows = sequences === 1 ? 0 : item / row;
      return { ...fixed, binding: bound.binding, base: bound.base / perQuad, row: row / perQuad, sequenceRows };
    }
    const quads = rowQuads(this.#problem, storage);
    const count = sequences * keyLength;
    const size = Math.max(16, count * quads * 16);
    checkBinding("the cache with padded rows", size, limits);
    const padded = { buffer: this.#steps.borrow(size), size };
    const places = Uint32Array.from({ length: count }, (_, i) => i);
    const fourths = quads * perQuad / 4;
    before.push({
      label: "pad rows",
      code: append.wgsl(bound.elements, storage),
      bindings: {
        0: this.#steps.params(Uint32Array.of(count, width, fourths, keyLength, bound.base, item, row, 0, count)),
        1: bound.binding,
        2: { buffer: this.#steps.upload(places), size: Math.max(16, 4 * count) },
        3: padded,
      },
      workgroups: [Math.min(stridingWorkgroups, Math.ceil(count * fourths / append.workgroupSize))],
    });
    return { ...fixed, binding: padded, base: 0, row: quads, sequenceRows: keyLength };
  }

  /** The items of each of the cache's buffers, and the entries of the merging kernel. */
  #schedule(shards: number, before: KernelStep[]): Scheduled {
    const { blockRows, blockK, workgroups } = this.#cfg;
    const { maxStorageBufferBindingSize } = this.#context.capabilities.limits;
    const slotBytes = blockRows * resultQuads(this.#problem) * 16;
    const maxSlots = Math.floor(Math.min(partialLimit, maxStorageBufferBindingSize) / slotBytes);
    if (this.#problem.seqLens === null) return this.#scheduleOnGpu(shards, maxSlots, before);
    const made = decodeSchedule(this.#problem, { blockRows, blockK, workgroups }, shards, maxSlots);
    return {
      ...made,
      slotBytes,
      items: made.items.map((words) => ({ buffer: this.#steps.upload(words), size: words.byteLength })),
      merges: { buffer: this.#steps.upload(made.merges), size: made.merges.byteLength },
    };
  }

  #scheduleOnGpu(shards: number, maxSlots: number, before: KernelStep[]): Scheduled {
    const { blockRows, blockK, workgroups } = this.#cfg;
    const { sequences, queryHeads, tokenStarts, capacity, splitKeys } = this.#problem;
    const tokens = tokenStarts[1];
    const sequenceBlocks = Math.ceil(tokens * queryHeads / blockRows);
    const blocks = sequences * sequenceBlocks;
    const longest = { keyStart: 0, keyEnd: capacity, sequence: 0, row: 0, rows: 0, diagonal: 0 };
    let length = splitKeys ?? splitLength(Array.from({ length: blocks }, () => longest), blockK, workgroups);
    const splitsOf = () => Math.max(1, Math.ceil(capacity / length) + (splitKeys === null ? 0 : 1));
    while (splitKeys === null && blocks * splitsOf() * shards > maxSlots && splitsOf() > 1) length *= 2;
    const maxSplits = splitsOf();
    const lens = boundIndices(this.#steps, this.#inputs.seqLens);
    const [left, right] = reach(this.#problem).map((keys) => Math.min(keys, unbounded));
    const itemBytes = split.itemBytes(blocks * maxSplits);
    const merges = { buffer: this.#steps.borrow(16 * blocks), size: Math.max(16, 16 * blocks) };
    const items = Array.from({ length: shards }, (_, shard) => {
      const own = { buffer: this.#steps.borrow(itemBytes), size: itemBytes };
      const words = [blocks, sequenceBlocks, blockRows, tokens, queryHeads, length, maxSplits, shard, shards, capacity];
      before.push({
        label: "split keys",
        code: split.wgsl(),
        bindings: {
          0: this.#steps.params(Uint32Array.of(...words, left, right, lens.base, splitKeys === null ? 0 : 1)),
          1: lens.binding,
          2: own,
          3: merges,
        },
        workgroups: [Math.min(stridingWorkgroups, Math.ceil(blocks / split.workgroupSize))],
      });
      return own;
    });
    return {
      items,
      merges,
      itemCount: blocks * maxSplits,
      mergeCount: blocks,
      slots: blocks * maxSplits * shards,
      slotBytes: blockRows * resultQuads(this.#problem) * 16,
    };
  }

  #attention(
    shape: AbsorbedShape,
    query: { readonly binding: GPUBufferBinding; readonly base: number },
    rows: ResultRows,
    sinks: GPUBufferBinding | null,
    lse: GpuTensor | undefined,
    before: KernelStep[],
  ): KernelStep[] {
    const { limits } = this.#context.capabilities;
    const { softmaxScale, logitsSoftCap, queryHeads, queryLength, maxPages } = this.#problem;
    const caches = this.#caches(before);
    const table = this.#inputs.blockTable && boundIndices(this.#steps, this.#inputs.blockTable);
    const schedule = this.#schedule(caches.length, before);
    const { blockRows } = this.#cfg;
    const partialBytes = Math.max(16, schedule.slots * schedule.slotBytes);
    checkBinding("partial results", partialBytes, limits);
    const partial = { buffer: this.#steps.borrow(partialBytes), size: partialBytes };
    const statsBytes = Math.max(16, schedule.slots * blockRows * 8);
    const stats = { buffer: this.#steps.borrow(statsBytes), size: statsBytes };
    const lsePlace = lse === undefined ? null : this.#place(lse);
    const most = limits.maxComputeWorkgroupsPerDimension;
    const gridX = Math.max(1, Math.min(schedule.itemCount, most));
    const [left, right] = reach(this.#problem);
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
      code: this.#attends.wgsl(whole),
      bindings: {
        0: this.#steps.params(absorbedParams(params(cache))),
        [at.items]: schedule.items[shard],
        [at.query]: query.binding,
        [at.cache]: cache.binding,
        ...(table && { [at.table]: table.binding }),
        ...ends,
      },
      workgroups: [gridX, Math.ceil(schedule.itemCount / gridX)],
    }));
    if (schedule.mergeCount === 0) return attended;
    const merging: KernelStep = {
      label: "merge splits",
      code: merge.wgsl(whole, blockRows),
      bindings: { 0: this.#steps.params(absorbedParams(params(caches[0]))), 1: schedule.merges, ...ends },
      workgroups: [
        Math.min(schedule.mergeCount, most),
        blockRows * Math.ceil(schedule.mergeCount / most),
        Math.ceil(resultQuads(this.#problem) / merge.mergeQuads),
      ],
    };
    return [...attended, merging];
  }
}

interface Scheduled {
  readonly items: readonly GPUBufferBinding[];
  readonly itemCount: number;
  readonly merges: GPUBufferBinding;
  readonly mergeCount: number;
  readonly slots: number;
  readonly slotBytes: number;
}
