// What a call will dispatch, worked out on the host: head groups that keep the expanded keys and values within bounds,
// query ranges that keep every binding within the device's limits, and the dispatches themselves. No GPU is touched.

import type { FlashMLAConfig } from "../op/config.ts";
import type { MlaProblem } from "../op/mla_problem.ts";
import type { Capabilities } from "./capabilities.ts";
import * as attend from "./kernels/attend.ts";
import * as expand from "./kernels/expand.ts";
import { attendSource, expandSource } from "./kernel_sources.ts";
import { storageElement } from "./kernels/storage_element.ts";
import { checkBinding, checkWindow, limitError } from "./limit_checks.ts";
import {
  batchGap,
  type BindingWindow,
  denseLayouts,
  denseWindow,
  emptyBinding,
  isQuadAligned,
  type LaidOut,
  type OperandLayout,
  type OperandLayouts,
  rowWindow,
} from "./operand_layout.ts";
import { chunks, rowWidth, splitQueries } from "./query_ranges.ts";
import { blockWords, type RowRange, schedule } from "./schedule.ts";

/** Bytes of expanded keys and values that are kept at a time, unless one head alone needs more. */
export const scratchLimit = 256 * 2 ** 20;

/** Bytes between two parameter blocks: WebGPU's strictest alignment of a uniform binding. */
export const paramsStride = 256;

/** Bytes of one parameter block, at least as many as the largest of the kernels' `Params`. */
export const paramsBytes = 96;

/** The operands that the plan's dispatches bind. */
export type Operand = LaidOut | "params" | "blocks" | "keys" | "values";

/** One binding of a dispatch. */
export interface Binding {
  /** Index in the kernel's group 0. */
  readonly binding: number;
  /** What is bound. */
  readonly operand: Operand;
  /** Bytes from the operand's start. */
  readonly offset: number;
  /** Bytes to bind. */
  readonly size: number;
}

/** One dispatch. */
export interface Dispatch {
  /** Which of the plan's kernels runs. */
  readonly kernel: "expandKeys" | "expandValues" | "attend";
  /** What is bound; index 0 is the parameter block. */
  readonly bindings: readonly Binding[];
  /** Index of the dispatch's parameter block. */
  readonly params: number;
  /** Index into {@link AttentionPlan.queryRanges}; 0 for the expansions. */
  readonly range: number;
  /** Workgroups along x and y. */
  readonly workgroups: readonly [number, number];
}

/** A query range with its schedule. */
export interface QueryRange extends RowRange {
  /** The schedule buffer's words. */
  readonly blocks: Uint32Array<ArrayBuffer>;
}

/** All that it takes to run one call, beside the data. */
export interface AttentionPlan {
  /** WGSL of each kernel. */
  readonly kernels: Readonly<Record<Dispatch["kernel"], string>>;
  /** The dispatches in order; those of one head group reuse the scratch of the one before. */
  readonly dispatches: readonly Dispatch[];
  /** The parameter blocks, {@link paramsStride} bytes apart. */
  readonly params: ArrayBuffer;
  /** Where the tensors lie. */
  readonly layouts: OperandLayouts;
  /** Ranges of query rows that are uploaded, computed and read back as one. */
  readonly queryRanges: readonly QueryRange[];
  /** Bytes of expanded keys of one head group. */
  readonly keysBytes: number;
  /** Bytes of expanded values of one head group. */
  readonly valuesBytes: number;
}

/** Why this configuration cannot run this problem on such a device, or null when it can. */
export function whyInvalid(config: FlashMLAConfig, problem: MlaProblem, capabilities: Capabilities): string | null {
  return attend.whyInvalid(config, problem, capabilities) ??
    expand.whyInvalid(expand.expandTile(config, capabilities.limits), capabilities.limits);
}

/**
 * Plans one call.
 *
 * @param problem The validated problem; batch, lengths and heads must not be empty.
 * @param config A configuration that {@link whyInvalid} accepts.
 * @param capabilities The device's capabilities.
 * @param layouts Where the tensors lie; dense float32 in memory of ours when absent.
 * @throws {FlashMLAError} With code `limit`, naming it, when an operand cannot be cut into pieces that fit.
 */
export function attentionPlan(
  problem: MlaProblem,
  config: FlashMLAConfig,
  capabilities: Capabilities,
  layouts: OperandLayouts = denseLayouts(problem),
): AttentionPlan {
  const { limits } = capabilities;
  const { batch, keyLength, queryLength, queryHeads, kvHeads, rope } = problem;
  const { kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim } = problem;
  const { query, keyValue, wKc, wVc, bQ, bK, output } = layouts as Required<OperandLayouts>;
  // Expanded keys and values stay in float32 whatever the storage: sums over the rank of products of halves pass the
  // largest half, 65,504, where their softmax is still well defined.
  const scratchBytes = 4;
  const keyRows = batch * keyLength;
  const headsPerKv = queryHeads / kvHeads;
  const latents = checkWindow("keyValue", rowWindow(keyValue, keyLength, 0, keyRows, kvLoraRank), limits);
  const weights = {
    keys: checkWindow("wKc", denseWindow(wKc, kvLoraRank * kvHeads * qkNopeHeadDim), limits),
    values: checkWindow("wVc", denseWindow(wVc, kvLoraRank * kvHeads * vHeadDim), limits),
  };
  const ropeKeys = rope === "none"
    ? null
    : checkWindow("bK", rowWindow(bK, keyLength, 0, keyRows, qkRopeHeadDim), limits);

  const headBytes = keyRows * Math.max(qkNopeHeadDim, vHeadDim) * scratchBytes;
  checkBinding("the expanded keys or values of one head", headBytes, limits);
  const groupKvHeads = Math.max(
    1,
    Math.min(
      kvHeads,
      Math.floor(scratchLimit / (keyRows * (qkNopeHeadDim + vHeadDim) * scratchBytes)),
      Math.floor(limits.maxStorageBufferBindingSize / headBytes),
      Math.floor(limits.maxComputeWorkgroupsPerDimension / headsPerKv),
    ),
  );
  if (headsPerKv > limits.maxComputeWorkgroupsPerDimension) {
    throw limitError(`${headsPerKv} query heads per KV head`, "maxComputeWorkgroupsPerDimension", limits);
  }
  const scratchSize = (headDim: number) => Math.max(emptyBinding, keyRows * groupKvHeads * headDim * scratchBytes);
  const scratchSizes = { keys: scratchSize(qkNopeHeadDim), values: scratchSize(vHeadDim) };

  const queryRanges = splitQueries(problem, layouts, limits).map((rows) => ({
    ...rows,
    blocks: schedule(problem, config.blockQ, rows),
  }));
  const tile = expand.expandTile(config, limits);
  const dispatches: Dispatch[] = [];
  const params: { readonly floats: readonly number[]; readonly words: readonly number[] }[] = [];
  const add = (
    dispatch: Pick<Dispatch, "kernel" | "range" | "workgroups">,
    operands: readonly (readonly [Operand, Pick<BindingWindow, "offset" | "size">])[],
    floats: readonly number[],
    words: readonly number[],
  ) => {
    const own = { offset: params.length * paramsStride, size: paramsBytes };
    const bindings = [["params", own] as const, ...operands]
      .map(([operand, { offset, size }], binding) => ({ binding, operand, offset, size }));
    dispatches.push({ ...dispatch, bindings, params: params.length });
    params.push({ floats, words });
  };

  for (let first = 0; first < kvHeads; first += groupKvHeads) {
    const heads = Math.min(groupKvHeads, kvHeads - first);
    for (const side of ["keys", "values"] as const) {
      const headDim = side === "keys" ? qkNopeHeadDim : vHeadDim;
      const rowTiles = Math.ceil(keyRows / tile.blockM);
      const columnTiles = Math.ceil((heads * headDim) / tile.blockN);
      if (columnTiles > limits.maxComputeWorkgroupsPerDimension) {
        throw limitError(`${columnTiles} column tiles of ${side}`, "maxComputeWorkgroupsPerDimension", limits);
      }
      for (const [firstTile, tiles] of chunks(rowTiles, limits.maxComputeWorkgroupsPerDimension)) {
        add(
          {
            kernel: side === "keys" ? "expandKeys" : "expandValues",
            range: 0,
            workgroups: [columnTiles, tiles],
          },
          [
            ["keyValue", latents],
            [side === "keys" ? "wKc" : "wVc", weights[side]],
            [side, { offset: 0, size: scratchSizes[side] }],
          ],
          [],
          [
            ...[keyRows, heads * headDim, first * headDim, firstTile, kvLoraRank, kvHeads * headDim],
            ...[latents.base, keyValue.row, keyLength, batchGap(keyValue, keyLength), weights[side].base],
          ],
        );
      }
    }
    queryRanges.forEach(({ start, end, blocks }, range) => {
      const rowsOf = (what: string, layout: OperandLayout, width: number) =>
        checkWindow(what, rowWindow(layout, queryLength, start, end, width), limits);
      const queries = rowsOf("query", query, rowWidth(query, problem, "query"));
      const outputs = rowsOf("the output", output, rowWidth(output, problem, "output"));
      const ropeQueries = rope === "shared" ? rowsOf("bQ", bQ, qkRopeHeadDim) : null;
      const count = blocks.length / blockWords;
      for (const [firstBlock, tiles] of chunks(count, limits.maxComputeWorkgroupsPerDimension)) {
        add(
          { kernel: "attend", range, workgroups: [heads * headsPerKv, tiles] },
          [
            ["blocks", { offset: 0, size: blocks.byteLength }],
            ["query", queries],
            ["keys", { offset: 0, size: scratchSizes.keys }],
            ["values", { offset: 0, size: scratchSizes.values }],
            ["output", outputs],
            ...(ropeKeys === null ? [] : [["bK", ropeKeys] as const]),
            ...(ropeQueries === null ? [] : [["bQ", ropeQueries] as const]),
          ],
          [problem.softmaxScale * Math.LOG2E],
          [
            ...[first * headsPerKv, heads, firstBlock, headsPerKv, qkNopeHeadDim, qkRopeHeadDim, vHeadDim],
            ...[queries.base, query.row, query.head, batchGap(query, queryLength)],
            ...[outputs.base, output.row, output.head, batchGap(output, queryLength)],
            ...(ropeKeys === null ? [0, 0, 0] : [ropeKeys.base, bK.row, batchGap(bK, keyLength)]),
            ...(ropeQueries === null ? [0, 0, 0] : [ropeQueries.base, bQ.row, batchGap(bQ, queryLength)]),
          ],
        );
      }
    });
  }

  const quads = (layout: OperandLayout, ...widths: number[]) =>
    storageElement(layout.dtype, isQuadAligned(layout) && widths.every((width) => width % 4 === 0));
  const expanded = (headDim: number) => storageElement("f32", headDim % 4 === 0);
  const gapped = batchGap(keyValue, keyLength) !== 0;
  return {
    kernels: {
      expandKeys: expandSource(tile, {
        latent: quads(keyValue, kvLoraRank),
        weight: quads(wKc, qkNopeHeadDim),
        expanded: expanded(qkNopeHeadDim),
        gapped,
      }),
      expandValues: expandSource(tile, {
        latent: quads(keyValue, kvLoraRank),
        weight: quads(wVc, vHeadDim),
        expanded: expanded(vHeadDim),
        gapped,
      }),
      attend: attendSource(config, {
        vHeadDim,
        rope,
        query: quads(query, qkNopeHeadDim, rope === "in_query" ? qkRopeHeadDim : 0),
        keys: expanded(qkNopeHeadDim),
        values: expanded(vHeadDim),
        output: quads(output, vHeadDim),
        ropeKey: rope === "none" ? "f32" : quads(bK, qkRopeHeadDim),
        ropeQuery: rope === "shared" ? quads(bQ, qkRopeHeadDim) : "f32",
      }, capabilities),
    },
    dispatches,
    params: packParams(params),
    layouts,
    queryRanges,
    keysBytes: scratchSizes.keys,
    valuesBytes: scratchSizes.values,
  };
}

function packParams(
  blocks: readonly { readonly floats: readonly number[]; readonly words: readonly number[] }[],
): ArrayBuffer {
  const packed = new ArrayBuffer(blocks.length * paramsStride);
  blocks.forEach(({ floats, words }, i) => {
    new Float32Array(packed, i * paramsStride, floats.length).set(floats);
    // Negative gaps wrap around, as the kernels' arithmetic does.
    new Uint32Array(packed, i * paramsStride + floats.length * 4, words.length).set(words.map((word) => word >>> 0));
  });
  return packed;
}
