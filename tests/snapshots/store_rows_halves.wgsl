// Rows into a dense tensor.
struct Params {
  elements: u32,
  width: u32,
  stride: u32, // elements from one row to the next
  base: u32,   // words from the binding's start to the tensor
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> from_rows: array<f32>;
@group(0) @binding(2) var<storage, read_write> stored: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var word = id.x; 2u * word < params.elements; word += groups.x * 64u) {
    let i = 2u * word;
    let low = from_rows[(i) / params.width * params.stride + (i) % params.width];
    if (i + 1u < params.elements) {
      stored[params.base + word] = pack2x16float(vec2<f32>(low, from_rows[(i + 1u) / params.width * params.stride + (i + 1u) % params.width]));
    } else {
      // The half behind the last one is not ours.
      stored[params.base + word] = (stored[params.base + word] & 0xffff0000u) | (pack2x16float(vec2<f32>(low, 0.0)) & 0xffffu);
    }
  }
}
