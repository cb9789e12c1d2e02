enable f16;
// Gradient of MLA attention on matrix units: ∂K, ∂V and ∂rope.
// 32 rows, 32 columns, 4 subgroups
const COLUMNS = 32u;
const NOPE_QUADS = 2u;
const ROPE_QUADS = 2u;
const DEPTH_QUADS = 4u;
const VALUE_QUADS = 2u;
const HEADER_QUADS = 129u;
const MASKED = -3.4e38;
const UNSEEN = -3.0e38;
const LOG2E = 1.4426950408889634;
const LN2 = 0.6931471805599453;

struct Params {
  scaleLog2: f32,     // softmaxScale · log2(e)
  capLog2: f32,       // logitsSoftCap · log2(e)
  scaleOverCap: f32,  // softmaxScale / logitsSoftCap
  keptFactor: f32,    // 1 / (1 − dropout rate)
  minusInfinity: f32, // WGSL has no literal for it
  softmaxScale: f32,
  firstRow: u32,      // query row, counted through all batch items, that row 0 of this dispatch is
  queryLength: u32,
  keyLength: u32,
  queryHeads: u32,    // of the whole call
  // Bias or mask: elements from the binding's start to the first one, from one item, head and query to the next; modulo
  // 2^32.
  termBase: u32,
  termItem: u32,
  termHead: u32,
  termRow: u32,
  dropBelow: u32,     // dropout: bits below this are dropped
  seed0: u32,
  seed1: u32,
  firstItem: u32,     // batch item and position, within the whole call, of this piece's first ones
  firstPosition: u32,
  firstHead: u32,    // first query head of this dispatch
  headCount: u32,    // query heads of this dispatch that one workgroup sums over
  firstKvHead: u32,  // first KV head of the head group
  groupKvHeads: u32, // KV heads in a row of keys and values
  valuesBase: u32,   // elements from the first key to the first value …
  ropeBase: u32,     // … and to the first rotary key
  firstBlock: u32,   // index of the first block of this dispatch
  groupSize: u32,    // query heads per KV head
  P: u32,            // widths of a head: rebuilt from latents, rotary, value
  R: u32,
  V: u32,
  rangeRows: u32,    // query rows of the range
  // Of each tensor: elements from the binding's start to the first row, from one row to the next, from one head to the
  // next, and by which a batch item starts later than if the items followed each other, modulo 2^32.
  queryBase: u32,
  queryRow: u32,
  queryHead: u32,
  queryGap: u32,
  gradBase: u32,
  gradRow: u32,
  gradHead: u32,
  gradGap: u32,
  ropeQueryBase: u32,
  ropeQueryRow: u32,
  ropeQueryGap: u32,
  // The gradient: ∂query by row and head, ∂bias by item, head and row; ∂K, ∂V and ∂rope lie as keys, values and rotary
  // keys of every head do.
  gradientBase: u32,
  gradientItem: u32,
  gradientHead: u32,
  gradientRow: u32,
  gradientValues: u32,
  gradientRope: u32,
  accumulate: u32,   // whether ∂K, ∂V and ∂rope add to what is there
  columnTiles: u32,  // ∂bias: tiles of columns of one head
}

struct Block {
  rowStart: u32,
  rowEnd: u32,
  columnStart: u32,   // first column that any row sees
  columnEnd: u32,     // one past the last one
  sharedStart: u32,   // every row sees the columns from here …
  sharedEnd: u32,     // … to one before here
  diagonalStart: i32, // row i sees columns from i + diagonalStart …
  diagonalEnd: i32,   // … to one before i + diagonalEnd
  item: u32,          // batch item
  rangeItem: u32,     // batch item, counted from that of the query range's first row
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> blocks: array<Block>;
@group(0) @binding(2) var<storage, read_write> staged: array<vec4<u32>>; // header, queries, ∂out
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>; // log2-sum-exp and D, [heads, rows]
@group(0) @binding(5) var<storage, read_write> expanded: array<vec4<u32>>; // keys, values, rotary keys
@group(0) @binding(6) var<storage, read_write> gradient: array<f32>;
@group(0) @binding(8) var<storage, read> term: array<f16>;

struct LeftFragment { k0: vec4<f32>, k4: vec4<f32>, k8: vec4<f32>, k12: vec4<f32> }
struct ResultFragment { c0: vec4<f32>, c4: vec4<f32> }

var<private> lane: u32;
var<workgroup> wide: array<vec4<u32>, 160>;
var<workgroup> narrow: array<vec4<u32>, 96>;
var<workgroup> scores: array<vec4<f32>, 288>;
var<workgroup> gradients: array<vec4<f32>, 288>;
var<workgroup> probs: array<vec4<u32>, 128>;
var<workgroup> slopes: array<vec4<u32>, 128>;
var<workgroup> exchanged: array<f32, 256>;

fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(pack2x16float(low.xy), pack2x16float(low.zw), pack2x16float(high.xy), pack2x16float(high.zw));
}

fn lowHalves(quad: vec4<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y)); }
fn highHalves(quad: vec4<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(quad.z), unpack2x16float(quad.w)); }

fn wide_left(offset: u32, stride: u32) -> LeftFragment {
  let first = wide[offset + lane / 2u * stride];
  let second = wide[offset + lane / 2u * stride + 1u];
  return LeftFragment(lowHalves(first), highHalves(first), lowHalves(second), highHalves(second));
}

fn wide_leftColumn(offset: u32, stride: u32) -> LeftFragment {
  let row = lane / 2u;
  var halves: array<f32, 16>;
  for (var k = 0u; k < 16u; k += 1u) {
    let quad = wide[offset + k * stride + row / 8u];
    halves[k] = unpack2x16float(quad[row % 8u / 2u])[row % 2u];
  }
  return LeftFragment(
    vec4<f32>(halves[0], halves[1], halves[2], halves[3]),
    vec4<f32>(halves[4], halves[5], halves[6], halves[7]),
    vec4<f32>(halves[8], halves[9], halves[10], halves[11]),
    vec4<f32>(halves[12], halves[13], halves[14], halves[15]),
  );
}

fn wide_row(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var result = sum;
  var rows = array<vec4<f32>, 4>(left.k0, left.k4, left.k8, left.k12);
  for (var k = 0u; k < 16u; k += 1u) {
    let right = wide[offset + k * stride + lane % 2u];
    let factor = rows[k / 4u][k % 4u];
    result.c0 += factor * lowHalves(right);
    result.c4 += factor * highHalves(right);
  }
  return result;
}

fn wide_dot(left: LeftFragment, at: u32) -> f32 {
  let first = wide[at];
  let second = wide[at + 1u];
  return dot(left.k0, lowHalves(first)) + dot(left.k4, highHalves(first)) +
    dot(left.k8, lowHalves(second)) + dot(left.k12, highHalves(second));
}

fn wide_column(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var sums: array<f32, 8>;
  for (var c = 0u; c < 8u; c += 1u) { sums[c] = wide_dot(left, offset + (lane % 2u * 8u + c) * stride); }
  return ResultFragment(
    sum.c0 + vec4<f32>(sums[0], sums[1], sums[2], sums[3]),
    sum.c4 + vec4<f32>(sums[4], sums[5], sums[6], sums[7]),
  );
}

fn narrow_left(offset: u32, stride: u32) -> LeftFragment {
  let first = narrow[offset + lane / 2u * stride];
  let second = narrow[offset + lane / 2u * stride + 1u];
  return LeftFragment(lowHalves(first), highHalves(first), lowHalves(second), highHalves(second));
}

fn narrow_leftColumn(offset: u32, stride: u32) -> LeftFragment {
  let row = lane / 2u;
  var halves: array<f32, 16>;
  for (var k = 0u; k < 16u; k += 1u) {
    let quad = narrow[offset + k * stride + row / 8u];
    halves[k] = unpack2x16float(quad[row % 8u / 2u])[row % 2u];
  }
  return LeftFragment(
    vec4<f32>(halves[0], halves[1], halves[2], halves[3]),
    vec4<f32>(halves[4], halves[5], halves[6], halves[7]),
    vec4<f32>(halves[8], halves[9], halves[10], halves[11]),
    vec4<f32>(halves[12], halves[13], halves[14], halves[15]),
  );
}

fn narrow_row(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var result = sum;
  var rows = array<vec4<f32>, 4>(left.k0, left.k4, left.k8, left.k12);
  for (var k = 0u; k < 16u; k += 1u) {
    let right = narrow[offset + k * stride + lane % 2u];
    let factor = rows[k / 4u][k % 4u];
    result.c0 += factor * lowHalves(right);
    result.c4 += factor * highHalves(right);
  }
  return result;
}

fn narrow_dot(left: LeftFragment, at: u32) -> f32 {
  let first = narrow[at];
  let second = narrow[at + 1u];
  return dot(left.k0, lowHalves(first)) + dot(left.k4, highHalves(first)) +
    dot(left.k8, lowHalves(second)) + dot(left.k12, highHalves(second));
}

fn narrow_column(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var sums: array<f32, 8>;
  for (var c = 0u; c < 8u; c += 1u) { sums[c] = narrow_dot(left, offset + (lane % 2u * 8u + c) * stride); }
  return ResultFragment(
    sum.c0 + vec4<f32>(sums[0], sums[1], sums[2], sums[3]),
    sum.c4 + vec4<f32>(sums[4], sums[5], sums[6], sums[7]),
  );
}

fn scores_load(offset: u32, stride: u32) -> ResultFragment {
  let at = offset + lane / 2u * stride + lane % 2u * 2u;
  return ResultFragment(scores[at], scores[at + 1u]);
}

fn scores_store(offset: u32, stride: u32, result: ResultFragment) {
  let at = offset + lane / 2u * stride + lane % 2u * 2u;
  scores[at] = result.c0;
  scores[at + 1u] = result.c4;
}

fn scores_storeColumn(offset: u32, stride: u32, result: ResultFragment) {
  let row = lane / 2u;
  for (var c = 0u; c < 8u; c += 1u) {
    let at = offset + (lane % 2u * 8u + c) * stride + row / 4u;
    scores[at][row % 4u] = select(result.c4[c % 4u], result.c0[c % 4u], c < 4u);
  }
}

fn gradients_load(offset: u32, stride: u32) -> ResultFragment {
  let at = offset + lane / 2u * stride + lane % 2u * 2u;
  return ResultFragment(gradients[at], gradients[at + 1u]);
}

fn gradients_store(offset: u32, stride: u32, result: ResultFragment) {
  let at = offset + lane / 2u * stride + lane % 2u * 2u;
  gradients[at] = result.c0;
  gradients[at + 1u] = result.c4;
}

fn gradients_storeColumn(offset: u32, stride: u32, result: ResultFragment) {
  let row = lane / 2u;
  for (var c = 0u; c < 8u; c += 1u) {
    let at = offset + (lane % 2u * 8u + c) * stride + row / 4u;
    gradients[at][row % 4u] = select(result.c4[c % 4u], result.c0[c % 4u], c < 4u);
  }
}

fn probs_left(offset: u32, stride: u32) -> LeftFragment {
  let first = probs[offset + lane / 2u * stride];
  let second = probs[offset + lane / 2u * stride + 1u];
  return LeftFragment(lowHalves(first), highHalves(first), lowHalves(second), highHalves(second));
}

fn probs_leftColumn(offset: u32, stride: u32) -> LeftFragment {
  let row = lane / 2u;
  var halves: array<f32, 16>;
  for (var k = 0u; k < 16u; k += 1u) {
    let quad = probs[offset + k * stride + row / 8u];
    halves[k] = unpack2x16float(quad[row % 8u / 2u])[row % 2u];
  }
  return LeftFragment(
    vec4<f32>(halves[0], halves[1], halves[2], halves[3]),
    vec4<f32>(halves[4], halves[5], halves[6], halves[7]),
    vec4<f32>(halves[8], halves[9], halves[10], halves[11]),
    vec4<f32>(halves[12], halves[13], halves[14], halves[15]),
  );
}

fn probs_row(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var result = sum;
  var rows = array<vec4<f32>, 4>(left.k0, left.k4, left.k8, left.k12);
  for (var k = 0u; k < 16u; k += 1u) {
    let right = probs[offset + k * stride + lane % 2u];
    let factor = rows[k / 4u][k % 4u];
    result.c0 += factor * lowHalves(right);
    result.c4 += factor * highHalves(right);
  }
  return result;
}

fn probs_dot(left: LeftFragment, at: u32) -> f32 {
  let first = probs[at];
  let second = probs[at + 1u];
  return dot(left.k0, lowHalves(first)) + dot(left.k4, highHalves(first)) +
    dot(left.k8, lowHalves(second)) + dot(left.k12, highHalves(second));
}

fn probs_column(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var sums: array<f32, 8>;
  for (var c = 0u; c < 8u; c += 1u) { sums[c] = probs_dot(left, offset + (lane % 2u * 8u + c) * stride); }
  return ResultFragment(
    sum.c0 + vec4<f32>(sums[0], sums[1], sums[2], sums[3]),
    sum.c4 + vec4<f32>(sums[4], sums[5], sums[6], sums[7]),
  );
}

fn slopes_left(offset: u32, stride: u32) -> LeftFragment {
  let first = slopes[offset + lane / 2u * stride];
  let second = slopes[offset + lane / 2u * stride + 1u];
  return LeftFragment(lowHalves(first), highHalves(first), lowHalves(second), highHalves(second));
}

fn slopes_leftColumn(offset: u32, stride: u32) -> LeftFragment {
  let row = lane / 2u;
  var halves: array<f32, 16>;
  for (var k = 0u; k < 16u; k += 1u) {
    let quad = slopes[offset + k * stride + row / 8u];
    halves[k] = unpack2x16float(quad[row % 8u / 2u])[row % 2u];
  }
  return LeftFragment(
    vec4<f32>(halves[0], halves[1], halves[2], halves[3]),
    vec4<f32>(halves[4], halves[5], halves[6], halves[7]),
    vec4<f32>(halves[8], halves[9], halves[10], halves[11]),
    vec4<f32>(halves[12], halves[13], halves[14], halves[15]),
  );
}

fn slopes_row(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var result = sum;
  var rows = array<vec4<f32>, 4>(left.k0, left.k4, left.k8, left.k12);
  for (var k = 0u; k < 16u; k += 1u) {
    let right = slopes[offset + k * stride + lane % 2u];
    let factor = rows[k / 4u][k % 4u];
    result.c0 += factor * lowHalves(right);
    result.c4 += factor * highHalves(right);
  }
  return result;
}

fn slopes_dot(left: LeftFragment, at: u32) -> f32 {
  let first = slopes[at];
  let second = slopes[at + 1u];
  return dot(left.k0, lowHalves(first)) + dot(left.k4, highHalves(first)) +
    dot(left.k8, lowHalves(second)) + dot(left.k12, highHalves(second));
}

fn slopes_column(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var sums: array<f32, 8>;
  for (var c = 0u; c < 8u; c += 1u) { sums[c] = slopes_dot(left, offset + (lane % 2u * 8u + c) * stride); }
  return ResultFragment(
    sum.c0 + vec4<f32>(sums[0], sums[1], sums[2], sums[3]),
    sum.c4 + vec4<f32>(sums[4], sums[5], sums[6], sums[7]),
  );
}
var<workgroup> columnStats: array<vec2<f32>, 32>;

fn scoreOf(raw: vec4<f32>) -> vec4<f32> {
  let x = raw * params.scaleOverCap;
  let e = exp2(-2.0 * LOG2E * abs(x));
  let far = sign(x) * (1.0 - e) / (1.0 + e);
  let y = x * x;
  let near = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))));
  return params.capLog2 * select(far, near, abs(x) < vec4<f32>(0.25));
}

fn capSlope(score: vec4<f32>) -> vec4<f32> {
  let t = score / params.capLog2;
  return 1.0 - t * t;
}

fn withTerm(score: f32, item: u32, head: u32, position: u32, keyPosition: u32) -> f32 {
  let bias = f32(term[params.termBase + item * params.termItem + head * params.termHead + position * params.termRow + keyPosition]);
  return select(score + bias * LOG2E, MASKED, bias <= -2e+38);
}

// Threefry-2x32, 20 rounds.
fn threefry(key: vec2<u32>, counter: vec2<u32>) -> vec2<u32> {
  let k0 = key.x;
  let k1 = key.y;
  let k2 = key.x ^ key.y ^ 466688986u;
  var x = counter + key;
  x.x += x.y; x.y = ((x.y << 13u) | (x.y >> 19u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 15u) | (x.y >> 17u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 26u) | (x.y >> 6u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 6u) | (x.y >> 26u)) ^ x.x;
  x.x += k1; x.y += k2 + 1u;
  x.x += x.y; x.y = ((x.y << 17u) | (x.y >> 15u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 29u) | (x.y >> 3u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 16u) | (x.y >> 16u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 24u) | (x.y >> 8u)) ^ x.x;
  x.x += k2; x.y += k0 + 2u;
  x.x += x.y; x.y = ((x.y << 13u) | (x.y >> 19u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 15u) | (x.y >> 17u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 26u) | (x.y >> 6u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 6u) | (x.y >> 26u)) ^ x.x;
  x.x += k0; x.y += k1 + 3u;
  x.x += x.y; x.y = ((x.y << 17u) | (x.y >> 15u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 29u) | (x.y >> 3u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 16u) | (x.y >> 16u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 24u) | (x.y >> 8u)) ^ x.x;
  x.x += k1; x.y += k2 + 4u;
  x.x += x.y; x.y = ((x.y << 13u) | (x.y >> 19u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 15u) | (x.y >> 17u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 26u) | (x.y >> 6u)) ^ x.x;
  x.x += x.y; x.y = ((x.y << 6u) | (x.y >> 26u)) ^ x.x;
  x.x += k2; x.y += k0 + 5u;
  return x;
}

fn dropoutKey(item: u32, head: u32) -> vec2<u32> {
  return threefry(vec2<u32>(params.seed0, params.seed1), vec2<u32>(params.firstItem + item, head));
}

fn keptFactor(key: vec2<u32>, position: u32, keyPosition: u32) -> f32 {
  let counter = vec2<u32>(params.firstPosition + position, params.firstPosition + keyPosition);
  return select(0.0, params.keptFactor, threefry(key, counter).x >= params.dropBelow);
}

fn saturated(x: vec4<f32>) -> vec4<f32> {
  let isNan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
  return select(clamp(x, vec4<f32>(-65504.0), vec4<f32>(65504.0)), x, isNan);
}

fn finiteHalves(quad: vec4<u32>) -> vec4<u32> {
  let low = select(vec4<u32>(0x0000ffffu), vec4<u32>(), (quad & vec4<u32>(0x7c00u)) == vec4<u32>(0x7c00u));
  let high = select(vec4<u32>(0xffff0000u), vec4<u32>(), (quad & vec4<u32>(0x7c000000u)) == vec4<u32>(0x7c000000u));
  return quad & (low | high);
}

fn within(row: u32, end: u32) -> u32 { return min(row, max(end, 1u) - 1u); }

fn loadQuery(row: u32, end: u32, head: u32, quad: u32) -> vec4<u32> {
  return staged[HEADER_QUADS + (within(row, end) * params.queryHeads + head) * DEPTH_QUADS + quad];
}

fn loadGrad(row: u32, end: u32, head: u32, quad: u32) -> vec4<u32> {
  let grads = HEADER_QUADS + params.rangeRows * params.queryHeads * DEPTH_QUADS;
  return staged[grads + (within(row, end) * params.queryHeads + head) * VALUE_QUADS + quad];
}

fn loadKey(row: u32, end: u32, head: u32, quad: u32) -> vec4<u32> {
  let key = within(row, end);
  let nope = (key * params.groupKvHeads + head / params.groupSize - params.firstKvHead) * NOPE_QUADS + quad;
  return expanded[select(params.ropeBase / 8u + key * ROPE_QUADS + quad - NOPE_QUADS, nope, quad < NOPE_QUADS)];
}

fn loadValue(row: u32, end: u32, head: u32, quad: u32) -> vec4<u32> {
  let kvHead = head / params.groupSize - params.firstKvHead;
  let at = (within(row, end) * params.groupKvHeads + kvHead) * VALUE_QUADS + quad;
  return expanded[params.valuesBase / 8u + at];
}

fn rowStats(row: u32, end: u32, head: u32) -> vec2<f32> { return stats[head * params.rangeRows + within(row, end)]; }

fn put(offset: u32, column: u32, width: u32, value: vec4<f32>) {
  for (var i = 0u; i < 4u; i += 1u) {
    if (column + i >= width) { return; }
    let at = offset + column + i;
    var sum = value[i];
    if (params.accumulate != 0u) { sum += gradient[at]; }
    gradient[at] = sum;
  }
}

fn ofKv(row: u32, head: u32) -> u32 { return row * params.groupKvHeads + head / params.groupSize - params.firstKvHead; }

fn putKey(factor: f32, row: u32, head: u32, column: u32, value: vec4<f32>) {
  if (column < 8u * NOPE_QUADS) {
    put(ofKv(row, head) * params.P, column, params.P, factor * value);
  } else {
    put(params.gradientRope + ofKv(row, head) * params.R, column - 8u * NOPE_QUADS, params.R, factor * value);
  }
}

fn putValue(factor: f32, row: u32, head: u32, column: u32, value: vec4<f32>) {
  put(params.gradientValues + ofKv(row, head) * params.V, column, params.V, factor * value);
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  lane = t % 32u;
  let subgroup = t / 32u;
  let block = blocks[params.firstBlock + workgroup.y];
  let firstHead = params.firstHead + workgroup.x * params.headCount;
  let rowGroup = subgroup / 4u;
  let isScore = subgroup % 4u < 2u; // makes S; the others make ∂P
  let share = subgroup % 2u;
  let softRow = t / 4u;
  let softPart = t % 4u;
  let columnEnd = block.columnEnd;
  let origin = block.item * params.keyLength; // first key row of the batch item
  let position = params.firstRow - block.item * params.queryLength; // of query row 0 in the batch item, modulo 2^32
  let blockCount = (columnEnd - block.columnStart + COLUMNS - 1u) / COLUMNS;
  let count = blockCount * params.headCount;
  let ranges = bitcast<vec4<f32>>(staged[0]); // ∂out's inverse factor, ∂s's factor, its inverse
  var f: array<LeftFragment, 4>;
  var s: array<ResultFragment, 2>;
  var g: array<ResultFragment, 2>;
  var wide0 = vec4<u32>();
  var narrow0 = vec4<u32>();
  var stat = vec2<f32>();

  for (var round = 0u; round < 1u; round += 1u) {
    workgroupBarrier();
    {
      let quad = loadKey(block.rowStart + round * 32u + (t) / DEPTH_QUADS, block.rowEnd, firstHead, (t) % DEPTH_QUADS);
      wide[((t) / DEPTH_QUADS / 16u) * 80u + (t) / DEPTH_QUADS % 16u * 5u + (t) % DEPTH_QUADS] = quad;
    }
    if (t < 64u) {
      {
        let quad = loadValue(block.rowStart + round * 32u + (t) / VALUE_QUADS, block.rowEnd, firstHead, (t) % VALUE_QUADS);
        narrow[((t) / VALUE_QUADS / 16u) * 48u + (t) / VALUE_QUADS % 16u * 3u + (t) % VALUE_QUADS] = quad;
      }
    }
    workgroupBarrier();
    if (isScore) {
      for (var r = 0u; r < 2u; r += 1u) {
        if ((rowGroup * 2u + r) / 2u == round) {
        for (var d = 0u; d < 2u; d += 1u) {
            f[r * 2u + d] = wide_left(((rowGroup * 2u + r) % 2u) * 80u + d * 2u, 5u);
        }
        }
      }
    } else {
      for (var r = 0u; r < 2u; r += 1u) {
        if ((rowGroup * 2u + r) / 2u == round) {
        for (var d = 0u; d < 1u; d += 1u) {
            f[r * 2u + d] = narrow_left(((rowGroup * 2u + r) % 2u) * 48u + d * 2u, 3u);
        }
        }
      }
    }
  }
  workgroupBarrier();

  wide0 = loadQuery(block.columnStart + (t) / DEPTH_QUADS, columnEnd, firstHead, (t) % DEPTH_QUADS);
  if (t < 64u) {
    narrow0 = loadGrad(block.columnStart + (t) / VALUE_QUADS, columnEnd, firstHead, (t) % VALUE_QUADS);
  }
  if (t < 32u) { stat = rowStats(block.columnStart + t, columnEnd, firstHead); }
  for (var step = 0u; step < count; step += 1u) {
    let head = firstHead + step / blockCount;
    let columnBase = block.columnStart + step % blockCount * COLUMNS;
    let masking = true;
    let dropped = dropoutKey(block.item, head);
    if (masking) {
      wide0 = finiteHalves(wide0);
      narrow0 = finiteHalves(narrow0);
    }
    wide[((t) / DEPTH_QUADS / 16u) * 80u + (t) / DEPTH_QUADS % 16u * 5u + (t) % DEPTH_QUADS] = wide0;
    if (t < 64u) {
      narrow[((t) / VALUE_QUADS / 16u) * 48u + (t) / VALUE_QUADS % 16u * 3u + (t) % VALUE_QUADS] = narrow0;
    }
    if (t < 32u) { columnStats[t] = stat; }
    workgroupBarrier();
    {
      let next = min(step + 1u, count - 1u);
      let nextBase = block.columnStart + next % blockCount * COLUMNS;
      wide0 = loadQuery(nextBase + (t) / DEPTH_QUADS, columnEnd, (firstHead + next / blockCount), (t) % DEPTH_QUADS);
      if (t < 64u) {
        narrow0 = loadGrad(nextBase + (t) / VALUE_QUADS, columnEnd, (firstHead + next / blockCount), (t) % VALUE_QUADS);
      }
      if (t < 32u) { stat = rowStats(nextBase + t, columnEnd, (firstHead + next / blockCount)); }
    }
    if (isScore) {
      for (var r = 0u; r < 2u; r += 1u) {
        for (var k = 0u; k < 1u; k += 1u) {
          s[r * 1u + k] = ResultFragment();
        }
      }
      for (var d = 0u; d < 2u; d += 1u) {
        for (var k = 0u; k < 1u; k += 1u) {
          let right = (share * 1u + k) * 80u + d * 2u;
          s[0u * 1u + k] = wide_column(f[0u * 2u + d], right, 5u, s[0u * 1u + k]);
          s[1u * 1u + k] = wide_column(f[1u * 2u + d], right, 5u, s[1u * 1u + k]);
        }
      }
      for (var r = 0u; r < 2u; r += 1u) {
        for (var k = 0u; k < 1u; k += 1u) {
          scores_store((rowGroup * 2u + r) * 144u + (share * 1u + k) * 4u, 9u, s[r * 1u + k]);
        }
      }
    } else {
      for (var r = 0u; r < 2u; r += 1u) {
        for (var k = 0u; k < 1u; k += 1u) {
          s[r * 1u + k] = ResultFragment();
        }
      }
      for (var d = 0u; d < 1u; d += 1u) {
        for (var k = 0u; k < 1u; k += 1u) {
          let right = (share * 1u + k) * 48u + d * 2u;
          s[0u * 1u + k] = narrow_column(f[0u * 2u + d], right, 3u, s[0u * 1u + k]);
          s[1u * 1u + k] = narrow_column(f[1u * 2u + d], right, 3u, s[1u * 1u + k]);
        }
      }
      for (var r = 0u; r < 2u; r += 1u) {
        for (var k = 0u; k < 1u; k += 1u) {
          gradients_store((rowGroup * 2u + r) * 144u + (share * 1u + k) * 4u, 9u, s[r * 1u + k]);
        }
      }
    }
    workgroupBarrier();
    var x0 = scoreOf(scores[(softRow / 16u) * 144u + softRow % 16u * 9u + softPart * 2u + 0u]);
    var y0 = gradients[(softRow / 16u) * 144u + softRow % 16u * 9u + softPart * 2u + 0u] * ranges.x;
    let slope0 = capSlope(x0);
    var x1 = scoreOf(scores[(softRow / 16u) * 144u + softRow % 16u * 9u + softPart * 2u + 1u]);
    var y1 = gradients[(softRow / 16u) * 144u + softRow % 16u * 9u + softPart * 2u + 1u] * ranges.x;
    let slope1 = capSlope(x1);
    if (masking) {
      let row = i32(block.rowStart + softRow);
      let start = vec4<i32>(row + block.diagonalStart);
      let end = vec4<i32>(min(row + block.diagonalEnd, i32(columnEnd)));
      {
        let column = vec4<i32>(i32(columnBase + 4u * (softPart * 2u + 0u))) + vec4<i32>(0, 1, 2, 3);
        let seen = (column < end) & (column >= start);
        if (seen[0] && row < i32(block.rowEnd)) { x0[0] = withTerm(x0[0], block.item, head, position + u32(column[0]), u32(row) - origin); } else { x0[0] = MASKED; }
        if (seen[1] && row < i32(block.rowEnd)) { x0[1] = withTerm(x0[1], block.item, head, position + u32(column[1]), u32(row) - origin); } else { x0[1] = MASKED; }
        if (seen[2] && row < i32(block.rowEnd)) { x0[2] = withTerm(x0[2], block.item, head, position + u32(column[2]), u32(row) - origin); } else { x0[2] = MASKED; }
        if (seen[3] && row < i32(block.rowEnd)) { x0[3] = withTerm(x0[3], block.item, head, position + u32(column[3]), u32(row) - origin); } else { x0[3] = MASKED; }
      }
      {
        let column = vec4<i32>(i32(columnBase + 4u * (softPart * 2u + 1u))) + vec4<i32>(0, 1, 2, 3);
        let seen = (column < end) & (column >= start);
        if (seen[0] && row < i32(block.rowEnd)) { x1[0] = withTerm(x1[0], block.item, head, position + u32(column[0]), u32(row) - origin); } else { x1[0] = MASKED; }
        if (seen[1] && row < i32(block.rowEnd)) { x1[1] = withTerm(x1[1], block.item, head, position + u32(column[1]), u32(row) - origin); } else { x1[1] = MASKED; }
        if (seen[2] && row < i32(block.rowEnd)) { x1[2] = withTerm(x1[2], block.item, head, position + u32(column[2]), u32(row) - origin); } else { x1[2] = MASKED; }
        if (seen[3] && row < i32(block.rowEnd)) { x1[3] = withTerm(x1[3], block.item, head, position + u32(column[3]), u32(row) - origin); } else { x1[3] = MASKED; }
      }
    }
    let stat0_0 = columnStats[4u * (softPart * 2u + 0u) + 0u];
    let stat0_1 = columnStats[4u * (softPart * 2u + 0u) + 1u];
    let stat0_2 = columnStats[4u * (softPart * 2u + 0u) + 2u];
    let stat0_3 = columnStats[4u * (softPart * 2u + 0u) + 3u];
    let logSum0 = vec4<f32>(stat0_0.x, stat0_1.x, stat0_2.x, stat0_3.x);
    let delta0 = vec4<f32>(stat0_0.y, stat0_1.y, stat0_2.y, stat0_3.y);
    let p0 = select(exp2(x0 - logSum0), vec4<f32>(), x0 <= vec4<f32>(UNSEEN));
    let isKept0 = vec4<bool>(keptFactor(dropped, position + columnBase + 4u * (softPart * 2u + 0u) + 0u, block.rowStart + softRow - origin) > 0.0, keptFactor(dropped, position + columnBase + 4u * (softPart * 2u + 0u) + 1u, block.rowStart + softRow - origin) > 0.0, keptFactor(dropped, position + columnBase + 4u * (softPart * 2u + 0u) + 2u, block.rowStart + softRow - origin) > 0.0, keptFactor(dropped, position + columnBase + 4u * (softPart * 2u + 0u) + 3u, block.rowStart + softRow - origin) > 0.0);
    let kept0 = select(vec4<f32>(), p0, isKept0);
    y0 = select(vec4<f32>(), y0 * params.keptFactor, isKept0);
    y0 = saturated(select(p0 * (y0 - delta0) * slope0 * ranges.y, vec4<f32>(), p0 == vec4<f32>()));
    let stat1_0 = columnStats[4u * (softPart * 2u + 1u) + 0u];
    let stat1_1 = columnStats[4u * (softPart * 2u + 1u) + 1u];
    let stat1_2 = columnStats[4u * (softPart * 2u + 1u) + 2u];
    let stat1_3 = columnStats[4u * (softPart * 2u + 1u) + 3u];
    let logSum1 = vec4<f32>(stat1_0.x, stat1_1.x, stat1_2.x, stat1_3.x);
    let delta1 = vec4<f32>(stat1_0.y, stat1_1.y, stat1_2.y, stat1_3.y);
    let p1 = select(exp2(x1 - logSum1), vec4<f32>(), x1 <= vec4<f32>(UNSEEN));
    let isKept1 = vec4<bool>(keptFactor(dropped, position + columnBase + 4u * (softPart * 2u + 1u) + 0u, block.rowStart + softRow - origin) > 0.0, keptFactor(dropped, position + columnBase + 4u * (softPart * 2u + 1u) + 1u, block.rowStart + softRow - origin) > 0.0, keptFactor(dropped, position + columnBase + 4u * (softPart * 2u + 1u) + 2u, block.rowStart + softRow - origin) > 0.0, keptFactor(dropped, position + columnBase + 4u * (softPart * 2u + 1u) + 3u, block.rowStart + softRow - origin) > 0.0);
    let kept1 = select(vec4<f32>(), p1, isKept1);
    y1 = select(vec4<f32>(), y1 * params.keptFactor, isKept1);
    y1 = saturated(select(p1 * (y1 - delta1) * slope1 * ranges.y, vec4<f32>(), p1 == vec4<f32>()));
    {
      let packedProbs = packHalves(4096.0 * kept0, 4096.0 * kept1);
      probs[(softRow / 16u * 2u + (softPart * 2u + 0u) / 4u) * 32u + softRow % 16u * 2u + (softPart * 2u + 0u) / 2u % 2u] = packedProbs;
      let packed = packHalves(y0, y1);
      slopes[(softRow / 16u * 2u + (softPart * 2u + 0u) / 4u) * 32u + softRow % 16u * 2u + (softPart * 2u + 0u) / 2u % 2u] = packed;
    }
    workgroupBarrier();
    if (isScore) {
      for (var k = 0u; k < 2u; k += 1u) {
        let left0 = probs_left(((rowGroup * 2u + 0u) * 2u + k) * 32u + 0u, 2u);
        let left1 = probs_left(((rowGroup * 2u + 1u) * 2u + k) * 32u + 0u, 2u);
        for (var c = 0u; c < 1u; c += 1u) {
          let right = k * 48u + min(0u + share * 1u + c, 0u) * 2u;
          g[0u * 1u + c] = narrow_row(left0, right, 3u, g[0u * 1u + c]);
          g[1u * 1u + c] = narrow_row(left1, right, 3u, g[1u * 1u + c]);
        }
      }
    } else {
      for (var k = 0u; k < 2u; k += 1u) {
        let left0 = slopes_left(((rowGroup * 2u + 0u) * 2u + k) * 32u + 0u, 2u);
        let left1 = slopes_left(((rowGroup * 2u + 1u) * 2u + k) * 32u + 0u, 2u);
        for (var c = 0u; c < 1u; c += 1u) {
          let right = k * 80u + min(0u + share * 1u + c, 1u) * 2u;
          g[0u * 1u + c] = wide_row(left0, right, 5u, g[0u * 1u + c]);
          g[1u * 1u + c] = wide_row(left1, right, 5u, g[1u * 1u + c]);
        }
      }
    }
    workgroupBarrier();
  }

  let own = subgroup % 2u * 64u;
  let keyFactor = params.softmaxScale * ranges.z;
  let valueFactor = ranges.x * 0.000244140625 * params.keptFactor;
  {
    let isWide = false;
    for (var r = 0u; r < 2u; r += 1u) {
      for (var c = 0u; c < 1u; c += 1u) {
        scores_store((subgroup / 2u) * 144u + own, 4u, g[r * 1u + c]);
        workgroupBarrier();
        {
          let ownRow = (lane + 0u) / 4u;
          let ownQuad = (lane + 0u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + r) * 16u + ownRow;
          let fragment = 0u + share * 1u + c;
          if (row < block.rowEnd && fragment < 1u && isScore) {
            putValue(valueFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u) * 144u + own + ownRow * 4u + ownQuad]);
          }
        }
        {
          let ownRow = (lane + 32u) / 4u;
          let ownQuad = (lane + 32u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + r) * 16u + ownRow;
          let fragment = 0u + share * 1u + c;
          if (row < block.rowEnd && fragment < 1u && isScore) {
            putValue(valueFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u) * 144u + own + ownRow * 4u + ownQuad]);
          }
        }
        workgroupBarrier();
      }
    }
  }
  {
    let isWide = !isScore;
    for (var r = 0u; r < 2u; r += 1u) {
      for (var c = 0u; c < 1u; c += 1u) {
        scores_store((subgroup / 2u) * 144u + own, 4u, g[r * 1u + c]);
        workgroupBarrier();
        {
          let ownRow = (lane + 0u) / 4u;
          let ownQuad = (lane + 0u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + r) * 16u + ownRow;
          let fragment = 0u + share * 1u + c;
          if (row < block.rowEnd && fragment < 2u && isWide) {
            putKey(keyFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u) * 144u + own + ownRow * 4u + ownQuad]);
          }
        }
        {
          let ownRow = (lane + 32u) / 4u;
          let ownQuad = (lane + 32u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + r) * 16u + ownRow;
          let fragment = 0u + share * 1u + c;
          if (row < block.rowEnd && fragment < 2u && isWide) {
            putKey(keyFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u) * 144u + own + ownRow * 4u + ownQuad]);
          }
        }
        workgroupBarrier();
      }
    }
  }
}
