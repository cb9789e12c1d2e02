// Generated WGSL, remembered: writing an unrolled kernel takes 0.3 ms and more, and lengths that grow token by token bring
// a new plan each, with the same kernels.

import type { FlashMLAConfig } from "../op/config.ts";
import type { Capabilities } from "./capabilities.ts";
import * as attend from "./kernels/attend.ts";
import type { AttendShape } from "./kernels/attend_operands.ts";
import * as expand from "./kernels/expand.ts";
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
