enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
diagnostic(off, subgroup_uniformity);
// Gradient of MLA attention on matrix units: ∂query.
// 32 rows, 32 columns, 4 subgroups
const COLUMNS = 32u;
const NOPE_QUADS = 4u;
const ROPE_QUADS = 2u;
const DEPTH_QUADS = 6u;
const VALUE_QUADS = 4u;
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
@group(0) @binding(6) var<storage, read_write> gradient: array<vec4<f32>>;


var<workgroup> wide: array<array<vec4<u32>, 112>, 2>;
var<workgroup> narrow: array<array<vec4<u32>, 80>, 2>;
var<workgroup> scores: array<array<vec4<f32>, 144>, 2>;
var<workgroup> gradients: array<array<vec4<f32>, 144>, 2>;
var<workgroup> slopes: array<array<vec4<u32>, 32>, 4>;

// Eight halves, rounded to nearest.
fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(bitcast<vec2<u32>>(vec4<f16>(low)), bitcast<vec2<u32>>(vec4<f16>(high)));
}


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
  if (column >= width) { return; }
  let at = (offset + column) / 4u;
  var sum = value;
  if (params.accumulate != 0u) { sum += gradient[at]; }
  gradient[at] = sum;
}

fn ofKv(row: u32, head: u32) -> u32 { return row * params.groupKvHeads + head / params.groupSize - params.firstKvHead; }

fn putKey(factor: f32, row: u32, head: u32, column: u32, value: vec4<f32>) {
  if (column < 8u * NOPE_QUADS) {
    put(params.gradientBase + row * params.gradientRow + head * params.gradientHead, column, params.P, factor * value);
  } else {
    put(params.gradientBase + row * params.gradientRow + head * params.gradientHead + params.P, column - 8u * NOPE_QUADS, params.R, factor * value);
  }
}


@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let lane = t % 32u;
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
  var f0_0: subgroup_matrix_left<f16, 16, 16>;
  var f0_1: subgroup_matrix_left<f16, 16, 16>;
  var f0_2: subgroup_matrix_left<f16, 16, 16>;
  var f1_0: subgroup_matrix_left<f16, 16, 16>;
  var f1_1: subgroup_matrix_left<f16, 16, 16>;
  var f1_2: subgroup_matrix_left<f16, 16, 16>;
  var s0_0: subgroup_matrix_result<f32, 16, 16>;
  var s1_0: subgroup_matrix_result<f32, 16, 16>;
  var g0_0: subgroup_matrix_result<f32, 16, 16>;
  var g1_0: subgroup_matrix_result<f32, 16, 16>;
  var wide0 = vec4<u32>();
  var wide1 = vec4<u32>();
  var narrow0 = vec4<u32>();
  let stat = rowStats(block.rowStart + softRow, block.rowEnd, firstHead);

  {
    workgroupBarrier();
    {
      let quad = loadQuery(block.rowStart + 0u * 32u + (t) / DEPTH_QUADS, block.rowEnd, firstHead, (t) % DEPTH_QUADS);
      wide[((t) / DEPTH_QUADS / 16u)][(t) / DEPTH_QUADS % 16u * 7u + (t) % DEPTH_QUADS] = quad;
    }
    if (t + 128u < 192u) {
      {
        let quad = loadQuery(block.rowStart + 0u * 32u + (t + 128u) / DEPTH_QUADS, block.rowEnd, firstHead, (t + 128u) % DEPTH_QUADS);
        wide[((t + 128u) / DEPTH_QUADS / 16u)][(t + 128u) / DEPTH_QUADS % 16u * 7u + (t + 128u) % DEPTH_QUADS] = quad;
      }
    }
    {
      let quad = loadGrad(block.rowStart + 0u * 32u + (t) / VALUE_QUADS, block.rowEnd, firstHead, (t) % VALUE_QUADS);
      narrow[((t) / VALUE_QUADS / 16u)][(t) / VALUE_QUADS % 16u * 5u + (t) % VALUE_QUADS] = quad;
    }
    workgroupBarrier();
    if (isScore) {
      {
        if ((rowGroup * 2u + 0u) / 2u == 0u) {
        {
            f0_0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&wide[((rowGroup * 2u + 0u) % 2u)], 0u * 2u, 7u);
        }
        {
            f0_1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&wide[((rowGroup * 2u + 0u) % 2u)], 1u * 2u, 7u);
        }
        {
            f0_2 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&wide[((rowGroup * 2u + 0u) % 2u)], 2u * 2u, 7u);
        }
        }
      }
      {
        if ((rowGroup * 2u + 1u) / 2u == 0u) {
        {
            f1_0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&wide[((rowGroup * 2u + 1u) % 2u)], 0u * 2u, 7u);
        }
        {
            f1_1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&wide[((rowGroup * 2u + 1u) % 2u)], 1u * 2u, 7u);
        }
        {
            f1_2 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&wide[((rowGroup * 2u + 1u) % 2u)], 2u * 2u, 7u);
        }
        }
      }
    } else {
      {
        if ((rowGroup * 2u + 0u) / 2u == 0u) {
        {
            f0_0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&narrow[((rowGroup * 2u + 0u) % 2u)], 0u * 2u, 5u);
        }
        {
            f0_1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&narrow[((rowGroup * 2u + 0u) % 2u)], 1u * 2u, 5u);
        }
        }
      }
      {
        if ((rowGroup * 2u + 1u) / 2u == 0u) {
        {
            f1_0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&narrow[((rowGroup * 2u + 1u) % 2u)], 0u * 2u, 5u);
        }
        {
            f1_1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&narrow[((rowGroup * 2u + 1u) % 2u)], 1u * 2u, 5u);
        }
        }
      }
    }
  }
  workgroupBarrier();

  wide0 = loadKey(block.columnStart + (t) / DEPTH_QUADS, columnEnd, firstHead, (t) % DEPTH_QUADS);
  if (t + 128u < 192u) {
    wide1 = loadKey(block.columnStart + (t + 128u) / DEPTH_QUADS, columnEnd, firstHead, (t + 128u) % DEPTH_QUADS);
  }
  narrow0 = loadValue(block.columnStart + (t) / VALUE_QUADS, columnEnd, firstHead, (t) % VALUE_QUADS);
  for (var step = 0u; step < count; step += 1u) {
    let head = firstHead + step / blockCount;
    let columnBase = block.columnStart + step % blockCount * COLUMNS;
    let masking = columnBase < block.sharedStart || columnBase + COLUMNS > block.sharedEnd;
    if (masking) {
      wide0 = finiteHalves(wide0);
      wide1 = finiteHalves(wide1);
      narrow0 = finiteHalves(narrow0);
    }
    wide[((t) / DEPTH_QUADS / 16u)][(t) / DEPTH_QUADS % 16u * 7u + (t) % DEPTH_QUADS] = wide0;
    if (t + 128u < 192u) {
      wide[((t + 128u) / DEPTH_QUADS / 16u)][(t + 128u) / DEPTH_QUADS % 16u * 7u + (t + 128u) % DEPTH_QUADS] = wide1;
    }
    narrow[((t) / VALUE_QUADS / 16u)][(t) / VALUE_QUADS % 16u * 5u + (t) % VALUE_QUADS] = narrow0;
    workgroupBarrier();
    {
      let next = min(step + 1u, count - 1u);
      let nextBase = block.columnStart + next % blockCount * COLUMNS;
      wide0 = loadKey(nextBase + (t) / DEPTH_QUADS, columnEnd, (firstHead + next / blockCount), (t) % DEPTH_QUADS);
      if (t + 128u < 192u) {
        wide1 = loadKey(nextBase + (t + 128u) / DEPTH_QUADS, columnEnd, (firstHead + next / blockCount), (t + 128u) % DEPTH_QUADS);
      }
      narrow0 = loadValue(nextBase + (t) / VALUE_QUADS, columnEnd, (firstHead + next / blockCount), (t) % VALUE_QUADS);
    }
    if (isScore) {
      {
        {
          s0_0 = subgroup_matrix_result<f32, 16, 16>();
        }
      }
      {
        {
          s1_0 = subgroup_matrix_result<f32, 16, 16>();
        }
      }
      {
        {
          let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&wide[(share * 1u + 0u)], 0u * 2u, 7u);
          s0_0 = subgroupMatrixMultiplyAccumulate(f0_0, right, s0_0);
          s1_0 = subgroupMatrixMultiplyAccumulate(f1_0, right, s1_0);
        }
      }
      {
        {
          let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&wide[(share * 1u + 0u)], 1u * 2u, 7u);
          s0_0 = subgroupMatrixMultiplyAccumulate(f0_1, right, s0_0);
          s1_0 = subgroupMatrixMultiplyAccumulate(f1_1, right, s1_0);
        }
      }
      {
        {
          let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&wide[(share * 1u + 0u)], 2u * 2u, 7u);
          s0_0 = subgroupMatrixMultiplyAccumulate(f0_2, right, s0_0);
          s1_0 = subgroupMatrixMultiplyAccumulate(f1_2, right, s1_0);
        }
      }
      switch (share) {
        case 0u: {
          {
            {
              subgroupMatrixStore<row_major>(&scores[(rowGroup * 2u + 0u)], (0u * 1u + 0u) * 4u, s0_0, 9u);
            }
          }
          {
            {
              subgroupMatrixStore<row_major>(&scores[(rowGroup * 2u + 1u)], (0u * 1u + 0u) * 4u, s1_0, 9u);
            }
          }
        }
        default: {
          {
            {
              subgroupMatrixStore<row_major>(&scores[(rowGroup * 2u + 0u)], (1u * 1u + 0u) * 4u, s0_0, 9u);
            }
          }
          {
            {
              subgroupMatrixStore<row_major>(&scores[(rowGroup * 2u + 1u)], (1u * 1u + 0u) * 4u, s1_0, 9u);
            }
          }
        }
      }
    } else {
      {
        {
          s0_0 = subgroup_matrix_result<f32, 16, 16>();
        }
      }
      {
        {
          s1_0 = subgroup_matrix_result<f32, 16, 16>();
        }
      }
      {
        {
          let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&narrow[(share * 1u + 0u)], 0u * 2u, 5u);
          s0_0 = subgroupMatrixMultiplyAccumulate(f0_0, right, s0_0);
          s1_0 = subgroupMatrixMultiplyAccumulate(f1_0, right, s1_0);
        }
      }
      {
        {
          let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&narrow[(share * 1u + 0u)], 1u * 2u, 5u);
          s0_0 = subgroupMatrixMultiplyAccumulate(f0_1, right, s0_0);
          s1_0 = subgroupMatrixMultiplyAccumulate(f1_1, right, s1_0);
        }
      }
      switch (share) {
        case 0u: {
          {
            {
              subgroupMatrixStore<row_major>(&gradients[(rowGroup * 2u + 0u)], (0u * 1u + 0u) * 4u, s0_0, 9u);
            }
          }
          {
            {
              subgroupMatrixStore<row_major>(&gradients[(rowGroup * 2u + 1u)], (0u * 1u + 0u) * 4u, s1_0, 9u);
            }
          }
        }
        default: {
          {
            {
              subgroupMatrixStore<row_major>(&gradients[(rowGroup * 2u + 0u)], (1u * 1u + 0u) * 4u, s0_0, 9u);
            }
          }
          {
            {
              subgroupMatrixStore<row_major>(&gradients[(rowGroup * 2u + 1u)], (1u * 1u + 0u) * 4u, s1_0, 9u);
            }
          }
        }
      }
    }
    workgroupBarrier();
    var x0 = scoreOf(scores[(softRow / 16u)][softRow % 16u * 9u + softPart * 2u + 0u]);
    var y0 = gradients[(softRow / 16u)][softRow % 16u * 9u + softPart * 2u + 0u] * ranges.x;
    var x1 = scoreOf(scores[(softRow / 16u)][softRow % 16u * 9u + softPart * 2u + 1u]);
    var y1 = gradients[(softRow / 16u)][softRow % 16u * 9u + softPart * 2u + 1u] * ranges.x;
    if (masking) {
      let row = i32(block.rowStart + softRow);
      let start = vec4<i32>(row + block.diagonalStart);
      let end = vec4<i32>(min(row + block.diagonalEnd, i32(columnEnd)));
      { let column = vec4<i32>(i32(columnBase + 4u * (softPart * 2u + 0u))) + vec4<i32>(0, 1, 2, 3); x0 = select(vec4<f32>(MASKED), x0, (column < end) & (column >= start)); }
      { let column = vec4<i32>(i32(columnBase + 4u * (softPart * 2u + 1u))) + vec4<i32>(0, 1, 2, 3); x1 = select(vec4<f32>(MASKED), x1, (column < end) & (column >= start)); }
    }
    let logSum0 = vec4<f32>(stat.x);
    let delta0 = vec4<f32>(stat.y);
    let p0 = select(exp2(x0 - logSum0), vec4<f32>(), x0 <= vec4<f32>(UNSEEN));
    let kept0 = p0;
    y0 = saturated(select(p0 * (y0 - delta0) * ranges.y, vec4<f32>(), p0 == vec4<f32>()));
    let logSum1 = vec4<f32>(stat.x);
    let delta1 = vec4<f32>(stat.y);
    let p1 = select(exp2(x1 - logSum1), vec4<f32>(), x1 <= vec4<f32>(UNSEEN));
    let kept1 = p1;
    y1 = saturated(select(p1 * (y1 - delta1) * ranges.y, vec4<f32>(), p1 == vec4<f32>()));
    {
      let packed = packHalves(y0, y1);
      slopes[(softRow / 16u * 2u + (softPart * 2u + 0u) / 4u)][softRow % 16u * 2u + (softPart * 2u + 0u) / 2u % 2u] = packed;
    }
    workgroupBarrier();
    if (isScore) {
      switch (share) {
        case 0u: {
          {
            let left0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 0u) * 2u + 0u)], 0u, 2u);
            let left1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 1u) * 2u + 0u)], 0u, 2u);
            {
              let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&wide[0u], 0u * 2u, 7u);
              g0_0 = subgroupMatrixMultiplyAccumulate(left0, right, g0_0);
              g1_0 = subgroupMatrixMultiplyAccumulate(left1, right, g1_0);
            }
          }
          {
            let left0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 0u) * 2u + 1u)], 0u, 2u);
            let left1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 1u) * 2u + 1u)], 0u, 2u);
            {
              let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&wide[1u], 0u * 2u, 7u);
              g0_0 = subgroupMatrixMultiplyAccumulate(left0, right, g0_0);
              g1_0 = subgroupMatrixMultiplyAccumulate(left1, right, g1_0);
            }
          }
        }
        default: {
          {
            let left0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 0u) * 2u + 0u)], 0u, 2u);
            let left1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 1u) * 2u + 0u)], 0u, 2u);
            {
              let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&wide[0u], 1u * 2u, 7u);
              g0_0 = subgroupMatrixMultiplyAccumulate(left0, right, g0_0);
              g1_0 = subgroupMatrixMultiplyAccumulate(left1, right, g1_0);
            }
          }
          {
            let left0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 0u) * 2u + 1u)], 0u, 2u);
            let left1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 1u) * 2u + 1u)], 0u, 2u);
            {
              let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&wide[1u], 1u * 2u, 7u);
              g0_0 = subgroupMatrixMultiplyAccumulate(left0, right, g0_0);
              g1_0 = subgroupMatrixMultiplyAccumulate(left1, right, g1_0);
            }
          }
        }
      }
    } else {
      switch (share) {
        case 0u: {
          {
            let left0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 0u) * 2u + 0u)], 0u, 2u);
            let left1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 1u) * 2u + 0u)], 0u, 2u);
            {
              let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&wide[0u], 2u * 2u, 7u);
              g0_0 = subgroupMatrixMultiplyAccumulate(left0, right, g0_0);
              g1_0 = subgroupMatrixMultiplyAccumulate(left1, right, g1_0);
            }
          }
          {
            let left0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 0u) * 2u + 1u)], 0u, 2u);
            let left1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 1u) * 2u + 1u)], 0u, 2u);
            {
              let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&wide[1u], 2u * 2u, 7u);
              g0_0 = subgroupMatrixMultiplyAccumulate(left0, right, g0_0);
              g1_0 = subgroupMatrixMultiplyAccumulate(left1, right, g1_0);
            }
          }
        }
        default: {
          {
            let left0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 0u) * 2u + 0u)], 0u, 2u);
            let left1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 1u) * 2u + 0u)], 0u, 2u);
            {
              let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&wide[0u], 2u * 2u, 7u);
              g0_0 = subgroupMatrixMultiplyAccumulate(left0, right, g0_0);
              g1_0 = subgroupMatrixMultiplyAccumulate(left1, right, g1_0);
            }
          }
          {
            let left0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 0u) * 2u + 1u)], 0u, 2u);
            let left1 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&slopes[((rowGroup * 2u + 1u) * 2u + 1u)], 0u, 2u);
            {
              let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&wide[1u], 2u * 2u, 7u);
              g0_0 = subgroupMatrixMultiplyAccumulate(left0, right, g0_0);
              g1_0 = subgroupMatrixMultiplyAccumulate(left1, right, g1_0);
            }
          }
        }
      }
    }
    workgroupBarrier();
  }

  let own = subgroup % 2u * 64u;
  let keyFactor = params.softmaxScale * ranges.z;

  {
    let isWide = isScore;
    {
      {
        subgroupMatrixStore<row_major>(&scores[(subgroup / 2u)], own, g0_0, 4u);
        workgroupBarrier();
        {
          let ownRow = (lane + 0u) / 4u;
          let ownQuad = (lane + 0u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + 0u) * 16u + ownRow;
          let fragment = 0u + share * 1u + 0u;
          if (row < block.rowEnd && fragment < 3u && isWide) {
            putKey(keyFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u)][own + ownRow * 4u + ownQuad]);
          }
        }
        {
          let ownRow = (lane + 32u) / 4u;
          let ownQuad = (lane + 32u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + 0u) * 16u + ownRow;
          let fragment = 0u + share * 1u + 0u;
          if (row < block.rowEnd && fragment < 3u && isWide) {
            putKey(keyFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u)][own + ownRow * 4u + ownQuad]);
          }
        }
        workgroupBarrier();
      }
    }
    {
      {
        subgroupMatrixStore<row_major>(&scores[(subgroup / 2u)], own, g1_0, 4u);
        workgroupBarrier();
        {
          let ownRow = (lane + 0u) / 4u;
          let ownQuad = (lane + 0u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + 1u) * 16u + ownRow;
          let fragment = 0u + share * 1u + 0u;
          if (row < block.rowEnd && fragment < 3u && isWide) {
            putKey(keyFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u)][own + ownRow * 4u + ownQuad]);
          }
        }
        {
          let ownRow = (lane + 32u) / 4u;
          let ownQuad = (lane + 32u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + 1u) * 16u + ownRow;
          let fragment = 0u + share * 1u + 0u;
          if (row < block.rowEnd && fragment < 3u && isWide) {
            putKey(keyFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u)][own + ownRow * 4u + ownQuad]);
          }
        }
        workgroupBarrier();
      }
    }
  }
  {
    let isWide = !isScore;
    {
      {
        subgroupMatrixStore<row_major>(&scores[(subgroup / 2u)], own, g0_0, 4u);
        workgroupBarrier();
        {
          let ownRow = (lane + 0u) / 4u;
          let ownQuad = (lane + 0u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + 0u) * 16u + ownRow;
          let fragment = 2u + share * 1u + 0u;
          if (row < block.rowEnd && fragment < 3u && isWide) {
            putKey(keyFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u)][own + ownRow * 4u + ownQuad]);
          }
        }
        {
          let ownRow = (lane + 32u) / 4u;
          let ownQuad = (lane + 32u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + 0u) * 16u + ownRow;
          let fragment = 2u + share * 1u + 0u;
          if (row < block.rowEnd && fragment < 3u && isWide) {
            putKey(keyFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u)][own + ownRow * 4u + ownQuad]);
          }
        }
        workgroupBarrier();
      }
    }
    {
      {
        subgroupMatrixStore<row_major>(&scores[(subgroup / 2u)], own, g1_0, 4u);
        workgroupBarrier();
        {
          let ownRow = (lane + 0u) / 4u;
          let ownQuad = (lane + 0u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + 1u) * 16u + ownRow;
          let fragment = 2u + share * 1u + 0u;
          if (row < block.rowEnd && fragment < 3u && isWide) {
            putKey(keyFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u)][own + ownRow * 4u + ownQuad]);
          }
        }
        {
          let ownRow = (lane + 32u) / 4u;
          let ownQuad = (lane + 32u) % 4u;
          let row = block.rowStart + (rowGroup * 2u + 1u) * 16u + ownRow;
          let fragment = 2u + share * 1u + 0u;
          if (row < block.rowEnd && fragment < 3u && isWide) {
            putKey(keyFactor, row, firstHead, fragment * 16u + 4u * ownQuad, scores[(subgroup / 2u)][own + ownRow * 4u + ownQuad]);
          }
        }
        workgroupBarrier();
      }
    }
  }
}
