enable f16;
// Gradient of MLA attention over expanded keys and values: ∂K and ∂V.
// 32 rows, 32 columns, 8 × 8 invocations, depth 4, 1 stage(s)
const ROWS = 32u;
const COLUMNS = 32u;
const DEPTH = 4u;
const DEPTH_PIECES = 1u;
const TX = 8u;
const PROB_SLICES = 8u;
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
@group(0) @binding(2) var<storage, read> query: array<vec4<f16>>;
@group(0) @binding(3) var<storage, read> gradOutput: array<f16>;
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>; // log2-sum-exp and D, [heads, rows]
@group(0) @binding(5) var<storage, read> expanded: array<vec4<f32>>; // keys, values, rotary keys
@group(0) @binding(6) var<storage, read_write> gradient: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read> term: array<f16>;

var<workgroup> left: array<array<array<vec4<f32>, 9>, 4>, 1>;
var<workgroup> right: array<array<array<vec4<f32>, 17>, 4>, 1>;
var<workgroup> probs: array<array<array<vec4<f32>, 9>, 4>, 8>;
var<workgroup> poisoned: array<atomic<u32>, 4>; // [0] is set once a staged column held NaN or infinity

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

fn keptSign(dropKey: vec2<u32>, position: u32, keyPosition: u32) -> f32 {
  return select(1.0, -1.0, keptFactor(dropKey, position, keyPosition) == 0.0);
}

fn nopeQuads() -> u32 { return (params.P + 3u) / 4u; }

fn keyQuads() -> u32 { return nopeQuads() + (params.R + 3u) / 4u; }

fn loadQuery(row: u32, end: u32, rangeItem: u32, head: u32, quad: u32) -> vec4<f32> {
  if (row >= end || quad >= keyQuads()) { return vec4<f32>(); }
  let offset = params.queryBase + row * params.queryRow + rangeItem * params.queryGap + head * params.queryHead;
  if (quad >= nopeQuads()) {
    let column = 4u * (quad - nopeQuads());
    return vec4<f32>(query[(offset + params.P + column) / 4u]);
  }
  let column = 4u * quad;
  return vec4<f32>(query[(offset + column) / 4u]);
}

fn loadGrad(row: u32, end: u32, rangeItem: u32, head: u32, quad: u32) -> vec4<f32> {
  let column = 4u * quad;
  if (row >= end || column >= params.V) { return vec4<f32>(); }
  let offset = params.gradBase + row * params.gradRow + rangeItem * params.gradGap + head * params.gradHead;
  return vec4<f32>(select(0.0, f32(gradOutput[offset + min(column + 0u, params.V - 1u)]), column + 0u < params.V), select(0.0, f32(gradOutput[offset + min(column + 1u, params.V - 1u)]), column + 1u < params.V), select(0.0, f32(gradOutput[offset + min(column + 2u, params.V - 1u)]), column + 2u < params.V), select(0.0, f32(gradOutput[offset + min(column + 3u, params.V - 1u)]), column + 3u < params.V));
}

fn loadKey(row: u32, end: u32, kvHead: u32, quad: u32) -> vec4<f32> {
  if (row >= end || quad >= keyQuads()) { return vec4<f32>(); }
  if (quad >= nopeQuads()) {
    let column = 4u * (quad - nopeQuads());
    let ropeOffset = params.ropeBase + row * params.R;
    return expanded[(ropeOffset + column) / 4u];
  }
  let column = 4u * quad;
  let offset = (row * params.groupKvHeads + kvHead) * params.P;
  return expanded[(offset + column) / 4u];
}

fn loadValue(row: u32, end: u32, kvHead: u32, quad: u32) -> vec4<f32> {
  let column = 4u * quad;
  if (row >= end || column >= params.V) { return vec4<f32>(); }
  let offset = params.valuesBase + (row * params.groupKvHeads + kvHead) * params.V;
  return expanded[(offset + column) / 4u];
}

fn rowStats(row: u32, end: u32, head: u32) -> vec2<f32> {
  if (row >= end) { return vec2<f32>(-MASKED, 0.0); }
  return stats[head * params.rangeRows + row];
}

fn put(offset: u32, column: u32, width: u32, value: vec4<f32>) {
  if (column >= width) { return; }
  let at = (offset + column) / 4u;
  var sum = value;
  if (params.accumulate != 0u) { sum += gradient[at]; }
  gradient[at] = sum;
}

// One quad of a row of ∂K or ∂rope.
fn putKey(offset: u32, ropeOffset: u32, quad: u32, value: vec4<f32>) {
  if (quad < nopeQuads()) {
    put(offset, 4u * quad, params.P, value);
  } else {
    put(ropeOffset, 4u * (quad - nopeQuads()), params.R, value);
  }
}

fn stageRow(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
  left[stage][depth + 0u][row >> 2u][row & 3u] = value[0];
  left[stage][depth + 1u][row >> 2u][row & 3u] = value[1];
  left[stage][depth + 2u][row >> 2u][row & 3u] = value[2];
  left[stage][depth + 3u][row >> 2u][row & 3u] = value[3];
}

fn stageColumn(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
  right[stage][depth + 0u][row >> 2u][row & 3u] = value[0];
  right[stage][depth + 1u][row >> 2u][row & 3u] = value[1];
  right[stage][depth + 2u][row >> 2u][row & 3u] = value[2];
  right[stage][depth + 3u][row >> 2u][row & 3u] = value[3];
}

fn stageSummed(row: u32, quad: u32, stage: u32, value: vec4<f32>) {
  let exponent = bitcast<vec4<u32>>(value) & vec4<u32>(0x7f800000u);
  if (any(exponent == vec4<u32>(0x7f800000u))) { atomicStore(&poisoned[0], 1u); }
  right[stage][row][quad] = value;
}

// Column, relative to the block, of entry entry of probability slice group. Neighbouring invocations have neighbouring
// entries, which lie in different banks of workgroup memory.
fn sliceColumn(group: u32, entry: u32) -> u32 {
  let own = group * 4u + entry / TX;
  return (own / 4u) * 4u * TX + (entry % TX) * 4u + own % 4u;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let block = blocks[params.firstBlock + workgroup.y];
  let tx = t % TX;
  let ty = t / TX;
  if (t == 0u) { atomicStore(&poisoned[0], 0u); } // many barriers before its first use
  let firstHead = params.firstHead + workgroup.x * params.headCount;
  let columnEnd = block.columnEnd;
  let origin = block.item * params.keyLength; // first key row of the batch item
  let position = params.firstRow - block.item * params.queryLength; // of query row 0 in the batch item, modulo 2^32
  let keySlices = (keyQuads() + DEPTH_PIECES - 1u) / DEPTH_PIECES;
  let valueSlices = ((params.V + 3u) / 4u + DEPTH_PIECES - 1u) / DEPTH_PIECES;
  var k0_0 = vec4<f32>();
  var k0_1 = vec4<f32>();
  var k1_0 = vec4<f32>();
  var k1_1 = vec4<f32>();
  var k2_0 = vec4<f32>();
  var k2_1 = vec4<f32>();
  var k3_0 = vec4<f32>();
  var k3_1 = vec4<f32>();
  var v0_0 = vec4<f32>();
  var v1_0 = vec4<f32>();
  var v2_0 = vec4<f32>();
  var v3_0 = vec4<f32>();

  for (var head = firstHead; head < firstHead + params.headCount; head += 1u) {
    let kvHead = head / params.groupSize - params.firstKvHead;
    let dropKey = dropoutKey(block.item, head);

  for (var columnBase = block.columnStart; columnBase < columnEnd; columnBase += COLUMNS) {
    let masking = true;
    // Scores.
    var s0_0 = vec4<f32>();
    var s1_0 = vec4<f32>();
    var s2_0 = vec4<f32>();
    var s3_0 = vec4<f32>();
    {
      var row0 = vec4<f32>();
      var column0 = vec4<f32>();

      for (var slice = 0u; slice < keySlices; slice += 1u) {
        if ((t + 0u) < 32u) { row0 = loadKey(block.rowStart + (t + 0u) / DEPTH_PIECES, block.rowEnd, kvHead, (slice) * DEPTH_PIECES + (t + 0u) % DEPTH_PIECES); }
        if ((t + 0u) < 32u) { column0 = loadQuery(columnBase + (t + 0u) / DEPTH_PIECES, columnEnd, block.rangeItem, head, (slice) * DEPTH_PIECES + (t + 0u) % DEPTH_PIECES); }
        if ((t + 0u) < 32u) { stageRow((t + 0u), 0u, row0); }
        if ((t + 0u) < 32u) { stageColumn((t + 0u), 0u, column0); }
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
    let slope0_0 = capSlope(s0_0);
    let slope1_0 = capSlope(s1_0);
    let slope2_0 = capSlope(s2_0);
    let slope3_0 = capSlope(s3_0);
    if (masking) {
      let row0 = vec4<i32>(i32(block.rowStart + 4u * (ty + 0u))) + vec4<i32>(0, 1, 2, 3);
      let start0 = row0 + block.diagonalStart;
      let end0 = min(row0 + block.diagonalEnd, vec4<i32>(i32(columnEnd)));
      let column0 = vec4<i32>(i32(columnBase + 4u * (tx + 0u) + 0u));
      let column1 = vec4<i32>(i32(columnBase + 4u * (tx + 0u) + 1u));
      let column2 = vec4<i32>(i32(columnBase + 4u * (tx + 0u) + 2u));
      let column3 = vec4<i32>(i32(columnBase + 4u * (tx + 0u) + 3u));
      {
        let seen = (column0 < end0) & (column0 >= start0);
        if (seen[0] && row0[0] < i32(block.rowEnd)) { s0_0[0] = withTerm(s0_0[0], block.item, head, position + u32(column0[0]), u32(row0[0]) - origin); } else { s0_0[0] = MASKED; }
        if (seen[1] && row0[1] < i32(block.rowEnd)) { s0_0[1] = withTerm(s0_0[1], block.item, head, position + u32(column0[1]), u32(row0[1]) - origin); } else { s0_0[1] = MASKED; }
        if (seen[2] && row0[2] < i32(block.rowEnd)) { s0_0[2] = withTerm(s0_0[2], block.item, head, position + u32(column0[2]), u32(row0[2]) - origin); } else { s0_0[2] = MASKED; }
        if (seen[3] && row0[3] < i32(block.rowEnd)) { s0_0[3] = withTerm(s0_0[3], block.item, head, position + u32(column0[3]), u32(row0[3]) - origin); } else { s0_0[3] = MASKED; }
      }
      {
        let seen = (column1 < end0) & (column1 >= start0);
        if (seen[0] && row0[0] < i32(block.rowEnd)) { s1_0[0] = withTerm(s1_0[0], block.item, head, position + u32(column1[0]), u32(row0[0]) - origin); } else { s1_0[0] = MASKED; }
        if (seen[1] && row0[1] < i32(block.rowEnd)) { s1_0[1] = withTerm(s1_0[1], block.item, head, position + u32(column1[1]), u32(row0[1]) - origin); } else { s1_0[1] = MASKED; }
        if (seen[2] && row0[2] < i32(block.rowEnd)) { s1_0[2] = withTerm(s1_0[2], block.item, head, position + u32(column1[2]), u32(row0[2]) - origin); } else { s1_0[2] = MASKED; }
        if (seen[3] && row0[3] < i32(block.rowEnd)) { s1_0[3] = withTerm(s1_0[3], block.item, head, position + u32(column1[3]), u32(row0[3]) - origin); } else { s1_0[3] = MASKED; }
      }
      {
        let seen = (column2 < end0) & (column2 >= start0);
        if (seen[0] && row0[0] < i32(block.rowEnd)) { s2_0[0] = withTerm(s2_0[0], block.item, head, position + u32(column2[0]), u32(row0[0]) - origin); } else { s2_0[0] = MASKED; }
        if (seen[1] && row0[1] < i32(block.rowEnd)) { s2_0[1] = withTerm(s2_0[1], block.item, head, position + u32(column2[1]), u32(row0[1]) - origin); } else { s2_0[1] = MASKED; }
        if (seen[2] && row0[2] < i32(block.rowEnd)) { s2_0[2] = withTerm(s2_0[2], block.item, head, position + u32(column2[2]), u32(row0[2]) - origin); } else { s2_0[2] = MASKED; }
        if (seen[3] && row0[3] < i32(block.rowEnd)) { s2_0[3] = withTerm(s2_0[3], block.item, head, position + u32(column2[3]), u32(row0[3]) - origin); } else { s2_0[3] = MASKED; }
      }
      {
        let seen = (column3 < end0) & (column3 >= start0);
        if (seen[0] && row0[0] < i32(block.rowEnd)) { s3_0[0] = withTerm(s3_0[0], block.item, head, position + u32(column3[0]), u32(row0[0]) - origin); } else { s3_0[0] = MASKED; }
        if (seen[1] && row0[1] < i32(block.rowEnd)) { s3_0[1] = withTerm(s3_0[1], block.item, head, position + u32(column3[1]), u32(row0[1]) - origin); } else { s3_0[1] = MASKED; }
        if (seen[2] && row0[2] < i32(block.rowEnd)) { s3_0[2] = withTerm(s3_0[2], block.item, head, position + u32(column3[2]), u32(row0[2]) - origin); } else { s3_0[2] = MASKED; }
        if (seen[3] && row0[3] < i32(block.rowEnd)) { s3_0[3] = withTerm(s3_0[3], block.item, head, position + u32(column3[3]), u32(row0[3]) - origin); } else { s3_0[3] = MASKED; }
      }
    }
    {
      let stat0 = rowStats(columnBase + 4u * (tx + 0u) + 0u, columnEnd, head).x;
      let stat1 = rowStats(columnBase + 4u * (tx + 0u) + 1u, columnEnd, head).x;
      let stat2 = rowStats(columnBase + 4u * (tx + 0u) + 2u, columnEnd, head).x;
      let stat3 = rowStats(columnBase + 4u * (tx + 0u) + 3u, columnEnd, head).x;
      s0_0 = select(exp2(s0_0 - vec4<f32>(stat0)), vec4<f32>(), s0_0 <= vec4<f32>(UNSEEN));
      s1_0 = select(exp2(s1_0 - vec4<f32>(stat1)), vec4<f32>(), s1_0 <= vec4<f32>(UNSEEN));
      s2_0 = select(exp2(s2_0 - vec4<f32>(stat2)), vec4<f32>(), s2_0 <= vec4<f32>(UNSEEN));
      s3_0 = select(exp2(s3_0 - vec4<f32>(stat3)), vec4<f32>(), s3_0 <= vec4<f32>(UNSEEN));
    }
    s0_0 *= vec4<f32>(keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 0u, block.rowStart + 4u * (ty + 0u) + 0u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 0u, block.rowStart + 4u * (ty + 0u) + 1u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 0u, block.rowStart + 4u * (ty + 0u) + 2u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 0u, block.rowStart + 4u * (ty + 0u) + 3u - origin));
    s1_0 *= vec4<f32>(keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 1u, block.rowStart + 4u * (ty + 0u) + 0u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 1u, block.rowStart + 4u * (ty + 0u) + 1u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 1u, block.rowStart + 4u * (ty + 0u) + 2u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 1u, block.rowStart + 4u * (ty + 0u) + 3u - origin));
    s2_0 *= vec4<f32>(keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 2u, block.rowStart + 4u * (ty + 0u) + 0u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 2u, block.rowStart + 4u * (ty + 0u) + 1u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 2u, block.rowStart + 4u * (ty + 0u) + 2u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 2u, block.rowStart + 4u * (ty + 0u) + 3u - origin));
    s3_0 *= vec4<f32>(keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 3u, block.rowStart + 4u * (ty + 0u) + 0u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 3u, block.rowStart + 4u * (ty + 0u) + 1u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 3u, block.rowStart + 4u * (ty + 0u) + 2u - origin), keptSign(dropKey, position + columnBase + 4u * (tx + 0u) + 3u, block.rowStart + 4u * (ty + 0u) + 3u - origin));
    // ∂V += p·∂out.
    for (var group = 0u; group < 1u; group += 1u) {
      {
        var column0 = vec4<f32>();
        probs[(tx + 0u) / DEPTH][(tx + 0u) % DEPTH][ty + 0u] = select(s0_0 * params.keptFactor, vec4<f32>(), s0_0 < vec4<f32>());
        probs[(tx + 8u) / DEPTH][(tx + 8u) % DEPTH][ty + 0u] = select(s1_0 * params.keptFactor, vec4<f32>(), s1_0 < vec4<f32>());
        probs[(tx + 16u) / DEPTH][(tx + 16u) % DEPTH][ty + 0u] = select(s2_0 * params.keptFactor, vec4<f32>(), s2_0 < vec4<f32>());
        probs[(tx + 24u) / DEPTH][(tx + 24u) % DEPTH][ty + 0u] = select(s3_0 * params.keptFactor, vec4<f32>(), s3_0 < vec4<f32>());
        for (var slice = 0u; slice < PROB_SLICES; slice += 1u) {
          if ((t + 0u) < 32u) { column0 = loadGrad(columnBase + sliceColumn(group, (slice) * DEPTH + (t + 0u) / 8u), columnEnd, block.rangeItem, head, (t + 0u) % 8u); }
          if ((t + 0u) < 32u) { stageSummed((t + 0u) / 8u, (t + 0u) % 8u, 0u, column0); }
          workgroupBarrier();
          if (masking && atomicLoad(&poisoned[0]) != 0u) {
            for (var d = 0u; d < 4u; d += 1u) {
              let a0 = probs[slice][d][ty + 0u];
              let b0 = right[0u][d][tx + 0u];
              v0_0 = select(fma(vec4<f32>(a0[0]), b0, v0_0), v0_0, a0[0] == 0.0);
              v1_0 = select(fma(vec4<f32>(a0[1]), b0, v1_0), v1_0, a0[1] == 0.0);
              v2_0 = select(fma(vec4<f32>(a0[2]), b0, v2_0), v2_0, a0[2] == 0.0);
              v3_0 = select(fma(vec4<f32>(a0[3]), b0, v3_0), v3_0, a0[3] == 0.0);
            }
          } else {
            for (var d = 0u; d < 4u; d += 1u) {
              let a0 = probs[slice][d][ty + 0u];
              let b0 = right[0u][d][tx + 0u];
              v0_0 = fma(vec4<f32>(a0.x), b0, v0_0);
              v1_0 = fma(vec4<f32>(a0.y), b0, v1_0);
              v2_0 = fma(vec4<f32>(a0.z), b0, v2_0);
              v3_0 = fma(vec4<f32>(a0.w), b0, v3_0);
            }
          }
          workgroupBarrier();
        }
      }
    }

    // Gradients of the scores.
    var g0_0 = vec4<f32>();
    var g1_0 = vec4<f32>();
    var g2_0 = vec4<f32>();
    var g3_0 = vec4<f32>();
    {
      var row0 = vec4<f32>();
      var column0 = vec4<f32>();

      for (var slice = 0u; slice < valueSlices; slice += 1u) {
        if ((t + 0u) < 32u) { row0 = loadValue(block.rowStart + (t + 0u) / DEPTH_PIECES, block.rowEnd, kvHead, (slice) * DEPTH_PIECES + (t + 0u) % DEPTH_PIECES); }
        if ((t + 0u) < 32u) { column0 = loadGrad(columnBase + (t + 0u) / DEPTH_PIECES, columnEnd, block.rangeItem, head, (slice) * DEPTH_PIECES + (t + 0u) % DEPTH_PIECES); }
        if ((t + 0u) < 32u) { stageRow((t + 0u), 0u, row0); }
        if ((t + 0u) < 32u) { stageColumn((t + 0u), 0u, column0); }
        workgroupBarrier();
        for (var d = 0u; d < 4u; d += 1u) {
          let a0 = left[0u][d][ty + 0u];
          let b0 = right[0u][d][tx + 0u];
          g0_0 = fma(a0, vec4<f32>(b0.x), g0_0);
          g1_0 = fma(a0, vec4<f32>(b0.y), g1_0);
          g2_0 = fma(a0, vec4<f32>(b0.z), g2_0);
          g3_0 = fma(a0, vec4<f32>(b0.w), g3_0);
        }
        workgroupBarrier();
      }
    }
    {
      let stat0 = rowStats(columnBase + 4u * (tx + 0u) + 0u, columnEnd, head).y;
      let stat1 = rowStats(columnBase + 4u * (tx + 0u) + 1u, columnEnd, head).y;
      let stat2 = rowStats(columnBase + 4u * (tx + 0u) + 2u, columnEnd, head).y;
      let stat3 = rowStats(columnBase + 4u * (tx + 0u) + 3u, columnEnd, head).y;
      g0_0 = select(abs(s0_0) * (select(g0_0 * params.keptFactor, vec4<f32>(), s0_0 < vec4<f32>()) - vec4<f32>(stat0)) * slope0_0, vec4<f32>(), s0_0 == vec4<f32>());
      g1_0 = select(abs(s1_0) * (select(g1_0 * params.keptFactor, vec4<f32>(), s1_0 < vec4<f32>()) - vec4<f32>(stat1)) * slope1_0, vec4<f32>(), s1_0 == vec4<f32>());
      g2_0 = select(abs(s2_0) * (select(g2_0 * params.keptFactor, vec4<f32>(), s2_0 < vec4<f32>()) - vec4<f32>(stat2)) * slope2_0, vec4<f32>(), s2_0 == vec4<f32>());
      g3_0 = select(abs(s3_0) * (select(g3_0 * params.keptFactor, vec4<f32>(), s3_0 < vec4<f32>()) - vec4<f32>(stat3)) * slope3_0, vec4<f32>(), s3_0 == vec4<f32>());
    }
    for (var group = 0u; group < 1u; group += 1u) {
      {
        var column0 = vec4<f32>();
        probs[(tx + 0u) / DEPTH][(tx + 0u) % DEPTH][ty + 0u] = g0_0;
        probs[(tx + 8u) / DEPTH][(tx + 8u) % DEPTH][ty + 0u] = g1_0;
        probs[(tx + 16u) / DEPTH][(tx + 16u) % DEPTH][ty + 0u] = g2_0;
        probs[(tx + 24u) / DEPTH][(tx + 24u) % DEPTH][ty + 0u] = g3_0;
        for (var slice = 0u; slice < PROB_SLICES; slice += 1u) {
          column0 = loadQuery(columnBase + sliceColumn(group, (slice) * DEPTH + (t + 0u) / 16u), columnEnd, block.rangeItem, head, (t + 0u) % 16u);
          stageSummed((t + 0u) / 16u, (t + 0u) % 16u, 0u, column0);
          workgroupBarrier();
          if (masking && atomicLoad(&poisoned[0]) != 0u) {
            for (var d = 0u; d < 4u; d += 1u) {
              let a0 = probs[slice][d][ty + 0u];
              let b0 = right[0u][d][tx + 0u];
              let b1 = right[0u][d][tx + 8u];
              k0_0 = select(fma(vec4<f32>(a0[0]), b0, k0_0), k0_0, a0[0] == 0.0);
              k0_1 = select(fma(vec4<f32>(a0[0]), b1, k0_1), k0_1, a0[0] == 0.0);
              k1_0 = select(fma(vec4<f32>(a0[1]), b0, k1_0), k1_0, a0[1] == 0.0);
              k1_1 = select(fma(vec4<f32>(a0[1]), b1, k1_1), k1_1, a0[1] == 0.0);
              k2_0 = select(fma(vec4<f32>(a0[2]), b0, k2_0), k2_0, a0[2] == 0.0);
              k2_1 = select(fma(vec4<f32>(a0[2]), b1, k2_1), k2_1, a0[2] == 0.0);
              k3_0 = select(fma(vec4<f32>(a0[3]), b0, k3_0), k3_0, a0[3] == 0.0);
              k3_1 = select(fma(vec4<f32>(a0[3]), b1, k3_1), k3_1, a0[3] == 0.0);
            }
          } else {
            for (var d = 0u; d < 4u; d += 1u) {
              let a0 = probs[slice][d][ty + 0u];
              let b0 = right[0u][d][tx + 0u];
              let b1 = right[0u][d][tx + 8u];
              k0_0 = fma(vec4<f32>(a0.x), b0, k0_0);
              k0_1 = fma(vec4<f32>(a0.x), b1, k0_1);
              k1_0 = fma(vec4<f32>(a0.y), b0, k1_0);
              k1_1 = fma(vec4<f32>(a0.y), b1, k1_1);
              k2_0 = fma(vec4<f32>(a0.z), b0, k2_0);
              k2_1 = fma(vec4<f32>(a0.z), b1, k2_1);
              k3_0 = fma(vec4<f32>(a0.w), b0, k3_0);
              k3_1 = fma(vec4<f32>(a0.w), b1, k3_1);
            }
          }
          workgroupBarrier();
        }
      }
    }
  }
  }

  {
    let row = block.rowStart + 4u * (ty + 0u) + 0u;
    if (row < block.rowEnd) {
      let at = row * params.groupKvHeads + firstHead / params.groupSize - params.firstKvHead;
      putKey(at * params.P, params.gradientRope + at * params.R, tx + 0u, params.softmaxScale * k0_0);
      putKey(at * params.P, params.gradientRope + at * params.R, tx + 8u, params.softmaxScale * k0_1);
      put(params.gradientValues + at * params.V, 4u * (tx + 0u), params.V, v0_0);
    }
  }
  {
    let row = block.rowStart + 4u * (ty + 0u) + 1u;
    if (row < block.rowEnd) {
      let at = row * params.groupKvHeads + firstHead / params.groupSize - params.firstKvHead;
      putKey(at * params.P, params.gradientRope + at * params.R, tx + 0u, params.softmaxScale * k1_0);
      putKey(at * params.P, params.gradientRope + at * params.R, tx + 8u, params.softmaxScale * k1_1);
      put(params.gradientValues + at * params.V, 4u * (tx + 0u), params.V, v1_0);
    }
  }
  {
    let row = block.rowStart + 4u * (ty + 0u) + 2u;
    if (row < block.rowEnd) {
      let at = row * params.groupKvHeads + firstHead / params.groupSize - params.firstKvHead;
      putKey(at * params.P, params.gradientRope + at * params.R, tx + 0u, params.softmaxScale * k2_0);
      putKey(at * params.P, params.gradientRope + at * params.R, tx + 8u, params.softmaxScale * k2_1);
      put(params.gradientValues + at * params.V, 4u * (tx + 0u), params.V, v2_0);
    }
  }
  {
    let row = block.rowStart + 4u * (ty + 0u) + 3u;
    if (row < block.rowEnd) {
      let at = row * params.groupKvHeads + firstHead / params.groupSize - params.firstKvHead;
      putKey(at * params.P, params.gradientRope + at * params.R, tx + 0u, params.softmaxScale * k3_0);
      putKey(at * params.P, params.gradientRope + at * params.R, tx + 8u, params.softmaxScale * k3_1);
      put(params.gradientValues + at * params.V, 4u * (tx + 0u), params.V, v3_0);
    }
  }
}
