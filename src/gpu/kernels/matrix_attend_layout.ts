// How the matrix kernel of attention lays out its workgroup: who makes what, and where it lies in workgroup memory.

import type { Capabilities } from "../capabilities.ts";
import { type HeadWidths, paddedWidth } from "./matrix_scratch.ts";
import { fragmentQuads, fragmentSize, type MatrixMemory, memoryBytes, subgroupSize } from "./matrix_unit.ts";
import { whyTooLarge } from "./workgroup_limits.ts";

/** The tile of one kernel. */
export interface MatrixAttendTile {
  /** Query rows of a workgroup. */
  readonly blockQ: number;
  /** Keys of a block. */
  readonly blockK: number;
  /** Subgroups of a workgroup. */
  readonly subgroups: number;
  /** Row fragments that a subgroup multiplies each staged fragment with. */
  readonly rowFragments: number;
  /**
   * Whether the scratch is bound as writable. A driver that moves loads towards their use, past barriers, leaves those of
   * writable memory where they are: 220 → 247 TFLOP/s on an H100.
   */
  readonly pinned: boolean;
}

/** How a tile is laid out. */
export interface MatrixAttendLayout {
  readonly workgroupSize: number;
  /** Subgroups that share rows. */
  readonly sharing: number;
  readonly depthFragments: number;
  readonly keyFragments: number;
  /** Key fragments that a subgroup makes scores of. */
  readonly ownKeys: number;
  /** Value column fragments that a subgroup makes outputs of; the last ones of all may be padding. */
  readonly ownValues: number;
  /** Invocations to a row in the softmax. */
  readonly rowThreads: number;
  /** Invocations to a row of keys or values on its way, and quads that each carries. */
  readonly stageThreads: number;
  readonly keyQuads: number;
  readonly valueQuads: number;
  readonly memories: {
    readonly keys: MatrixMemory;
    readonly values: MatrixMemory;
    readonly scores: MatrixMemory;
    readonly probs: MatrixMemory;
  };
  readonly keyStride: number;
  readonly valueStride: number;
  readonly scoreStride: number;
  /** Output fragments that pass through a subgroup's part of the scores at a time. */
  readonly together: number;
}

/** Quads that so many output fragments take side by side. */
const outputQuads = (fragments: number) => fragmentSize * (fragments * fragmentSize / 4 + 1);

/** Lays a tile out. */
export function matrixAttendLayout(tile: MatrixAttendTile, widths: HeadWidths): MatrixAttendLayout {
  const { blockQ, blockK, subgroups, rowFragments } = tile;
  const workgroupSize = subgroups * subgroupSize;
  const sharing = subgroups * rowFragments * fragmentSize / blockQ;
  const depth = paddedWidth(widths.qkNopeHeadDim) + paddedWidth(widths.qkRopeHeadDim);
  const keyFragments = blockK / fragmentSize;
  const ownKeys = keyFragments / sharing;
  const ownValues = Math.ceil(widths.vHeadDim / fragmentSize / sharing);
  const stageThreads = workgroupSize / blockK;
  const keyStride = depth / 8 + 1;
  const valueStride = ownValues * fragmentQuads + 1;
  const scoreStride = rowFragments * fragmentSize / 4 + 1;
  const scoreQuads = ownKeys * fragmentSize * scoreStride;
  const together = ownValues % 2 === 0 && scoreQuads >= outputQuads(2) ? 2 : 1;
  return {
    ...{ workgroupSize, sharing, depthFragments: depth / fragmentSize, keyFragments, ownKeys, ownValues },
    ...{ rowThreads: workgroupSize / blockQ, stageThreads, keyStride, valueStride, scoreStride, together },
    keyQuads: Math.ceil((keyStride - 1) / stageThreads),
    valueQuads: Math.ceil(sharing * ownValues * fragmentQuads / stageThreads),
    memories: {
      keys: { name: "keys", kind: "halves", parts: keyFragments, quads: fragmentSize * keyStride },
      values: {
        name: "values",
        kind: "halves",
        parts: sharing,
        // Without the padding of the last row: 16 bytes that decide whether the largest tile fits.
        quads: blockK * valueStride - 1,
      },
      scores: {
        name: "scores",
        kind: "floats",
        parts: subgroups,
        quads: Math.max(scoreQuads, outputQuads(together)),
      },
      probs: {
        ...{ name: "probs", kind: "halves", parts: blockQ / fragmentSize * keyFragments },
        quads: fragmentSize * fragmentQuads,
      },
    },
  };
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(tile: MatrixAttendTile, widths: HeadWidths): number {
  return memoryBytes(Object.values(matrixAttendLayout(tile, widths).memories)) + 4 * tile.blockQ + 16;
}

/** Why this tile cannot run, or null when it can. Whether the device has matrix units is the caller's to know. */
export function whyInvalid(
  tile: MatrixAttendTile,
  widths: HeadWidths,
  { limits }: Pick<Capabilities, "limits">,
): string | null {
  const { blockQ, blockK, subgroups, rowFragments } = tile;
  if (blockQ % (rowFragments * fragmentSize) !== 0) {
    return `blockQ ${blockQ} is not a multiple of ${rowFragments} fragments of ${fragmentSize} rows`;
  }
  const map = matrixAttendLayout(tile, widths);
  const { workgroupSize, sharing, ownKeys, rowThreads, depthFragments, ownValues, stageThreads } = map;
  if (!Number.isInteger(sharing)) return `${subgroups} subgroups do not divide the rows of blockQ ${blockQ}`;
  if (!Number.isInteger(ownKeys)) {
    return `blockK ${blockK} is not a multiple of ${fragmentSize} keys × ${sharing} subgroups that share rows`;
  }
  if (![1, 2, 4, 8].includes(rowThreads)) return `blockQ ${blockQ} does not suit ${workgroupSize} invocations`;
  if (!Number.isInteger(stageThreads)) return `blockK ${blockK} does not suit ${workgroupSize} invocations`;
  if (blockK % (8 * rowThreads) !== 0) {
    return `blockK ${blockK} is not a multiple of 8 keys × ${rowThreads} invocations`;
  }
  const registers = rowFragments * (depthFragments * 4 + ownValues * 8 + ownKeys * 8);
  if (registers > 224) return `${registers} registers per invocation for fragments, at most 224 are to be had`;
  return whyTooLarge(workgroupSize, workgroupBytes(tile, widths), limits);
}
