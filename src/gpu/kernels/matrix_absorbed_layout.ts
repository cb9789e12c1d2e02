// How absorbed attention on matrix units lies in workgroup memory and in registers; the kernel is in
// matrix_absorbed_attend.ts.

import type { Capabilities } from "../capabilities.ts";
import type { AbsorbedShape } from "./absorbed_operands.ts";
import { fragmentQuads, fragmentSize, type MatrixMemory, memoryBytes, subgroupSize } from "./matrix_unit.ts";
import { whyTooLarge } from "./workgroup_limits.ts";

/** The tile of one kernel. */
export interface MatrixAbsorbedTile {
  /** Query rows of a workgroup: 16, 32 or 64. */
  readonly blockRows: number;
  /** Keys of a block: up to 16 have two buffers of latents, more have one. */
  readonly blockK: number;
  /** Subgroups of a workgroup. */
  readonly subgroups: number;
  /** Whether the cache is bound as writable, which keeps some drivers from moving its loads to where they are used. */
  readonly pinned: boolean;
}

/** What of a shape a layout depends on. */
type LatentWidths = Pick<AbsorbedShape, "kvLoraRank" | "qkRopeHeadDim">;

/** How a tile is laid out. */
export interface MatrixAbsorbedLayout {
  readonly workgroupSize: number;
  readonly rowFragments: number;
  readonly keyFragments: number;
  readonly depthFragments: number;
  readonly columnFragments: number;
  /** How subgroups split the scores. */
  readonly rowGroups: number;
  readonly keyGroups: number;
  readonly depthParts: number;
  /** Fragments of one subgroup, at the most. */
  readonly ownRows: number;
  readonly ownKeys: number;
  readonly ownDepth: number;
  readonly ownColumns: number;
  /** Invocations to a row in the softmax, each with one quad of keys or several. */
  readonly rowThreads: number;
  /** Invocations that share such quads, to add up the parts of the depth. */
  readonly sharers: number;
  /** Invocations to a latent row, and quads that each carries. */
  readonly stageThreads: number;
  readonly stageQuads: number;
  readonly latentStride: number;
  readonly scoreStride: number;
  /** Buffers of latents. */
  readonly buffers: number;
  /** Registers of an invocation for fragments and latents on their way. */
  readonly registers: number;
  readonly memories: { readonly latents: MatrixMemory; readonly scores: MatrixMemory; readonly probs: MatrixMemory };
}

/** Quads from one row to the next of a result fragment that is stored by itself: memory is too short for odd strides. */
export const ownStride = fragmentSize / 4;

/** Lays a tile out. */
export function matrixAbsorbedLayout(
  { blockRows, blockK, subgroups }: MatrixAbsorbedTile,
  widths: LatentWidths,
): MatrixAbsorbedLayout {
  const workgroupSize = subgroups * subgroupSize;
  const rowFragments = blockRows / fragmentSize;
  const keyFragments = blockK / fragmentSize;
  const depthFragments = Math.ceil((widths.kvLoraRank + widths.qkRopeHeadDim) / fragmentSize);
  const columnFragments = Math.ceil(widths.kvLoraRank / fragmentSize);
  const rowGroups = Math.min(rowFragments, subgroups);
  const keyGroups = Math.min(keyFragments, subgroups / rowGroups);
  const depthParts = subgroups / rowGroups / keyGroups;
  const stageThreads = workgroupSize / blockK;
  const latentStride = depthFragments * fragmentQuads + 1;
  const buffers = blockK > 16 ? 1 : 2;
  const scoreStride = depthParts * blockK / 4 + 1;
  const ownRows = rowFragments / rowGroups;
  const ownKeys = keyFragments / keyGroups;
  const ownDepth = Math.ceil(depthFragments / depthParts);
  const ownColumns = Math.ceil(columnFragments / subgroups);
  const stageQuads = Math.ceil((latentStride - 1) / stageThreads);
  const rowThreads = Math.min(workgroupSize / blockRows, blockK / 4);
  const registers = rowFragments * ownColumns * 8 + ownRows * (ownDepth * 4 + ownKeys * 8) + stageQuads * 4;
  return {
    ...{ workgroupSize, rowFragments, keyFragments, depthFragments, columnFragments, rowGroups, keyGroups, depthParts },
    ...{
      ownRows,
      ownKeys,
      ownDepth,
      ownColumns,
      stageThreads,
      stageQuads,
      latentStride,
      scoreStride,
      buffers,
      registers,
    },
    rowThreads,
    sharers: Math.min(workgroupSize / blockRows / rowThreads, depthParts),
    memories: {
      latents: { name: "latents", kind: "halves", parts: buffers, quads: blockK * latentStride },
      scores: {
        name: "scores",
        kind: "floats",
        quads: Math.max(blockRows * scoreStride, subgroups * fragmentSize * ownStride),
      },
      probs: { name: "probs", kind: "halves", quads: blockRows * blockK / 8 },
    },
  };
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(tile: MatrixAbsorbedTile, widths: LatentWidths): number {
  return memoryBytes(Object.values(matrixAbsorbedLayout(tile, widths).memories)) + 4 * tile.blockRows + 16;
}

/** Why this tile cannot run, or null when it can. Whether the device has matrix units is the caller's to know. */
export function whyInvalid(
  tile: MatrixAbsorbedTile,
  shape: LatentWidths & Partial<Pick<AbsorbedShape, "query" | "cache">>,
  { limits }: Pick<Capabilities, "limits">,
): string | null {
  const { blockRows, blockK, subgroups } = tile;
  if (shape.query === "floats" || shape.cache === "floats") return "matrix units take queries and latents in halves";
  const isPower = (n: number) => Number.isInteger(Math.log2(n));
  if (!(blockRows >= fragmentSize && isPower(blockRows))) return `blockRows ${blockRows} is no power of two from 16`;
  if (!(blockK >= fragmentSize && isPower(blockK))) return `blockK ${blockK} is no power of two from 16`;
  if (!(subgroups >= 1 && isPower(subgroups))) return `${subgroups} subgroups are no power of two`;
  const { workgroupSize, registers } = matrixAbsorbedLayout(tile, shape);
  if (blockRows > workgroupSize || blockK > workgroupSize) {
    return `${workgroupSize} invocations are fewer than the rows of ${blockRows} × ${blockK}`;
  }
  if (registers > 228) {
    return `${registers} registers per invocation for fragments and latents, at most 228 are to be had`;
  }
  return whyTooLarge(workgroupSize, workgroupBytes(tile, shape), limits);
}
