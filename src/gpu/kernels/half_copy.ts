// Halves to float32 and back without half-precision arithmetic, for devices that lack it: core WGSL can unpack and pack
// pairs of halves.
//
//   one invocation = one element at a time, striding over the whole grid
//   dense side: float32, row-major       half side: any strides, two halves to a 32-bit word
//
// Packing writes halves of words whose other halves may belong to another invocation, or to nobody in this call: each
// word is changed by atomic operations that touch one half only.

/** Which way a copy goes. */
export type HalfCopyDirection = "unpack" | "pack";

/** Invocations per workgroup. */
export const workgroupSize = 64;

/** The kernel's source: bindings are the parameters, the halves, and the dense float32 elements. */
export function wgsl(direction: HalfCopyDirection): string {
  const unpack = direction === "unpack";
  return `// ${unpack ? "Halves to dense float32." : "Dense float32 to halves."}
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
@group(0) @binding(1) var<storage, ${unpack ? "read" : "read_write"}> halves: array<${unpack ? "u32" : "atomic<u32>"}>;
@group(0) @binding(2) var<storage, ${unpack ? "read_write" : "read"}> dense: array<f32>;

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < params.count; i += groups.x * ${workgroupSize}u) {
    let column = i % params.length3;
    let head = (i / params.length3) % params.length2;
    let row = params.first + i / (params.length3 * params.length2);
    let item = row / params.length1;
    let at = params.base + item * params.stride0 + (row % params.length1) * params.stride1 + head * params.stride2 + column;
${
    unpack
      ? "    dense[i] = unpack2x16float(halves[at / 2u])[at % 2u];"
      : `    let bits = pack2x16float(vec2<f32>(dense[i], 0.0)) & 0xffffu;
    let shift = 16u * (at % 2u);
    atomicAnd(&halves[at / 2u], ~(0xffffu << shift));
    atomicOr(&halves[at / 2u], bits << shift);`
  }
  }
}
`;
}
