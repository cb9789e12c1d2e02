enable f16;
// MLA attention over expanded keys and values.
// blockQ 32, blockK 32, 8 × 8 invocations, 4 rows each, depth 4, 1 stage(s)
const BLOCK_Q = 32u;
const BLOCK_K = 32u;
const DEPTH = 4u;
const DEPTH_PIECES = 1u;
const TX = 8u;
const PROB_SLICES = 2u;
const VALUE_QUADS = 8u;
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
@group(0) @binding(2) var<storage, read> query: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> expanded: array<vec4<f32>>; // keys, then values
@group(0) @binding(4) var<storage, read_write> output: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> ropeKey: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> lse: array<f32>;
@group(0) @binding(8) var<storage, read> term: array<f16>;
@group(0) @binding(9) var<uniform> sinks: array<vec4<f32>, 2>;

var<workgroup> left: array<array<array<vec4<f32>, 9>, 4>, 1>;
var<workgroup> right: array<array<array<vec4<f32>, 9>, 4>, 1>;
var<workgroup> probs: array<array<array<vec4<f32>, 9>, 4>, 2>;
var<workgroup> poisoned: array<atomic<u32>, 4>; // [0] is set once a staged value row held NaN or infinity

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

fn nopeSlices() -> u32 { return (params.P + DEPTH - 1u) / DEPTH; }

fn loadQuery(block: Block, head: u32, piece: u32, slice: u32) -> vec4<f32> {
  let row = block.rowStart + piece / DEPTH_PIECES;
  let within = (piece % DEPTH_PIECES) * 4u;
  let offset = params.queryBase + row * params.queryRow + block.rangeItem * params.queryGap + head * params.queryHead;
  if (row >= block.rowEnd) { return vec4<f32>(); }
  if (slice < nopeSlices()) {
    let column = slice * DEPTH + within;
    if (column < params.P) { return query[(offset + column) / 4u]; }
  } else {
    let column = (slice - nopeSlices()) * DEPTH + within;
    if (column < params.R) { return query[(offset + params.P + column) / 4u]; }
  }
  return vec4<f32>();
}

fn loadKey(block: Block, kvHead: u32, keyBase: u32, piece: u32, slice: u32) -> vec4<f32> {
  let row = keyBase + piece / DEPTH_PIECES;
  let within = (piece % DEPTH_PIECES) * 4u;
  let offset = (row * params.groupKvHeads + kvHead) * params.P;
  if (row >= block.columnEnd) { return vec4<f32>(); }
  if (slice < nopeSlices()) {
    let column = slice * DEPTH + within;
    if (column < params.P) { return expanded[(offset + column) / 4u]; }
  } else {
    let column = (slice - nopeSlices()) * DEPTH + within;
    let ropeOffset = params.ropeKeyBase + row * params.ropeKeyRow + block.item * params.ropeKeyGap;
    if (column < params.R) { return ropeKey[(ropeOffset + column) / 4u]; }
  }
  return vec4<f32>();
}

// Key, relative to the block, of entry entry of probability slice group.
fn sliceKey(group: u32, entry: u32) -> u32 {
  let own = group * 1u + entry % 1u;
  return (own / 4u) * 4u * TX + (entry / 1u) * 4u + own % 4u;
}

fn loadValue(block: Block, kvHead: u32, keyBase: u32, group: u32, piece: u32, slice: u32) -> vec4<f32> {
  let row = keyBase + sliceKey(group, slice * DEPTH + piece / VALUE_QUADS);
  let column = (piece % VALUE_QUADS) * 4u;
  let offset = params.valuesBase + (row * params.groupKvHeads + kvHead) * params.V;
  if (row >= block.columnEnd || column >= params.V) { return vec4<f32>(); }
  return expanded[(offset + column) / 4u];
}

fn stageQuery(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
  left[stage][depth + 0u][row >> 2u][row & 3u] = value[0];
  left[stage][depth + 1u][row >> 2u][row & 3u] = value[1];
  left[stage][depth + 2u][row >> 2u][row & 3u] = value[2];
  left[stage][depth + 3u][row >> 2u][row & 3u] = value[3];
}

fn stageKey(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
  right[stage][depth + 0u][row >> 2u][row & 3u] = value[0];
  right[stage][depth + 1u][row >> 2u][row & 3u] = value[1];
  right[stage][depth + 2u][row >> 2u][row & 3u] = value[2];
  right[stage][depth + 3u][row >> 2u][row & 3u] = value[3];
}

fn stageValue(piece: u32, stage: u32, value: vec4<f32>) {
  let exponent = bitcast<vec4<u32>>(value) & vec4<u32>(0x7f800000u);
  if (any(exponent == vec4<u32>(0x7f800000u))) { atomicStore(&poisoned[0], 1u); }
  right[stage][piece / VALUE_QUADS][piece % VALUE_QUADS] = value;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let block = blocks[params.firstBlock + workgroup.y];
  let head = params.firstHead + workgroup.x;
  let kvHead = head / params.groupSize - params.firstKvHead;
  let scoreSlices = nopeSlices() + (params.R + DEPTH - 1u) / DEPTH;
  let tx = t % TX;
  let ty = t / TX;
  if (t == 0u) { atomicStore(&poisoned[0], 0u); } // many barriers before its first use
  let origin = block.item * params.keyLength; // first key row of the batch item
  let position = params.firstRow - block.item * params.queryLength; // of row 0 in the batch item, modulo 2^32
  let dropped = dropoutKey(block.item, head);
  var rowMax0 = vec4<f32>(MASKED);
  var rowSum0 = vec4<f32>();
  var o0_0 = vec4<f32>();
  var o1_0 = vec4<f32>();
  var o2_0 = vec4<f32>();
  var o3_0 = vec4<f32>();

  for (var keyBase = block.columnStart; keyBase < block.columnEnd; keyBase += BLOCK_K) {
    let masking = true;

    // Scores.
    var s0_0 = vec4<f32>();
    var s1_0 = vec4<f32>();
    var s2_0 = vec4<f32>();
    var s3_0 = vec4<f32>();
    {
      var query0 = vec4<f32>();
      var key0 = vec4<f32>();

      for (var slice = 0u; slice < scoreSlices; slice += 1u) {
        if ((t + 0u) < 32u) { query0 = loadQuery(block, head, (t + 0u), slice); }
        if ((t + 0u) < 32u) { key0 = loadKey(block, kvHead, keyBase, (t + 0u), slice); }
        if ((t + 0u) < 32u) { stageQuery((t + 0u), 0u, query0); }
        if ((t + 0u) < 32u) { stageKey((t + 0u), 0u, key0); }
        workgroupBarrier();
        for (var d = 0u; d < 4u; d += 1u) {
          let a0 = left[0u][d][ty + 0u];
          let b0 = right[0u][d][tx + 0u];
          s0_0 = fma(a0, vec4<f32>(b0.x), s0_0);
          s1_0 = fma(a0, vec4<f32>(b0.y), s1_0);
          s2_0 = fma(a0, vec4<f32>(b0.z), s2_0);
          s3_0 = fma(a0, vec4<f32>(b0.w), s3_0);
        }
        workgroupBarrier();
      }
    }
    s0_0 = scoreOf(s0_0);
    s1_0 = scoreOf(s1_0);
    s2_0 = scoreOf(s2_0);
    s3_0 = scoreOf(s3_0);
    if (masking) {
      let row0 = vec4<i32>(i32(block.rowStart + 4u * (ty + 0u))) + vec4<i32>(0, 1, 2, 3);
      let end0 = min(row0 + block.diagonalEnd, vec4<i32>(i32(block.columnEnd)));
      let start0 = row0 + block.diagonalStart;
      let key0 = vec4<i32>(i32(keyBase + 4u * (tx + 0u) + 0u));
      {
        let seen = (key0 < end0) & (key0 >= start0);
        if (seen[0] && row0[0] < i32(block.rowEnd)) { s0_0[0] = withTerm(s0_0[0], block.item, head, position + u32(row0[0]), u32(key0[0]) - origin); } else { s0_0[0] = MASKED; }
        if (seen[1] && row0[1] < i32(block.rowEnd)) { s0_0[1] = withTerm(s0_0[1], block.item, head, position + u32(row0[1]), u32(key0[1]) - origin); } else { s0_0[1] = MASKED; }
        if (seen[2] && row0[2] < i32(block.rowEnd)) { s0_0[2] = withTerm(s0_0[2], block.item, head, position + u32(row0[2]), u32(key0[2]) - origin); } else { s0_0[2] = MASKED; }
        if (seen[3] && row0[3] < i32(block.rowEnd)) { s0_0[3] = withTerm(s0_0[3], block.item, head, position + u32(row0[3]), u32(key0[3]) - origin); } else { s0_0[3] = MASKED; }
      }
      let key1 = vec4<i32>(i32(keyBase + 4u * (tx + 0u) + 1u));
      {
        let seen = (key1 < end0) & (key1 >= start0);
        if (seen[0] && row0[0] < i32(block.rowEnd)) { s1_0[0] = withTerm(s1_0[0], block.item, head, position + u32(row0[0]), u32(key1[0]) - origin); } else { s1_0[0] = MASKED; }
        if (seen[1] && row0[1] < i32(block.rowEnd)) { s1_0[1] = withTerm(s1_0[1], block.item, head, position + u32(row0[1]), u32(key1[1]) - origin); } else { s1_0[1] = MASKED; }
        if (seen[2] && row0[2] < i32(block.rowEnd)) { s1_0[2] = withTerm(s1_0[2], block.item, head, position + u32(row0[2]), u32(key1[2]) - origin); } else { s1_0[2] = MASKED; }
        if (seen[3] && row0[3] < i32(block.rowEnd)) { s1_0[3] = withTerm(s1_0[3], block.item, head, position + u32(row0[3]), u32(key1[3]) - origin); } else { s1_0[3] = MASKED; }
      }
      let key2 = vec4<i32>(i32(keyBase + 4u * (tx + 0u) + 2u));
      {
        let seen = (key2 < end0) & (key2 >= start0);
        if (seen[0] && row0[0] < i32(block.rowEnd)) { s2_0[0] = withTerm(s2_0[0], block.item, head, position + u32(row0[0]), u32(key2[0]) - origin); } else { s2_0[0] = MASKED; }
        if (seen[1] && row0[1] < i32(block.rowEnd)) { s2_0[1] = withTerm(s2_0[1], block.item, head, position + u32(row0[1]), u32(key2[1]) - origin); } else { s2_0[1] = MASKED; }
        if (seen[2] && row0[2] < i32(block.rowEnd)) { s2_0[2] = withTerm(s2_0[2], block.item, head, position + u32(row0[2]), u32(key2[2]) - origin); } else { s2_0[2] = MASKED; }
        if (seen[3] && row0[3] < i32(block.rowEnd)) { s2_0[3] = withTerm(s2_0[3], block.item, head, position + u32(row0[3]), u32(key2[3]) - origin); } else { s2_0[3] = MASKED; }
      }
      let key3 = vec4<i32>(i32(keyBase + 4u * (tx + 0u) + 3u));
      {
        let seen = (key3 < end0) & (key3 >= start0);
        if (seen[0] && row0[0] < i32(block.rowEnd)) { s3_0[0] = withTerm(s3_0[0], block.item, head, position + u32(row0[0]), u32(key3[0]) - origin); } else { s3_0[0] = MASKED; }
        if (seen[1] && row0[1] < i32(block.rowEnd)) { s3_0[1] = withTerm(s3_0[1], block.item, head, position + u32(row0[1]), u32(key3[1]) - origin); } else { s3_0[1] = MASKED; }
        if (seen[2] && row0[2] < i32(block.rowEnd)) { s3_0[2] = withTerm(s3_0[2], block.item, head, position + u32(row0[2]), u32(key3[2]) - origin); } else { s3_0[2] = MASKED; }
        if (seen[3] && row0[3] < i32(block.rowEnd)) { s3_0[3] = withTerm(s3_0[3], block.item, head, position + u32(row0[3]), u32(key3[3]) - origin); } else { s3_0[3] = MASKED; }
      }
    }

    // Row maxima over the block, then over all that came before.
    var newMax0 = s0_0;
    newMax0 = max(newMax0, s1_0);
    newMax0 = max(newMax0, s2_0);
    newMax0 = max(newMax0, s3_0);
    probs[tx / DEPTH][tx % DEPTH][ty + 0u] = newMax0;
    workgroupBarrier();
    newMax0 = rowMax0;
    newMax0 = max(newMax0, probs[0][0][ty + 0u]);
    newMax0 = max(newMax0, probs[0][1][ty + 0u]);
    newMax0 = max(newMax0, probs[0][2][ty + 0u]);
    newMax0 = max(newMax0, probs[0][3][ty + 0u]);
    newMax0 = max(newMax0, probs[1][0][ty + 0u]);
    newMax0 = max(newMax0, probs[1][1][ty + 0u]);
    newMax0 = max(newMax0, probs[1][2][ty + 0u]);
    newMax0 = max(newMax0, probs[1][3][ty + 0u]);
    workgroupBarrier();

    // Probabilities, and the rescaling of what was summed under the old maximum.
    let decay0 = exp2(rowMax0 - newMax0);
    rowMax0 = newMax0;
    rowSum0 *= decay0;
    s0_0 = select(exp2(s0_0 - newMax0), vec4<f32>(), s0_0 <= vec4<f32>(UNSEEN));
    rowSum0 += s0_0;
    s1_0 = select(exp2(s1_0 - newMax0), vec4<f32>(), s1_0 <= vec4<f32>(UNSEEN));
    rowSum0 += s1_0;
    s2_0 = select(exp2(s2_0 - newMax0), vec4<f32>(), s2_0 <= vec4<f32>(UNSEEN));
    rowSum0 += s2_0;
    s3_0 = select(exp2(s3_0 - newMax0), vec4<f32>(), s3_0 <= vec4<f32>(UNSEEN));
    rowSum0 += s3_0;
    s0_0 *= vec4<f32>(keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 0u, keyBase + 4u * (tx + 0u) + 0u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 1u, keyBase + 4u * (tx + 0u) + 0u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 2u, keyBase + 4u * (tx + 0u) + 0u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 3u, keyBase + 4u * (tx + 0u) + 0u - origin));
    s1_0 *= vec4<f32>(keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 0u, keyBase + 4u * (tx + 0u) + 1u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 1u, keyBase + 4u * (tx + 0u) + 1u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 2u, keyBase + 4u * (tx + 0u) + 1u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 3u, keyBase + 4u * (tx + 0u) + 1u - origin));
    s2_0 *= vec4<f32>(keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 0u, keyBase + 4u * (tx + 0u) + 2u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 1u, keyBase + 4u * (tx + 0u) + 2u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 2u, keyBase + 4u * (tx + 0u) + 2u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 3u, keyBase + 4u * (tx + 0u) + 2u - origin));
    s3_0 *= vec4<f32>(keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 0u, keyBase + 4u * (tx + 0u) + 3u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 1u, keyBase + 4u * (tx + 0u) + 3u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 2u, keyBase + 4u * (tx + 0u) + 3u - origin), keptFactor(dropped, position + block.rowStart + 4u * (ty + 0u) + 3u, keyBase + 4u * (tx + 0u) + 3u - origin));
    o0_0 *= decay0[0];
    o1_0 *= decay0[1];
    o2_0 *= decay0[2];
    o3_0 *= decay0[3];

    // Outputs.
    for (var group = 0u; group < 4u; group += 1u) {
      {
        var value0 = vec4<f32>();
        switch group {
          case 0u: {
            probs[(tx * 1u + 0u) / DEPTH][(tx * 1u + 0u) % DEPTH][ty + 0u] = s0_0;
          }
          case 1u: {
            probs[(tx * 1u + 0u) / DEPTH][(tx * 1u + 0u) % DEPTH][ty + 0u] = s1_0;
          }
          case 2u: {
            probs[(tx * 1u + 0u) / DEPTH][(tx * 1u + 0u) % DEPTH][ty + 0u] = s2_0;
          }
          case 3u: {
            probs[(tx * 1u + 0u) / DEPTH][(tx * 1u + 0u) % DEPTH][ty + 0u] = s3_0;
          }
          default: {}
        }
        for (var slice = 0u; slice < PROB_SLICES; slice += 1u) {
          if ((t + 0u) < 32u) { value0 = loadValue(block, kvHead, keyBase, group, (t + 0u), slice); }
          if ((t + 0u) < 32u) { stageValue((t + 0u), 0u, value0); }
          workgroupBarrier();
          if (masking && atomicLoad(&poisoned[0]) != 0u) {
            for (var d = 0u; d < 4u; d += 1u) {
              let a0 = probs[slice][d][ty + 0u];
              let b0 = right[0u][d][tx + 0u];
              o0_0 = select(fma(vec4<f32>(a0[0]), b0, o0_0), o0_0, a0[0] == 0.0);
              o1_0 = select(fma(vec4<f32>(a0[1]), b0, o1_0), o1_0, a0[1] == 0.0);
              o2_0 = select(fma(vec4<f32>(a0[2]), b0, o2_0), o2_0, a0[2] == 0.0);
              o3_0 = select(fma(vec4<f32>(a0[3]), b0, o3_0), o3_0, a0[3] == 0.0);
            }
          } else {
            for (var d = 0u; d < 4u; d += 1u) {
              let a0 = probs[slice][d][ty + 0u];
              let b0 = right[0u][d][tx + 0u];
              o0_0 = fma(vec4<f32>(a0.x), b0, o0_0);
              o1_0 = fma(vec4<f32>(a0.y), b0, o1_0);
              o2_0 = fma(vec4<f32>(a0.z), b0, o2_0);
              o3_0 = fma(vec4<f32>(a0.w), b0, o3_0);
            }
          }
          workgroupBarrier();
        }
      }
    }
  }

  // Row sums over the invocations of a row. A row that sees no key has none; a NaN sum is not 0 and must reach the output.
  probs[tx / DEPTH][tx % DEPTH][ty + 0u] = rowSum0;
  workgroupBarrier();
  var total0 = vec4<f32>();
  total0 += probs[0][0][ty + 0u];
  total0 += probs[0][1][ty + 0u];
  total0 += probs[0][2][ty + 0u];
  total0 += probs[0][3][ty + 0u];
  total0 += probs[1][0][ty + 0u];
  total0 += probs[1][1][ty + 0u];
  total0 += probs[1][2][ty + 0u];
  total0 += probs[1][3][ty + 0u];
  let sink0 = vec4<f32>(sinks[head / 4u][head % 4u]);
  let top0 = max(rowMax0, sink0);
  let unseen0 = total0 == vec4<f32>();
  let down0 = exp2(rowMax0 - top0);
  total0 = select(total0 * down0 + exp2(sink0 - top0), vec4<f32>(), unseen0);
  let share0 = select(down0 / total0, vec4<f32>(), unseen0);
  if (tx == 0u) {
    let lseRow = params.lseBase + block.item * params.lseItem + head * params.lseHead + position;
    {
      let row = block.rowStart + 4u * (ty + 0u);
      let logSum = select((top0 + log2(total0)) * LN2, vec4<f32>(params.minusInfinity), total0 == vec4<f32>());
      if (row + 0u < block.rowEnd) { lse[lseRow + row + 0u] = logSum[0]; }
      if (row + 1u < block.rowEnd) { lse[lseRow + row + 1u] = logSum[1]; }
      if (row + 2u < block.rowEnd) { lse[lseRow + row + 2u] = logSum[2]; }
      if (row + 3u < block.rowEnd) { lse[lseRow + row + 3u] = logSum[3]; }
    }
  }
  {
    let row = block.rowStart + 4u * (ty + 0u) + 0u;
    if (row < block.rowEnd) {
      let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
      {
        let column = 4u * (tx + 0u);
        let result = select(o0_0 * share0[0], vec4<f32>(), share0[0] == 0.0);
        if (column < params.V) { output[(offset + column) / 4u] = result; }
      }
    }
  }
  {
    let row = block.rowStart + 4u * (ty + 0u) + 1u;
    if (row < block.rowEnd) {
      let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
      {
        let column = 4u * (tx + 0u);
        let result = select(o1_0 * share0[1], vec4<f32>(), share0[1] == 0.0);
        if (column < params.V) { output[(offset + column) / 4u] = result; }
      }
    }
  }
  {
    let row = block.rowStart + 4u * (ty + 0u) + 2u;
    if (row < block.rowEnd) {
      let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
      {
        let column = 4u * (tx + 0u);
        let result = select(o2_0 * share0[2], vec4<f32>(), share0[2] == 0.0);
        if (column < params.V) { output[(offset + column) / 4u] = result; }
      }
    }
  }
  {
    let row = block.rowStart + 4u * (ty + 0u) + 3u;
    if (row < block.rowEnd) {
      let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
      {
        let column = 4u * (tx + 0u);
        let result = select(o3_0 * share0[3], vec4<f32>(), share0[3] == 0.0);
        if (column < params.V) { output[(offset + column) / 4u] = result; }
      }
    }
  }
}
