// The memory of ours that gradients pass through, one group of KV heads at a time: keys, values and their gradients, which
// are as large; what is known of every query row; and, where one rotary query part serves all heads, the gradients of a
// range's queries before they are summed.
//
//   expanded      4 · keyRows · (heads · (P + V) + R) bytes
//   gradExpanded  4 · keyRows · heads · (P + V + R) bytes
//   stats         8 · queryRows · Hq bytes
//   gradQuery     4 · rangeRows · heads · (P + R) bytes, with rope mode `shared`
//
// On matrix units expanded is half as large, and the queries and the output's gradient of a range are kept in halves, too:
//
//   staged        2 · rangeRows · Hq · (P + R + V) bytes, widths in whole fragments
//
// The first two together keep to scratchLimit, unless one head alone needs more.

import type { MlaProblem } from "../op/mla_problem.ts";
import type { GpuLimits } from "./capabilities.ts";
import { checkedHeadsPerKv, type ExpandedScratch, scratchLimit } from "./expansion.ts";
import { matrixScratch } from "./kernels/matrix_scratch.ts";
import { checkBinding, halvedUntil } from "./limit_checks.ts";
import { type Region, regions } from "./regions.ts";
import type { RowRange } from "./schedule.ts";

/** Regions behind each other in one buffer. */
interface Regions {
  /** Keys, or their gradients. */
  readonly keys: Region;
  /** Values, or their gradients. */
  readonly values: Region;
  /** Rotary keys, which all heads share, or each head's part of their gradients. */
  readonly rope: Region;
  /** Bytes of the buffer. */
  readonly bytes: number;
}

/** Where everything lies. */
export interface BackwardScratch {
  /** Keys and values, as forward expands them, and rotary keys. */
  readonly expanded: ExpandedScratch & Regions;
  /** ∂K, ∂V and each head's part of ∂bK, `[keyRows, groupKvHeads, …]`. */
  readonly gradExpanded: Regions;
  /** Of each query range, what is known of its rows. */
  readonly stats: readonly Region[];
  /** Bytes for ∂query of the heads of a group; 0 unless it has to be summed over heads. */
  readonly gradQueryBytes: number;
  /** How attention loads and stores all of them. */
  readonly element: "f32" | "vec4<f32>";
}

/** The regions of so many elements in float32. */
function floatRegions(elements: readonly [keys: number, values: number, rope: number]): Regions {
  const [keys, values, rope] = regions(elements.map((count) => count * 4));
  return { keys, values, rope, bytes: rope.offset + rope.size };
}

/** The regions of keys and values in halves: one buffer, which the matrix kernels bind as a whole. */
function halvesRegions(problem: MlaProblem, heads: number): Regions {
  const { valuesBase, ropeBase, bytes } = matrixScratch(problem, problem.batch * problem.keyLength, heads);
  return {
    keys: { offset: 0, size: 2 * valuesBase },
    values: { offset: 2 * valuesBase, size: 2 * (ropeBase - valuesBase) },
    rope: { offset: 2 * ropeBase, size: bytes - 2 * ropeBase },
    bytes,
  };
}

/**
 * Lays out the scratch of a problem's head groups.
 *
 * @param problem The problem.
 * @param limits The device's limits.
 * @param queryRanges The ranges of query rows.
 * @param matrixUnits Whether keys and values are expanded for matrix units.
 * @throws {FlashMLAError} With code `limit` when one head does not fit.
 */
export function backwardScratch(
  problem: MlaProblem,
  limits: GpuLimits,
  queryRanges: readonly RowRange[],
  matrixUnits: boolean = false,
): BackwardScratch {
  const { batch, keyLength, queryHeads, kvHeads, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V, rope } = problem;
  const keyRows = batch * keyLength;
  const headsPerKv = checkedHeadsPerKv(problem, limits);
  const layout = (heads: number) => ({
    expanded: matrixUnits
      ? halvesRegions(problem, heads)
      : floatRegions([keyRows * heads * P, keyRows * heads * V, keyRows * R]),
    gradExpanded: floatRegions([keyRows * heads * P, keyRows * heads * V, keyRows * heads * R]),
  });
  const fits = (heads: number) => {
    const { expanded, gradExpanded } = layout(heads);
    return expanded.bytes + gradExpanded.bytes <= scratchLimit &&
      Math.max(expanded.bytes, gradExpanded.bytes) <= limits.maxStorageBufferBindingSize &&
      heads * headsPerKv <= limits.maxComputeWorkgroupsPerDimension;
  };
  const groupKvHeads = halvedUntil(kvHeads, fits);
  const { expanded, gradExpanded } = layout(groupKvHeads);
  const largest = Math.max(expanded.bytes, gradExpanded.bytes);
  checkBinding("the expanded keys and values of one head, or their gradients,", largest, limits);
  const element = [P, R, V].every((width) => width % 4 === 0) ? "vec4<f32>" : "f32";
  const longest = Math.max(...queryRanges.map(({ start, end }) => end - start));
  return {
    expanded: { ...expanded, groupKvHeads, element },
    gradExpanded,
    stats: regions(queryRanges.map(({ start, end }) => (end - start) * queryHeads * 8)),
    gradQueryBytes: rope === "shared" ? longest * groupKvHeads * headsPerKv * (P + R) * 4 : 0,
    element,
  };
}
