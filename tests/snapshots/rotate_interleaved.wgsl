enable f16;
// Rotary embedding, interleaved.
const BEFORE = 128u;
const PAIRS = 32u;
const WIDTH = 192u; // of a head

struct Params {
  rows: u32,
  columns: u32,   // heads × WIDTH
  sourceBase: u32, // elements from the binding's start to the first row, and from one row to the next
  sourceRow: u32,
  resultRow: u32, // elements from one row of the result to the next
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> source: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> turns: array<vec2<f32>>; // cosine and sine

@group(0) @binding(4) var<storage, read_write> result: array<vec4<f16>>;

fn turned(at: u32, row: u32, column: u32) -> vec4<f32> {
  let quad = source[(at + column) / 4u];
  let d = column % WIDTH;
  if (d < BEFORE) { return quad; }
  let first = turns[row * PAIRS + (d - BEFORE) / 2u];
  let second = turns[row * PAIRS + (d - BEFORE) / 2u + 1u];
  let cosines = vec4<f32>(first.xx, second.xx);
  let sines = vec4<f32>(-first.y, first.y, -second.y, second.y);
  return quad * cosines + quad.yxwz * sines;
}

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let quads = (params.columns + 3u) / 4u;
  for (var i = id.x; i < params.rows * quads; i += groups.x * 256u) {
    let row = i / quads;
    let column = i % quads * 4u;
    let at = params.sourceBase + row * params.sourceRow;
    let quad = turned(at, row, column);
    if (column < params.columns) { result[(row * params.resultRow + column) / 4u] = vec4<f16>(quad); }
  }
}
