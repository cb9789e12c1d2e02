enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
diagnostic(off, subgroup_uniformity);
// Absorbed attention on matrix units.
// blockRows 16, blockK 16, 2 subgroups: 1 of rows × 1 of keys × 2 of depth
const BLOCK_ROWS = 16u;
const BLOCK_K = 16u;
const ROW_QUADS = 10u;
const MASKED = -3.4e38;
const UNSEEN = -3.0e38;
const LOG2E = 1.4426950408889634;
const LN2 = 0.6931471805599453;
const NO_SLOT = 0xffffffffu;
const ABSENT = 0xffffffffu; // a key whose page is not bound
const RESULT_QUADS = 16u;

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
@group(0) @binding(3) var<storage, read> cache: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> pages: array<u32>;
@group(0) @binding(5) var<storage, read_write> partial: array<vec4<f32>>; // unnormalised sums, by slot and row
@group(0) @binding(6) var<storage, read_write> stats: array<vec2<f32>>; // maximum in log2 units, and sum
@group(0) @binding(7) var<storage, read_write> output: array<vec4<f32>>;

var<workgroup> latents: array<array<vec4<u32>, 176>, 2>;
var<workgroup> scores: array<vec4<f32>, 144>;
var<workgroup> probs: array<vec4<u32>, 32>;

// Eight halves, rounded to nearest.
fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(bitcast<vec2<u32>>(vec4<f16>(low)), bitcast<vec2<u32>>(vec4<f16>(high)));
}
var<workgroup> rowFactor: array<f32, 16>;
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

fn scoreOf(raw: vec4<f32>) -> vec4<f32> { return raw * params.scaleLog2; }

fn cacheRowOf(sequence: u32, key: u32) -> u32 {
  let page = pages[params.tableBase + sequence * params.maxPages + key / 64u] - params.firstPage;
  if (page >= params.pageCount) { return ABSENT; }
  return params.cacheBase + (page * 64u + key % 64u) * params.cacheRow;
}

fn storeResult(row: u32, quad: u32, value: vec4<f32>) {
  output[params.outputBase + row * RESULT_QUADS + quad] = value;
}

// Where a key's latents are; nothing is looked up past the item's keys.
fn latentRowOf(item: Item, key: u32) -> u32 {
  if (key >= item.keyEnd) { return ABSENT; }
  return cacheRowOf(item.sequence, key);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let lane = t % 32u;
  let subgroup = t / 32u;
  let itemIndex = workgroup.x + workgroup.y * params.gridX;
  if (itemIndex >= params.itemCount) { return; }
  let item = items[itemIndex];
  if (item.rows == 0u) { return; }
  let rowGroup = subgroup / 2u;
  let keyGroup = subgroup / 2u % 1u;
  let depthPart = subgroup % 2u;
  let stageRow = t / 4u;
  let stageQuad = t % 4u;
  let softRow = t / 4u % BLOCK_ROWS;
  let softShare = t / 4u % 1u;
  let softPart = t % 4u;
  let isSoft = t < 64u;
  let isWriting = isSoft && softShare == 0u;
  let isFirst = isWriting && softPart == 0u;
  let own = subgroup * 64u;
  let count = (item.keyEnd - item.keyStart + BLOCK_K - 1u) / BLOCK_K;
  let row = item.row + softRow;

  var rowTop = MASKED;
  var rowSum = 0.0;
  var q0_0: subgroup_matrix_left<f16, 16, 16>;
  var q0_1: subgroup_matrix_left<f16, 16, 16>;
  var q0_2: subgroup_matrix_left<f16, 16, 16>;
  var s0_0: subgroup_matrix_result<f32, 16, 16>;
  var o0_0: subgroup_matrix_result<f32, 16, 16>;
  var o0_1: subgroup_matrix_result<f32, 16, 16>;
  var latent0: vec4<u32>;
  var latent1: vec4<u32>;
  var latent2: vec4<u32>;
  var exists: bool;

  var nextRow = latentRowOf(item, item.keyStart + stageRow);
  exists = nextRow != ABSENT;
  nextRow = select(params.cacheBase, nextRow, exists);
  latent0 = cache[nextRow + stageQuad + 0u];
  latent1 = cache[nextRow + stageQuad + 4u];
  latent2 = cache[nextRow + min(stageQuad + 8u, ROW_QUADS - 1u)];
  nextRow = latentRowOf(item, item.keyStart + BLOCK_K + stageRow);
  if (t == 0u) { rescale = vec4<u32>(); }
  {
    let row = 0u + stageRow;
    let exists = row < item.rows;
    let origin = params.queryBase + select(0u, item.row + row, exists) * ROW_QUADS;
    var part0: vec4<u32>;
    var part1: vec4<u32>;
    var part2: vec4<u32>;
    part0 = query[origin + stageQuad + 0u];
    part1 = query[origin + stageQuad + 4u];
    part2 = query[origin + min(stageQuad + 8u, ROW_QUADS - 1u)];
    workgroupBarrier();
    {
      let staged = select(vec4<u32>(), part0, exists);
      latents[1u][stageRow * 11u + stageQuad + 0u] = staged;
    }
    {
      let staged = select(vec4<u32>(), part1, exists);
      latents[1u][stageRow * 11u + stageQuad + 4u] = staged;
    }
    if (stageQuad + 8u < 10u) {
      let staged = select(vec4<u32>(), part2, exists);
      latents[1u][stageRow * 11u + stageQuad + 8u] = staged;
    }
    workgroupBarrier();
    switch (subgroup) {
      case 0u: {
        {
          {
            q0_0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&latents[1u], (0u * 1u + 0u) % 1u * 176u + (0u * 2u + 0u) * 2u, 11u);
          }
          {
            q0_1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&latents[1u], (0u * 1u + 0u) % 1u * 176u + (1u * 2u + 0u) * 2u, 11u);
          }
          {
            q0_2 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&latents[1u], (0u * 1u + 0u) % 1u * 176u + (2u * 2u + 0u) * 2u, 11u);
          }
        }
      }
      default: {
        {
          {
            q0_0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&latents[1u], (0u * 1u + 0u) % 1u * 176u + (0u * 2u + 1u) * 2u, 11u);
          }
          {
            q0_1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&latents[1u], (0u * 1u + 0u) % 1u * 176u + (1u * 2u + 1u) * 2u, 11u);
          }
          {

          }
        }
      }
    }
  }
  workgroupBarrier();
  {
    let staged = select(vec4<u32>(), latent0, exists);
    latents[0u][stageRow * 11u + stageQuad + 0u] = staged;
  }
  {
    let staged = select(vec4<u32>(), latent1, exists);
    latents[0u][stageRow * 11u + stageQuad + 4u] = staged;
  }
  if (stageQuad + 8u < 10u) {
    let staged = select(vec4<u32>(), latent2, exists);
    latents[0u][stageRow * 11u + stageQuad + 8u] = staged;
  }
  exists = nextRow != ABSENT;
  nextRow = select(params.cacheBase, nextRow, exists);
  latent0 = cache[nextRow + stageQuad + 0u];
  latent1 = cache[nextRow + stageQuad + 4u];
  latent2 = cache[nextRow + min(stageQuad + 8u, ROW_QUADS - 1u)];
  nextRow = latentRowOf(item, item.keyStart + 2u * BLOCK_K + stageRow);
  // The first round of outputs adds zeros.
  let nothing = vec4<u32>();
  {
    let staged = select(vec4<u32>(), latent0, false);
    latents[1u][stageRow * 11u + stageQuad + 0u] = staged;
  }
  {
    let staged = select(vec4<u32>(), latent1, false);
    latents[1u][stageRow * 11u + stageQuad + 4u] = staged;
  }
  if (stageQuad + 8u < 10u) {
    let staged = select(vec4<u32>(), latent2, false);
    latents[1u][stageRow * 11u + stageQuad + 8u] = staged;
  }
  for (var i = t; i < 32u; i += 64u) {
    probs[i] = nothing;
  }
  workgroupBarrier();

  var block = 0u; // the block to be scored; the outputs of the one before are still to be summed
  var finished = false;
  loop {
    loop {
      if (block < count) {
        {
          {
            s0_0 = subgroup_matrix_result<f32, 16, 16>();
          }
        }
        switch (subgroup) {
          case 0u: {
            {
              let value0 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&latents[((block + 1u) & 1u)], 0u * 176u + (0u * 2u + 0u) * 2u, 11u);
              let value1 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&latents[((block + 1u) & 1u)], 0u * 176u + (1u * 2u + 0u) * 2u, 11u);
              {
                let prob = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&probs, (0u * 1u + 0u) * 32u, 2u);
                o0_0 = subgroupMatrixMultiplyAccumulate(prob, value0, o0_0);
                o0_1 = subgroupMatrixMultiplyAccumulate(prob, value1, o0_1);
              }
            }
            {
              {
                let key = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&latents[(block & 1u)], (0u * 1u + 0u) * 176u + (0u * 2u + 0u) * 2u, 11u);
                {
                  s0_0 = subgroupMatrixMultiplyAccumulate(q0_0, key, s0_0);
                }
              }
            }
            {
              {
                let key = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&latents[(block & 1u)], (0u * 1u + 0u) * 176u + (1u * 2u + 0u) * 2u, 11u);
                {
                  s0_0 = subgroupMatrixMultiplyAccumulate(q0_1, key, s0_0);
                }
              }
            }
            {
              {
                let key = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&latents[(block & 1u)], (0u * 1u + 0u) * 176u + (2u * 2u + 0u) * 2u, 11u);
                {
                  s0_0 = subgroupMatrixMultiplyAccumulate(q0_2, key, s0_0);
                }
              }
            }
            {
              {
                subgroupMatrixStore<row_major>(&scores, (0u * 1u + 0u) * 144u + 0u * 4u + (0u * 1u + 0u) * 4u, s0_0, 9u);
              }
            }
          }
          default: {
            {
              let value0 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&latents[((block + 1u) & 1u)], 0u * 176u + (0u * 2u + 1u) * 2u, 11u);
              let value1 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&latents[((block + 1u) & 1u)], 0u * 176u + (1u * 2u + 1u) * 2u, 11u);
              {
                let prob = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&probs, (0u * 1u + 0u) * 32u, 2u);
                o0_0 = subgroupMatrixMultiplyAccumulate(prob, value0, o0_0);
                o0_1 = subgroupMatrixMultiplyAccumulate(prob, value1, o0_1);
              }
            }
            {
              {
                let key = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&latents[(block & 1u)], (0u * 1u + 0u) * 176u + (0u * 2u + 1u) * 2u, 11u);
                {
                  s0_0 = subgroupMatrixMultiplyAccumulate(q0_0, key, s0_0);
                }
              }
            }
            {
              {
                let key = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&latents[(block & 1u)], (0u * 1u + 0u) * 176u + (1u * 2u + 1u) * 2u, 11u);
                {
                  s0_0 = subgroupMatrixMultiplyAccumulate(q0_1, key, s0_0);
                }
              }
            }
            {

            }
            {
              {
                subgroupMatrixStore<row_major>(&scores, (0u * 1u + 0u) * 144u + 1u * 4u + (0u * 1u + 0u) * 4u, s0_0, 9u);
              }
            }
          }
        }
      } else {
        switch (subgroup) {
          case 0u: {
            {
              let value0 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&latents[((block + 1u) & 1u)], 0u * 176u + (0u * 2u + 0u) * 2u, 11u);
              let value1 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&latents[((block + 1u) & 1u)], 0u * 176u + (1u * 2u + 0u) * 2u, 11u);
              {
                let prob = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&probs, (0u * 1u + 0u) * 32u, 2u);
                o0_0 = subgroupMatrixMultiplyAccumulate(prob, value0, o0_0);
                o0_1 = subgroupMatrixMultiplyAccumulate(prob, value1, o0_1);
              }
            }
          }
          default: {
            {
              let value0 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&latents[((block + 1u) & 1u)], 0u * 176u + (0u * 2u + 1u) * 2u, 11u);
              let value1 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&latents[((block + 1u) & 1u)], 0u * 176u + (1u * 2u + 1u) * 2u, 11u);
              {
                let prob = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&probs, (0u * 1u + 0u) * 32u, 2u);
                o0_0 = subgroupMatrixMultiplyAccumulate(prob, value0, o0_0);
                o0_1 = subgroupMatrixMultiplyAccumulate(prob, value1, o0_1);
              }
            }
          }
        }
        finished = true;
        break;
      }
      workgroupBarrier();

      let keyBase = item.keyStart + block * BLOCK_K;
      let masking = keyBase + BLOCK_K > item.keyEnd;
      {
        let staged = select(vec4<u32>(), latent0, exists);
        latents[((block + 1u) & 1u)][stageRow * 11u + stageQuad + 0u] = staged;
      }
      {
        let staged = select(vec4<u32>(), latent1, exists);
        latents[((block + 1u) & 1u)][stageRow * 11u + stageQuad + 4u] = staged;
      }
      if (stageQuad + 8u < 10u) {
        let staged = select(vec4<u32>(), latent2, exists);
        latents[((block + 1u) & 1u)][stageRow * 11u + stageQuad + 8u] = staged;
      }
      exists = nextRow != ABSENT;
      nextRow = select(params.cacheBase, nextRow, exists);
      latent0 = cache[nextRow + stageQuad + 0u];
      latent1 = cache[nextRow + stageQuad + 4u];
      latent2 = cache[nextRow + min(stageQuad + 8u, ROW_QUADS - 1u)];
      nextRow = latentRowOf(item, keyBase + 3u * BLOCK_K + stageRow);
      var x0 = scores[softRow * 9u + 0u + softPart * 1u + 0u] +
        scores[softRow * 9u + 4u + softPart * 1u + 0u];

      x0 = scoreOf(x0);
      if (masking) {
        {
          let key = vec4<i32>(i32(keyBase + 4u * (softPart * 1u + 0u))) + vec4<i32>(0, 1, 2, 3);
          let seen = key < vec4<i32>(i32(item.keyEnd));
          x0 = select(vec4<f32>(MASKED), x0, seen);

        }
      }
      var blockTop = max(max(x0.x, x0.y), max(x0.z, x0.w));

      blockTop = max(blockTop, subgroupShuffleXor(blockTop, 1u));
      blockTop = max(blockTop, subgroupShuffleXor(blockTop, 2u));
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
      if (masking) {
        p0 = select(p0, vec4<f32>(), x0 <= vec4<f32>(UNSEEN));
      }
      rowSum += (p0.x + p0.y) + (p0.z + p0.w);
      if (isWriting) {
        {
          let words = bitcast<vec2<u32>>(vec4<f16>(p0));
          probs[(((softRow / 16u * 1u + (softPart * 1u + 0u) / 4u) * 16u + softRow % 16u) * 4u + (softPart * 1u + 0u) % 4u) / 2u][2u * ((((softRow / 16u * 1u + (softPart * 1u + 0u) / 4u) * 16u + softRow % 16u) * 4u + (softPart * 1u + 0u) % 4u) % 2u)] = words.x;
          probs[(((softRow / 16u * 1u + (softPart * 1u + 0u) / 4u) * 16u + softRow % 16u) * 4u + (softPart * 1u + 0u) % 4u) / 2u][2u * ((((softRow / 16u * 1u + (softPart * 1u + 0u) / 4u) * 16u + softRow % 16u) * 4u + (softPart * 1u + 0u) % 4u) % 2u) + 1u] = words.y;
        }
      }

      block += 1u;
      if (workgroupUniformLoad(&rescale).x != 0u) { break; }
    }
    if (finished) { break; }
    // The scores are consumed, and their memory is free.
    if (t == 0u) { rescale = vec4<u32>(); }
    {
      {
        subgroupMatrixStore<row_major>(&scores, own, o0_0, 4u);
        workgroupBarrier();
        {
          let quad = (lane + 0u) % 4u;
          let ownRow = (lane + 0u) / 4u;
          let index = own + ownRow * 4u + quad;
          let scaled = scores[index] * rowFactor[(0u * 16u + ownRow)];
          scores[index] = scaled;
        }
        {
          let quad = (lane + 32u) % 4u;
          let ownRow = (lane + 32u) / 4u;
          let index = own + ownRow * 4u + quad;
          let scaled = scores[index] * rowFactor[(0u * 16u + ownRow)];
          scores[index] = scaled;
        }
        workgroupBarrier();
        o0_0 = subgroupMatrixLoad<subgroup_matrix_result<f32, 16, 16>, row_major>(&scores, own, 4u);
        workgroupBarrier();
      }
      {
        subgroupMatrixStore<row_major>(&scores, own, o0_1, 4u);
        workgroupBarrier();
        {
          let quad = (lane + 0u) % 4u;
          let ownRow = (lane + 0u) / 4u;
          let index = own + ownRow * 4u + quad;
          let scaled = scores[index] * rowFactor[(0u * 16u + ownRow)];
          scores[index] = scaled;
        }
        {
          let quad = (lane + 32u) % 4u;
          let ownRow = (lane + 32u) / 4u;
          let index = own + ownRow * 4u + quad;
          let scaled = scores[index] * rowFactor[(0u * 16u + ownRow)];
          scores[index] = scaled;
        }
        workgroupBarrier();
        o0_1 = subgroupMatrixLoad<subgroup_matrix_result<f32, 16, 16>, row_major>(&scores, own, 4u);
        workgroupBarrier();
      }
    }
  }

  // A row that sees no key has no sum; a NaN sum is not 0 and must reach the output.
  rowSum = rowSum + subgroupShuffleXor(rowSum, 1u);
  rowSum = rowSum + subgroupShuffleXor(rowSum, 2u);
  let isAlone = item.slot == NO_SLOT;
  let top = rowTop;
  let total = rowSum;
  var part = select(1.0 / total, 0.0, total == 0.0);
  if (!isAlone) { part = select(1.0, 0.0, rowSum == 0.0); }
  if (isFirst && softRow < item.rows) {
    rowFactor[softRow] = part;
    if (!isAlone) {
      stats[item.slot * BLOCK_ROWS + softRow] = vec2<f32>(rowTop, rowSum);
    }
  }
  workgroupBarrier();
  {
    {
      subgroupMatrixStore<row_major>(&scores, own, o0_0, 4u);
      workgroupBarrier();
      {
        let quad = (lane + 0u) % 4u;
        let ownRow = (lane + 0u) / 4u;
        let index = own + ownRow * 4u + quad;
        let resultQuad = (0u * 2u + subgroup) * 4u + quad;
        if ((0u * 16u + ownRow) < item.rows && resultQuad < RESULT_QUADS) {
          let factor = rowFactor[(0u * 16u + ownRow)];
          let result = select(scores[index] * factor, vec4<f32>(), factor == 0.0);
          if (isAlone) {
            storeResult(item.row + (0u * 16u + ownRow), resultQuad, result);
          } else {
            partial[(item.slot * BLOCK_ROWS + (0u * 16u + ownRow)) * RESULT_QUADS + resultQuad] = result;
          }
        }
      }
      {
        let quad = (lane + 32u) % 4u;
        let ownRow = (lane + 32u) / 4u;
        let index = own + ownRow * 4u + quad;
        let resultQuad = (0u * 2u + subgroup) * 4u + quad;
        if ((0u * 16u + ownRow) < item.rows && resultQuad < RESULT_QUADS) {
          let factor = rowFactor[(0u * 16u + ownRow)];
          let result = select(scores[index] * factor, vec4<f32>(), factor == 0.0);
          if (isAlone) {
            storeResult(item.row + (0u * 16u + ownRow), resultQuad, result);
          } else {
            partial[(item.slot * BLOCK_ROWS + (0u * 16u + ownRow)) * RESULT_QUADS + resultQuad] = result;
          }
        }
      }
      workgroupBarrier();
    }
    {
      subgroupMatrixStore<row_major>(&scores, own, o0_1, 4u);
      workgroupBarrier();
      {
        let quad = (lane + 0u) % 4u;
        let ownRow = (lane + 0u) / 4u;
        let index = own + ownRow * 4u + quad;
        let resultQuad = (1u * 2u + subgroup) * 4u + quad;
        if ((0u * 16u + ownRow) < item.rows && resultQuad < RESULT_QUADS) {
          let factor = rowFactor[(0u * 16u + ownRow)];
          let result = select(scores[index] * factor, vec4<f32>(), factor == 0.0);
          if (isAlone) {
            storeResult(item.row + (0u * 16u + ownRow), resultQuad, result);
          } else {
            partial[(item.slot * BLOCK_ROWS + (0u * 16u + ownRow)) * RESULT_QUADS + resultQuad] = result;
          }
        }
      }
      {
        let quad = (lane + 32u) % 4u;
        let ownRow = (lane + 32u) / 4u;
        let index = own + ownRow * 4u + quad;
        let resultQuad = (1u * 2u + subgroup) * 4u + quad;
        if ((0u * 16u + ownRow) < item.rows && resultQuad < RESULT_QUADS) {
          let factor = rowFactor[(0u * 16u + ownRow)];
          let result = select(scores[index] * factor, vec4<f32>(), factor == 0.0);
          if (isAlone) {
            storeResult(item.row + (0u * 16u + ownRow), resultQuad, result);
          } else {
            partial[(item.slot * BLOCK_ROWS + (0u * 16u + ownRow)) * RESULT_QUADS + resultQuad] = result;
          }
        }
      }
      workgroupBarrier();
    }
  }
}
