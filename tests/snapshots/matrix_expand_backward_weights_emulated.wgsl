// Gradient of the expansion: weights = cᵀ · ∂K, on matrix units. 32 × 32, depth 16
const BLOCK_M = 32u;
const BLOCK_N = 32u;
const DEPTH = 16u;

struct Params {
  rows: u32,         // of the product
  columns: u32,
  depth: u32,        // length of the summed axis
  firstTile: u32,    // index of the first row tile of this dispatch
  leftBase: u32,     // elements from the binding's start to the first row
  leftRow: u32,      // elements from one row to the next
  leftItemRows: u32, // rows of a batch item of latents
  leftGap: u32,      // further elements from one batch item to the next, modulo 2^32
  rightBase: u32,
  rightRow: u32,
  gradientBase: u32,
  gradientRow: u32,
  accumulate: u32,   // whether to add to what is there
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> leftRows: array<f32>;
@group(0) @binding(2) var<storage, read> rightRows: array<f32>;
@group(0) @binding(3) var<storage, read_write> gradient: array<f32>;
@group(0) @binding(4) var<storage, read> maxima: array<f32>; // of ∂K, then of ∂V

struct LeftFragment { k0: vec4<f32>, k4: vec4<f32>, k8: vec4<f32>, k12: vec4<f32> }
struct ResultFragment { c0: vec4<f32>, c4: vec4<f32> }

var<private> lane: u32;
var<workgroup> leftTile: array<vec4<u32>, 80>;
var<workgroup> rightTile: array<vec4<u32>, 80>;
var<workgroup> results: array<vec4<f32>, 320>;
var<workgroup> exchanged: array<f32, 256>;

fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(pack2x16float(low.xy), pack2x16float(low.zw), pack2x16float(high.xy), pack2x16float(high.zw));
}

fn lowHalves(quad: vec4<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y)); }
fn highHalves(quad: vec4<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(quad.z), unpack2x16float(quad.w)); }

fn leftTile_left(offset: u32, stride: u32) -> LeftFragment {
  let first = leftTile[offset + lane / 2u * stride];
  let second = leftTile[offset + lane / 2u * stride + 1u];
  return LeftFragment(lowHalves(first), highHalves(first), lowHalves(second), highHalves(second));
}

fn leftTile_leftColumn(offset: u32, stride: u32) -> LeftFragment {
  let row = lane / 2u;
  var halves: array<f32, 16>;
  for (var k = 0u; k < 16u; k += 1u) {
    let quad = leftTile[offset + k * stride + row / 8u];
    halves[k] = unpack2x16float(quad[row % 8u / 2u])[row % 2u];
  }
  return LeftFragment(
    vec4<f32>(halves[0], halves[1], halves[2], halves[3]),
    vec4<f32>(halves[4], halves[5], halves[6], halves[7]),
    vec4<f32>(halves[8], halves[9], halves[10], halves[11]),
    vec4<f32>(halves[12], halves[13], halves[14], halves[15]),
  );
}

fn leftTile_row(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var result = sum;
  var rows = array<vec4<f32>, 4>(left.k0, left.k4, left.k8, left.k12);
  for (var k = 0u; k < 16u; k += 1u) {
    let right = leftTile[offset + k * stride + lane % 2u];
    let factor = rows[k / 4u][k % 4u];
    result.c0 += factor * lowHalves(right);
    result.c4 += factor * highHalves(right);
  }
  return result;
}

fn leftTile_dot(left: LeftFragment, at: u32) -> f32 {
  let first = leftTile[at];
  let second = leftTile[at + 1u];
  return dot(left.k0, lowHalves(first)) + dot(left.k4, highHalves(first)) +
    dot(left.k8, lowHalves(second)) + dot(left.k12, highHalves(second));
}

fn leftTile_column(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var sums: array<f32, 8>;
  for (var c = 0u; c < 8u; c += 1u) { sums[c] = leftTile_dot(left, offset + (lane % 2u * 8u + c) * stride); }
  return ResultFragment(
    sum.c0 + vec4<f32>(sums[0], sums[1], sums[2], sums[3]),
    sum.c4 + vec4<f32>(sums[4], sums[5], sums[6], sums[7]),
  );
}

fn rightTile_left(offset: u32, stride: u32) -> LeftFragment {
  let first = rightTile[offset + lane / 2u * stride];
  let second = rightTile[offset + lane / 2u * stride + 1u];
  return LeftFragment(lowHalves(first), highHalves(first), lowHalves(second), highHalves(second));
}

fn rightTile_leftColumn(offset: u32, stride: u32) -> LeftFragment {
  let row = lane / 2u;
  var halves: array<f32, 16>;
  for (var k = 0u; k < 16u; k += 1u) {
    let quad = rightTile[offset + k * stride + row / 8u];
    halves[k] = unpack2x16float(quad[row % 8u / 2u])[row % 2u];
  }
  return LeftFragment(
    vec4<f32>(halves[0], halves[1], halves[2], halves[3]),
    vec4<f32>(halves[4], halves[5], halves[6], halves[7]),
    vec4<f32>(halves[8], halves[9], halves[10], halves[11]),
    vec4<f32>(halves[12], halves[13], halves[14], halves[15]),
  );
}

fn rightTile_row(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var result = sum;
  var rows = array<vec4<f32>, 4>(left.k0, left.k4, left.k8, left.k12);
  for (var k = 0u; k < 16u; k += 1u) {
    let right = rightTile[offset + k * stride + lane % 2u];
    let factor = rows[k / 4u][k % 4u];
    result.c0 += factor * lowHalves(right);
    result.c4 += factor * highHalves(right);
  }
  return result;
}

fn rightTile_dot(left: LeftFragment, at: u32) -> f32 {
  let first = rightTile[at];
  let second = rightTile[at + 1u];
  return dot(left.k0, lowHalves(first)) + dot(left.k4, highHalves(first)) +
    dot(left.k8, lowHalves(second)) + dot(left.k12, highHalves(second));
}

fn rightTile_column(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var sums: array<f32, 8>;
  for (var c = 0u; c < 8u; c += 1u) { sums[c] = rightTile_dot(left, offset + (lane % 2u * 8u + c) * stride); }
  return ResultFragment(
    sum.c0 + vec4<f32>(sums[0], sums[1], sums[2], sums[3]),
    sum.c4 + vec4<f32>(sums[4], sums[5], sums[6], sums[7]),
  );
}

fn results_load(offset: u32, stride: u32) -> ResultFragment {
  let at = offset + lane / 2u * stride + lane % 2u * 2u;
  return ResultFragment(results[at], results[at + 1u]);
}

fn results_store(offset: u32, stride: u32, result: ResultFragment) {
  let at = offset + lane / 2u * stride + lane % 2u * 2u;
  results[at] = result.c0;
  results[at + 1u] = result.c4;
}

fn results_storeColumn(offset: u32, stride: u32, result: ResultFragment) {
  let row = lane / 2u;
  for (var c = 0u; c < 8u; c += 1u) {
    let at = offset + (lane % 2u * 8u + c) * stride + row / 4u;
    results[at][row % 4u] = select(result.c4[c % 4u], result.c0[c % 4u], c < 4u);
  }
}
var<workgroup> most: array<f32, 128>;

fn saturated(x: vec4<f32>) -> vec4<f32> {
  let isNan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
  return select(clamp(x, vec4<f32>(-65504.0), vec4<f32>(65504.0)), x, isNan);
}

fn finiteHalves(quad: vec4<u32>) -> vec4<u32> {
  let low = select(vec4<u32>(0x0000ffffu), vec4<u32>(), (quad & vec4<u32>(0x7c00u)) == vec4<u32>(0x7c00u));
  let high = select(vec4<u32>(0xffff0000u), vec4<u32>(), (quad & vec4<u32>(0x7c000000u)) == vec4<u32>(0x7c000000u));
  return quad & (low | high);
}

// Latents of a row that nobody saw may hold anything; where the row was seen, it comes back through ∂K.
fn loadLeft(wantedRow: u32, wantedColumn: u32, factor: f32) -> vec4<u32> {
  let exists = wantedRow < params.depth && wantedColumn < params.rows;
  let row = select(0u, wantedRow, exists);
  let column = select(0u, wantedColumn, exists);
  let offset = params.leftBase + row * params.leftRow + (row / params.leftItemRows) * params.leftGap;
  return select(vec4<u32>(), finiteHalves(packHalves(saturated(vec4<f32>(select(0.0, leftRows[offset + min(column + 0u, params.rows - 1u)], column + 0u < params.rows), select(0.0, leftRows[offset + min(column + 1u, params.rows - 1u)], column + 1u < params.rows), select(0.0, leftRows[offset + min(column + 2u, params.rows - 1u)], column + 2u < params.rows), select(0.0, leftRows[offset + min(column + 3u, params.rows - 1u)], column + 3u < params.rows))), select(vec4<f32>(), saturated(vec4<f32>(select(0.0, leftRows[offset + min(select(column, column + 4u, column + 4u < params.rows) + 0u, params.rows - 1u)], select(column, column + 4u, column + 4u < params.rows) + 0u < params.rows), select(0.0, leftRows[offset + min(select(column, column + 4u, column + 4u < params.rows) + 1u, params.rows - 1u)], select(column, column + 4u, column + 4u < params.rows) + 1u < params.rows), select(0.0, leftRows[offset + min(select(column, column + 4u, column + 4u < params.rows) + 2u, params.rows - 1u)], select(column, column + 4u, column + 4u < params.rows) + 2u < params.rows), select(0.0, leftRows[offset + min(select(column, column + 4u, column + 4u < params.rows) + 3u, params.rows - 1u)], select(column, column + 4u, column + 4u < params.rows) + 3u < params.rows))), column + 4u < params.rows))), exists);
}

fn loadRight(wantedRow: u32, wantedColumn: u32, factor: f32) -> vec4<u32> {
  let exists = wantedRow < params.depth && wantedColumn < params.columns;
  let row = select(0u, wantedRow, exists);
  let column = select(0u, wantedColumn, exists);
  let offset = params.rightBase + row * params.rightRow;
  return select(vec4<u32>(), packHalves(saturated(factor * vec4<f32>(select(0.0, rightRows[offset + min(column + 0u, params.columns - 1u)], column + 0u < params.columns), select(0.0, rightRows[offset + min(column + 1u, params.columns - 1u)], column + 1u < params.columns), select(0.0, rightRows[offset + min(column + 2u, params.columns - 1u)], column + 2u < params.columns), select(0.0, rightRows[offset + min(column + 3u, params.columns - 1u)], column + 3u < params.columns))), select(vec4<f32>(), saturated(factor * vec4<f32>(select(0.0, rightRows[offset + min(select(column, column + 4u, column + 4u < params.columns) + 0u, params.columns - 1u)], select(column, column + 4u, column + 4u < params.columns) + 0u < params.columns), select(0.0, rightRows[offset + min(select(column, column + 4u, column + 4u < params.columns) + 1u, params.columns - 1u)], select(column, column + 4u, column + 4u < params.columns) + 1u < params.columns), select(0.0, rightRows[offset + min(select(column, column + 4u, column + 4u < params.columns) + 2u, params.columns - 1u)], select(column, column + 4u, column + 4u < params.columns) + 2u < params.columns), select(0.0, rightRows[offset + min(select(column, column + 4u, column + 4u < params.columns) + 3u, params.columns - 1u)], select(column, column + 4u, column + 4u < params.columns) + 3u < params.columns))), column + 4u < params.columns)), exists);
}

fn put(row: u32, column: u32, value: vec4<f32>) {
  if (row >= params.rows) { return; }
  let offset = params.gradientBase + row * params.gradientRow;
  for (var i = 0u; i < 4u; i += 1u) {
    if (column + i >= params.columns) { return; }
    let at = offset + column + i;
    var sum = value[i];
    if (params.accumulate != 0u) { sum += gradient[at]; }
    gradient[at] = sum;
  }
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  lane = t % 32u;
  let subgroup = t / 32u;
  let rowBase = (params.firstTile + workgroup.y) * BLOCK_M;
  let columnBase = workgroup.x * BLOCK_N;
  let subgroupRow = subgroup / 2u;
  let subgroupColumn = subgroup % 2u;
  let slices = (params.depth + DEPTH - 1u) / DEPTH;

  var own = 0.0;
  for (var i = t; i < 256u; i += 128u) { own = max(own, maxima[256u + i]); }
  most[t] = own;
  for (var count = 64u; count > 0u; count /= 2u) {
    workgroupBarrier();
    if (t < count) { most[t] = max(most[t], most[t + count]); }
  }
  workgroupBarrier();
  // The largest is below 2^exponent; factors are powers of two within what float32 has.
  let exponent = clamp(i32(bitcast<u32>(most[0]) >> 23u) - 126, -100, 100);
  let factor = bitcast<f32>(u32(15 - exponent + 127) << 23u);
  let inverse = bitcast<f32>(u32(exponent - 15 + 127) << 23u);

  var c: array<ResultFragment, 1>;
  var a0 = vec4<u32>();
  var b0 = vec4<u32>();
  if (t < 64u) {
    a0 = loadLeft(0u * DEPTH + (t) / 4u, rowBase + (t) % 4u * 8u, factor);
  }
  if (t < 64u) {
    b0 = loadRight(0u * DEPTH + (t) / 4u, columnBase + (t) % 4u * 8u, factor);
  }
  for (var slice = 0u; slice < slices; slice += 1u) {
    if (t < 64u) {
      leftTile[(t) / 4u * 5u + (t) % 4u] = a0;
    }
    if (t < 64u) {
      rightTile[(t) / 4u * 5u + (t) % 4u] = b0;
    }
    workgroupBarrier();
    if (slice + 1u < slices) { // a branch for the driver's sake: see matrix_expand.ts
      if (t < 64u) {
        a0 = loadLeft((slice + 1u) * DEPTH + (t) / 4u, rowBase + (t) % 4u * 8u, factor);
      }
      if (t < 64u) {
        b0 = loadRight((slice + 1u) * DEPTH + (t) / 4u, columnBase + (t) % 4u * 8u, factor);
      }
    }
    for (var d = 0u; d < 1u; d += 1u) {
      let left0 = leftTile_leftColumn(d * 80u + (subgroupRow * 1u + 0u) * 2u, 5u);
      for (var n = 0u; n < 1u; n += 1u) {
        let rightOne = d * 80u + (subgroupColumn * 1u + n) * 2u;
        c[0u * 1u + n] = rightTile_row(left0, rightOne, 5u, c[0u * 1u + n]);
      }
    }
    workgroupBarrier();
  }

  let part = subgroup * 80u;
  for (var r = 0u; r < 1u; r += 1u) {
    for (var n = 0u; n < 1u; n += 1u) {
      results_store(part, 5u, c[r * 1u + n]);
      workgroupBarrier();
      {
        let ownRow = (lane + 0u) / 4u;
        let ownQuad = (lane + 0u) % 4u;
        let row = rowBase + (subgroupRow * 1u + r) * 16u + ownRow;
        let column = columnBase + (subgroupColumn * 1u + n) * 16u + 4u * ownQuad;
        put(row, column, inverse * results[part + ownRow * 5u + ownQuad]);
      }
      {
        let ownRow = (lane + 32u) / 4u;
        let ownQuad = (lane + 32u) % 4u;
        let row = rowBase + (subgroupRow * 1u + r) * 16u + ownRow;
        let column = columnBase + (subgroupColumn * 1u + n) * 16u + 4u * ownQuad;
        put(row, column, inverse * results[part + ownRow * 5u + ownQuad]);
      }
      workgroupBarrier();
    }
  }
}
