// Rows of new tokens into the pages of a cache, rounded to its element type and padded with zeros to whole quads of 16 bytes.
//
//   one invocation = four neighbours of a row at a time, striding over the whole grid
//
// A cache of several buffers takes one dispatch each, which leaves the rows of the others out.

import type { RowStorage } from "./absorbed_operands.ts";
import { type PackedElements, packedLoad, packedType } from "./packed_element.ts";

/** Invocations of a workgroup. */
export const workgroupSize = 64;

/** Where a row goes that has no place. */
export const noPlace = 0xffffffff;

/** The kernel's source: bindings are the parameters, the rows, their places, and a buffer of the cache. */
export function wgsl(source: PackedElements, cache: RowStorage): string {
  const halves = cache === "halves";
  return `// New rows of a cache of latents.
struct Params {
  rows: u32,
  width: u32,      // of a row
  quads: u32,      // of four elements, of a row of the cache
  length: u32,     // rows of a batch item
  base: u32,       // elements from the binding's start to the first row, and from one item and row to the next
  item: u32,
  row: u32,
  firstPlace: u32, // the rows of the cache that this buffer holds
  placeCount: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> source: array<${packedType(source)}>;
@group(0) @binding(2) var<storage, read> places: array<u32>;
@group(0) @binding(3) var<storage, read_write> cache: array<${halves ? "vec2<u32>" : "vec4<f32>"}>;

${packedLoad("source", source)}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < params.rows * params.quads; i += groups.x * ${workgroupSize}u) {
    let row = i / params.quads;
    let column = i % params.quads * 4u;
    let place = places[row];
    // Wraps around for places before this buffer's, and for rows that have none.
    if (place == ${noPlace}u || place - params.firstPlace >= params.placeCount) { continue; }
    let at = params.base + row / params.length * params.item + row % params.length * params.row;
    let quad = load_source(at, column, params.width);
    cache[(place - params.firstPlace) * params.quads + column / 4u] = ${
    halves ? "vec2<u32>(pack2x16float(quad.xy), pack2x16float(quad.zw))" : "quad"
  };
  }
}
`;
}
