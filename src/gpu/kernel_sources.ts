// Generated WGSL, remembered: writing an unrolled kernel takes 0.3 ms and more, and lengths that grow token by token bring
// a new plan each, with the same kernels.

import type { FlashMLAConfig } from "../op/config.ts";
import type { Capabilities } from "./capabilities.ts";
import * as absorbQuery from "./kernels/absorb_query.ts";
import * as absorbed from "./kernels/absorbed_attend.ts";
import type { AbsorbedShape } from "./kernels/absorbed_operands.ts";
import * as attend from "./kernels/attend.ts";
import * as attendBackward from "./kernels/attend_backward.ts";
import type { GradTile } from "./kernels/attend_backward.ts";
import type { AttendBackwardShape, GradTarget } from "./kernels/attend_backward_operands.ts";
import type { AttendShape } from "./kernels/attend_operands.ts";
import * as expand from "./kernels/expand.ts";
import * as expandBackward from "./kernels/expand_backward.ts";
import * as headSum from "./kernels/head_sum.ts";
import * as linearRows from "./kernels/linear_rows.ts";
import * as mergeSplits from "./kernels/merge_splits.ts";
import * as projectOutput from "./kernels/project_output.ts";
import * as rowStats from "./kernels/row_stats.ts";
import * as rmsNorm from "./kernels/rms_norm.ts";
import * as rotate from "./kernels/rotate.ts";
import * as sinkGradient from "./kernels/sink_gradient.ts";
import * as matrixAbsorbed from "./kernels/matrix_absorbed_attend.ts";
import type { MatrixAbsorbedTile } from "./kernels/matrix_absorbed_layout.ts";
import * as matrixAttend from "./kernels/matrix_attend.ts";
import type { MatrixAttendTile } from "./kernels/matrix_attend_layout.ts";
import * as matrixGrad from "./kernels/matrix_attend_backward.ts";
import * as matrixExpand from "./kernels/matrix_expand.ts";
import * as matrixProject from "./kernels/matrix_expand_backward.ts";
import * as matrixMagnitude from "./kernels/matrix_magnitude.ts";
import * as matrixMaxima from "./kernels/matrix_maxima.ts";
import * as matrixRope from "./kernels/matrix_rope.ts";
import * as matrixStage from "./kernels/matrix_stage.ts";
import type { MatrixBackend } from "./kernels/matrix_unit.ts";
import type { ExpandGradient } from "./kernels/expand_backward.ts";
import type { StorageElement } from "./kernels/storage_element.ts";
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

/** Absorbed attention. */
export function absorbedSource(
  tile: absorbed.AbsorbedTile,
  shape: AbsorbedShape,
  capabilities: Pick<Capabilities, "subgroups">,
): string {
  const key = `absorbed ${JSON.stringify([tile, shape, capabilities.subgroups])}`;
  return remembered(key, () => absorbed.wgsl(tile, shape, capabilities));
}

/** Absorbed attention on matrix units. */
export function matrixAbsorbedSource(tile: MatrixAbsorbedTile, shape: AbsorbedShape, backend: MatrixBackend): string {
  return remembered(
    `matrix absorbed ${JSON.stringify([tile, shape, backend])}`,
    () => matrixAbsorbed.wgsl(tile, shape, backend),
  );
}

/** The kernel that merges the splits of absorbed attention. */
export function mergeSplitsSource(shape: AbsorbedShape, blockRows: number, lanes: number): string {
  return remembered(
    `merge splits ${JSON.stringify([shape, blockRows, lanes])}`,
    () => mergeSplits.wgsl(shape, blockRows, lanes),
  );
}

/** The kernel that absorbs queries, or copies absorbed ones. */
export function absorbQuerySource(shape: absorbQuery.AbsorbQueryShape): string {
  return remembered(`absorb query ${JSON.stringify(shape)}`, () => absorbQuery.wgsl(shape));
}

/** The projection of attended latents. */
export function projectOutputSource(shape: projectOutput.ProjectOutputShape): string {
  return remembered(`project output ${JSON.stringify(shape)}`, () => projectOutput.wgsl(shape));
}

/** The expansion kernel. */
export function expandSource(tile: expand.ExpandTile, shape: expand.ExpandShape): string {
  return remembered(`expand ${JSON.stringify([tile, shape])}`, () => expand.wgsl(tile, shape));
}

/** A linear layer of a few rows. */
export function linearRowsSource(tile: linearRows.LinearRowsTile, shape: linearRows.LinearRowsShape): string {
  return remembered(`linear rows ${JSON.stringify([tile, shape])}`, () => linearRows.wgsl(tile, shape));
}

/** Norms of rows. */
export function normSource(shape: Parameters<typeof rmsNorm.wgsl>[0]): string {
  return remembered(`rms norm ${shape.halves}`, () => rmsNorm.wgsl(shape));
}

/** The rotary embedding. */
export function rotateSource(shape: rotate.RotateShape): string {
  return remembered(`rotate ${JSON.stringify(shape)}`, () => rotate.wgsl(shape));
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

/** The expansion on matrix units. */
export function matrixExpandSource(
  tile: matrixExpand.MatrixExpandTile,
  shape: matrixExpand.MatrixExpandShape,
  backend: MatrixBackend,
): string {
  return remembered(
    `matrix expand ${JSON.stringify([tile, shape, backend])}`,
    () => matrixExpand.wgsl(tile, shape, backend),
  );
}

/** The copy of rotary keys that goes with it. */
export function matrixRopeSource(shape: matrixRope.MatrixRopeShape): string {
  return remembered(`matrix rope ${JSON.stringify(shape)}`, () => matrixRope.wgsl(shape));
}

/** Attention on matrix units. */
export function matrixAttendSource(
  tile: MatrixAttendTile,
  shape: matrixAttend.MatrixAttendShape,
  backend: MatrixBackend,
): string {
  return remembered(
    `matrix attend ${JSON.stringify([tile, shape, backend])}`,
    () => matrixAttend.wgsl(tile, shape, backend),
  );
}

/** The magnitudes that the staging of gradients scales by. */
export function matrixMagnitudeSource(gradOutput: StorageElement): string {
  return remembered(`matrix magnitude ${gradOutput}`, () => matrixMagnitude.wgsl(gradOutput));
}

/** Queries and output gradients in halves. */
export function matrixStageSource(shape: matrixStage.MatrixStageShape): string {
  return remembered(`matrix stage ${JSON.stringify(shape)}`, () => matrixStage.wgsl(shape));
}

/** Gradients of attention on matrix units. */
export function matrixGradSource(
  target: matrixGrad.MatrixGradTarget,
  tile: matrixGrad.MatrixGradTile,
  shape: matrixGrad.MatrixGradShape,
  backend: MatrixBackend,
): string {
  return remembered(
    `matrix ${target} ${JSON.stringify([tile, shape, backend])}`,
    () => matrixGrad.wgsl(target, tile, shape, backend),
  );
}

/** The magnitudes that the projections of gradients scale by. */
export function matrixMaximaSource(): string {
  return remembered("matrix maxima", () => matrixMaxima.wgsl());
}

/** Projections of gradients on matrix units. */
export function matrixProjectSource(
  which: ExpandGradient,
  tile: matrixExpand.MatrixExpandTile,
  shape: matrixProject.MatrixExpandBackwardShape,
  backend: MatrixBackend,
): string {
  return remembered(
    `matrix project ${which} ${JSON.stringify([tile, shape, backend])}`,
    () => matrixProject.wgsl(which, tile, shape, backend),
  );
}
