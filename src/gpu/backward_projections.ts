// The gradients' plan, the part of the expansion: from ∂K and ∂V to latents, weights and rotary keys.

import type { FlashMLAConfig } from "../op/config.ts";
import { addHeadSum, type Group, type Planning } from "./backward_planning.ts";
import type { GpuLimits } from "./capabilities.ts";
import type { Bound } from "./dispatch_plan.ts";
import type { Region } from "./regions.ts";
import { type ExpandTile, expandTile } from "./kernels/expand.ts";
import * as expandBackward from "./kernels/expand_backward.ts";
import { maximaBinding } from "./kernels/matrix_expand_backward.ts";
import { maximaBytes, workgroups as maximaWorkgroups } from "./kernels/matrix_maxima.ts";
import { checkWindow, limitError } from "./limit_checks.ts";
import { projectTile } from "./matrix_config.ts";
import { batchGap, denseWindow, type GradientName, type OperandLayouts, rowWindow } from "./operand_layout.ts";
import { chunks } from "./query_ranges.ts";

/** The tile of the expansion's gradients without matrix units. */
export function plainProjectTile(planning: Planning, which: expandBackward.ExpandGradient, width: number): ExpandTile {
  return which === "latents" ? gradientTile(planning.config, planning.limits) : weightsTile(planning, width);
}

/** The tile of the expansion's gradients. */
function gradientTile(config: Pick<FlashMLAConfig, "expandBlock" | "unrollDepth">, limits: GpuLimits): ExpandTile {
  const tile = expandTile(config, limits);
  // The smallest block is for small problems and for devices that compile slowly: short slices are short code.
  return config.expandBlock === 32 ? { ...tile, depth: 4, numStages: 1 } : tile;
}

/** Workgroups below which the weights' gradients are cut into smaller tiles: a large card would be half idle. */
const wantedWorkgroups = 256;

/** The tile of the weights' gradients, whose product has few rows and columns and is summed over all keys. */
function weightsTile({ problem, config, limits, scratch }: Planning, width: number): ExpandTile {
  const tile = gradientTile(config, limits);
  const columns = scratch.expanded.groupKvHeads * width;
  const workgroups = Math.ceil(problem.kvLoraRank / tile.blockM) * Math.ceil(columns / tile.blockN);
  if (workgroups >= wantedWorkgroups || config.expandBlock !== 128) return tile;
  return expandTile({ ...config, expandBlock: 64 }, limits);
}

/** Adds the gradients of latents and weights from those of a group's keys and values. */
export function addExpansionGradients(planning: Planning, group: Group): void {
  const { list, problem, limits, layouts, scratch, matrix } = planning;
  const { batch, keyLength, kvHeads, kvLoraRank: L, qkNopeHeadDim, vHeadDim } = problem;
  const { keyValue } = layouts as Required<OperandLayouts>;
  const keyRows = batch * keyLength;
  const latents = checkWindow("keyValue", rowWindow(keyValue, keyLength, 0, keyRows, L), limits);
  const gradLatents = checkWindow(
    "the gradient of keyValue",
    denseWindow(layouts["grad.keyValue"]!, keyRows * L),
    limits,
  );
  const sides = [
    { from: "Keys", region: scratch.gradExpanded.keys, name: "wKc", width: qkNopeHeadDim },
    { from: "Values", region: scratch.gradExpanded.values, name: "wVc", width: vHeadDim },
  ] as const;
  const add = (
    kernel: string,
    tile: Pick<ExpandTile, "blockM" | "blockN">,
    bound: readonly Bound[],
    words: Omit<expandBackward.ExpandBackwardWords, "firstTile" | "accumulate">,
  ) => {
    const [rows, columns] = words.sizes;
    const columnTiles = Math.ceil(columns / tile.blockN);
    if (columnTiles > limits.maxComputeWorkgroupsPerDimension) {
      throw limitError(`${columnTiles} column tiles of a gradient`, "maxComputeWorkgroupsPerDimension", limits);
    }
    for (const [firstTile, tiles] of chunks(Math.ceil(rows / tile.blockM), limits.maxComputeWorkgroupsPerDimension)) {
      list.add(
        { kernel, range: 0, workgroups: [columnTiles, tiles] },
        bound,
        [],
        expandBackward.wordsOf({ ...words, firstTile, accumulate: true }),
      );
    }
  };
  const matrixBound: readonly Bound[] = matrix === null
    ? []
    : [[maximaBinding, "maxima", { offset: 0, size: maximaBytes }]];
  if (matrix !== null) {
    const { keys, values, bytes } = scratch.gradExpanded;
    list.add(
      { kernel: "maxima", range: 0, workgroups: maximaWorkgroups },
      [[1, "gradExpanded", { offset: 0, size: bytes }], [2, "maxima", { offset: 0, size: maximaBytes }]],
      [],
      [
        keys.offset / 4 + keyRows * group.heads * qkNopeHeadDim,
        values.offset / 4,
        values.offset / 4 + keyRows * group.heads * vHeadDim,
      ],
    );
  }
  const tileOf = (which: expandBackward.ExpandGradient, width: number) =>
    matrix === null ? plainProjectTile(planning, which, width) : projectTile(which, matrix);
  for (const { from, region, name, width } of sides) {
    const columns = group.heads * width;
    const weights = checkWindow(name, denseWindow(layouts[name]!, L * kvHeads * width), limits);
    const gradName: GradientName = `grad.${name}`;
    const gradWeights = checkWindow(
      `the gradient of ${name}`,
      denseWindow(layouts[gradName]!, L * kvHeads * width),
      limits,
    );
    const gradRows: Region = { offset: region.offset, size: keyRows * columns * 4 };
    add(
      `latentsFrom${from}`,
      tileOf("latents", width),
      [[1, "gradExpanded", gradRows], [2, name, weights], [3, "grad.keyValue", gradLatents], ...matrixBound],
      {
        sizes: [keyRows, L, columns],
        left: [0, columns, keyRows, 0],
        right: [weights.base + group.first * width, kvHeads * width],
        gradient: [gradLatents.base, L],
      },
    );
    add(
      `weightsFrom${from}`,
      tileOf("weights", width),
      [[1, "keyValue", latents], [2, "gradExpanded", gradRows], [3, gradName, gradWeights], ...matrixBound],
      {
        sizes: [L, columns, keyRows],
        left: [latents.base, keyValue.row, keyLength, batchGap(keyValue, keyLength)],
        right: [0, columns],
        gradient: [gradWeights.base + group.first * width, kvHeads * width],
      },
    );
  }
}

/** Adds ∂bK: each head's part, summed. */
export function addRopeKeyGradient(planning: Planning, group: Group): void {
  const { problem, limits, layouts, scratch } = planning;
  const { batch, keyLength, qkRopeHeadDim: R } = problem;
  const keyRows = batch * keyLength;
  const window = checkWindow("the gradient of bK", denseWindow(layouts["grad.bK"]!, keyRows * R), limits);
  addHeadSum(planning, "headSum", 0, [1, "gradExpanded", scratch.gradExpanded.rope], [2, "grad.bK", window], {
    sizes: [keyRows, 1, group.heads, R],
    from: [0, group.heads * R, 0, R, keyRows, 0],
    into: [window.base, R, 0],
    accumulate: true,
  });
}
