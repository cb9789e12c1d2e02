// Rows into a dense tensor.
struct Params {
  elements: u32,
  width: u32,
  stride: u32, // elements from one row to the next
  base: u32,   // words from the binding's start to the tensor
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> from_rows: array<f32>;
@group(0) @binding(2) var<storage, read_write> stored: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < params.elements; i += groups.x * 64u) {
    stored[params.base + i] = from_rows[(i) / params.width * params.stride + (i) % params.width];
  }
}
