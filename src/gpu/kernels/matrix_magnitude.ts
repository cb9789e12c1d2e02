// The largest magnitudes of ∂out and of the expanded values, as many partial ones as matrix_staged.ts says.
//
//   one workgroup = every 256th piece of one of the two; workgroups: 256 along x, ∂out and values along y
//
// NaN and infinity do not count. Maxima do not depend on their order: two runs give the same bits.

import { attendBackwardParams } from "./attend_backward_operands.ts";
import { maximaOfEach } from "./matrix_staged.ts";
import { load4, storageDirectives, type StorageElement } from "./storage_element.ts";

/** Invocations per workgroup. */
const workgroupSize = 256;

/** Workgroups. */
export const workgroups: readonly [number, number] = [maximaOfEach, 2];

/** Index of each operand's binding. */
export const magnitudeBindings = { gradOutput: 1, expanded: 2, staged: 3 } as const;

/** The kernel's source. */
export function wgsl(gradOutput: StorageElement): string {
  return `${storageDirectives([gradOutput])}// Largest magnitudes of ∂out and of the values.
${attendBackwardParams}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gradOutput: array<${gradOutput}>;
@group(0) @binding(2) var<storage, read> expanded: array<vec4<u32>>; // halves
@group(0) @binding(3) var<storage, read_write> staged: array<f32>; // the header

var<workgroup> maxima: array<f32, ${workgroupSize}>;

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
  return magnitude(${load4("gradOutput", gradOutput, "offset", "column", "params.V")});
}

fn ofValues(piece: u32) -> f32 {
  let quad = expanded[params.valuesBase / 8u + piece];
  return max(
    magnitude(vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y))),
    magnitude(vec4<f32>(unpack2x16float(quad.z), unpack2x16float(quad.w))),
  );
}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  var most = 0.0;
  let first = workgroup.x * ${workgroupSize}u + t;
  if (workgroup.y == 0u) {
    let count = params.rangeRows * params.queryHeads * ((params.V + 3u) / 4u);
    for (var piece = first; piece < count; piece += ${
    maximaOfEach * workgroupSize
  }u) { most = max(most, ofGradient(piece)); }
  } else {
    let count = (params.ropeBase - params.valuesBase) / 8u;
    for (var piece = first; piece < count; piece += ${
    maximaOfEach * workgroupSize
  }u) { most = max(most, ofValues(piece)); }
  }
  maxima[t] = most;
  for (var half = ${workgroupSize / 2}u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (t < half) { maxima[t] = max(maxima[t], maxima[t + half]); }
  }
  if (t == 0u) { staged[4u + workgroup.y * ${maximaOfEach}u + workgroup.x] = maxima[0]; }
}
`;
}
