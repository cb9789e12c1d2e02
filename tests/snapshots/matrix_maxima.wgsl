// Largest magnitudes of ∂K and ∂V.
struct Params {
  keysEnd: u32,    // elements from the first of ∂K to one past its last …
  valuesBase: u32, // … to the first of ∂V …
  valuesEnd: u32,  // … and to one past the last of ∂V
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gradient: array<f32>;
@group(0) @binding(2) var<storage, read_write> maxima: array<f32>;

var<workgroup> most: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let end = select(params.keysEnd, params.valuesEnd, workgroup.y == 1u);
  let first = select(0u, params.valuesBase, workgroup.y == 1u) + workgroup.x * 256u + t;
  var own = 0.0;
  for (var i = first; i < end; i += 65536u) {
    let size = bitcast<u32>(gradient[i]) & 0x7fffffffu;
    if (size < 0x7f800000u) { own = max(own, bitcast<f32>(size)); }
  }
  most[t] = own;
  for (var count = 128u; count > 0u; count /= 2u) {
    workgroupBarrier();
    if (t < count) { most[t] = max(most[t], most[t + count]); }
  }
  if (t == 0u) { maxima[workgroup.y * 256u + workgroup.x] = most[0]; }
}
