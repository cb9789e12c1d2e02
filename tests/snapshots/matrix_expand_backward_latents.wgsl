enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
diagnostic(off, subgroup_uniformity);
// Gradient of the expansion: latents += ∂K · wᵀ, on matrix units. 32 × 32, depth 16
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
@group(0) @binding(1) var<storage, read> leftRows: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> rightRows: array<vec4<f16>>;
@group(0) @binding(3) var<storage, read_write> gradient: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> maxima: array<f32>; // of ∂K, then of ∂V

var<workgroup> leftTile: array<vec4<u32>, 96>;
var<workgroup> rightTile: array<vec4<u32>, 96>;
var<workgroup> results: array<vec4<f32>, 320>;

// Eight halves, rounded to nearest.
fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(bitcast<vec2<u32>>(vec4<f16>(low)), bitcast<vec2<u32>>(vec4<f16>(high)));
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

fn loadLeft(wantedRow: u32, wantedColumn: u32, factor: f32) -> vec4<u32> {
  let exists = wantedRow < params.rows && wantedColumn < params.depth;
  let row = select(0u, wantedRow, exists);
  let column = select(0u, wantedColumn, exists);
  let offset = params.leftBase + row * params.leftRow;
  return select(vec4<u32>(), packHalves(saturated(factor * leftRows[(offset + column) / 4u]), select(vec4<f32>(), saturated(factor * leftRows[(offset + select(column, column + 4u, column + 4u < params.depth)) / 4u]), column + 4u < params.depth)), exists);
}

fn loadRight(wantedRow: u32, wantedColumn: u32, factor: f32) -> vec4<u32> {
  let exists = wantedRow < params.columns && wantedColumn < params.depth;
  let row = select(0u, wantedRow, exists);
  let column = select(0u, wantedColumn, exists);
  let offset = params.rightBase + row * params.rightRow;
  return select(vec4<u32>(), vec4<u32>(bitcast<vec2<u32>>(rightRows[(offset + column) / 4u]), select(vec2<u32>(), bitcast<vec2<u32>>(rightRows[(offset + column) / 4u + select(0u, 1u, column + 4u < params.depth)]), column + 4u < params.depth)), exists);
}

fn put(row: u32, column: u32, value: vec4<f32>) {
  if (row >= params.rows) { return; }
  let offset = params.gradientBase + row * params.gradientRow;
  if (column >= params.columns) { return; }
  let at = (offset + column) / 4u;
  var sum = value;
  if (params.accumulate != 0u) { sum += gradient[at]; }
  gradient[at] = sum;
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let lane = t % 32u;
  let subgroup = t / 32u;
  let rowBase = (params.firstTile + workgroup.y) * BLOCK_M;
  let columnBase = workgroup.x * BLOCK_N;
  let subgroupRow = subgroup / 2u;
  let subgroupColumn = subgroup % 2u;
  let slices = (params.depth + DEPTH - 1u) / DEPTH;

  var own = 0.0;
  for (var i = t; i < 256u; i += 128u) { own = max(own, maxima[i]); }
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

  var c0_0: subgroup_matrix_result<f32, 16, 16>;
  var a0 = vec4<u32>();
  var b0 = vec4<u32>();
  if (t < 64u) {
    a0 = loadLeft(rowBase + (t) / 2u, 0u * DEPTH + (t) % 2u * 8u, factor);
  }
  if (t < 64u) {
    b0 = loadRight(columnBase + (t) / 2u, 0u * DEPTH + (t) % 2u * 8u, factor);
  }
  for (var slice = 0u; slice < slices; slice += 1u) {
    if (t < 64u) {
      leftTile[(t) / 2u * 3u + (t) % 2u] = a0;
    }
    if (t < 64u) {
      rightTile[(t) / 2u * 3u + (t) % 2u] = b0;
    }
    workgroupBarrier();
    if (slice + 1u < slices) { // a branch for the driver's sake: see matrix_expand.ts
      if (t < 64u) {
        a0 = loadLeft(rowBase + (t) / 2u, (slice + 1u) * DEPTH + (t) % 2u * 8u, factor);
      }
      if (t < 64u) {
        b0 = loadRight(columnBase + (t) / 2u, (slice + 1u) * DEPTH + (t) % 2u * 8u, factor);
      }
    }
    {
      let left0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&leftTile, (subgroupRow * 1u + 0u) * 48u + 0u * 2u, 3u);
      {
        let rightOne = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, col_major>(&rightTile, (subgroupColumn * 1u + 0u) * 48u + 0u * 2u, 3u);
        c0_0 = subgroupMatrixMultiplyAccumulate(left0, rightOne, c0_0);
      }
    }
    workgroupBarrier();
  }

  let part = subgroup * 80u;
  {
    {
      subgroupMatrixStore<row_major>(&results, part, c0_0, 5u);
      workgroupBarrier();
      {
        let ownRow = (lane + 0u) / 4u;
        let ownQuad = (lane + 0u) % 4u;
        let row = rowBase + (subgroupRow * 1u + 0u) * 16u + ownRow;
        let column = columnBase + (subgroupColumn * 1u + 0u) * 16u + 4u * ownQuad;
        put(row, column, inverse * results[part + ownRow * 5u + ownQuad]);
      }
      {
        let ownRow = (lane + 32u) / 4u;
        let ownQuad = (lane + 32u) % 4u;
        let row = rowBase + (subgroupRow * 1u + 0u) * 16u + ownRow;
        let column = columnBase + (subgroupColumn * 1u + 0u) * 16u + 4u * ownQuad;
        put(row, column, inverse * results[part + ownRow * 5u + ownQuad]);
      }
      workgroupBarrier();
    }
  }
}
