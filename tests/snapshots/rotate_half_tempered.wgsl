// Rotary embedding, half.
const BEFORE = 64u;
const PAIRS = 16u;
const WIDTH = 96u; // of a head

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
@group(0) @binding(3) var<storage, read> factors: array<f32>;
@group(0) @binding(4) var<storage, read_write> result: array<vec4<f32>>;

fn turned(at: u32, row: u32, column: u32) -> vec4<f32> {
  let quad = source[(at + column) / 4u];
  let d = column % WIDTH;
  if (d < BEFORE) { return quad; }
  let isSecond = d - BEFORE >= PAIRS;
  let partner = select(column + PAIRS, column - PAIRS, isSecond);
  let other = source[(at + partner) / 4u];
  let pair = row * PAIRS + (d - BEFORE) % PAIRS;
  let turn0 = turns[pair + 0u];
  let turn1 = turns[pair + 1u];
  let turn2 = turns[pair + 2u];
  let turn3 = turns[pair + 3u];
  let cosines = vec4<f32>(turn0.x, turn1.x, turn2.x, turn3.x);
  let sines = vec4<f32>(turn0.y, turn1.y, turn2.y, turn3.y);
  return quad * cosines + select(-other, other, isSecond) * sines;
}

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let quads = (params.columns + 3u) / 4u;
  for (var i = id.x; i < params.rows * quads; i += groups.x * 256u) {
    let row = i / quads;
    let column = i % quads * 4u;
    let at = params.sourceBase + row * params.sourceRow;
    let quad = turned(at, row, column) * factors[row];
    if (column < params.columns) { result[(row * params.resultRow + column) / 4u] = quad; }
  }
}
