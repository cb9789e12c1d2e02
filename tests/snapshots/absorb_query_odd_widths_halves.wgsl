// Absorbed queries.
const DEPTH = 5u;
const L = 7u;
const WIDTH = 16u; // of a row of the result

struct Params {
  tokens: u32,
  queryLength: u32, // tokens of a batch item
  heads: u32,
  kvHeads: u32,
  base: u32,        // elements from the binding's start to the first query, and from one item, token and head to the next
  item: u32,
  row: u32,
  head: u32,
  weightBase: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> query: array<u32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> rows_out: array<vec2<u32>>;

fn load_query(at: u32, column: u32, width: u32) -> vec4<f32> {
  var quad = vec4<f32>();
  for (var c = 0u; c < 4u && column + c < width; c += 1u) {
    let i = at + column + c;
    quad[c] = unpack2x16float(query[i / 2u])[i % 2u];
  }
  return quad;
}
fn load_weight(at: u32, column: u32, width: u32) -> vec4<f32> {
  var quad = vec4<f32>();
  for (var c = 0u; c < 4u && column + c < width; c += 1u) {
    let i = at + column + c;
    quad[c] = weight[i];
  }
  return quad;
}
fn packQuad(value: vec4<f32>) -> vec2<u32> {
  let bounded = select(clamp(value, vec4<f32>(-65504.0), vec4<f32>(65504.0)), value, value != value);
  return vec2<u32>(pack2x16float(bounded.xy), pack2x16float(bounded.zw));
}

fn queryAt(token: u32, head: u32) -> u32 {
  return params.base + token / params.queryLength * params.item + token % params.queryLength * params.row + head * params.head;
}

// One element: columns past what was multiplied begin at any place of a row.
fn element(at: u32, column: u32, end: u32) -> f32 {
  return load_query(at, column / 4u * 4u, end)[column % 4u];
}

fn store(token: u32, head: u32, column: u32, value: vec4<f32>) {
  let at = ((token * params.heads + head) * WIDTH + column) / 4u;
  rows_out[at] = packQuad(value);
}

// What lies past the last token or column is another one's, and is not stored; past the depth weights are zeros.
fn tile(token: u32, head: u32, k: u32) -> vec4<f32> {
  return load_query(queryAt(min(token, params.tokens - 1u), head), k, 8u);
}

fn weights(kvHead: u32, k: u32, n: u32) -> vec4<f32> {
  return load_weight(params.weightBase + (min(n, L - 1u) * params.kvHeads + kvHead) * DEPTH, k, DEPTH);
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
    let right0 = weights(kvHead, base + t % 8u * 4u, firstColumn + (t + 0u) / 8u);
    let right1 = weights(kvHead, base + t % 8u * 4u, firstColumn + (t + 64u) / 8u);
    let right2 = weights(kvHead, base + t % 8u * 4u, firstColumn + (t + 128u) / 8u);
    let right3 = weights(kvHead, base + t % 8u * 4u, firstColumn + (t + 192u) / 8u);
    let right4 = weights(kvHead, base + t % 8u * 4u, firstColumn + (t + 256u) / 8u);
    let right5 = weights(kvHead, base + t % 8u * 4u, firstColumn + (t + 320u) / 8u);
    let right6 = weights(kvHead, base + t % 8u * 4u, firstColumn + (t + 384u) / 8u);
    let right7 = weights(kvHead, base + t % 8u * 4u, firstColumn + (t + 448u) / 8u);
    rows[k0 + 0u][m0 / 4u][m0 % 4u] = left0[0];
    rows[k0 + 1u][m0 / 4u][m0 % 4u] = left0[1];
    rows[k0 + 2u][m0 / 4u][m0 % 4u] = left0[2];
    rows[k0 + 3u][m0 / 4u][m0 % 4u] = left0[3];
    rows[k1 + 0u][m1 / 4u][m1 % 4u] = left1[0];
    rows[k1 + 1u][m1 / 4u][m1 % 4u] = left1[1];
    rows[k1 + 2u][m1 / 4u][m1 % 4u] = left1[2];
    rows[k1 + 3u][m1 / 4u][m1 % 4u] = left1[3];
    right[t % 8u * 4u + 0u][(t + 0u) / 8u / 4u][(t + 0u) / 8u % 4u] = right0[0];
    right[t % 8u * 4u + 1u][(t + 0u) / 8u / 4u][(t + 0u) / 8u % 4u] = right0[1];
    right[t % 8u * 4u + 2u][(t + 0u) / 8u / 4u][(t + 0u) / 8u % 4u] = right0[2];
    right[t % 8u * 4u + 3u][(t + 0u) / 8u / 4u][(t + 0u) / 8u % 4u] = right0[3];
    right[t % 8u * 4u + 0u][(t + 64u) / 8u / 4u][(t + 64u) / 8u % 4u] = right1[0];
    right[t % 8u * 4u + 1u][(t + 64u) / 8u / 4u][(t + 64u) / 8u % 4u] = right1[1];
    right[t % 8u * 4u + 2u][(t + 64u) / 8u / 4u][(t + 64u) / 8u % 4u] = right1[2];
    right[t % 8u * 4u + 3u][(t + 64u) / 8u / 4u][(t + 64u) / 8u % 4u] = right1[3];
    right[t % 8u * 4u + 0u][(t + 128u) / 8u / 4u][(t + 128u) / 8u % 4u] = right2[0];
    right[t % 8u * 4u + 1u][(t + 128u) / 8u / 4u][(t + 128u) / 8u % 4u] = right2[1];
    right[t % 8u * 4u + 2u][(t + 128u) / 8u / 4u][(t + 128u) / 8u % 4u] = right2[2];
    right[t % 8u * 4u + 3u][(t + 128u) / 8u / 4u][(t + 128u) / 8u % 4u] = right2[3];
    right[t % 8u * 4u + 0u][(t + 192u) / 8u / 4u][(t + 192u) / 8u % 4u] = right3[0];
    right[t % 8u * 4u + 1u][(t + 192u) / 8u / 4u][(t + 192u) / 8u % 4u] = right3[1];
    right[t % 8u * 4u + 2u][(t + 192u) / 8u / 4u][(t + 192u) / 8u % 4u] = right3[2];
    right[t % 8u * 4u + 3u][(t + 192u) / 8u / 4u][(t + 192u) / 8u % 4u] = right3[3];
    right[t % 8u * 4u + 0u][(t + 256u) / 8u / 4u][(t + 256u) / 8u % 4u] = right4[0];
    right[t % 8u * 4u + 1u][(t + 256u) / 8u / 4u][(t + 256u) / 8u % 4u] = right4[1];
    right[t % 8u * 4u + 2u][(t + 256u) / 8u / 4u][(t + 256u) / 8u % 4u] = right4[2];
    right[t % 8u * 4u + 3u][(t + 256u) / 8u / 4u][(t + 256u) / 8u % 4u] = right4[3];
    right[t % 8u * 4u + 0u][(t + 320u) / 8u / 4u][(t + 320u) / 8u % 4u] = right5[0];
    right[t % 8u * 4u + 1u][(t + 320u) / 8u / 4u][(t + 320u) / 8u % 4u] = right5[1];
    right[t % 8u * 4u + 2u][(t + 320u) / 8u / 4u][(t + 320u) / 8u % 4u] = right5[2];
    right[t % 8u * 4u + 3u][(t + 320u) / 8u / 4u][(t + 320u) / 8u % 4u] = right5[3];
    right[t % 8u * 4u + 0u][(t + 384u) / 8u / 4u][(t + 384u) / 8u % 4u] = right6[0];
    right[t % 8u * 4u + 1u][(t + 384u) / 8u / 4u][(t + 384u) / 8u % 4u] = right6[1];
    right[t % 8u * 4u + 2u][(t + 384u) / 8u / 4u][(t + 384u) / 8u % 4u] = right6[2];
    right[t % 8u * 4u + 3u][(t + 384u) / 8u / 4u][(t + 384u) / 8u % 4u] = right6[3];
    right[t % 8u * 4u + 0u][(t + 448u) / 8u / 4u][(t + 448u) / 8u % 4u] = right7[0];
    right[t % 8u * 4u + 1u][(t + 448u) / 8u / 4u][(t + 448u) / 8u % 4u] = right7[1];
    right[t % 8u * 4u + 2u][(t + 448u) / 8u / 4u][(t + 448u) / 8u % 4u] = right7[2];
    right[t % 8u * 4u + 3u][(t + 448u) / 8u / 4u][(t + 448u) / 8u % 4u] = right7[3];
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
    if (token >= params.tokens || column >= WIDTH) { continue; }
    var value = sum;
    for (var c = 0u; c < 4u; c += 1u) {
      if (column + c >= L) {
        value[c] = select(0.0, element(queryAt(token, head), DEPTH + column + c - L, 8u), column + c < 10u);
      }
    }
    store(token, head, column, value);
  }
}
