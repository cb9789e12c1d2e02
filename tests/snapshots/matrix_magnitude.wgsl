enable f16;
// Largest magnitudes of ∂out and of the values.
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
@group(0) @binding(1) var<storage, read> gradOutput: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read> expanded: array<vec4<u32>>; // halves
@group(0) @binding(3) var<storage, read_write> staged: array<f32>; // the header

var<workgroup> maxima: array<f32, 256>;

fn magnitude(x: vec4<f32>) -> f32 {
  let finite = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) != vec4<u32>(0x7f800000u);
  let size = select(vec4<f32>(), abs(x), finite);
  return max(max(size.x, size.y), max(size.z, size.w));
}

fn ofGradient(piece: u32) -> f32 {
  let quads = (params.V + 3u) / 4u;
  let column = piece % quads * 4u;
  let head = piece / quads % params.queryHeads;
  let row = piece / quads / params.queryHeads;
  let item = (params.firstRow + row) / params.queryLength - params.firstRow / params.queryLength;
  let offset = params.gradBase + row * params.gradRow + item * params.gradGap + head * params.gradHead;
  return magnitude(vec4<f32>(gradOutput[(offset + column) / 4u]));
}

fn ofValues(piece: u32) -> f32 {
  let quad = expanded[params.valuesBase / 8u + piece];
  return max(
    magnitude(vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y))),
    magnitude(vec4<f32>(unpack2x16float(quad.z), unpack2x16float(quad.w))),
  );
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  var most = 0.0;
  let first = workgroup.x * 256u + t;
  if (workgroup.y == 0u) {
    let count = params.rangeRows * params.queryHeads * ((params.V + 3u) / 4u);
    for (var piece = first; piece < count; piece += 65536u) { most = max(most, ofGradient(piece)); }
  } else {
    let count = (params.ropeBase - params.valuesBase) / 8u;
    for (var piece = first; piece < count; piece += 65536u) { most = max(most, ofValues(piece)); }
  }
  maxima[t] = most;
  for (var half = 128u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (t < half) { maxima[t] = max(maxima[t], maxima[t + half]); }
  }
  if (t == 0u) { staged[4u + workgroup.y * 256u + workgroup.x] = maxima[0]; }
}
