// Absorbed attention on matrix units.
// blockRows 32, blockK 32, 4 subgroups: 2 of rows × 2 of keys × 1 of depth
const BLOCK_ROWS = 32u;
const BLOCK_K = 32u;
const ROW_QUADS = 4u;
const MASKED = -3.4e38;
const UNSEEN = -3.0e38;
const LOG2E = 1.4426950408889634;
const LN2 = 0.6931471805599453;
const NO_SLOT = 0xffffffffu;
const ABSENT = 0xffffffffu; // a key whose page is not bound
const RESULT_QUADS = 5u;

struct Item {
  sequence: u32, // row of the block table, or of the batch
  row: u32,      // first query row, counted through [tokens, heads]
  rows: u32,     // how many there are, from 1 to BLOCK_ROWS
  keyStart: u32, // first key
  keyEnd: u32,   // one past the last key; equal to keyStart when the rows see none
  diagonal: i32, // the position of row r's token among the keys is diagonal + i32(r / heads)
  slot: u32,     // where the partial result goes, or NO_SLOT: the result is written at once
  pad: u32,
}

struct Params {
  scaleLog2: f32,     // softmaxScale · log2(e)
  capLog2: f32,       // logitsSoftCap · log2(e)
  scaleOverCap: f32,  // softmaxScale / logitsSoftCap
  minusInfinity: f32, // WGSL has no literal for it
  left: i32,          // a token at position p sees the keys from p − left
  right: i32,         // to p + right; both are large where nothing bounds them
  heads: u32,
  queryLength: u32,   // tokens of a batch item, for the places of log-sum-exps
  itemCount: u32,
  gridX: u32,         // workgroups along x
  queryBase: u32,     // quads from the binding's start to the first query row
  outputBase: u32,    // the same for results, in quads of four elements
  lseBase: u32,
  maxPages: u32,      // columns of the block table
  tableBase: u32,     // words from the binding's start to the table
  cacheBase: u32,     // quads from the binding's start to the first row
  cacheRow: u32,      // quads from one row of the cache to the next
  sequenceRows: u32,  // without a block table: rows from one sequence to the next
  firstPage: u32,     // the pages that are bound
  pageCount: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> items: array<Item>;
@group(0) @binding(2) var<storage, read> query: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> cache: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> pages: array<u32>;
@group(0) @binding(5) var<storage, read_write> partial: array<vec4<f32>>; // unnormalised sums, by slot and row
@group(0) @binding(6) var<storage, read_write> stats: array<vec2<f32>>; // maximum in log2 units, and sum
@group(0) @binding(7) var<storage, read_write> output: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read_write> lse: array<f32>;
@group(0) @binding(9) var<uniform> sinks: array<vec4<f32>, 2>;

struct LeftFragment { k0: vec4<f32>, k4: vec4<f32>, k8: vec4<f32>, k12: vec4<f32> }
struct ResultFragment { c0: vec4<f32>, c4: vec4<f32> }

var<private> lane: u32;
var<workgroup> latents: array<vec4<u32>, 160>;
var<workgroup> scores: array<vec4<f32>, 288>;
var<workgroup> probs: array<vec4<u32>, 128>;
var<workgroup> exchanged: array<f32, 256>;

fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(pack2x16float(low.xy), pack2x16float(low.zw), pack2x16float(high.xy), pack2x16float(high.zw));
}

fn lowHalves(quad: vec4<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y)); }
fn highHalves(quad: vec4<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(quad.z), unpack2x16float(quad.w)); }

fn latents_left(offset: u32, stride: u32) -> LeftFragment {
  let first = latents[offset + lane / 2u * stride];
  let second = latents[offset + lane / 2u * stride + 1u];
  return LeftFragment(lowHalves(first), highHalves(first), lowHalves(second), highHalves(second));
}

fn latents_leftColumn(offset: u32, stride: u32) -> LeftFragment {
  let row = lane / 2u;
  var halves: array<f32, 16>;
  for (var k = 0u; k < 16u; k += 1u) {
    let quad = latents[offset + k * stride + row / 8u];
    halves[k] = unpack2x16float(quad[row % 8u / 2u])[row % 2u];
  }
  return LeftFragment(
    vec4<f32>(halves[0], halves[1], halves[2], halves[3]),
    vec4<f32>(halves[4], halves[5], halves[6], halves[7]),
    vec4<f32>(halves[8], halves[9], halves[10], halves[11]),
    vec4<f32>(halves[12], halves[13], halves[14], halves[15]),
  );
}

fn latents_row(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var result = sum;
  var rows = array<vec4<f32>, 4>(left.k0, left.k4, left.k8, left.k12);
  for (var k = 0u; k < 16u; k += 1u) {
    let right = latents[offset + k * stride + lane % 2u];
    let factor = rows[k / 4u][k % 4u];
    result.c0 += factor * lowHalves(right);
    result.c4 += factor * highHalves(right);
  }
  return result;
}

fn latents_dot(left: LeftFragment, at: u32) -> f32 {
  let first = latents[at];
  let second = latents[at + 1u];
  return dot(left.k0, lowHalves(first)) + dot(left.k4, highHalves(first)) +
    dot(left.k8, lowHalves(second)) + dot(left.k12, highHalves(second));
}

fn latents_column(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var sums: array<f32, 8>;
  for (var c = 0u; c < 8u; c += 1u) { sums[c] = latents_dot(left, offset + (lane % 2u * 8u + c) * stride); }
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

fn saturated(x: vec4<f32>) -> vec4<f32> {
  let isNan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
  return select(clamp(x, vec4<f32>(-65504.0), vec4<f32>(65504.0)), x, isNan);
}

fn finiteHalves(quad: vec4<u32>) -> vec4<u32> {
  let low = select(vec4<u32>(0x0000ffffu), vec4<u32>(), (quad & vec4<u32>(0x7c00u)) == vec4<u32>(0x7c00u));
  let high = select(vec4<u32>(0xffff0000u), vec4<u32>(), (quad & vec4<u32>(0x7c000000u)) == vec4<u32>(0x7c000000u));
  return quad & (low | high);
}

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

fn cacheRowOf(sequence: u32, key: u32) -> u32 {
  let page = pages[params.tableBase + sequence * params.maxPages + key / 64u] - params.firstPage;
  if (page >= params.pageCount) { return ABSENT; }
  return params.cacheBase + (page * 64u + key % 64u) * params.cacheRow;
}

fn storeResult(row: u32, quad: u32, value: vec4<f32>) {
  output[params.outputBase + row * RESULT_QUADS + quad] = value;
}

fn storeLse(row: u32, value: f32) {
  let token = row / params.heads;
  let item = token / params.queryLength;
  lse[params.lseBase + (item * params.heads + row % params.heads) * params.queryLength + token % params.queryLength] = value;
}

// Where a key's latents are; nothing is looked up past the item's keys.
fn latentRowOf(item: Item, key: u32) -> u32 {
  if (key >= item.keyEnd) { return ABSENT; }
  return cacheRowOf(item.sequence, key);
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  lane = t % 32u;
  let subgroup = t / 32u;
  let itemIndex = workgroup.x + workgroup.y * params.gridX;
  if (itemIndex >= params.itemCount) { return; }
  let item = items[itemIndex];
  if (item.rows == 0u) { return; }
  let rowGroup = subgroup / 2u;
  let keyGroup = subgroup / 1u % 2u;
  let depthPart = subgroup % 1u;
  let stageRow = t / 4u;
  let stageQuad = t % 4u;
  let softRow = t / 4u % BLOCK_ROWS;
  let softShare = t / 4u % 1u;
  let softPart = t % 4u;
  let isSoft = t < 128u;
  let isWriting = isSoft && softShare == 0u;
  let isFirst = isWriting && softPart == 0u;
  let own = subgroup * 64u;
  let count = (item.keyEnd - item.keyStart + BLOCK_K - 1u) / BLOCK_K;
  let row = item.row + softRow;
  // Keys that all rows see, and those that this invocation's row sees.
  let sharedStart = item.diagonal + i32((item.row + item.rows - 1u) / params.heads) - params.left;
  let sharedEnd = min(item.diagonal + i32(item.row / params.heads) + params.right + 1, i32(item.keyEnd));
  let position = item.diagonal + i32(row / params.heads);
  let seenStart = position - params.left;
  let seenEnd = min(position + params.right + 1, i32(item.keyEnd));
  var rowTop = MASKED;
  var rowSum = 0.0;
  var q: array<LeftFragment, 2>;
  var s: array<ResultFragment, 1>;
  var o: array<ResultFragment, 2>;
  var latent0: vec4<u32>;
  var exists: bool;

  var nextRow = latentRowOf(item, item.keyStart + stageRow);
  exists = nextRow != ABSENT;
  nextRow = select(params.cacheBase, nextRow, exists);
  latent0 = cache[nextRow + stageQuad + 0u];
  nextRow = latentRowOf(item, item.keyStart + BLOCK_K + stageRow);
  if (t == 0u) { rescale = vec4<u32>(); }
  {
    let row = 0u + stageRow;
    let exists = row < item.rows;
    let origin = params.queryBase + select(0u, item.row + row, exists) * ROW_QUADS;
    var part0: vec4<u32>;
    part0 = query[origin + stageQuad + 0u];
    workgroupBarrier();
    {
      let staged = select(vec4<u32>(), part0, exists);
      latents[0u * 160u + stageRow * 5u + stageQuad + 0u] = staged;
    }
    workgroupBarrier();
    for (var r = 0u; r < 1u; r += 1u) {
      if ((rowGroup * 1u + r) / 2u == 0u) {
        for (var d = 0u; d < 2u; d += 1u) {
          q[r * 2u + d] = latents_left(0u * 160u + (rowGroup * 1u + r) % 2u * 80u + (d * 1u + depthPart) * 2u, 5u);
        }
      }
    }
  }
  workgroupBarrier();

  // The first round of outputs adds zeros.
  let nothing = vec4<u32>();
  {
    let staged = select(vec4<u32>(), latent0, false);
    latents[0u * 160u + stageRow * 5u + stageQuad + 0u] = staged;
  }
  for (var i = t; i < 128u; i += 128u) {
    probs[i] = nothing;
  }
  workgroupBarrier();

  var block = 0u; // the block to be scored; the outputs of the one before are still to be summed
  var finished = false;
  loop {
    loop {
      for (var k = 0u; k < 2u; k += 1u) {
        let value0 = 0u * 160u + k * 80u + (0u * 4u + subgroup) * 2u;
        for (var r = 0u; r < 2u; r += 1u) {
          let prob = probs_left((r * 2u + k) * 32u, 2u);
          if (0u * 4u + subgroup < 2u) {
            o[r * 1u + 0u] = latents_row(prob, value0, 5u, o[r * 1u + 0u]);
          }
        }
      }
      if (block >= count) {
        finished = true;
        break;
      }
      workgroupBarrier();

      let keyBase = item.keyStart + block * BLOCK_K;
      let masking = true;
      {
        let staged = select(vec4<u32>(), latent0, exists);
        latents[0u * 160u + stageRow * 5u + stageQuad + 0u] = staged;
      }
      exists = nextRow != ABSENT;
      nextRow = select(params.cacheBase, nextRow, exists);
      latent0 = cache[nextRow + stageQuad + 0u];
      nextRow = latentRowOf(item, keyBase + 2u * BLOCK_K + stageRow);
      workgroupBarrier();

      for (var r = 0u; r < 1u; r += 1u) {
        for (var k = 0u; k < 1u; k += 1u) {
          s[r * 1u + k] = ResultFragment();
        }
      }
      for (var d = 0u; d < 2u; d += 1u) {
        for (var k = 0u; k < 1u; k += 1u) {
          let key = 0u * 160u + (keyGroup * 1u + k) * 80u + (d * 1u + depthPart) * 2u;
          for (var r = 0u; r < 1u; r += 1u) {
            s[r * 1u + k] = latents_column(q[r * 2u + d], key, 5u, s[r * 1u + k]);
          }
        }
      }
      for (var r = 0u; r < 1u; r += 1u) {
        for (var k = 0u; k < 1u; k += 1u) {
          scores_store((rowGroup * 1u + r) * 144u + depthPart * 8u + (keyGroup * 1u + k) * 4u, 9u, s[r * 1u + k]);
        }
      }
      workgroupBarrier();

      var x0 = scores[softRow * 9u + 0u + softPart * 2u + 0u];

      x0 = scoreOf(x0);
      var x1 = scores[softRow * 9u + 0u + softPart * 2u + 1u];

      x1 = scoreOf(x1);
      if (masking) {
        {
          let key = vec4<i32>(i32(keyBase + 4u * (softPart * 2u + 0u))) + vec4<i32>(0, 1, 2, 3);
          let seen = (key < vec4<i32>(seenEnd)) & (key >= vec4<i32>(seenStart));
          x0 = select(vec4<f32>(MASKED), x0, seen);
          if (seen[0]) {
            if (cacheRowOf(item.sequence, u32(key[0])) == ABSENT) { x0[0] = MASKED; }
          }
          if (seen[1]) {
            if (cacheRowOf(item.sequence, u32(key[1])) == ABSENT) { x0[1] = MASKED; }
          }
          if (seen[2]) {
            if (cacheRowOf(item.sequence, u32(key[2])) == ABSENT) { x0[2] = MASKED; }
          }
          if (seen[3]) {
            if (cacheRowOf(item.sequence, u32(key[3])) == ABSENT) { x0[3] = MASKED; }
          }
        }
        {
          let key = vec4<i32>(i32(keyBase + 4u * (softPart * 2u + 1u))) + vec4<i32>(0, 1, 2, 3);
          let seen = (key < vec4<i32>(seenEnd)) & (key >= vec4<i32>(seenStart));
          x1 = select(vec4<f32>(MASKED), x1, seen);
          if (seen[0]) {
            if (cacheRowOf(item.sequence, u32(key[0])) == ABSENT) { x1[0] = MASKED; }
          }
          if (seen[1]) {
            if (cacheRowOf(item.sequence, u32(key[1])) == ABSENT) { x1[1] = MASKED; }
          }
          if (seen[2]) {
            if (cacheRowOf(item.sequence, u32(key[2])) == ABSENT) { x1[2] = MASKED; }
          }
          if (seen[3]) {
            if (cacheRowOf(item.sequence, u32(key[3])) == ABSENT) { x1[3] = MASKED; }
          }
        }
      }
      var blockTop = max(max(x0.x, x0.y), max(x0.z, x0.w));
      blockTop = max(blockTop, max(max(x1.x, x1.y), max(x1.z, x1.w)));
      exchanged[t] = blockTop;
      workgroupBarrier();
      blockTop = max(blockTop, exchanged[t ^ 1u]);
      blockTop = max(blockTop, exchanged[t ^ 2u]);
      blockTop = max(blockTop, exchanged[t ^ 3u]);
      var decay = 1.0;
      if (blockTop > rowTop + 8.0) {
        // What was summed so far is zero before the first visible key.
        if (rowTop > UNSEEN) { rescale.x = 1u; }
        decay = exp2(rowTop - blockTop);
        rowTop = blockTop;
        rowSum *= decay;
      }
      if (isFirst) { rowFactor[softRow] = decay; }
      var p0 = exp2(x0 - rowTop);
      var p1 = exp2(x1 - rowTop);
      if (masking) {
        p0 = select(p0, vec4<f32>(), x0 <= vec4<f32>(UNSEEN));
        p1 = select(p1, vec4<f32>(), x1 <= vec4<f32>(UNSEEN));
      }
      rowSum += (p0.x + p0.y) + (p0.z + p0.w);
      rowSum += (p1.x + p1.y) + (p1.z + p1.w);
      if (isWriting) {
        {
          let quad = (((softRow / 16u * 2u + (softPart * 2u + 0u) / 4u) * 16u + softRow % 16u) * 4u + (softPart * 2u + 0u) % 4u) / 2u;
          probs[quad][2u * ((((softRow / 16u * 2u + (softPart * 2u + 0u) / 4u) * 16u + softRow % 16u) * 4u + (softPart * 2u + 0u) % 4u) % 2u)] = pack2x16float(p0.xy);
          probs[quad][2u * ((((softRow / 16u * 2u + (softPart * 2u + 0u) / 4u) * 16u + softRow % 16u) * 4u + (softPart * 2u + 0u) % 4u) % 2u) + 1u] = pack2x16float(p0.zw);
        }
        {
          let quad = (((softRow / 16u * 2u + (softPart * 2u + 1u) / 4u) * 16u + softRow % 16u) * 4u + (softPart * 2u + 1u) % 4u) / 2u;
          probs[quad][2u * ((((softRow / 16u * 2u + (softPart * 2u + 1u) / 4u) * 16u + softRow % 16u) * 4u + (softPart * 2u + 1u) % 4u) % 2u)] = pack2x16float(p1.xy);
          probs[quad][2u * ((((softRow / 16u * 2u + (softPart * 2u + 1u) / 4u) * 16u + softRow % 16u) * 4u + (softPart * 2u + 1u) % 4u) % 2u) + 1u] = pack2x16float(p1.zw);
        }
      }
      if (masking) {
        {
          let staged = finiteHalves(latents[0u * 160u + stageRow * 5u + stageQuad + 0u]);
          latents[0u * 160u + stageRow * 5u + stageQuad + 0u] = staged;
        }
      }
      block += 1u;
      if (workgroupUniformLoad(&rescale).x != 0u) { break; }
    }
    if (finished) { break; }
    // The scores are consumed, and their memory is free.
    if (t == 0u) { rescale = vec4<u32>(); }
    for (var r = 0u; r < 2u; r += 1u) {
      for (var c = 0u; c < 1u; c += 1u) {
        if (c * 4u + subgroup < 2u) {
          scores_store(own, 4u, o[r * 1u + c]);
        }
        workgroupBarrier();
        if (c * 4u + subgroup < 2u) {
          {
            let quad = (lane + 0u) % 4u;
            let ownRow = (lane + 0u) / 4u;
            let index = own + ownRow * 4u + quad;
            let scaled = scores[index] * rowFactor[(r * 16u + ownRow)];
            scores[index] = scaled;
          }
          {
            let quad = (lane + 32u) % 4u;
            let ownRow = (lane + 32u) / 4u;
            let index = own + ownRow * 4u + quad;
            let scaled = scores[index] * rowFactor[(r * 16u + ownRow)];
            scores[index] = scaled;
          }
        }
        workgroupBarrier();
        if (c * 4u + subgroup < 2u) {
          o[r * 1u + c] = scores_load(own, 4u);
        }
        workgroupBarrier();
      }
    }
  }

  // A row that sees no key has no sum; a NaN sum is not 0 and must reach the output.
  exchanged[t] = rowSum;
  workgroupBarrier();
  rowSum = rowSum + exchanged[t ^ 1u];
  rowSum = rowSum + exchanged[t ^ 2u];
  rowSum = rowSum + exchanged[t ^ 3u];
  let isAlone = item.slot == NO_SLOT;
  let head = row % params.heads;
  let sink = sinks[head / 4u][head % 4u];
  let top = max(rowTop, sink);
  let down = exp2(rowTop - top);
  let total = select(rowSum * down + exp2(sink - top), 0.0, rowSum == 0.0);
  var part = select(down / total, 0.0, rowSum == 0.0);
  if (!isAlone) { part = select(1.0, 0.0, rowSum == 0.0); }
  if (isFirst && softRow < item.rows) {
    rowFactor[softRow] = part;
    if (!isAlone) {
      stats[item.slot * BLOCK_ROWS + softRow] = vec2<f32>(rowTop, rowSum);
    } else {
      storeLse(row, select((top + log2(total)) * LN2, params.minusInfinity, total == 0.0));
    }
  }
  workgroupBarrier();
  for (var r = 0u; r < 2u; r += 1u) {
    for (var c = 0u; c < 1u; c += 1u) {
      if (c * 4u + subgroup < 2u) {
        scores_store(own, 4u, o[r * 1u + c]);
      }
      workgroupBarrier();
      if (c * 4u + subgroup < 2u) {
        {
          let quad = (lane + 0u) % 4u;
          let ownRow = (lane + 0u) / 4u;
          let index = own + ownRow * 4u + quad;
          let resultQuad = (c * 4u + subgroup) * 4u + quad;
          if ((r * 16u + ownRow) < item.rows && resultQuad < RESULT_QUADS) {
            let factor = rowFactor[(r * 16u + ownRow)];
            let result = select(scores[index] * factor, vec4<f32>(), factor == 0.0);
            if (isAlone) {
              storeResult(item.row + (r * 16u + ownRow), resultQuad, result);
            } else {
              partial[(item.slot * BLOCK_ROWS + (r * 16u + ownRow)) * RESULT_QUADS + resultQuad] = result;
            }
          }
        }
        {
          let quad = (lane + 32u) % 4u;
          let ownRow = (lane + 32u) / 4u;
          let index = own + ownRow * 4u + quad;
          let resultQuad = (c * 4u + subgroup) * 4u + quad;
          if ((r * 16u + ownRow) < item.rows && resultQuad < RESULT_QUADS) {
            let factor = rowFactor[(r * 16u + ownRow)];
            let result = select(scores[index] * factor, vec4<f32>(), factor == 0.0);
            if (isAlone) {
              storeResult(item.row + (r * 16u + ownRow), resultQuad, result);
            } else {
              partial[(item.slot * BLOCK_ROWS + (r * 16u + ownRow)) * RESULT_QUADS + resultQuad] = result;
            }
          }
        }
      }
      workgroupBarrier();
    }
  }
}
