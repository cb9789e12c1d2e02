enable f16;
// Up to 1 row(s) × a weight, 64 columns to a workgroup
const ROWS = 1u;
const QUADS = 16u;
const LANES = 16u;

struct Params {
  rows: u32,
  columns: u32,  // N
  depth: u32,    // K
  leftBase: u32, // elements from the binding's start to the first row
  leftRow: u32,  // elements from one row to the next
  leftRows: u32, // rows of a batch item
  leftGap: u32,  // further elements from one batch item to the next, modulo 2^32
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> left: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f16>>;
@group(0) @binding(3) var<storage, read_write> result: array<vec4<f32>>;

var<workgroup> sums: array<array<vec4<f32>, 256>, 1>;

fn loadLeft(row: u32, k: u32) -> vec4<f32> {
  let offset = params.leftBase + row * params.leftRow;
  return left[(offset + k) / 4u];
}

// Past the depth the rows are zeros, and any weight will do.
fn loadWeight(k: u32, column: u32) -> vec4<f32> {
  let offset = min(k, params.depth - 1u) * params.columns;
  return vec4<f32>(weight[(offset + column) / 4u]);
}

fn store(row: u32, column: u32, sum: vec4<f32>) {
  if (row >= params.rows) { return; }
  if (column < params.columns) { result[(row * params.columns + column) / 4u] = sum; }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let quad = t % QUADS;
  let lane = t / QUADS;
  let column = 4u * (workgroup.x * QUADS + quad);
  let firstRow = workgroup.y * ROWS;
  var sum0 = vec4<f32>();
  let row0 = min(firstRow + 0u, params.rows - 1u);
  if (column < params.columns) {
    for (var k = 4u * lane; k < params.depth; k += 4u * LANES) {
      let left0 = loadLeft(row0, k);
      let weight0 = loadWeight(k + 0u, column);
      let weight1 = loadWeight(k + 1u, column);
      let weight2 = loadWeight(k + 2u, column);
      let weight3 = loadWeight(k + 3u, column);
      sum0 = fma(vec4<f32>(left0[0]), weight0, sum0);
      sum0 = fma(vec4<f32>(left0[1]), weight1, sum0);
      sum0 = fma(vec4<f32>(left0[2]), weight2, sum0);
      sum0 = fma(vec4<f32>(left0[3]), weight3, sum0);
    }
  }
  sums[0][t] = sum0;
  workgroupBarrier();
  if (t < 1u * QUADS) {
    var total = vec4<f32>();
    for (var i = 0u; i < LANES; i += 1u) { total += sums[t / QUADS][i * QUADS + t % QUADS]; }
    store(firstRow + 0u + t / QUADS, 4u * (workgroup.x * QUADS + t % QUADS), total);
  }
}
