// The expansion on matrix units: keys, values and rotary keys of one head group in halves, in one buffer laid out as
// matrix_scratch.ts says.

import type { MlaProblem } from "../op/mla_problem.ts";
import type { Capabilities, GpuLimits } from "./capabilities.ts";
import type { DispatchList } from "./dispatch_plan.ts";
import { checkedHeadsPerKv, quads, scratchLimit } from "./expansion.ts";
import { matrixExpandSource, matrixRopeSource } from "./kernel_sources.ts";
import { isWhole, paddedColumns } from "./kernels/matrix_expand.ts";
import { workgroups as ropeWorkgroups } from "./kernels/matrix_rope.ts";
import { matrixScratch } from "./kernels/matrix_scratch.ts";
import { checkBinding, checkWindow, halvedUntil, limitError } from "./limit_checks.ts";
import { expandTile } from "./matrix_config.ts";
import { batchGap, denseWindow, isEightAligned, type OperandLayouts, rowWindow } from "./operand_layout.ts";
import { chunks } from "./query_ranges.ts";

/** The most KV heads of a group whose scratch keeps to the limits. */
export function matrixGroupHeads(problem: MlaProblem, limits: GpuLimits): number {
  const { batch, keyLength, kvHeads } = problem;
  const headsPerKv = checkedHeadsPerKv(problem, limits);
  const bytes = (heads: number) => matrixScratch(problem, batch * keyLength, heads).bytes;
  checkBinding("the expanded keys and values of one head", bytes(1), limits);
  const fits = (heads: number) =>
    bytes(heads) <= Math.min(scratchLimit, limits.maxStorageBufferBindingSize) &&
    heads * headsPerKv <= limits.maxComputeWorkgroupsPerDimension;
  return halvedUntil(kvHeads, fits);
}

/** Bytes of the scratch of a group. */
export function matrixScratchBytes(problem: MlaProblem, heads: number): number {
  return Math.max(16, matrixScratch(problem, problem.batch * problem.keyLength, heads).bytes);
}

/** The kernels that expand. */
export function matrixExpansionKernels(
  problem: MlaProblem,
  capabilities: Capabilities,
  layouts: OperandLayouts,
): Record<string, string> {
  const { keyLength, kvLoraRank, qkNopeHeadDim, vHeadDim, qkRopeHeadDim: R, rope } = problem;
  const { keyValue, wKc, wVc, bK } = layouts as Required<OperandLayouts>;
  const tile = expandTile(capabilities);
  const source = (weight: typeof wKc, headDim: number) =>
    matrixExpandSource(tile, {
      ...isWhole(tile, kvLoraRank, headDim) && isEightAligned(keyValue) && isEightAligned(weight)
        ? { latent: "vec4<u32>", weight: "vec4<u32>" }
        : { latent: quads(keyValue, kvLoraRank), weight: quads(weight, headDim) },
      headDim,
      gapped: batchGap(keyValue, keyLength) !== 0,
    }, capabilities.matrixUnits!);
  return {
    expandKeys: source(wKc, qkNopeHeadDim),
    expandValues: source(wVc, vHeadDim),
    ...(rope !== "none" && { expandRope: matrixRopeSource({ ropeKey: quads(bK, R), qkRopeHeadDim: R }) }),
  };
}

/**
 * Adds the dispatches that expand one head group.
 *
 * @throws {FlashMLAError} With code `limit` when an operand passes a binding or a dispatch is too wide.
 */
export function addMatrixExpansion(
  list: DispatchList,
  problem: MlaProblem,
  capabilities: Capabilities,
  layouts: OperandLayouts,
  group: { readonly first: number; readonly heads: number },
): void {
  const { limits } = capabilities;
  const { batch, keyLength, kvHeads, kvLoraRank, qkNopeHeadDim, vHeadDim, qkRopeHeadDim: R, rope } = problem;
  const { keyValue, wKc, wVc, bK } = layouts as Required<OperandLayouts>;
  const keyRows = batch * keyLength;
  if (keyRows === 0) return;
  const tile = expandTile(capabilities);
  const { valuesBase, ropeBase, bytes } = matrixScratch(problem, keyRows, group.heads);
  const latents = checkWindow("keyValue", rowWindow(keyValue, keyLength, 0, keyRows, kvLoraRank), limits);
  const scratch = { offset: 0, size: bytes };
  const sides = [
    { kernel: "expandKeys", name: "wKc", layout: wKc, width: qkNopeHeadDim, base: 0 },
    { kernel: "expandValues", name: "wVc", layout: wVc, width: vHeadDim, base: valuesBase },
  ] as const;
  for (const { kernel, name, layout, width, base } of sides) {
    const weights = checkWindow(name, denseWindow(layout, kvLoraRank * kvHeads * width), limits);
    const columns = paddedColumns({ headDim: width }, group.heads);
    const columnTiles = Math.ceil(columns / tile.blockN);
    if (columnTiles > limits.maxComputeWorkgroupsPerDimension) {
      throw limitError(`${columnTiles} column tiles`, "maxComputeWorkgroupsPerDimension", limits);
    }
    for (
      const [firstTile, tiles] of chunks(Math.ceil(keyRows / tile.blockM), limits.maxComputeWorkgroupsPerDimension)
    ) {
      list.add(
        { kernel, range: 0, workgroups: [tiles, columnTiles] },
        [[1, "keyValue", latents], [2, name, weights], [3, "expanded", scratch]],
        [],
        [
          ...[keyRows, columns, group.first * width, firstTile, kvLoraRank, kvHeads * width],
          ...[latents.base, keyValue.row, keyLength, batchGap(keyValue, keyLength), weights.base, base],
        ],
      );
    }
  }
  if (rope === "none") return;
  const ropeKeys = checkWindow("bK", rowWindow(bK, keyLength, 0, keyRows, R), limits);
  const count = ropeWorkgroups(problem, keyRows);
  if (count > limits.maxComputeWorkgroupsPerDimension) {
    throw limitError(`${count} tiles of rotary keys`, "maxComputeWorkgroupsPerDimension", limits);
  }
  list.add(
    { kernel: "expandRope", range: 0, workgroups: [count, 1] },
    [[1, "bK", ropeKeys], [2, "expanded", scratch]],
    [],
    [keyRows, ropeKeys.base, bK.row, keyLength, batchGap(bK, keyLength), ropeBase],
  );
}
