// The largest magnitudes of ∂K and of ∂V, as partial ones of 256 workgroups each: what their projections scale them by.
//
// NaN and infinity do not count. Maxima do not depend on their order: two runs give the same bits.

/** Partial maxima of each of the two. */
export const partialMaxima = 256;

/** Bytes of all partial maxima. */
export const maximaBytes: number = 2 * 4 * partialMaxima;

/** Workgroups: parts along x, ∂K and ∂V along y. */
export const workgroups: readonly [number, number] = [partialMaxima, 2];

const workgroupSize = 256;

/** The kernel's source. */
export function wgsl(): string {
  return `// Largest magnitudes of ∂K and ∂V.
struct Params {
  keysEnd: u32,    // elements from the first of ∂K to one past its last …
  valuesBase: u32, // … to the first of ∂V …
  valuesEnd: u32,  // … and to one past the last of ∂V
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gradient: array<f32>;
@group(0) @binding(2) var<storage, read_write> maxima: array<f32>;

var<workgroup> most: array<f32, ${workgroupSize}>;

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let end = select(params.keysEnd, params.valuesEnd, workgroup.y == 1u);
  let first = select(0u, params.valuesBase, workgroup.y == 1u) + workgroup.x * ${workgroupSize}u + t;
  var own = 0.0;
  for (var i = first; i < end; i += ${partialMaxima * workgroupSize}u) {
    let size = bitcast<u32>(gradient[i]) & 0x7fffffffu;
    if (size < 0x7f800000u) { own = max(own, bitcast<f32>(size)); }
  }
  most[t] = own;
  for (var count = ${workgroupSize / 2}u; count > 0u; count /= 2u) {
    workgroupBarrier();
    if (t < count) { most[t] = max(most[t], most[t + count]); }
  }
  if (t == 0u) { maxima[workgroup.y * ${partialMaxima}u + workgroup.x] = most[0]; }
}
`;
}
