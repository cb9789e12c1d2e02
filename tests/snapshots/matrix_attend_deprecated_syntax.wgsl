enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
diagnostic(off, subgroup_uniformity);
// MLA attention over expanded keys and values, on matrix units.
// blockQ 32, blockK 32, 2 subgroups, 1 to 16 rows
const BLOCK_K = 32u;
const NOPE_QUADS = 4u;
const ROPE_QUADS = 2u;
const DEPTH_QUADS = 6u;
const KEY_STRIDE = 7u;
const STORED_VALUE_QUADS = 4u;
const VALUE_STRIDE = 5u;
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
@group(0) @binding(2) var<storage, read> query: array<vec4<f16>>;
@group(0) @binding(3) var<storage, read_write> expanded: array<vec4<u32>>; // halves: keys, values, rotary keys
@group(0) @binding(4) var<storage, read_write> output: array<vec4<f16>>;
@group(0) @binding(7) var<storage, read_write> lse: array<f32>;

var<workgroup> keys: array<array<f16, 896>, 2>;
var<workgroup> values: array<array<f16, 1272>, 1>;
var<workgroup> scores: array<array<f32, 640>, 2>;
var<workgroup> probs: array<array<f16, 256>, 4>;

// Eight halves, rounded to nearest.
fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(bitcast<vec2<u32>>(vec4<f16>(low)), bitcast<vec2<u32>>(vec4<f16>(high)));
}
var<workgroup> rowFactor: array<f32, 32>;
var<workgroup> rescale: vec4<u32>; // x is set once a row's maximum has outgrown what its sums are relative to

fn scoreOf(raw: vec4<f32>) -> vec4<f32> { return raw * params.scaleLog2; }

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
    if (column < params.P) { return vec4<f32>(query[(offset + column) / 4u]); }
  } else {
    let column = at - 8u * NOPE_QUADS;
    if (column < params.R) { return vec4<f32>(query[(offset + params.P + column) / 4u]); }
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
  let lane = t % 32u;
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
  var rowTop = MASKED;
  var rowSum = 0.0;
  var q0_0: subgroup_matrix_left<f16, 16, 16>;
  var q0_1: subgroup_matrix_left<f16, 16, 16>;
  var q0_2: subgroup_matrix_left<f16, 16, 16>;
  var s0_0: subgroup_matrix_result<f32, 16, 16>;
  var s0_1: subgroup_matrix_result<f32, 16, 16>;
  var o0_0: subgroup_matrix_result<f32, 16, 16>;
  var o0_1: subgroup_matrix_result<f32, 16, 16>;
  var query0 = vec4<u32>();
  var key0 = vec4<u32>();
  var query1 = vec4<u32>();
  var key1 = vec4<u32>();
  var query2 = vec4<u32>();
  var key2 = vec4<u32>();
  var value0 = vec4<u32>();
  var value1 = vec4<u32>();

  if (t == 0u) { rescale = vec4<u32>(); }
  query0 = loadQuery(block, head, 0u * BLOCK_K + stageRow, stageQuad);
  query1 = loadQuery(block, head, 0u * BLOCK_K + stageRow, stageQuad + 2u);
  query2 = loadQuery(block, head, 0u * BLOCK_K + stageRow, stageQuad + 4u);
  for (var round = 0u; round < 1u; round += 1u) {
    workgroupBarrier();
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 0u] = f16(unpack2x16float(query0[0])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 1u] = f16(unpack2x16float(query0[0])[1]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 2u] = f16(unpack2x16float(query0[1])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 3u] = f16(unpack2x16float(query0[1])[1]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 4u] = f16(unpack2x16float(query0[2])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 5u] = f16(unpack2x16float(query0[2])[1]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 6u] = f16(unpack2x16float(query0[3])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 7u] = f16(unpack2x16float(query0[3])[1]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 0u] = f16(unpack2x16float(query1[0])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 1u] = f16(unpack2x16float(query1[0])[1]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 2u] = f16(unpack2x16float(query1[1])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 3u] = f16(unpack2x16float(query1[1])[1]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 4u] = f16(unpack2x16float(query1[2])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 5u] = f16(unpack2x16float(query1[2])[1]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 6u] = f16(unpack2x16float(query1[3])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 7u] = f16(unpack2x16float(query1[3])[1]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 0u] = f16(unpack2x16float(query2[0])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 1u] = f16(unpack2x16float(query2[0])[1]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 2u] = f16(unpack2x16float(query2[1])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 3u] = f16(unpack2x16float(query2[1])[1]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 4u] = f16(unpack2x16float(query2[2])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 5u] = f16(unpack2x16float(query2[2])[1]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 6u] = f16(unpack2x16float(query2[3])[0]);
    keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 7u] = f16(unpack2x16float(query2[3])[1]);
    workgroupBarrier();

    {
      if ((rowGroup * 1u + 0u) / 2u == round) {
        {
          q0_0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>>(&keys[((rowGroup * 1u + 0u) % 2u)], (0u * 2u) * 8u, false, 56u);
        }
        {
          q0_1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>>(&keys[((rowGroup * 1u + 0u) % 2u)], (1u * 2u) * 8u, false, 56u);
        }
        {
          q0_2 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>>(&keys[((rowGroup * 1u + 0u) % 2u)], (2u * 2u) * 8u, false, 56u);
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
    key1 = expanded[nope + stageQuad + 2u];
    key2 = expanded[rope + stageQuad + 4u];
  }
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 0u] = f16(unpack2x16float(key0[0])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 1u] = f16(unpack2x16float(key0[0])[1]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 2u] = f16(unpack2x16float(key0[1])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 3u] = f16(unpack2x16float(key0[1])[1]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 4u] = f16(unpack2x16float(key0[2])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 5u] = f16(unpack2x16float(key0[2])[1]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 6u] = f16(unpack2x16float(key0[3])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 7u] = f16(unpack2x16float(key0[3])[1]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 0u] = f16(unpack2x16float(key1[0])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 1u] = f16(unpack2x16float(key1[0])[1]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 2u] = f16(unpack2x16float(key1[1])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 3u] = f16(unpack2x16float(key1[1])[1]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 4u] = f16(unpack2x16float(key1[2])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 5u] = f16(unpack2x16float(key1[2])[1]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 6u] = f16(unpack2x16float(key1[3])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 7u] = f16(unpack2x16float(key1[3])[1]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 0u] = f16(unpack2x16float(key2[0])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 1u] = f16(unpack2x16float(key2[0])[1]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 2u] = f16(unpack2x16float(key2[1])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 3u] = f16(unpack2x16float(key2[1])[1]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 4u] = f16(unpack2x16float(key2[2])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 5u] = f16(unpack2x16float(key2[2])[1]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 6u] = f16(unpack2x16float(key2[3])[0]);
  keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 7u] = f16(unpack2x16float(key2[3])[1]);
  // The first round of outputs adds zeros.
  let zero = vec4<u32>();
  for (var i = t; i < 128u; i += 64u) {
    probs[(i / 32u)][8u * (i % 32u) + 0u] = f16(unpack2x16float(zero[0])[0]);
    probs[(i / 32u)][8u * (i % 32u) + 1u] = f16(unpack2x16float(zero[0])[1]);
    probs[(i / 32u)][8u * (i % 32u) + 2u] = f16(unpack2x16float(zero[1])[0]);
    probs[(i / 32u)][8u * (i % 32u) + 3u] = f16(unpack2x16float(zero[1])[1]);
    probs[(i / 32u)][8u * (i % 32u) + 4u] = f16(unpack2x16float(zero[2])[0]);
    probs[(i / 32u)][8u * (i % 32u) + 5u] = f16(unpack2x16float(zero[2])[1]);
    probs[(i / 32u)][8u * (i % 32u) + 6u] = f16(unpack2x16float(zero[3])[0]);
    probs[(i / 32u)][8u * (i % 32u) + 7u] = f16(unpack2x16float(zero[3])[1]);
  }
  for (var i = t; i < 159u; i += 64u) {
    values[(i / 159u)][8u * (i % 159u) + 0u] = f16(unpack2x16float(zero[0])[0]);
    values[(i / 159u)][8u * (i % 159u) + 1u] = f16(unpack2x16float(zero[0])[1]);
    values[(i / 159u)][8u * (i % 159u) + 2u] = f16(unpack2x16float(zero[1])[0]);
    values[(i / 159u)][8u * (i % 159u) + 3u] = f16(unpack2x16float(zero[1])[1]);
    values[(i / 159u)][8u * (i % 159u) + 4u] = f16(unpack2x16float(zero[2])[0]);
    values[(i / 159u)][8u * (i % 159u) + 5u] = f16(unpack2x16float(zero[2])[1]);
    values[(i / 159u)][8u * (i % 159u) + 6u] = f16(unpack2x16float(zero[3])[0]);
    values[(i / 159u)][8u * (i % 159u) + 7u] = f16(unpack2x16float(zero[3])[1]);
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
        key1 = expanded[nope + stageQuad + 2u];
        key2 = expanded[rope + stageQuad + 4u];
      }
      {
        let row = rowWithin(keyBase + stageRow, block);
        let start = params.valuesBase / 8u + (row * params.groupKvHeads + kvHead) * STORED_VALUE_QUADS;
        value0 = expanded[start + stageQuad];
        value1 = expanded[start + stageQuad + 2u];
      }
      {
        {
          s0_0 = subgroup_matrix_result<f32, 16, 16>();
        }
        {
          s0_1 = subgroup_matrix_result<f32, 16, 16>();
        }
      }
      {
        let prob0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>>(&probs[((rowGroup * 1u + 0u) * 2u + 0u)], (0u) * 8u, false, 16u);
        {
          let value = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&values[share], (0u * 80u + 0u * 2u) * 8u, false, 40u);
          o0_0 = subgroupMatrixMultiplyAccumulate(prob0, value, o0_0);
        }
        {
          let value = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&values[share], (0u * 80u + 1u * 2u) * 8u, false, 40u);
          o0_1 = subgroupMatrixMultiplyAccumulate(prob0, value, o0_1);
        }
      }
      {
        let prob0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>>(&probs[((rowGroup * 1u + 0u) * 2u + 1u)], (0u) * 8u, false, 16u);
        {
          let value = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&values[share], (1u * 80u + 0u * 2u) * 8u, false, 40u);
          o0_0 = subgroupMatrixMultiplyAccumulate(prob0, value, o0_0);
        }
        {
          let value = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&values[share], (1u * 80u + 1u * 2u) * 8u, false, 40u);
          o0_1 = subgroupMatrixMultiplyAccumulate(prob0, value, o0_1);
        }
      }
      {
        {
          let key = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&keys[(share * 2u + 0u)], (0u * 2u) * 8u, true, 56u);
          {
            s0_0 = subgroupMatrixMultiplyAccumulate(q0_0, key, s0_0);
          }
        }
        {
          let key = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&keys[(share * 2u + 1u)], (0u * 2u) * 8u, true, 56u);
          {
            s0_1 = subgroupMatrixMultiplyAccumulate(q0_0, key, s0_1);
          }
        }
      }
      {
        {
          let key = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&keys[(share * 2u + 0u)], (1u * 2u) * 8u, true, 56u);
          {
            s0_0 = subgroupMatrixMultiplyAccumulate(q0_1, key, s0_0);
          }
        }
        {
          let key = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&keys[(share * 2u + 1u)], (1u * 2u) * 8u, true, 56u);
          {
            s0_1 = subgroupMatrixMultiplyAccumulate(q0_1, key, s0_1);
          }
        }
      }
      {
        {
          let key = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&keys[(share * 2u + 0u)], (2u * 2u) * 8u, true, 56u);
          {
            s0_0 = subgroupMatrixMultiplyAccumulate(q0_2, key, s0_0);
          }
        }
        {
          let key = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>>(&keys[(share * 2u + 1u)], (2u * 2u) * 8u, true, 56u);
          {
            s0_1 = subgroupMatrixMultiplyAccumulate(q0_2, key, s0_1);
          }
        }
      }
      if (next >= count) {
        finished = true;
        break;
      }
      {
        {
          subgroupMatrixStore(&scores[subgroup], (0u * 80u + 0u * 4u) * 4u, s0_0, true, 20u);
        }
        {
          subgroupMatrixStore(&scores[subgroup], (1u * 80u + 0u * 4u) * 4u, s0_1, true, 20u);
        }
      }
      workgroupBarrier();

      let masking = keyBase + BLOCK_K > block.sharedEnd;
      let turn = softPart % 2u;
      var x0 = (vec4<f32>(scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 0u + turn) + 0u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 0u + turn) + 1u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 0u + turn) + 2u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 0u + turn) + 3u) * 5u + softRow % 16u / 4u) + softRow % 4u]));
      var x1 = (vec4<f32>(scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 1u + turn) + 0u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 1u + turn) + 1u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 1u + turn) + 2u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 1u + turn) + 3u) * 5u + softRow % 16u / 4u) + softRow % 4u]));
      var x2 = (vec4<f32>(scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 2u + turn) + 0u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 2u + turn) + 1u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 2u + turn) + 2u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 2u + turn) + 3u) * 5u + softRow % 16u / 4u) + softRow % 4u]));
      var x3 = (vec4<f32>(scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 3u - 3u * turn) + 0u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 3u - 3u * turn) + 1u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 3u - 3u * turn) + 2u) * 5u + softRow % 16u / 4u) + softRow % 4u], scores[(softRow / 16u * 1u + 4u * softPart / 8u)][4u * ((4u * (4u * softPart % 8u + 3u - 3u * turn) + 3u) * 5u + softRow % 16u / 4u) + softRow % 4u]));
      if (masking) {
        let row = i32(block.rowStart + softRow);
        let end = vec4<i32>(min(row + block.diagonalEnd, i32(block.columnEnd)));
        { let key = vec4<i32>(i32(keyBase + 4u * (4u * softPart + 0u + turn))) + vec4<i32>(0, 1, 2, 3); x0 = select(vec4<f32>(MASKED), x0, key < end); }
        { let key = vec4<i32>(i32(keyBase + 4u * (4u * softPart + 1u + turn))) + vec4<i32>(0, 1, 2, 3); x1 = select(vec4<f32>(MASKED), x1, key < end); }
        { let key = vec4<i32>(i32(keyBase + 4u * (4u * softPart + 2u + turn))) + vec4<i32>(0, 1, 2, 3); x2 = select(vec4<f32>(MASKED), x2, key < end); }
        { let key = vec4<i32>(i32(keyBase + 4u * (4u * softPart + 3u - 3u * turn))) + vec4<i32>(0, 1, 2, 3); x3 = select(vec4<f32>(MASKED), x3, key < end); }
      }
      var blockTop = max(max(x0.x, x0.y), max(x0.z, x0.w));
      blockTop = max(blockTop, max(max(x1.x, x1.y), max(x1.z, x1.w)));
      blockTop = max(blockTop, max(max(x2.x, x2.y), max(x2.z, x2.w)));
      blockTop = max(blockTop, max(max(x3.x, x3.y), max(x3.z, x3.w)));
      blockTop = max(blockTop, subgroupShuffleXor(blockTop, 1u));
      blockTop = select(blockTop * params.scaleLog2, MASKED, blockTop <= UNSEEN);
      var decay = 1.0;
      if (blockTop > rowTop + 8.0) {
        // What was summed so far is zero before the first visible key.
        if (rowTop > UNSEEN) { rescale.x = 1u; }
        decay = exp2(rowTop - blockTop);
        rowTop = blockTop;
        rowSum *= decay;
      }
      if (softPart == 0u) { rowFactor[softRow] = decay; }
      var p0 = exp2(fma(x0, vec4<f32>(params.scaleLog2), vec4<f32>(-rowTop)));
      var p1 = exp2(fma(x1, vec4<f32>(params.scaleLog2), vec4<f32>(-rowTop)));
      var p2 = exp2(fma(x2, vec4<f32>(params.scaleLog2), vec4<f32>(-rowTop)));
      var p3 = exp2(fma(x3, vec4<f32>(params.scaleLog2), vec4<f32>(-rowTop)));
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

      {
        let eight = select(packHalves(p0, p1), packHalves(p1, p2), turn == 1u);
        probs[(softRow / 16u * 2u + (2u * softPart + (0u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (0u + turn) % 2u) % 2u) + 0u] = f16(unpack2x16float(eight[0])[0]);
        probs[(softRow / 16u * 2u + (2u * softPart + (0u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (0u + turn) % 2u) % 2u) + 1u] = f16(unpack2x16float(eight[0])[1]);
        probs[(softRow / 16u * 2u + (2u * softPart + (0u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (0u + turn) % 2u) % 2u) + 2u] = f16(unpack2x16float(eight[1])[0]);
        probs[(softRow / 16u * 2u + (2u * softPart + (0u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (0u + turn) % 2u) % 2u) + 3u] = f16(unpack2x16float(eight[1])[1]);
        probs[(softRow / 16u * 2u + (2u * softPart + (0u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (0u + turn) % 2u) % 2u) + 4u] = f16(unpack2x16float(eight[2])[0]);
        probs[(softRow / 16u * 2u + (2u * softPart + (0u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (0u + turn) % 2u) % 2u) + 5u] = f16(unpack2x16float(eight[2])[1]);
        probs[(softRow / 16u * 2u + (2u * softPart + (0u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (0u + turn) % 2u) % 2u) + 6u] = f16(unpack2x16float(eight[3])[0]);
        probs[(softRow / 16u * 2u + (2u * softPart + (0u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (0u + turn) % 2u) % 2u) + 7u] = f16(unpack2x16float(eight[3])[1]);
      }
      {
        let eight = select(packHalves(p2, p3), packHalves(p3, p0), turn == 1u);
        probs[(softRow / 16u * 2u + (2u * softPart + (1u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (1u + turn) % 2u) % 2u) + 0u] = f16(unpack2x16float(eight[0])[0]);
        probs[(softRow / 16u * 2u + (2u * softPart + (1u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (1u + turn) % 2u) % 2u) + 1u] = f16(unpack2x16float(eight[0])[1]);
        probs[(softRow / 16u * 2u + (2u * softPart + (1u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (1u + turn) % 2u) % 2u) + 2u] = f16(unpack2x16float(eight[1])[0]);
        probs[(softRow / 16u * 2u + (2u * softPart + (1u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (1u + turn) % 2u) % 2u) + 3u] = f16(unpack2x16float(eight[1])[1]);
        probs[(softRow / 16u * 2u + (2u * softPart + (1u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (1u + turn) % 2u) % 2u) + 4u] = f16(unpack2x16float(eight[2])[0]);
        probs[(softRow / 16u * 2u + (2u * softPart + (1u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (1u + turn) % 2u) % 2u) + 5u] = f16(unpack2x16float(eight[2])[1]);
        probs[(softRow / 16u * 2u + (2u * softPart + (1u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (1u + turn) % 2u) % 2u) + 6u] = f16(unpack2x16float(eight[3])[0]);
        probs[(softRow / 16u * 2u + (2u * softPart + (1u + turn) % 2u) / 2u)][8u * (softRow % 16u * 2u + (2u * softPart + (1u + turn) % 2u) % 2u) + 7u] = f16(unpack2x16float(eight[3])[1]);
      }
      if (masking) {
        value0 = finiteHalves(value0);
        value1 = finiteHalves(value1);
      }
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad - 0u) + 0u] = f16(unpack2x16float(value0[0])[0]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad - 0u) + 1u] = f16(unpack2x16float(value0[0])[1]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad - 0u) + 2u] = f16(unpack2x16float(value0[1])[0]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad - 0u) + 3u] = f16(unpack2x16float(value0[1])[1]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad - 0u) + 4u] = f16(unpack2x16float(value0[2])[0]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad - 0u) + 5u] = f16(unpack2x16float(value0[2])[1]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad - 0u) + 6u] = f16(unpack2x16float(value0[3])[0]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad - 0u) + 7u] = f16(unpack2x16float(value0[3])[1]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad + 2u - 0u) + 0u] = f16(unpack2x16float(value1[0])[0]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad + 2u - 0u) + 1u] = f16(unpack2x16float(value1[0])[1]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad + 2u - 0u) + 2u] = f16(unpack2x16float(value1[1])[0]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad + 2u - 0u) + 3u] = f16(unpack2x16float(value1[1])[1]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad + 2u - 0u) + 4u] = f16(unpack2x16float(value1[2])[0]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad + 2u - 0u) + 5u] = f16(unpack2x16float(value1[2])[1]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad + 2u - 0u) + 6u] = f16(unpack2x16float(value1[3])[0]);
      values[0u][8u * (stageRow * VALUE_STRIDE + stageQuad + 2u - 0u) + 7u] = f16(unpack2x16float(value1[3])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 0u] = f16(unpack2x16float(key0[0])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 1u] = f16(unpack2x16float(key0[0])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 2u] = f16(unpack2x16float(key0[1])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 3u] = f16(unpack2x16float(key0[1])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 4u] = f16(unpack2x16float(key0[2])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 5u] = f16(unpack2x16float(key0[2])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 6u] = f16(unpack2x16float(key0[3])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad) + 7u] = f16(unpack2x16float(key0[3])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 0u] = f16(unpack2x16float(key1[0])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 1u] = f16(unpack2x16float(key1[0])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 2u] = f16(unpack2x16float(key1[1])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 3u] = f16(unpack2x16float(key1[1])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 4u] = f16(unpack2x16float(key1[2])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 5u] = f16(unpack2x16float(key1[2])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 6u] = f16(unpack2x16float(key1[3])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 2u) + 7u] = f16(unpack2x16float(key1[3])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 0u] = f16(unpack2x16float(key2[0])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 1u] = f16(unpack2x16float(key2[0])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 2u] = f16(unpack2x16float(key2[1])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 3u] = f16(unpack2x16float(key2[1])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 4u] = f16(unpack2x16float(key2[2])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 5u] = f16(unpack2x16float(key2[2])[1]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 6u] = f16(unpack2x16float(key2[3])[0]);
      keys[(stageRow / 16u)][8u * (stageRow % 16u * KEY_STRIDE + stageQuad + 4u) + 7u] = f16(unpack2x16float(key2[3])[1]);
      next += 1u;
      if (workgroupUniformLoad(&rescale).x != 0u) { break; }
    }
    if (finished) { break; }
    // The scores are consumed, and their memory is free.
    if (t == 0u) { rescale = vec4<u32>(); }
    {
      {
        subgroupMatrixStore(&scores[subgroup], (0u) * 4u, o0_0, false, 36u);
        subgroupMatrixStore(&scores[subgroup], (4u) * 4u, o0_1, false, 36u);
        workgroupBarrier();
        {
          let ownRow = (lane + 0u) / 8u;
          let ownQuad = (lane + 0u) % 8u;
          let index = ownRow * 9u + ownQuad;
          let scaled = vec4<f32>(scores[subgroup][4u * (index) + 0u], scores[subgroup][4u * (index) + 1u], scores[subgroup][4u * (index) + 2u], scores[subgroup][4u * (index) + 3u]) * rowFactor[((rowGroup * 1u + 0u) * 16u + ownRow)];
          scores[subgroup][4u * (index) + 0u] = scaled[0];
          scores[subgroup][4u * (index) + 1u] = scaled[1];
          scores[subgroup][4u * (index) + 2u] = scaled[2];
          scores[subgroup][4u * (index) + 3u] = scaled[3];
        }
        {
          let ownRow = (lane + 32u) / 8u;
          let ownQuad = (lane + 32u) % 8u;
          let index = ownRow * 9u + ownQuad;
          let scaled = vec4<f32>(scores[subgroup][4u * (index) + 0u], scores[subgroup][4u * (index) + 1u], scores[subgroup][4u * (index) + 2u], scores[subgroup][4u * (index) + 3u]) * rowFactor[((rowGroup * 1u + 0u) * 16u + ownRow)];
          scores[subgroup][4u * (index) + 0u] = scaled[0];
          scores[subgroup][4u * (index) + 1u] = scaled[1];
          scores[subgroup][4u * (index) + 2u] = scaled[2];
          scores[subgroup][4u * (index) + 3u] = scaled[3];
        }
        {
          let ownRow = (lane + 64u) / 8u;
          let ownQuad = (lane + 64u) % 8u;
          let index = ownRow * 9u + ownQuad;
          let scaled = vec4<f32>(scores[subgroup][4u * (index) + 0u], scores[subgroup][4u * (index) + 1u], scores[subgroup][4u * (index) + 2u], scores[subgroup][4u * (index) + 3u]) * rowFactor[((rowGroup * 1u + 0u) * 16u + ownRow)];
          scores[subgroup][4u * (index) + 0u] = scaled[0];
          scores[subgroup][4u * (index) + 1u] = scaled[1];
          scores[subgroup][4u * (index) + 2u] = scaled[2];
          scores[subgroup][4u * (index) + 3u] = scaled[3];
        }
        {
          let ownRow = (lane + 96u) / 8u;
          let ownQuad = (lane + 96u) % 8u;
          let index = ownRow * 9u + ownQuad;
          let scaled = vec4<f32>(scores[subgroup][4u * (index) + 0u], scores[subgroup][4u * (index) + 1u], scores[subgroup][4u * (index) + 2u], scores[subgroup][4u * (index) + 3u]) * rowFactor[((rowGroup * 1u + 0u) * 16u + ownRow)];
          scores[subgroup][4u * (index) + 0u] = scaled[0];
          scores[subgroup][4u * (index) + 1u] = scaled[1];
          scores[subgroup][4u * (index) + 2u] = scaled[2];
          scores[subgroup][4u * (index) + 3u] = scaled[3];
        }
        workgroupBarrier();
        o0_0 = subgroupMatrixLoad<subgroup_matrix_result<f32, 16, 16>>(&scores[subgroup], (0u) * 4u, false, 36u);
        o0_1 = subgroupMatrixLoad<subgroup_matrix_result<f32, 16, 16>>(&scores[subgroup], (4u) * 4u, false, 36u);
        workgroupBarrier();
      }
    }
  }

  // A row that sees no key has no sum; a NaN sum is not 0 and must reach the output.
  rowSum = rowSum + subgroupShuffleXor(rowSum, 1u);
  let top = rowTop;
  let total = rowSum;
  let part = select(1.0 / total, 0.0, total == 0.0);
  if (softPart == 0u) {
    rowFactor[softRow] = part;
    if (block.rowStart + softRow < block.rowEnd) {
      lse[params.lseBase + block.item * params.lseItem + head * params.lseHead + position + block.rowStart + softRow] =
        select((top + log2(total)) * LN2, params.minusInfinity, total == 0.0);
    }
  }
  workgroupBarrier();
  {
    {
      subgroupMatrixStore(&scores[subgroup], (0u) * 4u, o0_0, false, 36u);
      subgroupMatrixStore(&scores[subgroup], (4u) * 4u, o0_1, false, 36u);
      workgroupBarrier();
      {
        let ownRow = (lane + 0u) / 8u;
        let ownQuad = (lane + 0u) % 8u;
        let index = ownRow * 9u + ownQuad;
        let row = block.rowStart + ((rowGroup * 1u + 0u) * 16u + ownRow);
        let column = share * 32u + (0u * 2u * 16u + 4u * ownQuad);
        if (row < block.rowEnd && column < params.V) {
          let factor = rowFactor[((rowGroup * 1u + 0u) * 16u + ownRow)];
          let result = select(vec4<f32>(scores[subgroup][4u * (index) + 0u], scores[subgroup][4u * (index) + 1u], scores[subgroup][4u * (index) + 2u], scores[subgroup][4u * (index) + 3u]) * factor, vec4<f32>(), factor == 0.0);
          let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
          if (column < params.V) { output[(offset + column) / 4u] = vec4<f16>(result); }
        }
      }
      {
        let ownRow = (lane + 32u) / 8u;
        let ownQuad = (lane + 32u) % 8u;
        let index = ownRow * 9u + ownQuad;
        let row = block.rowStart + ((rowGroup * 1u + 0u) * 16u + ownRow);
        let column = share * 32u + (0u * 2u * 16u + 4u * ownQuad);
        if (row < block.rowEnd && column < params.V) {
          let factor = rowFactor[((rowGroup * 1u + 0u) * 16u + ownRow)];
          let result = select(vec4<f32>(scores[subgroup][4u * (index) + 0u], scores[subgroup][4u * (index) + 1u], scores[subgroup][4u * (index) + 2u], scores[subgroup][4u * (index) + 3u]) * factor, vec4<f32>(), factor == 0.0);
          let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
          if (column < params.V) { output[(offset + column) / 4u] = vec4<f16>(result); }
        }
      }
      {
        let ownRow = (lane + 64u) / 8u;
        let ownQuad = (lane + 64u) % 8u;
        let index = ownRow * 9u + ownQuad;
        let row = block.rowStart + ((rowGroup * 1u + 0u) * 16u + ownRow);
        let column = share * 32u + (0u * 2u * 16u + 4u * ownQuad);
        if (row < block.rowEnd && column < params.V) {
          let factor = rowFactor[((rowGroup * 1u + 0u) * 16u + ownRow)];
          let result = select(vec4<f32>(scores[subgroup][4u * (index) + 0u], scores[subgroup][4u * (index) + 1u], scores[subgroup][4u * (index) + 2u], scores[subgroup][4u * (index) + 3u]) * factor, vec4<f32>(), factor == 0.0);
          let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
          if (column < params.V) { output[(offset + column) / 4u] = vec4<f16>(result); }
        }
      }
      {
        let ownRow = (lane + 96u) / 8u;
        let ownQuad = (lane + 96u) % 8u;
        let index = ownRow * 9u + ownQuad;
        let row = block.rowStart + ((rowGroup * 1u + 0u) * 16u + ownRow);
        let column = share * 32u + (0u * 2u * 16u + 4u * ownQuad);
        if (row < block.rowEnd && column < params.V) {
          let factor = rowFactor[((rowGroup * 1u + 0u) * 16u + ownRow)];
          let result = select(vec4<f32>(scores[subgroup][4u * (index) + 0u], scores[subgroup][4u * (index) + 1u], scores[subgroup][4u * (index) + 2u], scores[subgroup][4u * (index) + 3u]) * factor, vec4<f32>(), factor == 0.0);
          let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
          if (column < params.V) { output[(offset + column) / 4u] = vec4<f16>(result); }
        }
      }
      workgroupBarrier();
    }
  }
}
