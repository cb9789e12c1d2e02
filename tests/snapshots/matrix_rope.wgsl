// Rotary keys in halves.
const WIDTH = 5u;
const QUADS = 2u;

struct Params {
  rows: u32,
  ropeKeyBase: u32,  // elements from the binding's start to the first row
  ropeKeyRow: u32,   // elements from one row to the next
  ropeKeyRows: u32,  // rows of a batch item
  ropeKeyGap: u32,   // further elements from one batch item to the next, modulo 2^32
  expandedBase: u32, // halves from the scratch's start to the first row, a multiple of 8
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> ropeKey: array<f32>;
@group(0) @binding(2) var<storage, read_write> expanded: array<vec4<u32>>; // halves

fn saturated(x: vec4<f32>) -> vec4<f32> {
  let isNan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
  return select(clamp(x, vec4<f32>(-65504.0), vec4<f32>(65504.0)), x, isNan);
}

fn finiteHalves(quad: vec4<u32>) -> vec4<u32> {
  let low = select(vec4<u32>(0x0000ffffu), vec4<u32>(), (quad & vec4<u32>(0x7c00u)) == vec4<u32>(0x7c00u));
  let high = select(vec4<u32>(0xffff0000u), vec4<u32>(), (quad & vec4<u32>(0x7c000000u)) == vec4<u32>(0x7c000000u));
  return quad & (low | high);
}

fn loadRope4(row: u32, column: u32) -> vec4<f32> {
  let offset = params.ropeKeyBase + row * params.ropeKeyRow + (row / params.ropeKeyRows) * params.ropeKeyGap;
  if (column >= WIDTH) { return vec4<f32>(); }
  return vec4<f32>(select(0.0, ropeKey[offset + min(column + 0u, WIDTH - 1u)], column + 0u < WIDTH), select(0.0, ropeKey[offset + min(column + 1u, WIDTH - 1u)], column + 1u < WIDTH), select(0.0, ropeKey[offset + min(column + 2u, WIDTH - 1u)], column + 2u < WIDTH), select(0.0, ropeKey[offset + min(column + 3u, WIDTH - 1u)], column + 3u < WIDTH));
}

fn packed4(row: u32, column: u32) -> vec2<u32> {
  let x = saturated(loadRope4(row, column));
  return vec2<u32>(pack2x16float(x.xy), pack2x16float(x.zw));
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let piece = workgroup.x * 64u + t;
  let row = piece / QUADS;
  if (row >= params.rows) { return; }
  let column = piece % QUADS * 8u;
  expanded[params.expandedBase / 8u + piece] = vec4<u32>(packed4(row, column), packed4(row, column + 4u));
}
