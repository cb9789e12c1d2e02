// Queries and ∂out in halves.
const NOPE_QUADS = 4u;
const DEPTH_QUADS = 6u;
const VALUE_QUADS = 4u;
const HEADER_QUADS = 129u;

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

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> query: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> gradOutput: array<f32>;
@group(0) @binding(3) var<storage, read_write> staged: array<vec4<u32>>;


var<workgroup> maxima: array<vec2<f32>, 256>;

fn saturated(x: vec4<f32>) -> vec4<f32> {
  let isNan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
  return select(clamp(x, vec4<f32>(-65504.0), vec4<f32>(65504.0)), x, isNan);
}

fn finiteHalves(quad: vec4<u32>) -> vec4<u32> {
  let low = select(vec4<u32>(0x0000ffffu), vec4<u32>(), (quad & vec4<u32>(0x7c00u)) == vec4<u32>(0x7c00u));
  let high = select(vec4<u32>(0xffff0000u), vec4<u32>(), (quad & vec4<u32>(0x7c000000u)) == vec4<u32>(0x7c000000u));
  return quad & (low | high);
}

fn loadQuery4(row: u32, item: u32, head: u32, at: u32) -> vec4<f32> {
  let offset = params.queryBase + row * params.queryRow + item * params.queryGap + head * params.queryHead;
  if (at < 8u * NOPE_QUADS) {
    let column = at;
    if (column >= params.P) { return vec4<f32>(); }
    return query[(offset + column) / 4u];
  }
  let ropeOffset = params.ropeQueryBase + row * params.ropeQueryRow + item * params.ropeQueryGap;
  let column = at - 8u * NOPE_QUADS;
  if (column < params.R) { return query[(offset + params.P + column) / 4u]; }
  return vec4<f32>();
}

fn loadGrad4(row: u32, item: u32, head: u32, column: u32) -> vec4<f32> {
  let offset = params.gradBase + row * params.gradRow + item * params.gradGap + head * params.gradHead;
  if (column >= params.V) { return vec4<f32>(); }
  return vec4<f32>(select(0.0, gradOutput[offset + min(column + 0u, params.V - 1u)], column + 0u < params.V), select(0.0, gradOutput[offset + min(column + 1u, params.V - 1u)], column + 1u < params.V), select(0.0, gradOutput[offset + min(column + 2u, params.V - 1u)], column + 2u < params.V), select(0.0, gradOutput[offset + min(column + 3u, params.V - 1u)], column + 3u < params.V));
}

fn packed(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  let a = saturated(low);
  let b = saturated(high);
  return vec4<u32>(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
}

// Exponent of the smallest power of two above x.
fn exponentAbove(x: f32) -> i32 { return i32(bitcast<u32>(x) >> 23u) - 126; }

fn powerOfTwo(exponent: i32) -> f32 { return bitcast<f32>(u32(clamp(exponent, -100, 100) + 127) << 23u); }

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) count: vec3<u32>,
  @builtin(local_invocation_index) t: u32,
) {
  let slot = bitcast<vec4<f32>>(staged[1u + t / 4u]);
  let valueSlot = bitcast<vec4<f32>>(staged[65u + t / 4u]);
  maxima[t] = vec2<f32>(slot[t % 4u], valueSlot[t % 4u]);
  for (var half = 128u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (t < half) { maxima[t] = max(maxima[t], maxima[t + half]); }
  }
  workgroupBarrier();
  let most = maxima[0];
  let gradExponent = exponentAbove(most.x);
  let gradFactor = powerOfTwo(15 - gradExponent);
  let bound = gradExponent + exponentAbove(most.y) + exponentAbove(f32(params.V) * params.keptFactor);
  if (t == 0u && workgroup.x == 0u) {
    staged[0] = bitcast<vec4<u32>>(vec4<f32>(
      powerOfTwo(gradExponent - 15),
      powerOfTwo(16 - bound),
      powerOfTwo(bound - 16),
      gradFactor,
    ));
  }

  let rows = params.rangeRows * params.queryHeads;
  for (var i = workgroup.x * 256u + t; i < rows * (DEPTH_QUADS + VALUE_QUADS); i += count.x * 256u) {
    let isGrad = i >= rows * DEPTH_QUADS;
    let piece = select(i, i - rows * DEPTH_QUADS, isGrad);
    let quads = select(DEPTH_QUADS, VALUE_QUADS, isGrad);
    let at = piece % quads * 8u;
    let head = piece / quads % params.queryHeads;
    let row = piece / quads / params.queryHeads;
    let item = (params.firstRow + row) / params.queryLength - params.firstRow / params.queryLength;
    if (isGrad) {
      staged[HEADER_QUADS + i] = packed(
        gradFactor * loadGrad4(row, item, head, at),
        gradFactor * loadGrad4(row, item, head, at + 4u),
      );
    } else {
      staged[HEADER_QUADS + i] = packed(loadQuery4(row, item, head, at), loadQuery4(row, item, head, at + 4u));
    }
  }
}
