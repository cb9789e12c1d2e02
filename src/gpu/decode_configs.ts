// Which configurations of decoding a device runs, and which are worth measuring, in the order in which they won on an H100
// (bench/NOTES.md).

import type { DecodeConfig } from "../op/decode_config.ts";
import type { DecodeProblem } from "../op/decode_problem.ts";
import { FlashMLAError } from "../op/errors.ts";
import { ceilPowerOfTwo } from "../op/length_bucket.ts";
import type { Capabilities } from "./capabilities.ts";
import { absorbedSource, matrixAbsorbedSource } from "./kernel_sources.ts";
import * as plain from "./kernels/absorbed_attend.ts";
import type { AbsorbedShape, RowStorage } from "./kernels/absorbed_operands.ts";
import { type MatrixAbsorbedTile, whyInvalid as whyMatrixInvalid } from "./kernels/matrix_absorbed_layout.ts";

/** A kernel of absorbed attention under one configuration. */
export interface Attends {
  /** How it reads queries. */
  readonly query: RowStorage | "either";
  /** Its source. */
  wgsl(shape: AbsorbedShape): string;
}

/** The kernel that a configuration names. */
export function attendsBy(cfg: DecodeConfig, capabilities: Capabilities): Attends {
  if (!cfg.matrixUnits) return { query: "either", wgsl: (shape) => absorbedSource(tileOf(cfg), shape, capabilities) };
  const tile = matrixTile(cfg);
  return { query: "halves", wgsl: (shape) => matrixAbsorbedSource(tile, shape, capabilities.matrixUnits!) };
}

/** What of a configuration the plain kernel reads: not how far keys are split. */
function tileOf({ blockRows, blockK, numWarps, subgroups, pinned }: DecodeConfig): plain.AbsorbedTile {
  return { blockRows, blockK, numWarps, subgroups, pinned };
}

function matrixTile({ blockRows, blockK, numWarps, pinned }: DecodeConfig): MatrixAbsorbedTile {
  return { blockRows, blockK, subgroups: numWarps, pinned };
}

/** What of a problem the kernels depend on, as far as a plan does not decide it. */
export function decodeShape(problem: DecodeProblem, cfg: Pick<DecodeConfig, "matrixUnits">): AbsorbedShape {
  const { kvLoraRank, qkRopeHeadDim, cache, logitsSoftCap, sinks, queryHeads, causal, slidingWindow } = problem;
  const { tokenStarts } = problem;
  const several = tokenStarts.some((start, i) => i > 0 && start - tokenStarts[i - 1] > 1);
  return {
    kvLoraRank,
    qkRopeHeadDim,
    query: cfg.matrixUnits ? "halves" : "floats",
    cache: cache.dtype === "f16" ? "halves" : "floats",
    output: "floats",
    pageSize: cache.pageSize,
    sharded: false,
    // Of a single token all rows see the same keys, which the schedule has cut already.
    bounded: several && (causal || slidingWindow !== null),
    softCap: logitsSoftCap !== null,
    sinkQuads: sinks === 0 ? 0 : Math.ceil(queryHeads / 4),
    lse: true,
  };
}

/** Why this configuration cannot run this problem on such a device, or null when it can. */
export function whyInvalid(cfg: DecodeConfig, problem: DecodeProblem, capabilities: Capabilities): string | null {
  for (const name of ["blockRows", "blockK", "numWarps", "workgroups"] as const) {
    if (!Number.isInteger(cfg[name]) || cfg[name] < 1) return `${name} must be a positive integer, got ${cfg[name]}`;
  }
  for (const name of ["subgroups", "matrixUnits", "pinned"] as const) {
    if (typeof cfg[name] !== "boolean") return `${name} must be true or false, got ${cfg[name]}`;
  }
  if (problem.splitKeys !== null && problem.splitKeys % cfg.blockK !== 0) {
    return `blockK ${cfg.blockK} does not divide splitKeys ${problem.splitKeys}`;
  }
  const shape = decodeShape(problem, cfg);
  if (!cfg.matrixUnits) return plain.whyInvalid(cfg, shape, capabilities);
  if (capabilities.matrixUnits === null) return "matrixUnits is true, the device has none that kernels may use";
  if (problem.cache.dtype !== "f16") return 'matrixUnits is true, which is for a cache of dtype "f16"';
  return whyMatrixInvalid(matrixTile(cfg), shape, capabilities);
}

type Tile = Pick<DecodeConfig, "blockRows" | "blockK" | "numWarps">;

const matrixTiles: readonly Tile[] = [
  { blockRows: 64, blockK: 16, numWarps: 8 },
  { blockRows: 32, blockK: 16, numWarps: 8 },
  { blockRows: 16, blockK: 32, numWarps: 8 },
  { blockRows: 16, blockK: 16, numWarps: 8 },
  { blockRows: 16, blockK: 16, numWarps: 4 },
  { blockRows: 16, blockK: 16, numWarps: 2 },
];

const gpuTiles: readonly Tile[] = [
  { blockRows: 16, blockK: 32, numWarps: 8 },
  { blockRows: 16, blockK: 16, numWarps: 8 },
  { blockRows: 16, blockK: 8, numWarps: 4 },
  { blockRows: 4, blockK: 32, numWarps: 4 },
  { blockRows: 4, blockK: 16, numWarps: 2 },
  { blockRows: 16, blockK: 4, numWarps: 2 },
  { blockRows: 4, blockK: 8, numWarps: 2 },
  { blockRows: 4, blockK: 4, numWarps: 2 },
  // 512 + 64 floats in 16 KiB without subgroups: 13.7 KB, where twice the invocations store twice the sums.
  { blockRows: 4, blockK: 4, numWarps: 1 },
];

const softwareTiles: readonly Tile[] = [
  { blockRows: 4, blockK: 8, numWarps: 1 },
  { blockRows: 4, blockK: 4, numWarps: 1 },
  { blockRows: 4, blockK: 4, numWarps: 2 },
];

/** Workgroups that splitting may aim at: a data-centre card has 132 multiprocessors, a laptop's a tenth of that. */
const aims: readonly number[] = [128, 256, 64, 512];

/** Tiles that are measured. */
const triedTiles = 3;

/**
 * The configurations worth measuring, best guess first; never empty.
 *
 * @throws {FlashMLAError} With code `limit` when the latents are too wide for every tile.
 */
export function candidateConfigs(problem: DecodeProblem, capabilities: Capabilities): DecodeConfig[] {
  const { software } = capabilities;
  const valid = (cfg: DecodeConfig) => whyInvalid(cfg, problem, capabilities) === null;
  const base = {
    subgroups: false,
    pinned: false,
    workgroups: software ? 8 : aims[0],
    platform: "webgpu",
    backend: "gpu",
  } as const;
  const rows = mostRows(problem);
  const useful = ({ blockRows }: Tile, least: number) => blockRows <= Math.max(least, ceilPowerOfTwo(rows));
  const onMatrixUnits = matrixTiles.filter((tile) => useful(tile, 16))
    .map((tile): DecodeConfig => ({ ...base, ...tile, matrixUnits: true }))
    .filter(valid);
  const onPlain = (software ? softwareTiles : gpuTiles).filter((tile) => useful(tile, 4))
    .flatMap((tile): DecodeConfig[] => {
      const cfg = { ...base, ...tile, matrixUnits: false };
      const shuffling = { ...cfg, subgroups: true };
      return !software && valid(shuffling) ? [shuffling] : [cfg];
    }).filter(valid);
  const found = [...onMatrixUnits.slice(0, triedTiles), ...onPlain.slice(0, triedTiles)];
  if (found.length === 0) {
    const { maxComputeWorkgroupStorageSize } = capabilities.limits;
    throw new FlashMLAError(
      "limit",
      `Cannot decode on this device: no tile fits rows of ${problem.kvLoraRank} + ${problem.qkRopeHeadDim} elements, ` +
        `maxComputeWorkgroupStorageSize is ${maxComputeWorkgroupStorageSize}`,
    );
  }
  if (problem.splitKeys !== null || software) return found.slice(0, 1);
  const [guess, ...others] = found;
  const pinned = { ...guess, pinned: true };
  return [guess, ...others, pinned, ...aims.slice(1).map((workgroups) => ({ ...guess, workgroups }))];
}

/** Query rows of the sequence that has most; with fixed splits, which no batch may change, those of one token. */
function mostRows({ tokenStarts, queryHeads, splitKeys }: DecodeProblem): number {
  if (splitKeys !== null) return queryHeads;
  return queryHeads *
    tokenStarts.reduce((most, start, i) => Math.max(most, start - tokenStarts[Math.max(0, i - 1)]), 1);
}
