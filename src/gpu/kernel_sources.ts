// Generated WGSL, remembered: writing an unrolled kernel takes 0.3 ms and more, and lengths that grow token by token bring
// a new plan each, with the same kernels.

import type { FlashMLAConfig } from "../op/config.ts";
import type { Capabilities } from "./capabilities.ts";
import * as attend from "./kernels/attend.ts";
import * as attendBackward from "./kernels/attend_backward.ts";
import type { GradTile } from "./kernels/attend_backward.ts";
import type { AttendBackwardShape, GradTarget } from "./kernels/attend_backward_operands.ts";
import type { AttendShape } from "./kernels/attend_operands.ts";
import * as expand from "./kernels/expand.ts";
import * as expandBackward from "./kernels/expand_backward.ts";
import * as headSum from "./kernels/head_sum.ts";
import * as rowStats from "./kernels/row_stats.ts";
import * as sinkGradient from "./kernels/sink_gradient.ts";
import * as sinks from "./kernels/sinks.ts";

/** Sources kept: some dozens of kilobytes each. */
const kept = 256;

const sources = new Map<string, string>();

function remembered(key: string, make: () => string): string {
  let source = sources.get(key);
  if (source === undefined) {
    if (sources.size >= kept) sources.clear();
    sources.set(key, source = make());
  }
  return source;
}

/** The expansion kernel. */
export function expandSource(tile: expand.ExpandTile, shape: expand.ExpandShape): string {
  return remembered(`expand ${JSON.stringify([tile, shape])}`, () => expand.wgsl(tile, shape));
}

/** The attention kernel. */
export function attendSource(
  config: FlashMLAConfig,
  shape: AttendShape,
  capabilities: Pick<Capabilities, "subgroups">,
): string {
  const key = `attend ${JSON.stringify([config, shape, capabilities.subgroups])}`;
  return remembered(key, () => attend.wgsl(config, shape, capabilities));
}

/** The kernel that sums the sinks of each head. */
export function sinksSource(stored: "f32" | "f16"): string {
  return remembered(`sinks ${stored}`, () => sinks.wgsl(stored));
}

/** A backward attention kernel. */
export function attendBackwardSource(target: GradTarget, tile: GradTile, shape: AttendBackwardShape): string {
  return remembered(
    `attend backward ${JSON.stringify([target, tile, shape])}`,
    () => attendBackward.wgsl(target, tile, shape),
  );
}

/** A kernel of the expansion's gradients. */
export function expandBackwardSource(
  which: expandBackward.ExpandGradient,
  tile: expand.ExpandTile,
  shape: expandBackward.ExpandBackwardShape,
): string {
  return remembered(
    `expand backward ${JSON.stringify([which, tile, shape])}`,
    () => expandBackward.wgsl(which, tile, shape),
  );
}

/** The kernel that finds what the gradients need to know of a query row. */
export function rowStatsSource(shape: rowStats.RowStatsShape): string {
  return remembered(`row stats ${JSON.stringify(shape)}`, () => rowStats.wgsl(shape));
}

/** The kernel that sums strided rows over heads. */
export function headSumSource(from: "f32" | "f16"): string {
  return remembered(`head sum ${from}`, () => headSum.wgsl(from));
}

/** The kernel of the sinks' gradients. */
export function sinkGradientSource(aux: "f32" | "f16"): string {
  return remembered(`sink gradient ${aux}`, () => sinkGradient.wgsl(aux));
}
