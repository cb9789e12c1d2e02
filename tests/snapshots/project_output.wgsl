// Results of absorbed attention.
const DEPTH = 32u;
const V = 16u;

struct Params {
  tokens: u32,
  heads: u32,
  kvHeads: u32,
  weightBase: u32,
  outputBase: u32, // elements from the binding's start to the first result
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> attended: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> output: array<vec2<u32>>;

fn load_attended(at: u32, column: u32, width: u32) -> vec4<f32> {
  let quad = attended[(at + min(column, width - 4u)) / 4u];
  return select(vec4<f32>(), quad, column < width);
}
fn load_weight(at: u32, column: u32, width: u32) -> vec4<f32> {
  let quad = weight[(at + min(column, width - 4u)) / 4u];
  return select(vec4<f32>(), vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y)), column < width);
}

// What lies past the last token or column is another one's, and is not stored; past the depth there are zeros.
fn tile(token: u32, head: u32, k: u32) -> vec4<f32> {
  let quad = load_attended((min(token, params.tokens - 1u) * params.heads + head) * 32u, k, 32u);
  return select(vec4<f32>(), quad, vec4<u32>(k, k + 1u, k + 2u, k + 3u) < vec4<u32>(DEPTH));
}

fn weights(kvHead: u32, k: u32, n: u32) -> vec4<f32> {
  let quad = load_weight(params.weightBase + (min(k, DEPTH - 1u) * params.kvHeads + kvHead) * V, n, V);
  return select(vec4<f32>(), quad, k < DEPTH);
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
    // All loads before the first store, so that a step waits for memory once.
    let m0 = (t + 0u) / 8u;
    let k0 = t % 8u * 4u;
    let left0 = tile(firstToken + m0, head, base + k0);
    let m1 = (t + 64u) / 8u;
    let k1 = t % 8u * 4u;
    let left1 = tile(firstToken + m1, head, base + k1);
    let right0 = weights(kvHead, base + (t + 0u) / 16u, firstColumn + 4u * (t % 16u));
    let right1 = weights(kvHead, base + (t + 64u) / 16u, firstColumn + 4u * (t % 16u));
    let right2 = weights(kvHead, base + (t + 128u) / 16u, firstColumn + 4u * (t % 16u));
    let right3 = weights(kvHead, base + (t + 192u) / 16u, firstColumn + 4u * (t % 16u));
    let right4 = weights(kvHead, base + (t + 256u) / 16u, firstColumn + 4u * (t % 16u));
    let right5 = weights(kvHead, base + (t + 320u) / 16u, firstColumn + 4u * (t % 16u));
    let right6 = weights(kvHead, base + (t + 384u) / 16u, firstColumn + 4u * (t % 16u));
    let right7 = weights(kvHead, base + (t + 448u) / 16u, firstColumn + 4u * (t % 16u));
    rows[k0 + 0u][m0 / 4u][m0 % 4u] = left0[0];
    rows[k0 + 1u][m0 / 4u][m0 % 4u] = left0[1];
    rows[k0 + 2u][m0 / 4u][m0 % 4u] = left0[2];
    rows[k0 + 3u][m0 / 4u][m0 % 4u] = left0[3];
    rows[k1 + 0u][m1 / 4u][m1 % 4u] = left1[0];
    rows[k1 + 1u][m1 / 4u][m1 % 4u] = left1[1];
    rows[k1 + 2u][m1 / 4u][m1 % 4u] = left1[2];
    rows[k1 + 3u][m1 / 4u][m1 % 4u] = left1[3];
    right[(t + 0u) / 16u][t % 16u] = right0;
    right[(t + 64u) / 16u][t % 16u] = right1;
    right[(t + 128u) / 16u][t % 16u] = right2;
    right[(t + 192u) / 16u][t % 16u] = right3;
    right[(t + 256u) / 16u][t % 16u] = right4;
    right[(t + 320u) / 16u][t % 16u] = right5;
    right[(t + 384u) / 16u][t % 16u] = right6;
    right[(t + 448u) / 16u][t % 16u] = right7;
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
    if (token >= params.tokens || column >= V) { continue; }
    output[(params.outputBase + (token * params.heads + head) * V + column) / 4u] =
      vec2<u32>(pack2x16float(sum.xy), pack2x16float(sum.zw));
  }
}
