// MLA attention of absorbed queries over latent rows.
// 8 rows × 8 keys, 32 invocations; scores 4 × 4 over 1/16 of the columns, values 4 × 4
const BLOCK_ROWS = 8u;
const BLOCK_K = 8u;
const ROW_GROUPS = 2u;
const KEY_GROUPS = 2u;
const KEY_COLUMNS = 1u;
const LOADERS = 4u;
const VALUE_COLUMNS = 2u;
const VALUE_ROWS = 4u;
const QUERY_QUADS = 3u;

const MASKED = -3.4e38;
const UNSEEN = -3.0e38;
const LOG2E = 1.4426950408889634;
const LN2 = 0.6931471805599453;
const NO_SLOT = 0xffffffffu;
const ABSENT = 0xffffffffu; // a key whose page is not bound
const RESULT_QUADS = 2u;

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
@group(0) @binding(2) var<storage, read> query: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> cache: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> pages: array<u32>;
@group(0) @binding(5) var<storage, read_write> partial: array<vec4<f32>>; // unnormalised sums, by slot and row
@group(0) @binding(6) var<storage, read_write> stats: array<vec2<f32>>; // maximum in log2 units, and sum
@group(0) @binding(7) var<storage, read_write> output: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read_write> lse: array<f32>;
@group(0) @binding(9) var<uniform> sinks: array<vec4<f32>, 2>;

alias Quad = vec2<u32>; // four columns
var<workgroup> latents: array<array<array<Quad, 4>, 2>, 4>;
var<workgroup> sums: array<array<vec4<f32>, 20>, 16>;
var<workgroup> probs: array<array<array<vec4<f32>, 3>, 2>, 4>;
var<workgroup> factors: array<vec4<f32>, 2>; // of each row: what its sums are multiplied by
var<workgroup> exchange: array<array<f32, 8>, 2>;
var<workgroup> present: array<array<u32, 2>, 4>;

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
  let page = pages[params.tableBase + sequence * params.maxPages + key / 1u] - params.firstPage;
  if (page >= params.pageCount) { return ABSENT; }
  return params.cacheBase + (page * 1u + key % 1u) * params.cacheRow;
}

fn storeResult(row: u32, quad: u32, value: vec4<f32>) {
  output[params.outputBase + row * RESULT_QUADS + quad] = value;
}

fn storeLse(row: u32, value: f32) {
  let token = row / params.heads;
  let item = token / params.queryLength;
  lse[params.lseBase + (item * params.heads + row % params.heads) * params.queryLength + token % params.queryLength] = value;
}

fn queryQuad(base: u32, quad: u32) -> vec4<f32> {
  return query[base + quad];
}

fn columnsOf(quad: Quad) -> vec4<f32> { return vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y)); }

fn finite(quad: Quad) -> Quad {
  let low = select(quad & vec2<u32>(0xffffu), vec2<u32>(), (quad & vec2<u32>(0x7c00u)) == vec2<u32>(0x7c00u));
  let high = select(quad & vec2<u32>(0xffff0000u), vec2<u32>(), (quad & vec2<u32>(0x7c000000u)) == vec2<u32>(0x7c000000u));
  return low | high;
}

@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let index = workgroup.x + workgroup.y * params.gridX;
  if (index >= params.itemCount) { return; }
  let item = items[index];
  if (item.rows == 0u) { return; }

  // Scores: four rows, some key groups, and a slice of the columns. Neighbours are slices, then key groups, then rows.
  let keyColumn = (t / 4u) % KEY_COLUMNS;
  let rowGroup = (t / (4u * KEY_COLUMNS)) % ROW_GROUPS;
  let slice = t / (4u * KEY_COLUMNS * ROW_GROUPS) * 4u + t % 4u;
  let row0 = 0u * ROW_GROUPS + rowGroup;
  let query0 = params.queryBase + (item.row + min(row0, item.rows - 1u)) * QUERY_QUADS;
  let row1 = 1u * ROW_GROUPS + rowGroup;
  let query1 = params.queryBase + (item.row + min(row1, item.rows - 1u)) * QUERY_QUADS;
  let row2 = 2u * ROW_GROUPS + rowGroup;
  let query2 = params.queryBase + (item.row + min(row2, item.rows - 1u)) * QUERY_QUADS;
  let row3 = 3u * ROW_GROUPS + rowGroup;
  let query3 = params.queryBase + (item.row + min(row3, item.rows - 1u)) * QUERY_QUADS;

  // Softmax: four scores of one row.
  let scoring = t < BLOCK_ROWS * KEY_GROUPS;
  let scoreKeys = t % KEY_GROUPS;
  let scoreRow = min(t / KEY_GROUPS, BLOCK_ROWS - 1u);
  let queryRow = item.row + min(scoreRow, item.rows - 1u);
  let position = item.diagonal + i32(queryRow / params.heads);
  let firstPosition = item.diagonal + i32(item.row / params.heads);
  let lastPosition = item.diagonal + i32((item.row + item.rows - 1u) / params.heads);
  var top = MASKED;
  var total = 0.0;

  // Values: rows and column quads.
  let valueColumn = t % VALUE_COLUMNS;
  let valueGroup = min(t / VALUE_COLUMNS, 1u);
  let column0 = min(valueColumn + 0u, RESULT_QUADS - 1u);
  var o0_0 = vec4<f32>();
  var o1_0 = vec4<f32>();
  var o2_0 = vec4<f32>();
  var o3_0 = vec4<f32>();

  // Latents on their way: an invocation carries pieces of one key.
  let loadedKey = t / LOADERS;
  let loader = t % LOADERS;
  var piece0 = vec4<u32>();
  var found = 0u;

  // A round loads a block into registers, works on the one before meanwhile, and then stages what it loaded.
  for (var next = item.keyStart; ; next += BLOCK_K) {
    if (next < item.keyEnd) {
      let key = next + loadedKey;
      let start = cacheRowOf(item.sequence, min(key, item.keyEnd - 1u));
      let there = key < item.keyEnd && start != ABSENT;
      piece0 = vec4<u32>();
      if (there) {
        if (loader + 0u < 2u) { piece0 = cache[start + loader + 0u]; }
      }
      found = u32(there);
    }
    if (next != item.keyStart) {
      let keyBase = next - BLOCK_K;
      let masking = true;

      // Scores.
      for (var h = 0u; h < KEY_GROUPS; h += KEY_COLUMNS) {
        let keys = h + keyColumn;
        var s0 = vec4<f32>();
        var s1 = vec4<f32>();
        var s2 = vec4<f32>();
        var s3 = vec4<f32>();
        for (var quad = slice; quad < 3u; quad += 16u) {
          let k0 = columnsOf(latents[0][keys][quad]);
          let k1 = columnsOf(latents[1][keys][quad]);
          let k2 = columnsOf(latents[2][keys][quad]);
          let k3 = columnsOf(latents[3][keys][quad]);
          let a0 = queryQuad(query0, quad);
          let a1 = queryQuad(query1, quad);
          let a2 = queryQuad(query2, quad);
          let a3 = queryQuad(query3, quad);
          let c0 = vec4<f32>(k0[0], k1[0], k2[0], k3[0]);
          s0 = fma(vec4<f32>(a0[0]), c0, s0);
          s1 = fma(vec4<f32>(a1[0]), c0, s1);
          s2 = fma(vec4<f32>(a2[0]), c0, s2);
          s3 = fma(vec4<f32>(a3[0]), c0, s3);
          let c1 = vec4<f32>(k0[1], k1[1], k2[1], k3[1]);
          s0 = fma(vec4<f32>(a0[1]), c1, s0);
          s1 = fma(vec4<f32>(a1[1]), c1, s1);
          s2 = fma(vec4<f32>(a2[1]), c1, s2);
          s3 = fma(vec4<f32>(a3[1]), c1, s3);
          let c2 = vec4<f32>(k0[2], k1[2], k2[2], k3[2]);
          s0 = fma(vec4<f32>(a0[2]), c2, s0);
          s1 = fma(vec4<f32>(a1[2]), c2, s1);
          s2 = fma(vec4<f32>(a2[2]), c2, s2);
          s3 = fma(vec4<f32>(a3[2]), c2, s3);
          let c3 = vec4<f32>(k0[3], k1[3], k2[3], k3[3]);
          s0 = fma(vec4<f32>(a0[3]), c3, s0);
          s1 = fma(vec4<f32>(a1[3]), c3, s1);
          s2 = fma(vec4<f32>(a2[3]), c3, s2);
          s3 = fma(vec4<f32>(a3[3]), c3, s3);
        }
        sums[slice][row0 * KEY_GROUPS + keys] = s0;
        sums[slice][row1 * KEY_GROUPS + keys] = s1;
        sums[slice][row2 * KEY_GROUPS + keys] = s2;
        sums[slice][row3 * KEY_GROUPS + keys] = s3;
      }
      workgroupBarrier();

      // Softmax.
      var score = vec4<f32>();
      if (scoring) {
        for (var i = 0u; i < 16u; i += 1u) { score += sums[i][t]; }
      }
      score = scoreOf(score);
      if (masking) {
        let key = vec4<i32>(i32(keyBase + scoreKeys)) + vec4<i32>(0, 2, 4, 6);
        var seen = key < vec4<i32>(i32(item.keyEnd));
        seen &= (key <= vec4<i32>(position + params.right)) & (key >= vec4<i32>(position - params.left));
        seen &= vec4<bool>(present[0][scoreKeys] != 0u, present[1][scoreKeys] != 0u, present[2][scoreKeys] != 0u, present[3][scoreKeys] != 0u);
        score = select(vec4<f32>(MASKED), score, seen);
        for (var quad = loader; quad < RESULT_QUADS; quad += LOADERS) {
          let kept = finite(latents[loadedKey / KEY_GROUPS][loadedKey % KEY_GROUPS][quad]);
          latents[loadedKey / KEY_GROUPS][loadedKey % KEY_GROUPS][quad] = kept;
        }
      }
      var newTop = max(max(score.x, score.y), max(score.z, score.w));
      if (scoring) { exchange[scoreKeys][scoreRow] = newTop; }
      workgroupBarrier();
      newTop = exchange[0][scoreRow];
      newTop = max(newTop, exchange[1][scoreRow]);
      newTop = max(newTop, top);
      let prob = select(exp2(score - newTop), vec4<f32>(), score <= vec4<f32>(UNSEEN));
      let decay = exp2(top - newTop);
      total = total * decay + ((prob.x + prob.y) + (prob.z + prob.w));
      top = newTop;
      if (scoring) {
        probs[0][scoreKeys][scoreRow / 4u][scoreRow % 4u] = prob[0];
        probs[1][scoreKeys][scoreRow / 4u][scoreRow % 4u] = prob[1];
        probs[2][scoreKeys][scoreRow / 4u][scoreRow % 4u] = prob[2];
        probs[3][scoreKeys][scoreRow / 4u][scoreRow % 4u] = prob[3];
        if (scoreKeys == 0u) { factors[scoreRow / 4u][scoreRow % 4u] = decay; }
      }
      workgroupBarrier();

      // Values.
      let decay0 = factors[valueGroup * 1u + 0u];
      o0_0 *= decay0[0];
      o1_0 *= decay0[1];
      o2_0 *= decay0[2];
      o3_0 *= decay0[3];
      for (var g = 0u; g < KEY_GROUPS; g += 1u) {
        {
          let v0 = columnsOf(latents[0][g][column0]);
          let p0 = probs[0][g][valueGroup * 1u + 0u];
          o0_0 = fma(vec4<f32>(p0[0]), v0, o0_0);
          o1_0 = fma(vec4<f32>(p0[1]), v0, o1_0);
          o2_0 = fma(vec4<f32>(p0[2]), v0, o2_0);
          o3_0 = fma(vec4<f32>(p0[3]), v0, o3_0);
        }
        {
          let v0 = columnsOf(latents[1][g][column0]);
          let p0 = probs[1][g][valueGroup * 1u + 0u];
          o0_0 = fma(vec4<f32>(p0[0]), v0, o0_0);
          o1_0 = fma(vec4<f32>(p0[1]), v0, o1_0);
          o2_0 = fma(vec4<f32>(p0[2]), v0, o2_0);
          o3_0 = fma(vec4<f32>(p0[3]), v0, o3_0);
        }
        {
          let v0 = columnsOf(latents[2][g][column0]);
          let p0 = probs[2][g][valueGroup * 1u + 0u];
          o0_0 = fma(vec4<f32>(p0[0]), v0, o0_0);
          o1_0 = fma(vec4<f32>(p0[1]), v0, o1_0);
          o2_0 = fma(vec4<f32>(p0[2]), v0, o2_0);
          o3_0 = fma(vec4<f32>(p0[3]), v0, o3_0);
        }
        {
          let v0 = columnsOf(latents[3][g][column0]);
          let p0 = probs[3][g][valueGroup * 1u + 0u];
          o0_0 = fma(vec4<f32>(p0[0]), v0, o0_0);
          o1_0 = fma(vec4<f32>(p0[1]), v0, o1_0);
          o2_0 = fma(vec4<f32>(p0[2]), v0, o2_0);
          o3_0 = fma(vec4<f32>(p0[3]), v0, o3_0);
        }
      }
      workgroupBarrier();
    }
    if (next >= item.keyEnd) { break; }
    if (loader + 0u < 2u) { latents[loadedKey / KEY_GROUPS][loadedKey % KEY_GROUPS][2u * (loader + 0u)] = piece0.xy; latents[loadedKey / KEY_GROUPS][loadedKey % KEY_GROUPS][2u * (loader + 0u) + 1u] = piece0.zw; }
    if (loader == 0u) { present[loadedKey / KEY_GROUPS][loadedKey % KEY_GROUPS] = found; }
    workgroupBarrier();
  }

  // Row sums over the invocations of a row. A row that sees no key has none; a NaN sum is not 0 and must reach the output.
  if (scoring) { exchange[scoreKeys][scoreRow] = total; }
  workgroupBarrier();
  total = exchange[0][scoreRow];
  total = total + exchange[1][scoreRow];
  let split = item.slot != NO_SLOT;
  let writes = scoring && scoreKeys == 0u && scoreRow < item.rows;
  var factor = 1.0;
  if (split) {
    if (writes) { stats[item.slot * BLOCK_ROWS + scoreRow] = vec2<f32>(top, total); }
  } else {
    let head = queryRow % params.heads;
    let sink = sinks[head / 4u][head % 4u];
    let unseen = total == 0.0;
    let newTop = max(top, sink);
    let down = exp2(top - newTop);
    total = select(total * down + exp2(sink - newTop), 0.0, unseen);
    factor = select(down / total, 0.0, unseen);
    top = newTop;
    if (writes) { storeLse(queryRow, select((top + log2(total)) * LN2, params.minusInfinity, total == 0.0)); }
  }
  if (scoring && scoreKeys == 0u) { factors[scoreRow / 4u][scoreRow % 4u] = factor; }
  workgroupBarrier();
  if (t >= VALUE_COLUMNS * 2u) { return; }
  {
    let row = valueGroup * VALUE_ROWS + 0u;
    let share = factors[row / 4u][row % 4u];
    if (row < item.rows) {
      if (valueColumn + 0u < RESULT_QUADS) {
        let result = select(select(o0_0, vec4<f32>(), vec4<u32>(4u * (valueColumn + 0u)) + vec4<u32>(0u, 1u, 2u, 3u) >= vec4<u32>(7u)) * share, vec4<f32>(), share == 0.0);
        if (split) {
          partial[(item.slot * BLOCK_ROWS + row) * RESULT_QUADS + valueColumn + 0u] = result;
        } else {
          storeResult(item.row + row, valueColumn + 0u, result);
        }
      }
    }
  }
  {
    let row = valueGroup * VALUE_ROWS + 1u;
    let share = factors[row / 4u][row % 4u];
    if (row < item.rows) {
      if (valueColumn + 0u < RESULT_QUADS) {
        let result = select(select(o1_0, vec4<f32>(), vec4<u32>(4u * (valueColumn + 0u)) + vec4<u32>(0u, 1u, 2u, 3u) >= vec4<u32>(7u)) * share, vec4<f32>(), share == 0.0);
        if (split) {
          partial[(item.slot * BLOCK_ROWS + row) * RESULT_QUADS + valueColumn + 0u] = result;
        } else {
          storeResult(item.row + row, valueColumn + 0u, result);
        }
      }
    }
  }
  {
    let row = valueGroup * VALUE_ROWS + 2u;
    let share = factors[row / 4u][row % 4u];
    if (row < item.rows) {
      if (valueColumn + 0u < RESULT_QUADS) {
        let result = select(select(o2_0, vec4<f32>(), vec4<u32>(4u * (valueColumn + 0u)) + vec4<u32>(0u, 1u, 2u, 3u) >= vec4<u32>(7u)) * share, vec4<f32>(), share == 0.0);
        if (split) {
          partial[(item.slot * BLOCK_ROWS + row) * RESULT_QUADS + valueColumn + 0u] = result;
        } else {
          storeResult(item.row + row, valueColumn + 0u, result);
        }
      }
    }
  }
  {
    let row = valueGroup * VALUE_ROWS + 3u;
    let share = factors[row / 4u][row % 4u];
    if (row < item.rows) {
      if (valueColumn + 0u < RESULT_QUADS) {
        let result = select(select(o3_0, vec4<f32>(), vec4<u32>(4u * (valueColumn + 0u)) + vec4<u32>(0u, 1u, 2u, 3u) >= vec4<u32>(7u)) * share, vec4<f32>(), share == 0.0);
        if (split) {
          partial[(item.slot * BLOCK_ROWS + row) * RESULT_QUADS + valueColumn + 0u] = result;
        } else {
          storeResult(item.row + row, valueColumn + 0u, result);
        }
      }
    }
  }
}
