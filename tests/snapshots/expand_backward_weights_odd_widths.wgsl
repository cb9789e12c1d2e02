enable f16;
// Gradient of the expansion: weights = cᵀ · ∂K. 128 × 32, depth 16, 1 stage(s)
const BLOCK_M = 128u;
const BLOCK_N = 32u;
const DEPTH = 16u;
const DEPTH_PIECES = 4u;
const TX = 1u;

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
@group(0) @binding(1) var<storage, read> leftRows: array<f16>;
@group(0) @binding(2) var<storage, read> rightRows: array<f32>;
@group(0) @binding(3) var<storage, read_write> gradient: array<f32>;

var<workgroup> left: array<array<array<vec4<f32>, 33>, 16>, 1>;
var<workgroup> right: array<array<array<vec4<f32>, 9>, 16>, 1>;

// Four neighbours across the summed axis, of one row of it.
fn loadLeft(piece: u32, slice: u32, rowBase: u32) -> vec4<f32> {
  let row = slice * DEPTH + piece / 32u;
  let column = rowBase + (piece % 32u) * 4u;
  if (row >= params.depth || column >= params.rows) { return vec4<f32>(); }
  let offset = params.leftBase + row * params.leftRow + (row / params.leftItemRows) * params.leftGap;
  let value = vec4<f32>(select(0.0, f32(leftRows[offset + min(column + 0u, params.rows - 1u)]), column + 0u < params.rows), select(0.0, f32(leftRows[offset + min(column + 1u, params.rows - 1u)]), column + 1u < params.rows), select(0.0, f32(leftRows[offset + min(column + 2u, params.rows - 1u)]), column + 2u < params.rows), select(0.0, f32(leftRows[offset + min(column + 3u, params.rows - 1u)]), column + 3u < params.rows));
  let exponent = bitcast<vec4<u32>>(value) & vec4<u32>(0x7f800000u);
  return select(value, vec4<f32>(), exponent == vec4<u32>(0x7f800000u));
}

fn stageLeft(piece: u32, stage: u32, value: vec4<f32>) {
  left[stage][piece / 32u][piece % 32u] = value;
}

fn loadRight(piece: u32, slice: u32, columnBase: u32) -> vec4<f32> {
  let row = slice * DEPTH + piece / 8u;
  let column = columnBase + (piece % 8u) * 4u;
  if (row >= params.depth || column >= params.columns) { return vec4<f32>(); }
  let offset = params.rightBase + row * params.rightRow;
  return vec4<f32>(select(0.0, rightRows[offset + min(column + 0u, params.columns - 1u)], column + 0u < params.columns), select(0.0, rightRows[offset + min(column + 1u, params.columns - 1u)], column + 1u < params.columns), select(0.0, rightRows[offset + min(column + 2u, params.columns - 1u)], column + 2u < params.columns), select(0.0, rightRows[offset + min(column + 3u, params.columns - 1u)], column + 3u < params.columns));
}

fn stageRight(piece: u32, stage: u32, value: vec4<f32>) {
  right[stage][piece / 8u][piece % 8u] = value;
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

@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let tx = t % TX;
  let ty = t / TX;
  let rowBase = (params.firstTile + workgroup.y) * BLOCK_M;
  let columnBase = workgroup.x * BLOCK_N;
  var c0_0 = vec4<f32>();
  var c0_1 = vec4<f32>();
  var c0_2 = vec4<f32>();
  var c0_3 = vec4<f32>();
  var c0_4 = vec4<f32>();
  var c0_5 = vec4<f32>();
  var c0_6 = vec4<f32>();
  var c0_7 = vec4<f32>();
  var c1_0 = vec4<f32>();
  var c1_1 = vec4<f32>();
  var c1_2 = vec4<f32>();
  var c1_3 = vec4<f32>();
  var c1_4 = vec4<f32>();
  var c1_5 = vec4<f32>();
  var c1_6 = vec4<f32>();
  var c1_7 = vec4<f32>();
  var c2_0 = vec4<f32>();
  var c2_1 = vec4<f32>();
  var c2_2 = vec4<f32>();
  var c2_3 = vec4<f32>();
  var c2_4 = vec4<f32>();
  var c2_5 = vec4<f32>();
  var c2_6 = vec4<f32>();
  var c2_7 = vec4<f32>();
  var c3_0 = vec4<f32>();
  var c3_1 = vec4<f32>();
  var c3_2 = vec4<f32>();
  var c3_3 = vec4<f32>();
  var c3_4 = vec4<f32>();
  var c3_5 = vec4<f32>();
  var c3_6 = vec4<f32>();
  var c3_7 = vec4<f32>();
  {
    var left0 = vec4<f32>();
    var left1 = vec4<f32>();
    var left2 = vec4<f32>();
    var left3 = vec4<f32>();
    var left4 = vec4<f32>();
    var left5 = vec4<f32>();
    var left6 = vec4<f32>();
    var left7 = vec4<f32>();
    var left8 = vec4<f32>();
    var left9 = vec4<f32>();
    var left10 = vec4<f32>();
    var left11 = vec4<f32>();
    var left12 = vec4<f32>();
    var left13 = vec4<f32>();
    var left14 = vec4<f32>();
    var left15 = vec4<f32>();
    var right0 = vec4<f32>();
    var right1 = vec4<f32>();
    var right2 = vec4<f32>();
    var right3 = vec4<f32>();

    for (var slice = 0u; slice < (params.depth + DEPTH - 1u) / DEPTH; slice += 1u) {
      left0 = loadLeft((t + 0u), slice, rowBase);
      left1 = loadLeft((t + 32u), slice, rowBase);
      left2 = loadLeft((t + 64u), slice, rowBase);
      left3 = loadLeft((t + 96u), slice, rowBase);
      left4 = loadLeft((t + 128u), slice, rowBase);
      left5 = loadLeft((t + 160u), slice, rowBase);
      left6 = loadLeft((t + 192u), slice, rowBase);
      left7 = loadLeft((t + 224u), slice, rowBase);
      left8 = loadLeft((t + 256u), slice, rowBase);
      left9 = loadLeft((t + 288u), slice, rowBase);
      left10 = loadLeft((t + 320u), slice, rowBase);
      left11 = loadLeft((t + 352u), slice, rowBase);
      left12 = loadLeft((t + 384u), slice, rowBase);
      left13 = loadLeft((t + 416u), slice, rowBase);
      left14 = loadLeft((t + 448u), slice, rowBase);
      left15 = loadLeft((t + 480u), slice, rowBase);
      right0 = loadRight((t + 0u), slice, columnBase);
      right1 = loadRight((t + 32u), slice, columnBase);
      right2 = loadRight((t + 64u), slice, columnBase);
      right3 = loadRight((t + 96u), slice, columnBase);
      stageLeft((t + 0u), 0u, left0);
      stageLeft((t + 32u), 0u, left1);
      stageLeft((t + 64u), 0u, left2);
      stageLeft((t + 96u), 0u, left3);
      stageLeft((t + 128u), 0u, left4);
      stageLeft((t + 160u), 0u, left5);
      stageLeft((t + 192u), 0u, left6);
      stageLeft((t + 224u), 0u, left7);
      stageLeft((t + 256u), 0u, left8);
      stageLeft((t + 288u), 0u, left9);
      stageLeft((t + 320u), 0u, left10);
      stageLeft((t + 352u), 0u, left11);
      stageLeft((t + 384u), 0u, left12);
      stageLeft((t + 416u), 0u, left13);
      stageLeft((t + 448u), 0u, left14);
      stageLeft((t + 480u), 0u, left15);
      stageRight((t + 0u), 0u, right0);
      stageRight((t + 32u), 0u, right1);
      stageRight((t + 64u), 0u, right2);
      stageRight((t + 96u), 0u, right3);
      workgroupBarrier();
      for (var d = 0u; d < 16u; d += 1u) {
        let a0 = left[0u][d][ty + 0u];
        let b0 = right[0u][d][tx + 0u];
        let b1 = right[0u][d][tx + 1u];
        let b2 = right[0u][d][tx + 2u];
        let b3 = right[0u][d][tx + 3u];
        let b4 = right[0u][d][tx + 4u];
        let b5 = right[0u][d][tx + 5u];
        let b6 = right[0u][d][tx + 6u];
        let b7 = right[0u][d][tx + 7u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c0_1 = fma(vec4<f32>(a0.x), b1, c0_1);
        c0_2 = fma(vec4<f32>(a0.x), b2, c0_2);
        c0_3 = fma(vec4<f32>(a0.x), b3, c0_3);
        c0_4 = fma(vec4<f32>(a0.x), b4, c0_4);
        c0_5 = fma(vec4<f32>(a0.x), b5, c0_5);
        c0_6 = fma(vec4<f32>(a0.x), b6, c0_6);
        c0_7 = fma(vec4<f32>(a0.x), b7, c0_7);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c1_1 = fma(vec4<f32>(a0.y), b1, c1_1);
        c1_2 = fma(vec4<f32>(a0.y), b2, c1_2);
        c1_3 = fma(vec4<f32>(a0.y), b3, c1_3);
        c1_4 = fma(vec4<f32>(a0.y), b4, c1_4);
        c1_5 = fma(vec4<f32>(a0.y), b5, c1_5);
        c1_6 = fma(vec4<f32>(a0.y), b6, c1_6);
        c1_7 = fma(vec4<f32>(a0.y), b7, c1_7);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c2_1 = fma(vec4<f32>(a0.z), b1, c2_1);
        c2_2 = fma(vec4<f32>(a0.z), b2, c2_2);
        c2_3 = fma(vec4<f32>(a0.z), b3, c2_3);
        c2_4 = fma(vec4<f32>(a0.z), b4, c2_4);
        c2_5 = fma(vec4<f32>(a0.z), b5, c2_5);
        c2_6 = fma(vec4<f32>(a0.z), b6, c2_6);
        c2_7 = fma(vec4<f32>(a0.z), b7, c2_7);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
        c3_1 = fma(vec4<f32>(a0.w), b1, c3_1);
        c3_2 = fma(vec4<f32>(a0.w), b2, c3_2);
        c3_3 = fma(vec4<f32>(a0.w), b3, c3_3);
        c3_4 = fma(vec4<f32>(a0.w), b4, c3_4);
        c3_5 = fma(vec4<f32>(a0.w), b5, c3_5);
        c3_6 = fma(vec4<f32>(a0.w), b6, c3_6);
        c3_7 = fma(vec4<f32>(a0.w), b7, c3_7);
      }
      workgroupBarrier();
    }
  }
  put(rowBase + 4u * (ty + 0u) + 0u, columnBase + 4u * (tx + 0u), c0_0);
  put(rowBase + 4u * (ty + 0u) + 0u, columnBase + 4u * (tx + 1u), c0_1);
  put(rowBase + 4u * (ty + 0u) + 0u, columnBase + 4u * (tx + 2u), c0_2);
  put(rowBase + 4u * (ty + 0u) + 0u, columnBase + 4u * (tx + 3u), c0_3);
  put(rowBase + 4u * (ty + 0u) + 0u, columnBase + 4u * (tx + 4u), c0_4);
  put(rowBase + 4u * (ty + 0u) + 0u, columnBase + 4u * (tx + 5u), c0_5);
  put(rowBase + 4u * (ty + 0u) + 0u, columnBase + 4u * (tx + 6u), c0_6);
  put(rowBase + 4u * (ty + 0u) + 0u, columnBase + 4u * (tx + 7u), c0_7);
  put(rowBase + 4u * (ty + 0u) + 1u, columnBase + 4u * (tx + 0u), c1_0);
  put(rowBase + 4u * (ty + 0u) + 1u, columnBase + 4u * (tx + 1u), c1_1);
  put(rowBase + 4u * (ty + 0u) + 1u, columnBase + 4u * (tx + 2u), c1_2);
  put(rowBase + 4u * (ty + 0u) + 1u, columnBase + 4u * (tx + 3u), c1_3);
  put(rowBase + 4u * (ty + 0u) + 1u, columnBase + 4u * (tx + 4u), c1_4);
  put(rowBase + 4u * (ty + 0u) + 1u, columnBase + 4u * (tx + 5u), c1_5);
  put(rowBase + 4u * (ty + 0u) + 1u, columnBase + 4u * (tx + 6u), c1_6);
  put(rowBase + 4u * (ty + 0u) + 1u, columnBase + 4u * (tx + 7u), c1_7);
  put(rowBase + 4u * (ty + 0u) + 2u, columnBase + 4u * (tx + 0u), c2_0);
  put(rowBase + 4u * (ty + 0u) + 2u, columnBase + 4u * (tx + 1u), c2_1);
  put(rowBase + 4u * (ty + 0u) + 2u, columnBase + 4u * (tx + 2u), c2_2);
  put(rowBase + 4u * (ty + 0u) + 2u, columnBase + 4u * (tx + 3u), c2_3);
  put(rowBase + 4u * (ty + 0u) + 2u, columnBase + 4u * (tx + 4u), c2_4);
  put(rowBase + 4u * (ty + 0u) + 2u, columnBase + 4u * (tx + 5u), c2_5);
  put(rowBase + 4u * (ty + 0u) + 2u, columnBase + 4u * (tx + 6u), c2_6);
  put(rowBase + 4u * (ty + 0u) + 2u, columnBase + 4u * (tx + 7u), c2_7);
  put(rowBase + 4u * (ty + 0u) + 3u, columnBase + 4u * (tx + 0u), c3_0);
  put(rowBase + 4u * (ty + 0u) + 3u, columnBase + 4u * (tx + 1u), c3_1);
  put(rowBase + 4u * (ty + 0u) + 3u, columnBase + 4u * (tx + 2u), c3_2);
  put(rowBase + 4u * (ty + 0u) + 3u, columnBase + 4u * (tx + 3u), c3_3);
  put(rowBase + 4u * (ty + 0u) + 3u, columnBase + 4u * (tx + 4u), c3_4);
  put(rowBase + 4u * (ty + 0u) + 3u, columnBase + 4u * (tx + 5u), c3_5);
  put(rowBase + 4u * (ty + 0u) + 3u, columnBase + 4u * (tx + 6u), c3_6);
  put(rowBase + 4u * (ty + 0u) + 3u, columnBase + 4u * (tx + 7u), c3_7);
}
