// The sinks of each head as one number: the logarithm to base 2 of Σ_n exp(aux_n). Only their sum joins the softmax's
// denominator, so that attention needs no more than this.
//
//   one invocation = one head

import { storageDirectives } from "./storage_element.ts";

/** Invocations per workgroup. */
export const workgroupSize = 64;

/** The kernel's source: bindings are the parameters, the sinks as the caller has them, and one float32 a head. */
export function wgsl(stored: "f32" | "f16"): string {
  return `${storageDirectives([stored])}// Sinks of each head, summed.
struct Params {
  heads: u32,
  sinks: u32, // of one head
  base: u32,  // elements from the binding's start to the first sink
  head: u32,  // elements from one head to the next
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> aux: array<${stored}>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;

const LOG2E = 1.4426950408889634;

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= params.heads) { return; }
  let first = params.base + id.x * params.head;
  var most = -3.4e38;
  for (var n = 0u; n < params.sinks; n += 1u) { most = max(most, f32(aux[first + n]) * LOG2E); }
  var sum = 0.0;
  for (var n = 0u; n < params.sinks; n += 1u) { sum += exp2(f32(aux[first + n]) * LOG2E - most); }
  sums[id.x] = most + log2(sum);
}
`;
}
