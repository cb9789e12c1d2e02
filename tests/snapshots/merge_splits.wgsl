// Splits of absorbed attention, merged.
const MASKED = -3.4e38;
const UNSEEN = -3.0e38;
const LOG2E = 1.4426950408889634;
const LN2 = 0.6931471805599453;
const NO_SLOT = 0xffffffffu;
const ABSENT = 0xffffffffu; // a key whose page is not bound
const RESULT_QUADS = 8u;

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
@group(0) @binding(5) var<storage, read> partial: array<vec4<f32>>; // unnormalised sums, by slot and row
@group(0) @binding(6) var<storage, read> stats: array<vec2<f32>>; // maximum in log2 units, and sum
@group(0) @binding(7) var<storage, read_write> output: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read_write> lse: array<f32>;

struct Merge {
  row: u32,
  rows: u32,
  slot: u32,
  splits: u32,
}

@group(0) @binding(1) var<storage, read> merges: array<Merge>;

const BLOCK_ROWS = 8u;
const LANES = 4u;


fn storeResult(row: u32, quad: u32, value: vec4<f32>) {
  output[params.outputBase + row * RESULT_QUADS + quad] = value;
}

fn storeLse(row: u32, value: f32) {
  let token = row / params.heads;
  let item = token / params.queryLength;
  lse[params.lseBase + (item * params.heads + row % params.heads) * params.queryLength + token % params.queryLength] = value;
}

var<workgroup> parts: array<vec2<f32>, 256>;
var<workgroup> weights: array<f32, 256>;
var<workgroup> sums: array<vec4<f32>, 256>;

// Of two parts, as maximum and sum relative to it. One that saw nothing has weight 0; its sum counts if it is NaN.
fn joined(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
  let top = max(a.x, b.x);
  return vec2<f32>(top, weightOf(a.x, top) * a.y + weightOf(b.x, top) * b.y);
}

fn weightOf(own: f32, top: f32) -> f32 { return select(exp2(own - top), 0.0, own <= UNSEEN); }

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) t: u32,
) {
  // Entries past what one axis takes lie along y.
  let index = workgroup.x + workgroup.y / BLOCK_ROWS * groups.x;
  let blockRow = workgroup.y % BLOCK_ROWS;
  if (index >= arrayLength(&merges)) { return; }
  let entry = merges[index];
  if (blockRow >= entry.rows) { return; }
  let lane = t / 64u;
  let quad = workgroup.z * 64u + t % 64u;
  let column = min(quad, RESULT_QUADS - 1u);
  var whole = vec2<f32>(MASKED, 0.0);
  var sum = vec4<f32>();
  for (var first = 0u; first < entry.splits; first += 256u) {
    let count = min(entry.splits - first, 256u);
    let slot = entry.slot + first;
    var own = vec2<f32>(MASKED, 0.0);
    if (t < count) { own = stats[(slot + t) * BLOCK_ROWS + blockRow]; }
    parts[t] = own;
    for (var half = 128u; half > 0u; half /= 2u) {
      workgroupBarrier();
      if (t < half) { parts[t] = joined(parts[t], parts[t + half]); }
    }
    workgroupBarrier();
    let before = whole;
    whole = joined(before, parts[0]);
    sum *= weightOf(before.x, whole.x);
    weights[t] = weightOf(own.x, whole.x);
    workgroupBarrier();
    for (var s = lane; s < count; s += 4u * LANES) {
      // Loads first, of splits that exist; a split that saw nothing takes no part, whatever lies in its slot.
      let at0 = min(s + 0u * LANES, count - 1u);
      let part0 = partial[((slot + at0) * BLOCK_ROWS + blockRow) * RESULT_QUADS + column];
      let at1 = min(s + 1u * LANES, count - 1u);
      let part1 = partial[((slot + at1) * BLOCK_ROWS + blockRow) * RESULT_QUADS + column];
      let at2 = min(s + 2u * LANES, count - 1u);
      let part2 = partial[((slot + at2) * BLOCK_ROWS + blockRow) * RESULT_QUADS + column];
      let at3 = min(s + 3u * LANES, count - 1u);
      let part3 = partial[((slot + at3) * BLOCK_ROWS + blockRow) * RESULT_QUADS + column];
      let weight0 = select(0.0, weights[at0], s + 0u * LANES < count);
      if (weight0 != 0.0) { sum += weight0 * part0; }
      let weight1 = select(0.0, weights[at1], s + 1u * LANES < count);
      if (weight1 != 0.0) { sum += weight1 * part1; }
      let weight2 = select(0.0, weights[at2], s + 2u * LANES < count);
      if (weight2 != 0.0) { sum += weight2 * part2; }
      let weight3 = select(0.0, weights[at3], s + 3u * LANES < count);
      if (weight3 != 0.0) { sum += weight3 * part3; }
    }
  }
  let top = whole.x;
  let total = whole.y;
  sums[t] = sum;
  workgroupBarrier();
  if (lane == 0u && quad < RESULT_QUADS) {
    for (var other = 1u; other < LANES; other += 1u) { sum += sums[other * 64u + t]; }
    storeResult(entry.row + blockRow, quad, select(sum / total, vec4<f32>(), total == 0.0));
  }
  if (t == 0u && workgroup.z == 0u) {
    storeLse(entry.row + blockRow, select((top + log2(total)) * LN2, params.minusInfinity, total == 0.0));
  }
}
