// Latents × weights = keys or values of a head group. 32 × 32, depth 16, 2 stage(s)
const BLOCK_M = 32u;
const BLOCK_N = 32u;
const BLOCK_QUADS = 8u;
const DEPTH = 16u;
const DEPTH_PIECES = 4u;
const TX = 8u;

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

var<workgroup> left: array<array<array<vec4<f32>, 9>, 16>, 2>;
var<workgroup> right: array<array<array<vec4<f32>, 9>, 16>, 2>;

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
    var latent0 = vec4<f32>();
    var latent1 = vec4<f32>();
    var weight0 = vec4<f32>();
    var weight1 = vec4<f32>();
    latent0 = loadLatent((t + 0u), 0u, rowBase);
    latent1 = loadLatent((t + 64u), 0u, rowBase);
    weight0 = loadWeight((t + 0u), 0u, columnBase);
    weight1 = loadWeight((t + 64u), 0u, columnBase);

    stageLatent((t + 0u), 0u, latent0);
    stageLatent((t + 64u), 0u, latent1);
    right[0u][(t + 0u) / BLOCK_QUADS][(t + 0u) % BLOCK_QUADS] = weight0;
    right[0u][(t + 64u) / BLOCK_QUADS][(t + 64u) % BLOCK_QUADS] = weight1;
    workgroupBarrier();
    for (var slice = 0u; slice < (params.L + DEPTH - 1u) / DEPTH; slice += 1u) {
      let stage = slice & 1u;
      let more = slice + 1u < (params.L + DEPTH - 1u) / DEPTH;
      if (more) {
        latent0 = loadLatent((t + 0u), slice + 1u, rowBase);
        latent1 = loadLatent((t + 64u), slice + 1u, rowBase);
        weight0 = loadWeight((t + 0u), slice + 1u, columnBase);
        weight1 = loadWeight((t + 64u), slice + 1u, columnBase);
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
        stageLatent((t + 0u), 1u - stage, latent0);
        stageLatent((t + 64u), 1u - stage, latent1);
        right[1u - stage][(t + 0u) / BLOCK_QUADS][(t + 0u) % BLOCK_QUADS] = weight0;
        right[1u - stage][(t + 64u) / BLOCK_QUADS][(t + 64u) % BLOCK_QUADS] = weight1;
      }
      workgroupBarrier();
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 0u;
    let column = columnBase + 4u * (tx + 0u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = c0_0; }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 1u;
    let column = columnBase + 4u * (tx + 0u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = c1_0; }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 2u;
    let column = columnBase + 4u * (tx + 0u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = c2_0; }
    }
  }
  {
    let row = rowBase + 4u * (ty + 0u) + 3u;
    let column = columnBase + 4u * (tx + 0u);
    if (row < params.rows) {
      if (column < params.columns) { expanded[(row * params.columns + column) / 4u] = c3_0; }
    }
  }
}
