// Halves to dense float32.
struct Params {
  count: u32,    // elements
  base: u32,     // halves from the binding's start to where position 0 of the first row's item would be, modulo 2^32
  first: u32,    // position of the first row within its item
  length1: u32,  // positions of an item
  length2: u32,  // heads
  length3: u32,  // columns
  stride0: u32,  // halves from one item to the next, and so on
  stride1: u32,
  stride2: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> halves: array<u32>;
@group(0) @binding(2) var<storage, read_write> dense: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < params.count; i += groups.x * 64u) {
    let column = i % params.length3;
    let head = (i / params.length3) % params.length2;
    let row = params.first + i / (params.length3 * params.length2);
    let item = row / params.length1;
    let at = params.base + item * params.stride0 + (row % params.length1) * params.stride1 + head * params.stride2 + column;
    dense[i] = unpack2x16float(halves[at / 2u])[at % 2u];
  }
}
