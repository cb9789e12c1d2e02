// Queries and ∂out rounded to halves, scaled and padded, as matrix_staged.ts lays them out.
//
//   one invocation = eight neighbours of a row at a time, striding over the whole grid
//   every workgroup adds up the partial maxima by itself; the first one writes down what follows from them

import type { MlaProblem } from "../../op/mla_problem.ts";
import { attendBackwardParams } from "./attend_backward_operands.ts";
import { halfRange, type HeadWidths, paddedWidth } from "./matrix_scratch.ts";
import { headerQuads, maximaOfEach } from "./matrix_staged.ts";
import { load4, storageDirectives, type StorageElement } from "./storage_element.ts";

const workgroupSize = 256;

/** Workgroups along x: enough to fill a device. */
export const workgroups = 1024;

/** Index of each operand's binding. */
export const stageBindings = { query: 1, gradOutput: 2, staged: 3, bQ: 4 } as const;

/** What of a call the generated WGSL depends on. */
export interface MatrixStageShape extends HeadWidths, Pick<MlaProblem, "rope"> {
  /** Queries as they are stored. */
  readonly query: StorageElement;
  /** Rotary queries as they are stored, with rope mode `shared`. */
  readonly ropeQuery: StorageElement;
  /** ∂out as it is stored. */
  readonly gradOutput: StorageElement;
}

/** The kernel's source. */
export function wgsl(shape: MatrixStageShape): string {
  const { rope, query, ropeQuery, gradOutput } = shape;
  const ropeOfQuery = rope === "in_query"
    ? load4("query", query, "offset + params.P", "column", "params.R")
    : load4("ropeQuery", ropeQuery, "ropeOffset", "column", "params.R");
  return `${
    storageDirectives([query, gradOutput, ...(rope === "shared" ? [ropeQuery] : [])])
  }// Queries and ∂out in halves.
const NOPE_QUADS = ${paddedWidth(shape.qkNopeHeadDim) / 8}u;
const DEPTH_QUADS = ${(paddedWidth(shape.qkNopeHeadDim) + paddedWidth(shape.qkRopeHeadDim)) / 8}u;
const VALUE_QUADS = ${paddedWidth(shape.vHeadDim) / 8}u;
const HEADER_QUADS = ${headerQuads}u;

${attendBackwardParams}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> query: array<${query}>;
@group(0) @binding(2) var<storage, read> gradOutput: array<${gradOutput}>;
@group(0) @binding(3) var<storage, read_write> staged: array<vec4<u32>>;
${rope === "shared" ? `@group(0) @binding(4) var<storage, read> ropeQuery: array<${ropeQuery}>;` : ""}

var<workgroup> maxima: array<vec2<f32>, ${workgroupSize}>;

${halfRange}

fn loadQuery4(row: u32, item: u32, head: u32, at: u32) -> vec4<f32> {
  let offset = params.queryBase + row * params.queryRow + item * params.queryGap + head * params.queryHead;
  if (at < 8u * NOPE_QUADS) {
    let column = at;
    if (column >= params.P) { return vec4<f32>(); }
    return ${load4("query", query, "offset", "column", "params.P")};
  }${
    rope === "none" ? "" : `
  let ropeOffset = params.ropeQueryBase + row * params.ropeQueryRow + item * params.ropeQueryGap;
  let column = at - 8u * NOPE_QUADS;
  if (column < params.R) { return ${ropeOfQuery}; }`
  }
  return vec4<f32>();
}

fn loadGrad4(row: u32, item: u32, head: u32, column: u32) -> vec4<f32> {
  let offset = params.gradBase + row * params.gradRow + item * params.gradGap + head * params.gradHead;
  if (column >= params.V) { return vec4<f32>(); }
  return ${load4("gradOutput", gradOutput, "offset", "column", "params.V")};
}

fn packed(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  let a = saturated(low);
  let b = saturated(high);
  return vec4<u32>(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
}

// Exponent of the smallest power of two above x.
fn exponentAbove(x: f32) -> i32 { return i32(bitcast<u32>(x) >> 23u) - 126; }

fn powerOfTwo(exponent: i32) -> f32 { return bitcast<f32>(u32(clamp(exponent, -100, 100) + 127) << 23u); }

@compute @workgroup_size(${workgroupSize})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) count: vec3<u32>,
  @builtin(local_invocation_index) t: u32,
) {
  let slot = bitcast<vec4<f32>>(staged[1u + t / 4u]);
  let valueSlot = bitcast<vec4<f32>>(staged[${1 + maximaOfEach / 4}u + t / 4u]);
  maxima[t] = vec2<f32>(slot[t % 4u], valueSlot[t % 4u]);
  for (var half = ${workgroupSize / 2}u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (t < half) { maxima[t] = max(maxima[t], maxima[t + half]); }
  }
  workgroupBarrier();
  let most = maxima[0];
  let gradExponent = exponentAbove(most.x);
  let gradFactor = powerOfTwo(15 - gradExponent);
  let bound = gradExponent + exponentAbove(most.y) + exponentAbove(f32(params.V) * params.keptFactor);
  if (t == 0u && workgroup.x == 0u) {
    staged[0] = bitcast<vec4<u32>>(vec4<f32>(
      powerOfTwo(gradExponent - 15),
      powerOfTwo(16 - bound),
      powerOfTwo(bound - 16),
      gradFactor,
    ));
  }

  let rows = params.rangeRows * params.queryHeads;
  for (var i = workgroup.x * ${workgroupSize}u + t; i < rows * (DEPTH_QUADS + VALUE_QUADS); i += count.x * ${workgroupSize}u) {
    let isGrad = i >= rows * DEPTH_QUADS;
    let piece = select(i, i - rows * DEPTH_QUADS, isGrad);
    let quads = select(DEPTH_QUADS, VALUE_QUADS, isGrad);
    let at = piece % quads * 8u;
    let head = piece / quads % params.queryHeads;
    let row = piece / quads / params.queryHeads;
    let item = (params.firstRow + row) / params.queryLength - params.firstRow / params.queryLength;
    if (isGrad) {
      staged[HEADER_QUADS + i] = packed(
        gradFactor * loadGrad4(row, item, head, at),
        gradFactor * loadGrad4(row, item, head, at + 4u),
      );
    } else {
      staged[HEADER_QUADS + i] = packed(loadQuery4(row, item, head, at), loadQuery4(row, item, head, at + 4u));
    }
  }
}
`;
}
