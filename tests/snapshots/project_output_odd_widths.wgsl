// Results of absorbed attention.
const DEPTH = 7u;
const V = 5u;

struct Params {
  tokens: u32,
  heads: u32,
  kvHeads: u32,
  weightBase: u32,
  outputBase: u32, // elements from the binding's start to the first result
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> attended: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> output: array<f32>;

fn load_attended(at: u32, column: u32, width: u32) -> vec4<f32> {
  if (column >= width) { return vec4<f32>(); }
  return attended[(at + column) / 4u];
}
fn load_weight(at: u32, column: u32, width: u32) -> vec4<f32> {
  var quad = vec4<f32>();
  for (var c = 0u; c < 4u && column + c < width; c += 1u) {
    let i = at + column + c;
    quad[c] = weight[i];
  }
  return quad;
}

fn tile(token: u32, head: u32, k: u32) -> vec4<f32> {
  if (token >= params.tokens) { return vec4<f32>(); }
  let quad = load_attended((token * params.heads + head) * 8u, k, DEPTH);
  return select(vec4<f32>(), quad, vec4<u32>(k, k + 1u, k + 2u, k + 3u) < vec4<u32>(DEPTH));
}

fn weights(kvHead: u32, k: u32, n: u32) -> vec4<f32> {
  if (k >= DEPTH) { return vec4<f32>(); }
  return load_weight(params.weightBase + (k * params.kvHeads + kvHead) * V, n, V);
}

var<workgroup> rows: array<array<vec4<f32>, 4>, 32>;
var<workgroup> right: array<array<vec4<f32>, 16>, 32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let head = workgroup.z;
  let firstColumn = workgroup.x * 64u;
  let firstToken = workgroup.y * 16u;
  let kvHead = head * params.kvHeads / params.heads;
  let rowQuad = t / 16u;
  let columnQuad = t % 16u;
  var sums: array<vec4<f32>, 4>;
  for (var base = 0u; base < DEPTH; base += 32u) {
    for (var piece = t; piece < 128u; piece += 64u) {
      let m = piece / 8u;
      let k = piece % 8u * 4u;
      let quad = tile(firstToken + m, head, base + k);
      for (var i = 0u; i < 4u; i += 1u) { rows[k + i][m / 4u][m % 4u] = quad[i]; }
    }
    for (var piece = t; piece < 512u; piece += 64u) {
      let k = piece / 16u;
      let n = piece % 16u;
      right[k][n] = weights(kvHead, base + k, firstColumn + 4u * n);
    }
    workgroupBarrier();
    for (var k = 0u; k < 32u; k += 1u) {
      let l = rows[k][rowQuad];
      let r = right[k][columnQuad];
      sums[0] += l.x * r;
      sums[1] += l.y * r;
      sums[2] += l.z * r;
      sums[3] += l.w * r;
    }
    workgroupBarrier();
  }
  let column = firstColumn + 4u * columnQuad;
  for (var i = 0u; i < 4u; i += 1u) {
    let token = firstToken + 4u * rowQuad + i;
    let sum = sums[i];
    if (token >= params.tokens) { continue; }
    for (var c = 0u; c < 4u && column + c < V; c += 1u) {
      output[params.outputBase + (token * params.heads + head) * V + column + c] = sum[c];
    }
  }
}
