enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
diagnostic(off, subgroup_uniformity);
// Latents × weights = keys or values of a head group in halves, on matrix units. 32 × 32, depth 16
const BLOCK_M = 32u;
const BLOCK_N = 32u;
const DEPTH = 16u;
const WIDTH = 32u; // of a head
const PADDED = 32u; // the same in whole fragments

struct Params {
  rows: u32,         // latent rows
  columns: u32,      // columns of the result: heads of the group × padded width
  firstColumn: u32,  // first column of the group in the weights
  firstTile: u32,    // index of the first row tile of this dispatch
  L: u32,            // width of a latent row
  weightStride: u32, // columns of the weights: all KV heads × width
  latentBase: u32,   // elements from the binding's start to the first row
  latentRow: u32,    // elements from one row to the next
  latentRows: u32,   // rows of a batch item
  latentGap: u32,    // further elements from one batch item to the next, modulo 2^32
  weightBase: u32,
  expandedBase: u32, // halves from the scratch's start to the first row, a multiple of 8
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> latent: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f16>>;
@group(0) @binding(3) var<storage, read_write> expanded: array<vec4<u32>>; // halves

var<workgroup> latents: array<array<vec4<u32>, 48>, 2>;
var<workgroup> weights: array<array<vec4<u32>, 48>, 2>;
var<workgroup> results: array<array<vec4<f32>, 144>, 4>;

// Eight halves, rounded to nearest.
fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(bitcast<vec2<u32>>(vec4<f16>(low)), bitcast<vec2<u32>>(vec4<f16>(high)));
}

fn saturated(x: vec4<f32>) -> vec4<f32> {
  let isNan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
  return select(clamp(x, vec4<f32>(-65504.0), vec4<f32>(65504.0)), x, isNan);
}

fn finiteHalves(quad: vec4<u32>) -> vec4<u32> {
  let low = select(vec4<u32>(0x0000ffffu), vec4<u32>(), (quad & vec4<u32>(0x7c00u)) == vec4<u32>(0x7c00u));
  let high = select(vec4<u32>(0xffff0000u), vec4<u32>(), (quad & vec4<u32>(0x7c000000u)) == vec4<u32>(0x7c000000u));
  return quad & (low | high);
}

// Loads stand outside of branches: those inside of one each wait for memory by itself.
fn loadLatents(piece: u32, slice: u32, rowBase: u32) -> vec4<u32> {
  let row = min(rowBase + piece / 2u, params.rows - 1u);
  let wanted = slice * DEPTH + piece % 2u * 8u;
  let exists = wanted < params.L;
  let column = select(0u, wanted, exists);
  let offset = params.latentBase + row * params.latentRow;
  return select(vec4<u32>(), vec4<u32>(bitcast<vec2<u32>>(latent[(offset + column) / 4u]), select(vec2<u32>(), bitcast<vec2<u32>>(latent[(offset + column) / 4u + select(0u, 1u, column + 4u < params.L)]), column + 4u < params.L)), exists);
}

fn loadWeights(piece: u32, slice: u32, columnBase: u32) -> vec4<u32> {
  let wanted = slice * DEPTH + piece / 4u;
  let column = columnBase + piece % 4u * 8u;
  let exists = wanted < params.L && column < params.columns && column % PADDED < WIDTH;
  let row = select(0u, wanted, exists);
  let head = select(0u, column / PADDED, exists);
  let within = select(0u, column % PADDED, exists);
  let offset = params.weightBase + row * params.weightStride + params.firstColumn + head * WIDTH;
  return select(vec4<u32>(), vec4<u32>(bitcast<vec2<u32>>(weight[(offset + within) / 4u]), select(vec2<u32>(), bitcast<vec2<u32>>(weight[(offset + within) / 4u + select(0u, 1u, within + 4u < WIDTH)]), within + 4u < WIDTH)), exists);
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let lane = t % 32u;
  let subgroup = t / 32u;
  // Tiles of the same columns run next to each other: weights may be larger than a card's cache, and are read once so.
  let rowBase = (params.firstTile + workgroup.x) * BLOCK_M;
  let columnBase = workgroup.y * BLOCK_N;
  let subgroupRow = subgroup / 2u;
  let subgroupColumn = subgroup % 2u;
  let slices = (params.L + DEPTH - 1u) / DEPTH;
  var c0_0: subgroup_matrix_result<f32, 16, 16>;
  var latent0 = vec4<u32>();
  var weight0 = vec4<u32>();

  if (t < 64u) {
    latent0 = loadLatents(t, 0u, rowBase);
  }
  if (t < 64u) {
    weight0 = loadWeights(t, 0u, columnBase);
  }
  for (var slice = 0u; slice < slices; slice += 1u) {
    if (t < 64u) {
      latents[((t) / 32u)][(t) / 2u % 16u * 3u + (t) % 2u] = latent0;
    }
    if (t < 64u) {
      weights[((t) % 4u / 2u)][(t) / 4u * 3u + (t) % 2u] = weight0;
    }
    workgroupBarrier();
    // In a branch, or the driver moves the loads behind the products, to where they are stored, and waits for each: 167 → 227
    // TFLOP/s on an H100.
    if (slice + 1u < slices) {
      if (t < 64u) {
        latent0 = loadLatents(t, (slice + 1u), rowBase);
      }
      if (t < 64u) {
        weight0 = loadWeights(t, (slice + 1u), columnBase);
      }
    }
    {
      let left0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&latents[subgroupRow], 0u + 0u * 2u, 3u);
      {
        let right = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&weights[subgroupColumn], 0u * 48u + 0u * 2u, 3u);
        c0_0 = subgroupMatrixMultiplyAccumulate(left0, right, c0_0);
      }
    }
    workgroupBarrier();
  }

  // A few fragments at a time, through the subgroup's own memory: eight halves of a row to an invocation.
  {
    {
      subgroupMatrixStore<row_major>(&results[subgroup], 0u, c0_0, 9u);
      workgroupBarrier();
      {
        let ownRow = (lane + 0u) / 2u;
        let eight = (lane + 0u) % 2u;
        let part = ownRow * 9u + 2u * eight;
        let row = rowBase + (subgroupRow * 1u + 0u) * 16u + ownRow;
        let column = columnBase + (subgroupColumn * 1u + 0u * 1u) * 16u + eight * 8u;
        if (row < params.rows && column < params.columns) {
          expanded[(params.expandedBase + row * params.columns + column) / 8u] = packHalves(
            saturated(results[subgroup][part]),
            saturated(results[subgroup][part + 1u]),
          );
        }
      }
      workgroupBarrier();
    }
  }
}
