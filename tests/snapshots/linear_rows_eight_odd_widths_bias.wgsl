enable f16;
// Up to 8 row(s) × a weight, 16 columns to a workgroup
const ROWS = 8u;
const QUADS = 4u;
const LANES = 64u;

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
@group(0) @binding(1) var<storage, read> left: array<f16>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> result: array<f16>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;

fn biasAt(column: u32) -> vec4<f32> {
  let last = arrayLength(&bias) - 1u;
  return vec4<f32>(
    bias[min(column, last)],
    bias[min(column + 1u, last)],
    bias[min(column + 2u, last)],
    bias[min(column + 3u, last)],
  );
}

var<workgroup> sums: array<array<vec4<f32>, 256>, 4>;

fn loadLeft(row: u32, k: u32) -> vec4<f32> {
  let offset = params.leftBase + row * params.leftRow + (row / params.leftRows) * params.leftGap;
  return vec4<f32>(select(0.0, f32(left[offset + min(k + 0u, params.depth - 1u)]), k + 0u < params.depth), select(0.0, f32(left[offset + min(k + 1u, params.depth - 1u)]), k + 1u < params.depth), select(0.0, f32(left[offset + min(k + 2u, params.depth - 1u)]), k + 2u < params.depth), select(0.0, f32(left[offset + min(k + 3u, params.depth - 1u)]), k + 3u < params.depth));
}

// Past the depth the rows are zeros, and any weight will do.
fn loadWeight(k: u32, column: u32) -> vec4<f32> {
  let offset = min(k, params.depth - 1u) * params.columns;
  return vec4<f32>(select(0.0, weight[offset + min(column + 0u, params.columns - 1u)], column + 0u < params.columns), select(0.0, weight[offset + min(column + 1u, params.columns - 1u)], column + 1u < params.columns), select(0.0, weight[offset + min(column + 2u, params.columns - 1u)], column + 2u < params.columns), select(0.0, weight[offset + min(column + 3u, params.columns - 1u)], column + 3u < params.columns));
}

fn store(row: u32, column: u32, sum: vec4<f32>) {
  if (row >= params.rows) { return; }
  if (column + 0u < params.columns) { result[row * params.columns + column + 0u] = f16((sum + biasAt(column))[0]); }
  if (column + 1u < params.columns) { result[row * params.columns + column + 1u] = f16((sum + biasAt(column))[1]); }
  if (column + 2u < params.columns) { result[row * params.columns + column + 2u] = f16((sum + biasAt(column))[2]); }
  if (column + 3u < params.columns) { result[row * params.columns + column + 3u] = f16((sum + biasAt(column))[3]); }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let quad = t % QUADS;
  let lane = t / QUADS;
  let column = 4u * (workgroup.x * QUADS + quad);
  let firstRow = workgroup.y * ROWS;
  var sum0 = vec4<f32>();
  let row0 = min(firstRow + 0u, params.rows - 1u);
  var sum1 = vec4<f32>();
  let row1 = min(firstRow + 1u, params.rows - 1u);
  var sum2 = vec4<f32>();
  let row2 = min(firstRow + 2u, params.rows - 1u);
  var sum3 = vec4<f32>();
  let row3 = min(firstRow + 3u, params.rows - 1u);
  var sum4 = vec4<f32>();
  let row4 = min(firstRow + 4u, params.rows - 1u);
  var sum5 = vec4<f32>();
  let row5 = min(firstRow + 5u, params.rows - 1u);
  var sum6 = vec4<f32>();
  let row6 = min(firstRow + 6u, params.rows - 1u);
  var sum7 = vec4<f32>();
  let row7 = min(firstRow + 7u, params.rows - 1u);
  if (column < params.columns) {
    for (var k = 4u * lane; k < params.depth; k += 4u * LANES) {
      let left0 = loadLeft(row0, k);
      let left1 = loadLeft(row1, k);
      let left2 = loadLeft(row2, k);
      let left3 = loadLeft(row3, k);
      let left4 = loadLeft(row4, k);
      let left5 = loadLeft(row5, k);
      let left6 = loadLeft(row6, k);
      let left7 = loadLeft(row7, k);
      let weight0 = loadWeight(k + 0u, column);
      let weight1 = loadWeight(k + 1u, column);
      let weight2 = loadWeight(k + 2u, column);
      let weight3 = loadWeight(k + 3u, column);
      sum0 = fma(vec4<f32>(left0[0]), weight0, sum0);
      sum1 = fma(vec4<f32>(left1[0]), weight0, sum1);
      sum2 = fma(vec4<f32>(left2[0]), weight0, sum2);
      sum3 = fma(vec4<f32>(left3[0]), weight0, sum3);
      sum4 = fma(vec4<f32>(left4[0]), weight0, sum4);
      sum5 = fma(vec4<f32>(left5[0]), weight0, sum5);
      sum6 = fma(vec4<f32>(left6[0]), weight0, sum6);
      sum7 = fma(vec4<f32>(left7[0]), weight0, sum7);
      sum0 = fma(vec4<f32>(left0[1]), weight1, sum0);
      sum1 = fma(vec4<f32>(left1[1]), weight1, sum1);
      sum2 = fma(vec4<f32>(left2[1]), weight1, sum2);
      sum3 = fma(vec4<f32>(left3[1]), weight1, sum3);
      sum4 = fma(vec4<f32>(left4[1]), weight1, sum4);
      sum5 = fma(vec4<f32>(left5[1]), weight1, sum5);
      sum6 = fma(vec4<f32>(left6[1]), weight1, sum6);
      sum7 = fma(vec4<f32>(left7[1]), weight1, sum7);
      sum0 = fma(vec4<f32>(left0[2]), weight2, sum0);
      sum1 = fma(vec4<f32>(left1[2]), weight2, sum1);
      sum2 = fma(vec4<f32>(left2[2]), weight2, sum2);
      sum3 = fma(vec4<f32>(left3[2]), weight2, sum3);
      sum4 = fma(vec4<f32>(left4[2]), weight2, sum4);
      sum5 = fma(vec4<f32>(left5[2]), weight2, sum5);
      sum6 = fma(vec4<f32>(left6[2]), weight2, sum6);
      sum7 = fma(vec4<f32>(left7[2]), weight2, sum7);
      sum0 = fma(vec4<f32>(left0[3]), weight3, sum0);
      sum1 = fma(vec4<f32>(left1[3]), weight3, sum1);
      sum2 = fma(vec4<f32>(left2[3]), weight3, sum2);
      sum3 = fma(vec4<f32>(left3[3]), weight3, sum3);
      sum4 = fma(vec4<f32>(left4[3]), weight3, sum4);
      sum5 = fma(vec4<f32>(left5[3]), weight3, sum5);
      sum6 = fma(vec4<f32>(left6[3]), weight3, sum6);
      sum7 = fma(vec4<f32>(left7[3]), weight3, sum7);
    }
  }
  sums[0][t] = sum0;
  sums[1][t] = sum1;
  sums[2][t] = sum2;
  sums[3][t] = sum3;
  workgroupBarrier();
  if (t < 4u * QUADS) {
    var total = vec4<f32>();
    for (var i = 0u; i < LANES; i += 1u) { total += sums[t / QUADS][i * QUADS + t % QUADS]; }
    store(firstRow + 0u + t / QUADS, 4u * (workgroup.x * QUADS + t % QUADS), total);
  }
  workgroupBarrier();
  sums[0][t] = sum4;
  sums[1][t] = sum5;
  sums[2][t] = sum6;
  sums[3][t] = sum7;
  workgroupBarrier();
  if (t < 4u * QUADS) {
    var total = vec4<f32>();
    for (var i = 0u; i < LANES; i += 1u) { total += sums[t / QUADS][i * QUADS + t % QUADS]; }
    store(firstRow + 4u + t / QUADS, 4u * (workgroup.x * QUADS + t % QUADS), total);
  }
}
