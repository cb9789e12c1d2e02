// Rows of a cache in the order of their keys, for what reads latents that follow each other.
//
//   one invocation = four neighbours of a row at a time, striding over the whole grid
//
// A cache of several buffers takes one dispatch each, which leaves the rows of the others as they are.

import type { RowStorage } from "./absorbed_operands.ts";
import { noPlace } from "./append_latents.ts";

/** Invocations of a workgroup. */
export const workgroupSize = 64;

/** The kernel's source: bindings are the parameters, the places of the rows, a buffer of the cache, and the rows. */
export function wgsl(cache: RowStorage): string {
  const quad = cache === "halves" ? "vec2<u32>" : "vec4<f32>";
  return `// Rows of a cache, gathered.
struct Params {
  rows: u32,
  quads: u32,      // of four elements, of a row
  firstPlace: u32, // the rows of the cache that this buffer holds
  placeCount: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> places: array<u32>;
@group(0) @binding(2) var<storage, read> cache: array<${quad}>;
@group(0) @binding(3) var<storage, read_write> gathered: array<${quad}>;

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < params.rows * params.quads; i += groups.x * ${workgroupSize}u) {
    let place = places[i / params.quads];
    if (place == ${noPlace}u || place - params.firstPlace >= params.placeCount) { continue; }
    gathered[i] = cache[(place - params.firstPlace) * params.quads + i % params.quads];
  }
}
`;
}
