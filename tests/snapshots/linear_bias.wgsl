// Latents × weights = keys or values of a head group. 128 × 32, depth 16, 1 stage(s)
const BLOCK_M = 128u;
const BLOCK_N = 32u;
const BLOCK_QUADS = 8u;
const DEPTH = 16u;
const DEPTH_PIECES = 4u;
const TX = 1u;

struct Params {
  rows: u32,         // latent rows
  columns: u32,      // columns of the result: heads of the group × head dimension
  firstColumn: u32,  // first column of the group in the weights
  firstTile: u32,    // index of the first row tile of this dispatch
  L: u32,            // width of a latent row
  weightStride: u32, // columns of the weights: all KV heads × head dimension
  latentBase: u32,   // elements from the binding's start to the first row
  latentRow: u32,    // elements from one row to the next
  latentRows: u32,   // rows of a batch item
  latentGap: u32,    // further elements from one batch item to the next, modulo 2^32
  weightBase: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> latent: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> expanded: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;

fn biasAt(column: u32) -> vec4<f32> {
  let last = arrayLength(&bias) - 1u;
  return vec4<f32>(
    bias[min(column, last)],
    bias[min(column + 1u, last)],
    bias[min(column + 2u, last)],
    bias[min(column + 3u, last)],
  );
}

var<workgroup> left: array<array<array<vec4<f32>, 33>, 16>, 1>;
var<workgroup> right: array<array<array<vec4<f32>, 9>, 16>, 1>;

fn loadLatent(piece: u32, slice: u32, rowBase: u32) -> vec4<f32> {
  let row = rowBase + piece / DEPTH_PIECES;
  let column = slice * DEPTH + (piece % DEPTH_PIECES) * 4u;
  if (row >= params.rows || column >= params.L) { return vec4<f32>(); }
  let offset = params.latentBase + row * params.latentRow;
  return latent[(offset + column) / 4u];
}

fn stageLatent(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
  left[stage][depth + 0u][row >> 2u][row & 3u] = value[0];
  left[stage][depth + 1u][row >> 2u][row & 3u] = value[1];
  left[stage][depth + 2u][row >> 2u][row & 3u] = value[2];
  left[stage][depth + 3u][row >> 2u][row & 3u] = value[3];
}

fn loadWeight(piece: u32, slice: u32, columnBase: u32) -> vec4<f32> {
  let row = slice * DEPTH + piece / BLOCK_QUADS;
  let column = columnBase + (piece % BLOCK_QUADS) * 4u;
  if (row >= params.L || column >= params.columns) { return vec4<f32>(); }
  let offset = params.weightBase + row * params.weightStride + params.firstColumn;
  return weight[(offset + column) / 4u];
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
    var latent0 = vec4<f32>();
    var latent1 = vec4<f32>();
    var latent2 = vec4<f32>();
    var latent3 = vec4<f32>();
    var latent4 = vec4<f32>();
    var latent5 = vec4<f32>();
    var latent6 = vec4<f32>();
    var latent7 = vec4<f32>();
    var latent8 = vec4<f32>();
    var latent9 = vec4<f32>();
    var latent10 = vec4<f32>();
    var latent11 = vec4<f32>();
    var latent12 = vec4<f32>();
    var latent13 = vec4<f32>();
    var latent14 = vec4<f32>();
    var latent15 = vec4<f32>();
    var weight0 = vec4<f32>();
    var weight1 = vec4<f32>();
    var weight2 = vec4<f32>();
    var weight3 = vec4<f32>();

    for (var slice = 0u; slice < (params.L + DEPTH - 1u) / DEPTH; slice += 1u) {
      latent0 = loadLatent((t + 0u), slice, rowBase);
      latent1 = loadLatent((t + 32u), slice, rowBase);
      latent2 = loadLatent((t + 64u), slice, rowBase);
      latent3 = loadLatent((t + 96u), slice, rowBase);
      latent4 = loadLatent((t + 128u), slice, rowBase);
      latent5 = loadLatent((t + 160u), slice, rowBase);
      latent6 = loadLatent((t + 192u), slice, rowBase);
      latent7 = loadLatent((t + 224u), slice, rowBase);
      latent8 = loadLatent((t + 256u), slice, rowBase);
      latent9 = loadLatent((t + 288u), slice, rowBase);
      latent10 = loadLatent((t + 320u), slice, rowBase);
      latent11 = loadLatent((t + 352u), slice, rowBase);
      latent12 = loadLatent((t + 384u), slice, rowBase);
      latent13 = loadLatent((t + 416u), slice, rowBase);
      latent14 = loadLatent((t + 448u), slice, rowBase);
      latent15 = loadLatent((t + 480u), slice, rowBase);
      weight0 = loadWeight((t + 0u), slice, columnBase);
      weight1 = loadWeight((t + 32u), slice, columnBase);
      weight2 = loadWeight((t + 64u), slice, columnBase);
      weight3 = loadWeight((t + 96u), slice, columnBase);
      stageLatent((t + 0u), 0u, latent0);
      stageLatent((t + 32u), 0u, latent1);
      stageLatent((t + 64u), 0u, latent2);
      stageLatent((t + 96u), 0u, latent3);
      stageLatent((t + 128u), 0u, latent4);
      stageLatent((t + 160u), 0u, latent5);
      stageLatent((t + 192u), 0u, latent6);
      stageLatent((t + 224u), 0u, latent7);
      stageLatent((t + 256u), 0u, latent8);
      stageLatent((t + 288u), 0u, latent9);
      stageLatent((t + 320u), 0u, latent10);
      stageLatent((t + 352u), 0u, latent11);
      stageLatent((t + 384u), 0u, latent12);
      stageLatent((t + 416u), 0u, latent13);
      stageLatent((t + 448u), 0u, latent14);
      stageLatent((t + 480u), 0u, latent15);
      right[0u][(t + 0u) / BLOCK_QUADS][(t + 0u) % BLOCK_QUADS] = weight0;
      right[0u][(t + 32u) / BLOCK_QUADS][(t + 32u) % BLOCK_QUADS] = weight1;
      right[0u][(t + 64u) / BLOCK_QUADS][(t + 64u) % BLOCK_QUADS] = weight2;
      right[0u][(t + 96u) / BLOCK_QUADS][(t + 96u) % BLOCK_QUADS] = weight3;
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
  {
    let row = rowBase + 4u * (ty + 0u) + 0u;
    let column = columnBase + 4u * (tx + 0u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c0_0 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 0u;
    let column = columnBase + 4u * (tx + 1u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c0_1 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 0u;
    let column = columnBase + 4u * (tx + 2u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c0_2 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 0u;
    let column = columnBase + 4u * (tx + 3u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c0_3 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 0u;
    let column = columnBase + 4u * (tx + 4u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c0_4 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 0u;
    let column = columnBase + 4u * (tx + 5u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c0_5 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 0u;
    let column = columnBase + 4u * (tx + 6u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c0_6 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 0u;
    let column = columnBase + 4u * (tx + 7u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c0_7 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 1u;
    let column = columnBase + 4u * (tx + 0u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c1_0 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 1u;
    let column = columnBase + 4u * (tx + 1u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c1_1 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 1u;
    let column = columnBase + 4u * (tx + 2u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c1_2 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 1u;
    let column = columnBase + 4u * (tx + 3u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c1_3 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 1u;
    let column = columnBase + 4u * (tx + 4u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c1_4 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 1u;
    let column = columnBase + 4u * (tx + 5u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c1_5 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 1u;
    let column = columnBase + 4u * (tx + 6u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c1_6 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 1u;
    let column = columnBase + 4u * (tx + 7u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c1_7 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 2u;
    let column = columnBase + 4u * (tx + 0u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c2_0 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 2u;
    let column = columnBase + 4u * (tx + 1u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c2_1 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 2u;
    let column = columnBase + 4u * (tx + 2u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c2_2 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 2u;
    let column = columnBase + 4u * (tx + 3u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c2_3 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 2u;
    let column = columnBase + 4u * (tx + 4u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c2_4 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 2u;
    let column = columnBase + 4u * (tx + 5u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c2_5 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 2u;
    let column = columnBase + 4u * (tx + 6u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c2_6 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 2u;
    let column = columnBase + 4u * (tx + 7u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c2_7 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 3u;
    let column = columnBase + 4u * (tx + 0u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c3_0 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 3u;
    let column = columnBase + 4u * (tx + 1u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c3_1 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 3u;
    let column = columnBase + 4u * (tx + 2u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c3_2 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 3u;
    let column = columnBase + 4u * (tx + 3u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c3_3 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 3u;
    let column = columnBase + 4u * (tx + 4u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c3_4 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 3u;
    let column = columnBase + 4u * (tx + 5u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c3_5 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 3u;
    let column = columnBase + 4u * (tx + 6u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c3_6 + biasAt(column)); }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 3u;
    let column = columnBase + 4u * (tx + 7u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = (c3_7 + biasAt(column)); }
    }
  }
}
