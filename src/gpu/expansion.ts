// The expansion of latents to keys and values, one group of KV heads at a time: how large a group is, where its keys and
// values lie in scratch, and the dispatches that fill it. Forward and backward expand alike.

import type { FlashMLAConfig } from "../op/config.ts";
import type { MlaProblem } from "../op/mla_problem.ts";
import type { Capabilities, GpuLimits } from "./capabilities.ts";
import type { DispatchList } from "./dispatch_plan.ts";
import { expandSource } from "./kernel_sources.ts";
import { expandTile } from "./kernels/expand.ts";
import { type StorageElement, storageElement } from "./kernels/storage_element.ts";
import { checkBinding, checkWindow, limitError } from "./limit_checks.ts";
import {
  batchGap,
  denseWindow,
  isQuadAligned,
  type OperandLayout,
  type OperandLayouts,
  rowWindow,
} from "./operand_layout.ts";
import { chunks } from "./query_ranges.ts";
import { type Region, regionAlignment, regions } from "./regions.ts";

/** Bytes of scratch that are kept at a time, unless one head alone needs more. */
export const scratchLimit = 256 * 2 ** 20;

/** Where the expanded keys and values of one head group lie. Rows are keys, then heads, then columns. */
export interface ExpandedScratch {
  /** KV heads of a group; the last group may have fewer, in rows as wide as it needs. */
  readonly groupKvHeads: number;
  /** K_nope, `[keyRows, groupKvHeads, qkNopeHeadDim]`. */
  readonly keys: Region;
  /** V, `[keyRows, groupKvHeads, vHeadDim]`. */
  readonly values: Region;
  /** How attention loads both. */
  readonly element: StorageElement;
  /** Bytes of the buffer. */
  readonly bytes: number;
}

// Expanded keys and values stay in float32 whatever the storage: sums over the rank of products of halves pass the largest
// half, 65,504, where their softmax is still well defined.
const elementBytes = 4;

/**
 * Lays out the scratch of a problem's head groups.
 *
 * @throws {FlashMLAError} With code `limit` when one head does not fit.
 */
export function expandedScratch(problem: MlaProblem, limits: GpuLimits): ExpandedScratch {
  const { batch, keyLength, kvHeads, qkNopeHeadDim: P, vHeadDim: V } = problem;
  const keyRows = batch * keyLength;
  const headsPerKv = checkedHeadsPerKv(problem, limits);
  const sizeOf = (heads: number) => {
    const [keys, values] = regions([keyRows * heads * P * elementBytes, keyRows * heads * V * elementBytes]);
    return { keys, values, bytes: values.offset + values.size };
  };
  checkBinding("the expanded keys and values of one head", sizeOf(1).bytes, limits);
  const headBytes = keyRows * (P + V) * elementBytes;
  const most = Math.min(scratchLimit, limits.maxStorageBufferBindingSize - regionAlignment);
  const groupKvHeads = Math.max(
    1,
    Math.min(
      kvHeads,
      Math.floor(most / headBytes),
      Math.floor(limits.maxComputeWorkgroupsPerDimension / headsPerKv),
    ),
  );
  return {
    groupKvHeads,
    ...sizeOf(groupKvHeads),
    element: storageElement("f32", P % 4 === 0 && V % 4 === 0),
  };
}

/**
 * The query heads of one KV head, which a dispatch must take at once.
 *
 * @throws {FlashMLAError} With code `limit` when they are too many.
 */
export function checkedHeadsPerKv({ queryHeads, kvHeads }: MlaProblem, limits: GpuLimits): number {
  const heads = queryHeads / kvHeads;
  if (heads > limits.maxComputeWorkgroupsPerDimension) {
    throw limitError(`${heads} query heads per KV head`, "maxComputeWorkgroupsPerDimension", limits);
  }
  return heads;
}

/** The groups of KV heads in order. */
export function headGroups(
  { kvHeads }: MlaProblem,
  { groupKvHeads }: Pick<ExpandedScratch, "groupKvHeads">,
): { first: number; heads: number }[] {
  return chunks(kvHeads, groupKvHeads).map(([first, heads]) => ({ first, heads }));
}

/** How kernels load and store a tensor: in quads where all its rows and widths are aligned to them. */
export function quads(layout: OperandLayout, ...widths: number[]): StorageElement {
  if (layout.dtype === "u8") throw new TypeError("masks are loaded by words");
  return storageElement(layout.dtype, isQuadAligned(layout) && widths.every((width) => width % 4 === 0));
}

/** The kernels that expand. */
export function expansionKernels(
  problem: MlaProblem,
  config: FlashMLAConfig,
  { limits }: Capabilities,
  layouts: OperandLayouts,
): { readonly expandKeys: string; readonly expandValues: string } {
  const { keyLength, kvLoraRank, qkNopeHeadDim: P, vHeadDim: V } = problem;
  const { keyValue, wKc, wVc } = layouts as Required<OperandLayouts>;
  const tile = expandTile(config, limits);
  const source = (weight: OperandLayout, width: number) =>
    expandSource(tile, {
      latent: quads(keyValue, kvLoraRank),
      weight: quads(weight, width),
      expanded: storageElement("f32", width % 4 === 0),
      gapped: batchGap(keyValue, keyLength) !== 0,
    });
  return { expandKeys: source(wKc, P), expandValues: source(wVc, V) };
}

/**
 * Adds the dispatches that expand one head group.
 *
 * @throws {FlashMLAError} With code `limit` when an operand passes a binding or a dispatch is too wide.
 */
export function addExpansion(
  list: DispatchList,
  problem: MlaProblem,
  config: FlashMLAConfig,
  { limits }: Capabilities,
  layouts: OperandLayouts,
  scratch: ExpandedScratch,
  group: { readonly first: number; readonly heads: number },
): void {
  const { batch, keyLength, kvHeads, kvLoraRank, qkNopeHeadDim, vHeadDim } = problem;
  const { keyValue, wKc, wVc } = layouts as Required<OperandLayouts>;
  const tile = expandTile(config, limits);
  const keyRows = batch * keyLength;
  const latents = checkWindow("keyValue", rowWindow(keyValue, keyLength, 0, keyRows, kvLoraRank), limits);
  const sides = [
    { kernel: "expandKeys", side: "keys", name: "wKc", layout: wKc, width: qkNopeHeadDim },
    { kernel: "expandValues", side: "values", name: "wVc", layout: wVc, width: vHeadDim },
  ] as const;
  for (const { kernel, side, name, layout, width } of sides) {
    const weights = checkWindow(name, denseWindow(layout, kvLoraRank * kvHeads * width), limits);
    const columnTiles = Math.ceil((group.heads * width) / tile.blockN);
    if (columnTiles > limits.maxComputeWorkgroupsPerDimension) {
      throw limitError(`${columnTiles} column tiles of ${side}`, "maxComputeWorkgroupsPerDimension", limits);
    }
    const rowTiles = Math.ceil(keyRows / tile.blockM);
    for (const [firstTile, tiles] of chunks(rowTiles, limits.maxComputeWorkgroupsPerDimension)) {
      list.add(
        { kernel, range: 0, workgroups: [columnTiles, tiles] },
        [[1, "keyValue", latents], [2, name, weights], [3, "expanded", scratch[side]]],
        [],
        [
          ...[keyRows, group.heads * width, group.first * width, firstTile, kvLoraRank, kvHeads * width],
          ...[latents.base, keyValue.row, keyLength, batchGap(keyValue, keyLength), weights.base],
        ],
      );
    }
  }
}
