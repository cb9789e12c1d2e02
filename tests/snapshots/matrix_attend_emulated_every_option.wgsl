enable f16;
// MLA attention over expanded keys and values, on matrix units.
// blockQ 32, blockK 32, 2 subgroups, 1 to 16 rows
const BLOCK_K = 32u;
const NOPE_QUADS = 2u;
const ROPE_QUADS = 2u;
const DEPTH_QUADS = 4u;
const KEY_STRIDE = 5u;
const STORED_VALUE_QUADS = 2u;
const VALUE_STRIDE = 3u;
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
  firstKvHead: u32,  // first KV head of the head group, which keys and values begin with
  groupKvHeads: u32, // KV heads in a row of keys and values
  valuesBase: u32,   // elements from the first key to the first value
  firstBlock: u32,   // index of the first block of this dispatch
  groupSize: u32,    // query heads per KV head
  P: u32,            // widths of a head: rebuilt from latents, rotary, value
  R: u32,
  V: u32,
  // Of each tensor: elements from the binding's start to the first row, from one row to the next, from one head to the
  // next, and by which a batch item starts later than if the items followed each other, modulo 2^32.
  queryBase: u32,
  queryRow: u32,
  queryHead: u32,
  queryGap: u32,
  outputBase: u32,
  outputRow: u32,
  outputHead: u32,
  outputGap: u32,
  ropeKeyBase: u32,
  ropeKeyRow: u32,
  ropeKeyGap: u32,
  ropeQueryBase: u32,
  ropeQueryRow: u32,
  ropeQueryGap: u32,
  // Elements from the binding's start to the first log-sum-exp, from one item and one head to the next.
  lseBase: u32,
  lseItem: u32,
  lseHead: u32,
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
@group(0) @binding(2) var<storage, read> query: array<f32>;
@group(0) @binding(3) var<storage, read_write> expanded: array<vec4<u32>>; // halves: keys, values, rotary keys
@group(0) @binding(4) var<storage, read_write> output: array<f32>;
@group(0) @binding(6) var<storage, read> ropeQuery: array<f32>;
@group(0) @binding(8) var<storage, read> term: array<f16>;
@group(0) @binding(9) var<uniform> sinks: array<vec4<f32>, 1>;

struct LeftFragment { k0: vec4<f32>, k4: vec4<f32>, k8: vec4<f32>, k12: vec4<f32> }
struct ResultFragment { c0: vec4<f32>, c4: vec4<f32> }

var<private> lane: u32;
var<workgroup> keys: array<vec4<u32>, 160>;
var<workgroup> values: array<vec4<u32>, 95>;
var<workgroup> scores: array<vec4<f32>, 320>;
var<workgroup> probs: array<vec4<u32>, 128>;
var<workgroup> exchanged: array<f32, 256>;

fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(pack2x16float(low.xy), pack2x16float(low.zw), pack2x16float(high.xy), pack2x16float(high.zw));
}

fn lowHalves(quad: vec4<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y)); }
fn highHalves(quad: vec4<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(quad.z), unpack2x16float(quad.w)); }

fn keys_left(offset: u32, stride: u32) -> LeftFragment {
  let first = keys[offset + lane / 2u * stride];
  let second = keys[offset + lane / 2u * stride + 1u];
  return LeftFragment(lowHalves(first), highHalves(first), lowHalves(second), highHalves(second));
}

fn keys_leftColumn(offset: u32, stride: u32) -> LeftFragment {
  let row = lane / 2u;
  var halves: array<f32, 16>;
  for (var k = 0u; k < 16u; k += 1u) {
    let quad = keys[offset + k * stride + row / 8u];
    halves[k] = unpack2x16float(quad[row % 8u / 2u])[row % 2u];
  }
  return LeftFragment(
    vec4<f32>(halves[0], halves[1], halves[2], halves[3]),
    vec4<f32>(halves[4], halves[5], halves[6], halves[7]),
    vec4<f32>(halves[8], halves[9], halves[10], halves[11]),
    vec4<f32>(halves[12], halves[13], halves[14], halves[15]),
  );
}

fn keys_row(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var result = sum;
  var rows = array<vec4<f32>, 4>(left.k0, left.k4, left.k8, left.k12);
  for (var k = 0u; k < 16u; k += 1u) {
    let right = keys[offset + k * stride + lane % 2u];
    let factor = rows[k / 4u][k % 4u];
    result.c0 += factor * lowHalves(right);
    result.c4 += factor * highHalves(right);
  }
  return result;
}

fn keys_dot(left: LeftFragment, at: u32) -> f32 {
  let first = keys[at];
  let second = keys[at + 1u];
  return dot(left.k0, lowHalves(first)) + dot(left.k4, highHalves(first)) +
    dot(left.k8, lowHalves(second)) + dot(left.k12, highHalves(second));
}

fn keys_column(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var sums: array<f32, 8>;
  for (var c = 0u; c < 8u; c += 1u) { sums[c] = keys_dot(left, offset + (lane % 2u * 8u + c) * stride); }
  return ResultFragment(
    sum.c0 + vec4<f32>(sums[0], sums[1], sums[2], sums[3]),
    sum.c4 + vec4<f32>(sums[4], sums[5], sums[6], sums[7]),
  );
}

fn values_left(offset: u32, stride: u32) -> LeftFragment {
  let first = values[offset + lane / 2u * stride];
  let second = values[offset + lane / 2u * stride + 1u];
  return LeftFragment(lowHalves(first), highHalves(first), lowHalves(second), highHalves(second));
}

fn values_leftColumn(offset: u32, stride: u32) -> LeftFragment {
  let row = lane / 2u;
  var halves: array<f32, 16>;
  for (var k = 0u; k < 16u; k += 1u) {
    let quad = values[offset + k * stride + row / 8u];
    halves[k] = unpack2x16float(quad[row % 8u / 2u])[row % 2u];
  }
  return LeftFragment(
    vec4<f32>(halves[0], halves[1], halves[2], halves[3]),
    vec4<f32>(halves[4], halves[5], halves[6], halves[7]),
    vec4<f32>(halves[8], halves[9], halves[10], halves[11]),
    vec4<f32>(halves[12], halves[13], halves[14], halves[15]),
  );
}

fn values_row(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var result = sum;
  var rows = array<vec4<f32>, 4>(left.k0, left.k4, left.k8, left.k12);
  for (var k = 0u; k < 16u; k += 1u) {
    let right = values[offset + k * stride + lane % 2u];
    let factor = rows[k / 4u][k % 4u];
    result.c0 += factor * lowHalves(right);
    result.c4 += factor * highHalves(right);
  }
  return result;
}

fn values_dot(left: LeftFragment, at: u32) -> f32 {
  let first = values[at];
  let second = values[at + 1u];
  return dot(left.k0, lowHalves(first)) + dot(left.k4, highHalves(first)) +
    dot(left.k8, lowHalves(second)) + dot(left.k12, highHalves(second));
}

fn values_column(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var sums: array<f32, 8>;
  for (var c = 0u; c < 8u; c += 1u) { sums[c] = values_dot(left, offset + (lane % 2u * 8u + c) * stride); }
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
var<workgroup> rowFactor: array<f32, 32>;
var<workgroup> rescale: vec4<u32>; // x is set once a row's maximum has outgrown what its sums are relative to

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

fn loadQuery4(block: Block, head: u32, row: u32, at: u32) -> vec4<f32> {
  let offset = params.queryBase + row * params.queryRow + block.rangeItem * params.queryGap + head * params.queryHead;
  if (row >= block.rowEnd) { return vec4<f32>(); }
  if (at < 8u * NOPE_QUADS) {
    let column = at;
    if (column < params.P) { return vec4<f32>(select(0.0, query[offset + min(column + 0u, params.P - 1u)], column + 0u < params.P), select(0.0, query[offset + min(column + 1u, params.P - 1u)], column + 1u < params.P), select(0.0, query[offset + min(column + 2u, params.P - 1u)], column + 2u < params.P), select(0.0, query[offset + min(column + 3u, params.P - 1u)], column + 3u < params.P)); }
  } else {
    let column = at - 8u * NOPE_QUADS;
    let ropeOffset = params.ropeQueryBase + row * params.ropeQueryRow + block.rangeItem * params.ropeQueryGap;
    if (column < params.R) { return vec4<f32>(select(0.0, ropeQuery[ropeOffset + min(column + 0u, params.R - 1u)], column + 0u < params.R), select(0.0, ropeQuery[ropeOffset + min(column + 1u, params.R - 1u)], column + 1u < params.R), select(0.0, ropeQuery[ropeOffset + min(column + 2u, params.R - 1u)], column + 2u < params.R), select(0.0, ropeQuery[ropeOffset + min(column + 3u, params.R - 1u)], column + 3u < params.R)); }
  }
  return vec4<f32>();
}

fn loadQuery(block: Block, head: u32, firstRow: u32, quad: u32) -> vec4<u32> {
  let row = block.rowStart + firstRow;
  let at = quad * 8u;
  return packHalves(saturated(loadQuery4(block, head, row, at)), saturated(loadQuery4(block, head, row, at + 4u)));
}

// Past the last key stands the last one again: its scores are masked, and its values are multiplied by 0.
fn rowWithin(row: u32, block: Block) -> u32 { return min(row, max(block.columnEnd, 1u) - 1u); }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  lane = t % 32u;
  let subgroup = t / 32u;
  let block = blocks[params.firstBlock + workgroup.y];
  let head = params.firstHead + workgroup.x;
  let kvHead = head / params.groupSize - params.firstKvHead;
  let rowGroup = subgroup / 1u;
  let share = subgroup % 1u;
  let softRow = t / 2u;
  let softPart = t % 2u;
  let stageRow = t / 2u;
  let stageQuad = t % 2u;
  let origin = block.item * params.keyLength; // first key row of the batch item
  let position = params.firstRow - block.item * params.queryLength; // of row 0 in the batch item, modulo 2^32
  let count = (block.columnEnd - block.columnStart + BLOCK_K - 1u) / BLOCK_K;
  let lastBase = block.columnStart + (count - 1u) * BLOCK_K; // arbitrary when there is no key: what is loaded then is not used
  let dropped = dropoutKey(block.item, head);
  var rowTop = MASKED;
  var rowSum = 0.0;
  var q: array<LeftFragment, 2>;
  var s: array<ResultFragment, 2>;
  var o: array<ResultFragment, 1>;
  var query0 = vec4<u32>();
  var key0 = vec4<u32>();
  var query1 = vec4<u32>();
  var key1 = vec4<u32>();
  var value0 = vec4<u32>();

  if (t == 0u) { rescale = vec4<u32>(); }
  query0 = loadQuery(block, head, 0u * BLOCK_K + stageRow, stageQuad);
  query1 = loadQuery(block, head, 0u * BLOCK_K + stageRow, stageQuad + 2u);
  for (var round = 0u; round < 1u; round += 1u) {
    workgroupBarrier();
    keys[(stageRow / 16u) * 80u + stageRow % 16u * KEY_STRIDE + stageQuad] = query0;
    keys[(stageRow / 16u) * 80u + stageRow % 16u * KEY_STRIDE + stageQuad + 2u] = query1;
    workgroupBarrier();

    for (var r = 0u; r < 1u; r += 1u) {
      if ((rowGroup * 1u + r) / 2u == round) {
        for (var d = 0u; d < 2u; d += 1u) {
          q[r * 2u + d] = keys_left(((rowGroup * 1u + r) % 2u) * 80u + d * 2u, 5u);
        }
      }
    }
  }
  workgroupBarrier();
  {
    let row = rowWithin(lastBase + stageRow, block);
    let nope = (row * params.groupKvHeads + kvHead) * NOPE_QUADS;
    let rope = params.ropeKeyBase / 8u + row * ROPE_QUADS - NOPE_QUADS;
    key0 = expanded[nope + stageQuad];
    key1 = expanded[rope + stageQuad + 2u];
  }
  keys[(stageRow / 16u) * 80u + stageRow % 16u * KEY_STRIDE + stageQuad] = key0;
  keys[(stageRow / 16u) * 80u + stageRow % 16u * KEY_STRIDE + stageQuad + 2u] = key1;
  // The first round of outputs adds zeros.
  let zero = vec4<u32>();
  for (var i = t; i < 128u; i += 64u) {
    probs[(i / 32u) * 32u + i % 32u] = zero;
  }
  for (var i = t; i < 95u; i += 64u) {
    values[(i / 95u) * 95u + i % 95u] = zero;
  }
  workgroupBarrier();

  var next = 0u; // the block to be scored; the outputs of the one before are still to be summed
  var finished = false;
  loop {
    loop {
      let keyBase = lastBase - next * BLOCK_K;
      {
        let row = rowWithin(keyBase - BLOCK_K + stageRow, block);
        let nope = (row * params.groupKvHeads + kvHead) * NOPE_QUADS;
        let rope = params.ropeKeyBase / 8u + row * ROPE_QUADS - NOPE_QUADS;
        key0 = expanded[nope + stageQuad];
        key1 = expanded[rope + stageQuad + 2u];
      }
      {
        let row = rowWithin(keyBase + stageRow, block);
        let start = params.valuesBase / 8u + (row * params.groupKvHeads + kvHead) * STORED_VALUE_QUADS;
        value0 = expanded[start + stageQuad];
      }
      for (var r = 0u; r < 1u; r += 1u) {
        for (var k = 0u; k < 2u; k += 1u) {
          s[r * 2u + k] = ResultFragment();
        }
      }
      for (var k = 0u; k < 2u; k += 1u) {
        let prob0 = probs_left(((rowGroup * 1u + 0u) * 2u + k) * 32u + 0u, 2u);
        for (var c = 0u; c < 1u; c += 1u) {
          let value = share * 95u + k * 48u + c * 2u;
          o[0u * 1u + c] = values_row(prob0, value, 3u, o[0u * 1u + c]);
        }
      }
      for (var d = 0u; d < 2u; d += 1u) {
        for (var k = 0u; k < 2u; k += 1u) {
          let key = (share * 2u + k) * 80u + d * 2u;
          for (var r = 0u; r < 1u; r += 1u) {
            s[r * 2u + k] = keys_column(q[r * 2u + d], key, 5u, s[r * 2u + k]);
          }
        }
      }
      if (next >= count) {
        finished = true;
        break;
      }
      for (var r = 0u; r < 1u; r += 1u) {
        for (var k = 0u; k < 2u; k += 1u) {
          scores_storeColumn(subgroup * 160u + k * 80u + r * 4u, 5u, s[r * 2u + k]);
        }
      }
      workgroupBarrier();

      let masking = true;
      let turn = softPart % 2u;
      var x0 = scoreOf(vec4<f32>(scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 0u + turn) + 0u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 0u + turn) + 1u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 0u + turn) + 2u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 0u + turn) + 3u) * 5u + softRow % 16u / 4u][softRow % 4u]));
      var x1 = scoreOf(vec4<f32>(scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 1u + turn) + 0u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 1u + turn) + 1u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 1u + turn) + 2u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 1u + turn) + 3u) * 5u + softRow % 16u / 4u][softRow % 4u]));
      var x2 = scoreOf(vec4<f32>(scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 2u + turn) + 0u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 2u + turn) + 1u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 2u + turn) + 2u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 2u + turn) + 3u) * 5u + softRow % 16u / 4u][softRow % 4u]));
      var x3 = scoreOf(vec4<f32>(scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 3u - 3u * turn) + 0u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 3u - 3u * turn) + 1u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 3u - 3u * turn) + 2u) * 5u + softRow % 16u / 4u][softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u) * 160u + (4u * (4u * softPart % 8u + 3u - 3u * turn) + 3u) * 5u + softRow % 16u / 4u][softRow % 4u]));
      if (masking) {
        let row = i32(block.rowStart + softRow);
        let end = vec4<i32>(min(row + block.diagonalEnd, i32(block.columnEnd)));
        let start = vec4<i32>(row + block.diagonalStart);
        {
          let key = vec4<i32>(i32(keyBase + 4u * (4u * softPart + 0u + turn))) + vec4<i32>(0, 1, 2, 3);
          let seen = (key < end) & (key >= start);
          if (seen[0] && row < i32(block.rowEnd)) { x0[0] = withTerm(x0[0], block.item, head, position + u32(row), u32(key[0]) - origin); } else { x0[0] = MASKED; }
          if (seen[1] && row < i32(block.rowEnd)) { x0[1] = withTerm(x0[1], block.item, head, position + u32(row), u32(key[1]) - origin); } else { x0[1] = MASKED; }
          if (seen[2] && row < i32(block.rowEnd)) { x0[2] = withTerm(x0[2], block.item, head, position + u32(row), u32(key[2]) - origin); } else { x0[2] = MASKED; }
          if (seen[3] && row < i32(block.rowEnd)) { x0[3] = withTerm(x0[3], block.item, head, position + u32(row), u32(key[3]) - origin); } else { x0[3] = MASKED; }
        }
        {
          let key = vec4<i32>(i32(keyBase + 4u * (4u * softPart + 1u + turn))) + vec4<i32>(0, 1, 2, 3);
          let seen = (key < end) & (key >= start);
          if (seen[0] && row < i32(block.rowEnd)) { x1[0] = withTerm(x1[0], block.item, head, position + u32(row), u32(key[0]) - origin); } else { x1[0] = MASKED; }
          if (seen[1] && row < i32(block.rowEnd)) { x1[1] = withTerm(x1[1], block.item, head, position + u32(row), u32(key[1]) - origin); } else { x1[1] = MASKED; }
          if (seen[2] && row < i32(block.rowEnd)) { x1[2] = withTerm(x1[2], block.item, head, position + u32(row), u32(key[2]) - origin); } else { x1[2] = MASKED; }
          if (seen[3] && row < i32(block.rowEnd)) { x1[3] = withTerm(x1[3], block.item, head, position + u32(row), u32(key[3]) - origin); } else { x1[3] = MASKED; }
        }
        {
          let key = vec4<i32>(i32(keyBase + 4u * (4u * softPart + 2u + turn))) + vec4<i32>(0, 1, 2, 3);
          let seen = (key < end) & (key >= start);
          if (seen[0] && row < i32(block.rowEnd)) { x2[0] = withTerm(x2[0], block.item, head, position + u32(row), u32(key[0]) - origin); } else { x2[0] = MASKED; }
          if (seen[1] && row < i32(block.rowEnd)) { x2[1] = withTerm(x2[1], block.item, head, position + u32(row), u32(key[1]) - origin); } else { x2[1] = MASKED; }
          if (seen[2] && row < i32(block.rowEnd)) { x2[2] = withTerm(x2[2], block.item, head, position + u32(row), u32(key[2]) - origin); } else { x2[2] = MASKED; }
          if (seen[3] && row < i32(block.rowEnd)) { x2[3] = withTerm(x2[3], block.item, head, position + u32(row), u32(key[3]) - origin); } else { x2[3] = MASKED; }
        }
        {
          let key = vec4<i32>(i32(keyBase + 4u * (4u * softPart + 3u - 3u * turn))) + vec4<i32>(0, 1, 2, 3);
          let seen = (key < end) & (key >= start);
          if (seen[0] && row < i32(block.rowEnd)) { x3[0] = withTerm(x3[0], block.item, head, position + u32(row), u32(key[0]) - origin); } else { x3[0] = MASKED; }
          if (seen[1] && row < i32(block.rowEnd)) { x3[1] = withTerm(x3[1], block.item, head, position + u32(row), u32(key[1]) - origin); } else { x3[1] = MASKED; }
          if (seen[2] && row < i32(block.rowEnd)) { x3[2] = withTerm(x3[2], block.item, head, position + u32(row), u32(key[2]) - origin); } else { x3[2] = MASKED; }
          if (seen[3] && row < i32(block.rowEnd)) { x3[3] = withTerm(x3[3], block.item, head, position + u32(row), u32(key[3]) - origin); } else { x3[3] = MASKED; }
        }
      }
      var blockTop = max(max(x0.x, x0.y), max(x0.z, x0.w));
      blockTop = max(blockTop, max(max(x1.x, x1.y), max(x1.z, x1.w)));
      blockTop = max(blockTop, max(max(x2.x, x2.y), max(x2.z, x2.w)));
      blockTop = max(blockTop, max(max(x3.x, x3.y), max(x3.z, x3.w)));
      exchanged[t] = blockTop;
      workgroupBarrier();
      blockTop = max(blockTop, exchanged[t ^ 1u]);

      var decay = 1.0;
      if (blockTop > rowTop + 8.0) {
        // What was summed so far is zero before the first visible key.
        if (rowTop > UNSEEN) { rescale.x = 1u; }
        decay = exp2(rowTop - blockTop);
        rowTop = blockTop;
        rowSum *= decay;
      }
      if (softPart == 0u) { rowFactor[softRow] = decay; }
      var p0 = exp2(x0 - rowTop);
      var p1 = exp2(x1 - rowTop);
      var p2 = exp2(x2 - rowTop);
      var p3 = exp2(x3 - rowTop);
      if (masking) {
        p0 = select(p0, vec4<f32>(), x0 <= vec4<f32>(UNSEEN));
        p1 = select(p1, vec4<f32>(), x1 <= vec4<f32>(UNSEEN));
        p2 = select(p2, vec4<f32>(), x2 <= vec4<f32>(UNSEEN));
        p3 = select(p3, vec4<f32>(), x3 <= vec4<f32>(UNSEEN));
      }
      rowSum += (p0.x + p0.y) + (p0.z + p0.w);
      rowSum += (p1.x + p1.y) + (p1.z + p1.w);
      rowSum += (p2.x + p2.y) + (p2.z + p2.w);
      rowSum += (p3.x + p3.y) + (p3.z + p3.w);
      p0[0] = select(0.0, p0[0], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 0u + turn) + 0u - origin) > 0.0);
      p0[1] = select(0.0, p0[1], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 0u + turn) + 1u - origin) > 0.0);
      p0[2] = select(0.0, p0[2], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 0u + turn) + 2u - origin) > 0.0);
      p0[3] = select(0.0, p0[3], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 0u + turn) + 3u - origin) > 0.0);
      p1[0] = select(0.0, p1[0], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 1u + turn) + 0u - origin) > 0.0);
      p1[1] = select(0.0, p1[1], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 1u + turn) + 1u - origin) > 0.0);
      p1[2] = select(0.0, p1[2], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 1u + turn) + 2u - origin) > 0.0);
      p1[3] = select(0.0, p1[3], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 1u + turn) + 3u - origin) > 0.0);
      p2[0] = select(0.0, p2[0], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 2u + turn) + 0u - origin) > 0.0);
      p2[1] = select(0.0, p2[1], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 2u + turn) + 1u - origin) > 0.0);
      p2[2] = select(0.0, p2[2], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 2u + turn) + 2u - origin) > 0.0);
      p2[3] = select(0.0, p2[3], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 2u + turn) + 3u - origin) > 0.0);
      p3[0] = select(0.0, p3[0], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 3u - 3u * turn) + 0u - origin) > 0.0);
      p3[1] = select(0.0, p3[1], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 3u - 3u * turn) + 1u - origin) > 0.0);
      p3[2] = select(0.0, p3[2], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 3u - 3u * turn) + 2u - origin) > 0.0);
      p3[3] = select(0.0, p3[3], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (4u * softPart + 3u - 3u * turn) + 3u - origin) > 0.0);
      {
        let eight = select(packHalves(p0, p1), packHalves(p1, p2), turn == 1u);
        probs[(softRow / 16u * 2u + (2u * softPart + (0u + turn) % 2u) / 2u) * 32u + softRow % 16u * 2u + (2u * softPart + (0u + turn) % 2u) % 2u] = eight;
      }
      {
        let eight = select(packHalves(p2, p3), packHalves(p3, p0), turn == 1u);
        probs[(softRow / 16u * 2u + (2u * softPart + (1u + turn) % 2u) / 2u) * 32u + softRow % 16u * 2u + (2u * softPart + (1u + turn) % 2u) % 2u] = eight;
      }
      if (masking) {
        value0 = finiteHalves(value0);
      }
      values[0u * 95u + stageRow * VALUE_STRIDE + stageQuad - 0u] = value0;
      keys[(stageRow / 16u) * 80u + stageRow % 16u * KEY_STRIDE + stageQuad] = key0;
      keys[(stageRow / 16u) * 80u + stageRow % 16u * KEY_STRIDE + stageQuad + 2u] = key1;
      next += 1u;
      if (workgroupUniformLoad(&rescale).x != 0u) { break; }
    }
    if (finished) { break; }
    // The scores are consumed, and their memory is free.
    if (t == 0u) { rescale = vec4<u32>(); }
    for (var r = 0u; r < 1u; r += 1u) {
      for (var c = 0u; c < 1u; c += 1u) {
        scores_store(subgroup * 160u + 0u, 5u, o[r * 1u + (c * 1u + 0u)]);
        workgroupBarrier();
        {
          let ownRow = (lane + 0u) / 4u;
          let ownQuad = (lane + 0u) % 4u;
          let index = ownRow * 5u + ownQuad;
          let scaled = scores[subgroup * 160u + index] * rowFactor[((rowGroup * 1u + r) * 16u + ownRow)];
          scores[subgroup * 160u + index] = scaled;
        }
        {
          let ownRow = (lane + 32u) / 4u;
          let ownQuad = (lane + 32u) % 4u;
          let index = ownRow * 5u + ownQuad;
          let scaled = scores[subgroup * 160u + index] * rowFactor[((rowGroup * 1u + r) * 16u + ownRow)];
          scores[subgroup * 160u + index] = scaled;
        }
        workgroupBarrier();
        o[r * 1u + (c * 1u + 0u)] = scores_load(subgroup * 160u + 0u, 5u);
        workgroupBarrier();
      }
    }
  }

  // A row that sees no key has no sum; a NaN sum is not 0 and must reach the output.
  exchanged[t] = rowSum;
  workgroupBarrier();
  rowSum = rowSum + exchanged[t ^ 1u];
  let sink = sinks[head / 4u][head % 4u];
  let top = max(rowTop, sink);
  let down = exp2(rowTop - top);
  let total = select(rowSum * down + exp2(sink - top), 0.0, rowSum == 0.0);
  let part = select(down / total, 0.0, rowSum == 0.0);
  if (softPart == 0u) {
    rowFactor[softRow] = part * params.keptFactor;

  }
  workgroupBarrier();
  for (var r = 0u; r < 1u; r += 1u) {
    for (var c = 0u; c < 1u; c += 1u) {
      scores_store(subgroup * 160u + 0u, 5u, o[r * 1u + (c * 1u + 0u)]);
      workgroupBarrier();
      {
        let ownRow = (lane + 0u) / 4u;
        let ownQuad = (lane + 0u) % 4u;
        let index = ownRow * 5u + ownQuad;
        let row = block.rowStart + ((rowGroup * 1u + r) * 16u + ownRow);
        let column = share * 16u + (c * 1u * 16u + 4u * ownQuad);
        if (row < block.rowEnd && column < params.V) {
          let factor = rowFactor[((rowGroup * 1u + r) * 16u + ownRow)];
          let result = select(scores[subgroup * 160u + index] * factor, vec4<f32>(), factor == 0.0);
          let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
          if (column + 0u < params.V) { output[offset + column + 0u] = result[0]; }
          if (column + 1u < params.V) { output[offset + column + 1u] = result[1]; }
          if (column + 2u < params.V) { output[offset + column + 2u] = result[2]; }
          if (column + 3u < params.V) { output[offset + column + 3u] = result[3]; }
        }
      }
      {
        let ownRow = (lane + 32u) / 4u;
        let ownQuad = (lane + 32u) % 4u;
        let index = ownRow * 5u + ownQuad;
        let row = block.rowStart + ((rowGroup * 1u + r) * 16u + ownRow);
        let column = share * 16u + (c * 1u * 16u + 4u * ownQuad);
        if (row < block.rowEnd && column < params.V) {
          let factor = rowFactor[((rowGroup * 1u + r) * 16u + ownRow)];
          let result = select(scores[subgroup * 160u + index] * factor, vec4<f32>(), factor == 0.0);
          let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
          if (column + 0u < params.V) { output[offset + column + 0u] = result[0]; }
          if (column + 1u < params.V) { output[offset + column + 1u] = result[1]; }
          if (column + 2u < params.V) { output[offset + column + 2u] = result[2]; }
          if (column + 3u < params.V) { output[offset + column + 3u] = result[3]; }
        }
      }
      workgroupBarrier();
    }
  }
}
