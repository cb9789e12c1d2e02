enable f16;
// Rotary embedding, none.
const BEFORE = 4u;
const PAIRS = 1u;
const WIDTH = 6u; // of a head

struct Params {
  rows: u32,
  columns: u32,   // heads × WIDTH
  sourceBase: u32, // elements from the binding's start to the first row, and from one row to the next
  sourceRow: u32,
  resultRow: u32, // elements from one row of the result to the next
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> source: array<vec4<f32>>;


@group(0) @binding(4) var<storage, read_write> result: array<f16>;

fn element(at: u32, row: u32, column: u32) -> f32 {
  if (column >= params.columns) { return 0.0; }
  return f32(source[(at + column) / 4u][(at + column) % 4u]);
}

fn turnedEach(at: u32, row: u32, column: u32) -> vec4<f32> {
  return vec4<f32>(
    element(at, row, column),
    element(at, row, column + 1u),
    element(at, row, column + 2u),
    element(at, row, column + 3u),
  );
}

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let quads = (params.columns + 3u) / 4u;
  for (var i = id.x; i < params.rows * quads; i += groups.x * 256u) {
    let row = i / quads;
    let column = i % quads * 4u;
    let at = params.sourceBase + row * params.sourceRow;
    let quad = turnedEach(at, row, column);
    if (column + 0u < params.columns) { result[row * params.resultRow + column + 0u] = f16(quad[0]); }
    if (column + 1u < params.columns) { result[row * params.resultRow + column + 1u] = f16(quad[1]); }
    if (column + 2u < params.columns) { result[row * params.resultRow + column + 2u] = f16(quad[2]); }
    if (column + 3u < params.columns) { result[row * params.resultRow + column + 3u] = f16(quad[3]); }
  }
}
