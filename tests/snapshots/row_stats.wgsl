enable f16;
// Log-sum-exp and D of every query row.
const MASKED = -3.4e38;
const UNSEEN = -3.0e38;
const LOG2E = 1.4426950408889634;
const LN2 = 0.6931471805599453;

struct Params {
  rows: u32,        // of the range
  firstRow: u32,    // query row, counted through all batch items, that row 0 is
  queryLength: u32,
  V: u32,
  firstTile: u32,   // index of the first tile of rows of this dispatch
  outputBase: u32,  // elements from the binding's start to the first row, and so on
  outputRow: u32,
  outputHead: u32,
  outputGap: u32,
  gradBase: u32,
  gradRow: u32,
  gradHead: u32,
  gradGap: u32,
  lseBase: u32,
  lseItem: u32,
  lseHead: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> output: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read> gradOutput: array<f32>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read_write> stats: array<vec2<f32>>;

var<workgroup> sums: array<array<f32, 8>, 8>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let row = (params.firstTile + workgroup.x) * 8u + t / 8u;
  let head = workgroup.y;
  let whole = params.firstRow + row;
  let item = whole / params.queryLength;
  var sum = 0.0;
  if (row < params.rows) {
    let rangeItem = item - params.firstRow / params.queryLength;
    let outputAt = params.outputBase + row * params.outputRow + head * params.outputHead + rangeItem * params.outputGap;
    let gradAt = params.gradBase + row * params.gradRow + head * params.gradHead + rangeItem * params.gradGap;
    for (var column = (t % 8u) * 4u; column < params.V; column += 32u) {
      let result = vec4<f32>(output[(outputAt + column) / 4u]);
      let grad = vec4<f32>(select(0.0, gradOutput[gradAt + min(column + 0u, params.V - 1u)], column + 0u < params.V), select(0.0, gradOutput[gradAt + min(column + 1u, params.V - 1u)], column + 1u < params.V), select(0.0, gradOutput[gradAt + min(column + 2u, params.V - 1u)], column + 2u < params.V), select(0.0, gradOutput[gradAt + min(column + 3u, params.V - 1u)], column + 3u < params.V));
      sum += dot(result, grad);
    }
  }
  sums[t / 8u][t % 8u] = sum;
  workgroupBarrier();
  if (t % 8u == 0u && row < params.rows) {
    let logSum = lse[params.lseBase + item * params.lseItem + head * params.lseHead + whole % params.queryLength];
    if (bitcast<u32>(logSum) == 0xff800000u) {
      stats[head * params.rows + row] = vec2<f32>(-MASKED, 0.0);
    } else {
      var total = 0.0;
      for (var i = 0u; i < 8u; i += 1u) { total += sums[t / 8u][i]; }
      stats[head * params.rows + row] = vec2<f32>(logSum * LOG2E, total);
    }
  }
}
