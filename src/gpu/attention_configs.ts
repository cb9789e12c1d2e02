// Which configurations are worth measuring, in the order in which they won on an H100 (bench/NOTES.md).

import type { FlashMLAConfig } from "../op/config.ts";
import { ceilPowerOfTwo, longestSequence } from "../op/length_bucket.ts";
import type { MlaProblem } from "../op/mla_problem.ts";
import { whyInvalid } from "./attention_plan.ts";
import { whyBackwardInvalid } from "./backward_plan.ts";
import { FlashMLAError } from "../op/errors.ts";
import type { Capabilities } from "./capabilities.ts";
import { matrixTilings } from "./matrix_config.ts";

type Tiling = Pick<FlashMLAConfig, "blockQ" | "blockK" | "numWarps" | "rowsPerThread">;
type Staging = Pick<FlashMLAConfig, "numStages" | "blockDepth" | "probKeys">;

const tiling = (blockQ: number, blockK: number, numWarps: number, rowsPerThread: number): Tiling => ({
  blockQ,
  blockK,
  numWarps,
  rowsPerThread,
});

const staging = (numStages: number, blockDepth: number, probKeys: number): Staging => ({
  numStages,
  blockDepth,
  probKeys,
});

/** ejkernel's three pairs (64², 128², 256²) and what lies between and below them. */
const gpuTilings: readonly Tiling[] = [
  tiling(128, 128, 8, 8),
  tiling(64, 128, 8, 4),
  tiling(64, 128, 4, 8),
  tiling(128, 128, 16, 4),
  tiling(64, 64, 4, 4),
  tiling(256, 256, 16, 8),
  tiling(32, 64, 4, 4),
  tiling(32, 32, 2, 4),
  tiling(16, 32, 1, 4),
];

/**
 * For adapters that run on the CPU. There every load from workgroup memory is a gather, so large register tiles win, and
 * compile time grows faster than the unrolled code, so slices are short.
 */
const softwareTilings: readonly Tiling[] = [
  tiling(64, 128, 2, 8),
  tiling(64, 64, 2, 8),
  tiling(32, 32, 2, 4),
  tiling(128, 128, 8, 8),
  tiling(256, 256, 16, 8),
];

/** For value heads so wide that the other tiles run out of registers: 64 invocations share a row. */
const wideTiling = tiling(16, 256, 8, 4);

/** How slices are staged, best first; each tiling takes the first ones that fit its device. */
const gpuStagings: readonly Staging[] = [
  staging(2, 8, 2),
  staging(1, 16, 1),
  staging(1, 16, 2),
  staging(2, 8, 1),
  staging(1, 8, 1),
  staging(1, 4, 1),
];

const softwareStagings: readonly Staging[] = [staging(1, 4, 1)];

/** Stagings that are tried of one tiling. */
const stagingsPerTiling = 2;

/** Side of the expansion tile: the largest that the columns of one head group fill. */
function expandBlock(problem: MlaProblem): number {
  const columns = problem.kvHeads * Math.min(problem.qkNopeHeadDim, problem.vHeadDim);
  const rows = ceilPowerOfTwo(problem.batch * problem.keyLength);
  return [128, 64].find((block) => columns >= block && rows >= block) ?? 32;
}

/** Backward tiles worth measuring, best guess first; the last one fits heads of nearly any width. */
const gpuGradBlocks: readonly number[] = [128, 64, 256];

/**
 * Compile time grows with the sums of an invocation: with DeepSeek-V2's heads the second tile compiles in a third of the
 * time of the first (34 s against 120 s on two busy cores) and runs 1.6 times as long.
 */
const softwareGradBlocks: readonly number[] = [32, 256];

/** Widths of a key and a value together from which on software adapters take the second tile first. */
const wideHeads = 96;

/** The backward tiles that go with a configuration: two at most, and one even where none is valid. */
function gradBlocks(config: FlashMLAConfig, problem: MlaProblem, capabilities: Capabilities): number[] {
  const wide = problem.qkNopeHeadDim + problem.qkRopeHeadDim + problem.vHeadDim >= wideHeads;
  const all = !capabilities.software ? gpuGradBlocks : wide ? softwareGradBlocks.toReversed() : softwareGradBlocks;
  const valid = [...all, 32].filter((gradBlock) =>
    whyBackwardInvalid({ ...config, gradBlock }, problem, capabilities) === null
  );
  return valid.length === 0 ? [all[0]] : valid.slice(0, capabilities.software ? 1 : 2);
}

/**
 * The configurations worth measuring on a device, for all problems whose lengths fall in the same powers of two.
 *
 * @returns Valid configurations, best guess first; never empty.
 * @throws {FlashMLAError} With code `limit` when the value heads are too wide for every tile.
 */
export function candidateConfigs(problem: MlaProblem, capabilities: Capabilities): FlashMLAConfig[] {
  const rows = ceilPowerOfTwo(longestSequence(problem));
  const [tilings, stagings] = capabilities.software ? [softwareTilings, softwareStagings] : [gpuTilings, gpuStagings];
  const found: FlashMLAConfig[] = [];
  for (const tile of [...tilings, ...(problem.vHeadDim > 256 ? [wideTiling] : [])]) {
    // A tile that is mostly padding is not worth its compile time; the smallest one stays for every problem.
    if (tile.blockQ > 32 && tile.blockQ >= 2 * rows) continue;
    const valid = (config: FlashMLAConfig) => whyInvalid(config, problem, capabilities) === null;
    const fitting = stagings
      .map((stages): FlashMLAConfig => ({
        ...tile,
        ...stages,
        unrollDepth: true,
        subgroups: false,
        expandBlock: expandBlock(problem),
        gradBlock: 32,
        matrixUnits: false,
        platform: "webgpu",
        backend: "gpu",
      }))
      .filter(valid)
      .map((config) => ({ ...config, gradBlock: gradBlocks(config, problem, capabilities)[0] }));
    const shuffling = fitting.slice(0, 1).map((config) => ({ ...config, subgroups: true })).filter(valid);
    const both = [fitting.slice(0, stagingsPerTiling), shuffling];
    // Shuffling is never slower on a card: 30.9 against 30.1 TFLOP/s with the first tile, 28.5 against 20.1 with the second.
    found.push(...(capabilities.software ? both : both.toReversed()).flat());
  }
  if (found.length === 0) {
    const { maxComputeWorkgroupStorageSize, maxComputeInvocationsPerWorkgroup } = capabilities.limits;
    throw new FlashMLAError(
      "limit",
      `Cannot run MLA on this device: no tile fits vHeadDim ${problem.vHeadDim}, maxComputeWorkgroupStorageSize is ` +
        `${maxComputeWorkgroupStorageSize} and maxComputeInvocationsPerWorkgroup is ${maxComputeInvocationsPerWorkgroup}`,
    );
  }
  const best = found.indexOf(bestGuess(found, problem, capabilities));
  const [guess] = found.splice(best, 1);
  const onMatrixUnits = matrixConfigs(guess, problem, capabilities);
  if (onMatrixUnits.length > 0) {
    const first = onMatrixUnits.indexOf(bestGuess(onMatrixUnits, problem, capabilities));
    return [...onMatrixUnits.splice(first, 1), ...onMatrixUnits, guess, ...found];
  }
  // Backward tiles are independent of forward ones: the second one is measured once.
  const others = gradBlocks(guess, problem, capabilities).slice(1).map((gradBlock) => ({ ...guess, gradBlock }));
  return [guess, ...others, ...found];
}

/**
 * Configurations on matrix units, where the device has them and the tensors are halves or may be rounded to them; what
 * these cannot do falls to the plain configuration. The emulation is for tests alone.
 */
function matrixConfigs(plain: FlashMLAConfig, problem: MlaProblem, capabilities: Capabilities): FlashMLAConfig[] {
  if (capabilities.matrixUnits === null || capabilities.matrixUnits === "emulated") return [];
  return matrixTilings
    .map((tiling): FlashMLAConfig => ({ ...plain, ...tiling, subgroups: false, matrixUnits: true }))
    .filter((config) => whyInvalid(config, problem, capabilities) === null);
}

/** Workgroups that keep a large card busy: below them, smaller query blocks win. */
const wantedWorkgroups = 256;

/** The first tile in merit order that gives a GPU enough workgroups. */
function bestGuess(
  configs: readonly FlashMLAConfig[],
  problem: MlaProblem,
  capabilities: Capabilities,
): FlashMLAConfig {
  const last = configs[configs.length - 1];
  if (capabilities.software) return configs[0];
  const rows = ceilPowerOfTwo(problem.batch * problem.queryLength);
  return configs.find(({ blockQ }) => problem.queryHeads * rows / blockQ >= wantedWorkgroups) ?? last;
}
