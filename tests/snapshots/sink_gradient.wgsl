enable f16;
// Gradients of the sinks.
const MASKED = -3.4e38;
const UNSEEN = -3.0e38;
const LOG2E = 1.4426950408889634;
const LN2 = 0.6931471805599453;

struct Params {
  rows: u32,         // query rows of the range
  heads: u32,        // heads that share a row of sinks
  sinks: u32,        // of a row
  auxBase: u32,      // elements from the binding's start to the first sink, and from row to row
  auxRow: u32,
  gradientBase: u32,
  accumulate: u32,   // whether to add to what is there
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> aux: array<f16>;
@group(0) @binding(2) var<storage, read> stats: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> gradient: array<f32>;

var<workgroup> sums: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let sink = f32(aux[params.auxBase + workgroup.y * params.auxRow + workgroup.x]) * LOG2E;
  let first = workgroup.y * params.heads * params.rows;
  var sum = 0.0;
  for (var i = t; i < params.heads * params.rows; i += 256u) {
    let stat = stats[first + i];
    sum += exp2(sink - stat.x) * stat.y;
  }
  sums[t] = sum;
  workgroupBarrier();
  for (var step = 128u; step > 0u; step /= 2u) {
    if (t < step) { sums[t] += sums[t + step]; }
    workgroupBarrier();
  }
  if (t == 0u) {
    let at = params.gradientBase + workgroup.y * params.sinks + workgroup.x;
    var total = -sums[0];
    if (params.accumulate != 0u) { total += gradient[at]; }
    gradient[at] = total;
  }
}
