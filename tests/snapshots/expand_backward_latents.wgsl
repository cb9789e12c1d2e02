enable f16;
// Gradient of the expansion: latents += ∂K · wᵀ. 32 × 32, depth 16, 2 stage(s)
const BLOCK_M = 32u;
const BLOCK_N = 32u;
const DEPTH = 16u;
const DEPTH_PIECES = 4u;
const TX = 8u;

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

var<workgroup> left: array<array<array<vec4<f32>, 9>, 16>, 2>;
var<workgroup> right: array<array<array<vec4<f32>, 9>, 16>, 2>;

// Four neighbours along the summed axis of one row.
fn loadLeft(piece: u32, slice: u32, rowBase: u32) -> vec4<f32> {
  let row = rowBase + piece / DEPTH_PIECES;
  let column = slice * DEPTH + (piece % DEPTH_PIECES) * 4u;
  if (row >= params.rows || column >= params.depth) { return vec4<f32>(); }
  let offset = params.leftBase + row * params.leftRow;
  return leftRows[(offset + column) / 4u];
}

fn stageLeft(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
  left[stage][depth + 0u][row >> 2u][row & 3u] = value[0];
  left[stage][depth + 1u][row >> 2u][row & 3u] = value[1];
  left[stage][depth + 2u][row >> 2u][row & 3u] = value[2];
  left[stage][depth + 3u][row >> 2u][row & 3u] = value[3];
}

fn loadRight(piece: u32, slice: u32, columnBase: u32) -> vec4<f32> {
  let row = columnBase + piece / DEPTH_PIECES;
  let column = slice * DEPTH + (piece % DEPTH_PIECES) * 4u;
  if (row >= params.columns || column >= params.depth) { return vec4<f32>(); }
  let offset = params.rightBase + row * params.rightRow;
  return vec4<f32>(rightRows[(offset + column) / 4u]);
}

fn stageRight(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
  right[stage][depth + 0u][row >> 2u][row & 3u] = value[0];
  right[stage][depth + 1u][row >> 2u][row & 3u] = value[1];
  right[stage][depth + 2u][row >> 2u][row & 3u] = value[2];
  right[stage][depth + 3u][row >> 2u][row & 3u] = value[3];
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

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let tx = t % TX;
  let ty = t / TX;
  let rowBase = (params.firstTile + workgroup.y) * BLOCK_M;
  let columnBase = workgroup.x * BLOCK_N;
  var c0_0 = vec4<f32>();
  var c1_0 = vec4<f32>();
  var c2_0 = vec4<f32>();
  var c3_0 = vec4<f32>();
  {
    var left0 = vec4<f32>();
    var left1 = vec4<f32>();
    var right0 = vec4<f32>();
    var right1 = vec4<f32>();
    left0 = loadLeft((t + 0u), 0u, rowBase);
    left1 = loadLeft((t + 64u), 0u, rowBase);
    right0 = loadRight((t + 0u), 0u, columnBase);
    right1 = loadRight((t + 64u), 0u, columnBase);

    stageLeft((t + 0u), 0u, left0);
    stageLeft((t + 64u), 0u, left1);
    stageRight((t + 0u), 0u, right0);
    stageRight((t + 64u), 0u, right1);
    workgroupBarrier();
    for (var slice = 0u; slice < (params.depth + DEPTH - 1u) / DEPTH; slice += 1u) {
      let stage = slice & 1u;
      let more = slice + 1u < (params.depth + DEPTH - 1u) / DEPTH;
      if (more) {
        left0 = loadLeft((t + 0u), slice + 1u, rowBase);
        left1 = loadLeft((t + 64u), slice + 1u, rowBase);
        right0 = loadRight((t + 0u), slice + 1u, columnBase);
        right1 = loadRight((t + 64u), slice + 1u, columnBase);
      }
      {
        let a0 = left[stage][0][ty + 0u];
        let b0 = right[stage][0][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][1][ty + 0u];
        let b0 = right[stage][1][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][2][ty + 0u];
        let b0 = right[stage][2][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][3][ty + 0u];
        let b0 = right[stage][3][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][4][ty + 0u];
        let b0 = right[stage][4][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][5][ty + 0u];
        let b0 = right[stage][5][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][6][ty + 0u];
        let b0 = right[stage][6][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][7][ty + 0u];
        let b0 = right[stage][7][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][8][ty + 0u];
        let b0 = right[stage][8][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][9][ty + 0u];
        let b0 = right[stage][9][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][10][ty + 0u];
        let b0 = right[stage][10][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][11][ty + 0u];
        let b0 = right[stage][11][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][12][ty + 0u];
        let b0 = right[stage][12][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][13][ty + 0u];
        let b0 = right[stage][13][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][14][ty + 0u];
        let b0 = right[stage][14][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      {
        let a0 = left[stage][15][ty + 0u];
        let b0 = right[stage][15][tx + 0u];
        c0_0 = fma(vec4<f32>(a0.x), b0, c0_0);
        c1_0 = fma(vec4<f32>(a0.y), b0, c1_0);
        c2_0 = fma(vec4<f32>(a0.z), b0, c2_0);
        c3_0 = fma(vec4<f32>(a0.w), b0, c3_0);
      }
      if (more) {
        stageLeft((t + 0u), 1u - stage, left0);
        stageLeft((t + 64u), 1u - stage, left1);
        stageRight((t + 0u), 1u - stage, right0);
        stageRight((t + 64u), 1u - stage, right1);
      }
      workgroupBarrier();
    }
  }
  put(rowBase + 4u * (ty + 0u) + 0u, columnBase + 4u * (tx + 0u), c0_0);
  put(rowBase + 4u * (ty + 0u) + 1u, columnBase + 4u * (tx + 0u), c1_0);
  put(rowBase + 4u * (ty + 0u) + 2u, columnBase + 4u * (tx + 0u), c2_0);
  put(rowBase + 4u * (ty + 0u) + 3u, columnBase + 4u * (tx + 0u), c3_0);
}
