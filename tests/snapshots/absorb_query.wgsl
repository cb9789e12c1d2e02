// Absorbed queries.
const DEPTH = 16u;
const L = 32u;
const WIDTH = 40u; // of a row of the result

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
@group(0) @binding(1) var<storage, read> query: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> rows_out: array<vec4<f32>>;

fn load_query(at: u32, column: u32, width: u32) -> vec4<f32> {
  if (column >= width) { return vec4<f32>(); }
  return query[(at + column) / 4u];
}
fn load_weight(at: u32, column: u32, width: u32) -> vec4<f32> {
  if (column >= width) { return vec4<f32>(); }
  let quad = weight[(at + column) / 4u];
  return vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y));
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
  rows_out[at] = value;
}

fn tile(token: u32, head: u32, k: u32) -> vec4<f32> {
  if (token >= params.tokens) { return vec4<f32>(); }
  return load_query(queryAt(token, head), k, DEPTH);
}

fn weights(kvHead: u32, k: u32, n: u32) -> vec4<f32> {
  if (n >= L) { return vec4<f32>(); }
  return load_weight(params.weightBase + (n * params.kvHeads + kvHead) * DEPTH, k, DEPTH);
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
      let n = piece / 8u;
      let k = piece % 8u * 4u;
      let quad = weights(kvHead, base + k, firstColumn + n);
      for (var i = 0u; i < 4u; i += 1u) { right[k + i][n / 4u][n % 4u] = quad[i]; }
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
    if (token >= params.tokens || column >= WIDTH) { continue; }
    var value = sum;
    for (var c = 0u; c < 4u; c += 1u) {
      if (column + c >= L) {
        value[c] = select(0.0, element(queryAt(token, head), DEPTH + column + c - L, 24u), column + c < 40u);
      }
    }
    store(token, head, column, value);
  }
}
