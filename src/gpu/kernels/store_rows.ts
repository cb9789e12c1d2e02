// Rows of float32, padded to quads or not, into a dense tensor of either element type: for widths that other kernels cannot
// write directly.
//
//   one invocation = one word of the tensor at a time, striding over the whole grid

/** Invocations of a workgroup. */
export const workgroupSize = 64;

/** The kernel's source: bindings are the parameters, the rows, and the tensor. */
export function wgsl(result: "halves" | "floats"): string {
  const halves = result === "halves";
  const element = (i: string) => `from_rows[(${i}) / params.width * params.stride + (${i}) % params.width]`;
  return `// Rows into a dense tensor.
struct Params {
  elements: u32,
  width: u32,
  stride: u32, // elements from one row to the next
  base: u32,   // words from the binding's start to the tensor
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> from_rows: array<f32>;
@group(0) @binding(2) var<storage, read_write> stored: array<${halves ? "u32" : "f32"}>;

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
${
    halves
      ? `  for (var word = id.x; 2u * word < params.elements; word += groups.x * ${workgroupSize}u) {
    let i = 2u * word;
    let low = ${element("i")};
    if (i + 1u < params.elements) {
      stored[params.base + word] = pack2x16float(vec2<f32>(low, ${element("i + 1u")}));
    } else {
      // The half behind the last one is not ours.
      stored[params.base + word] = (stored[params.base + word] & 0xffff0000u) | (pack2x16float(vec2<f32>(low, 0.0)) & 0xffffu);
    }
  }`
      : `  for (var i = id.x; i < params.elements; i += groups.x * ${workgroupSize}u) {
    stored[params.base + i] = ${element("i")};
  }`
  }
}
`;
}
