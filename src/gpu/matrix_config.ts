// Which problems run on matrix units, and under which tiles.

import type { FlashMLAConfig } from "../op/config.ts";
import type { MlaProblem } from "../op/mla_problem.ts";
import { exactFactor } from "../op/precision.ts";
import type { Capabilities } from "./capabilities.ts";
import * as attend from "./kernels/matrix_attend_layout.ts";
import * as grad from "./kernels/matrix_attend_backward.ts";
import * as expand from "./kernels/matrix_expand.ts";
import * as project from "./kernels/matrix_expand_backward.ts";
import { fragmentSize } from "./kernels/matrix_unit.ts";

/** The fields of a configuration that a matrix kernel's tile is made of. */
type Tiling = Pick<FlashMLAConfig, "blockQ" | "blockK" | "numWarps" | "rowsPerThread">;

/** Tiles of attention in the order in which they won on an H100 (bench/NOTES.md). */
export const matrixTilings: readonly Tiling[] = [
  { blockQ: 128, blockK: 32, numWarps: 8, rowsPerThread: 32 },
  { blockQ: 64, blockK: 32, numWarps: 8, rowsPerThread: 16 },
  { blockQ: 32, blockK: 32, numWarps: 2, rowsPerThread: 32 },
];

/** The tile of attention that a configuration stands for. */
export function attendTile({ blockQ, blockK, numWarps, rowsPerThread }: Tiling): attend.MatrixAttendTile {
  return { blockQ, blockK, subgroups: numWarps, rowFragments: rowsPerThread / fragmentSize, pinned: true };
}

type Limits = Pick<Capabilities, "limits" | "matrixUnits">;

/**
 * The first tile of a list that a device runs; the last and smallest where it runs none, and where the units are emulated,
 * which is for tests: large tiles are long code there.
 */
function firstFitting<Tile>(
  tiles: readonly Tile[],
  { matrixUnits }: Limits,
  why: (tile: Tile) => string | null,
): Tile {
  const found = matrixUnits === "emulated" ? undefined : tiles.find((tile) => why(tile) === null);
  return found ?? tiles[tiles.length - 1];
}

const expandTiles: readonly expand.MatrixExpandTile[] = [
  { blockM: 128, blockN: 256, depth: 32, rowFragments: 4, columnFragments: 4 },
  { blockM: 32, blockN: 64, depth: 16, rowFragments: 1, columnFragments: 2 },
];

/** The tile of the expansion. */
export function expandTile(capabilities: Limits): expand.MatrixExpandTile {
  return firstFitting(expandTiles, capabilities, (tile) => expand.whyInvalid(tile, capabilities));
}

const gradTiles: readonly grad.MatrixGradTile[] = [
  { rows: 64, columns: 32, rowFragments: 2, pinned: true },
  { rows: 32, columns: 32, rowFragments: 1, pinned: true },
];

/** The tile of the gradients of attention. */
export function gradTile(
  target: grad.MatrixGradTarget,
  problem: MlaProblem,
  capabilities: Limits,
): grad.MatrixGradTile {
  return firstFitting(gradTiles, capabilities, (tile) => grad.whyInvalid(tile, problem, target, capabilities));
}

const projectTiles: Readonly<Record<"latents" | "weights", readonly expand.MatrixExpandTile[]>> = {
  latents: [
    { blockM: 128, blockN: 128, depth: 32, rowFragments: 4, columnFragments: 2 },
    { blockM: 32, blockN: 32, depth: 16, rowFragments: 1, columnFragments: 1 },
  ],
  weights: [
    { blockM: 64, blockN: 128, depth: 64, rowFragments: 2, columnFragments: 2 },
    { blockM: 32, blockN: 32, depth: 16, rowFragments: 1, columnFragments: 1 },
  ],
};

/** The tile of the gradients of latents or weights. */
export function projectTile(which: "latents" | "weights", capabilities: Limits): expand.MatrixExpandTile {
  const { limits } = capabilities;
  return firstFitting(projectTiles[which], capabilities, (tile) => {
    const fits = project.workgroupBytes(which, tile) <= limits.maxComputeWorkgroupStorageSize &&
      expand.workgroupSize(tile) <= limits.maxComputeInvocationsPerWorkgroup;
    return fits ? null : "too large";
  });
}

/** Why forward cannot run on matrix units under this configuration, or null when it can. */
export function whyMatrixInvalid(config: Tiling, problem: MlaProblem, capabilities: Capabilities): string | null {
  if (capabilities.matrixUnits === null) return "matrixUnits is true, the device has none that kernels may use";
  const exact = exactFactor(problem);
  if (exact !== undefined) {
    return `matrixUnits is true, which is for tensors of halves: ${exact} is not of dtype "f16"; ` +
      'the option precision: "f16" lets it be rounded';
  }
  for (const [name, value] of Object.entries(config)) {
    if (["blockQ", "blockK", "numWarps", "rowsPerThread"].includes(name) && !(Number.isInteger(value) && +value > 0)) {
      return `${name} must be a positive integer, got ${value}`;
    }
  }
  if (config.rowsPerThread % fragmentSize !== 0) {
    return `rowsPerThread must be a multiple of ${fragmentSize} on matrix units, got ${config.rowsPerThread}`;
  }
  return attend.whyInvalid(attendTile(config), problem, capabilities) ??
    expand.whyInvalid(expandTile(capabilities), capabilities);
}

/** Why gradients cannot run on matrix units, or null when they can; other kernels take their place then. */
export function whyMatrixBackwardInvalid(problem: MlaProblem, capabilities: Capabilities): string | null {
  if (problem.scoreTerm === "bias") return "the gradient of a bias is not computed on matrix units";
  for (const target of ["query", "keys"] as const) {
    const why = grad.whyInvalid(gradTile(target, problem, capabilities), problem, target, capabilities);
    if (why !== null) return why;
  }
  return null;
}
