// Rotary keys into the scratch of the kernels on matrix units: rounded to halves, padded with zeros.
//
//   one invocation = eight neighbours of one row

import { halfRange, paddedWidth } from "./matrix_scratch.ts";
import { load4, storageDirectives, type StorageElement } from "./storage_element.ts";

/** Invocations per workgroup. */
export const workgroupSize = 64;

/** What of a call the generated WGSL depends on. */
export interface MatrixRopeShape {
  /** Rotary keys as they are stored. */
  readonly ropeKey: StorageElement;
  /** Width of a rotary key. */
  readonly qkRopeHeadDim: number;
}

/** Workgroups along x that cover so many key rows. */
export function workgroups({ qkRopeHeadDim }: Pick<MatrixRopeShape, "qkRopeHeadDim">, keyRows: number): number {
  return Math.ceil(keyRows * paddedWidth(qkRopeHeadDim) / 8 / workgroupSize);
}

/** The kernel's source. */
export function wgsl({ ropeKey, qkRopeHeadDim }: MatrixRopeShape): string {
  return `${storageDirectives([ropeKey])}// Rotary keys in halves.
const WIDTH = ${qkRopeHeadDim}u;
const QUADS = ${paddedWidth(qkRopeHeadDim) / 8}u;

struct Params {
  rows: u32,
  ropeKeyBase: u32,  // elements from the binding's start to the first row
  ropeKeyRow: u32,   // elements from one row to the next
  ropeKeyRows: u32,  // rows of a batch item
  ropeKeyGap: u32,   // further elements from one batch item to the next, modulo 2^32
  expandedBase: u32, // halves from the scratch's start to the first row, a multiple of 8
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> ropeKey: array<${ropeKey}>;
@group(0) @binding(2) var<storage, read_write> expanded: array<vec4<u32>>; // halves

${halfRange}

fn loadRope4(row: u32, column: u32) -> vec4<f32> {
  let offset = params.ropeKeyBase + row * params.ropeKeyRow + (row / params.ropeKeyRows) * params.ropeKeyGap;
  if (column >= WIDTH) { return vec4<f32>(); }
  return ${load4("ropeKey", ropeKey, "offset", "column", "WIDTH")};
}

fn packed4(row: u32, column: u32) -> vec2<u32> {
  let x = saturated(loadRope4(row, column));
  return vec2<u32>(pack2x16float(x.xy), pack2x16float(x.zw));
}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let piece = workgroup.x * ${workgroupSize}u + t;
  let row = piece / QUADS;
  if (row >= params.rows) { return; }
  let column = piece % QUADS * 8u;
  expanded[params.expandedBase / 8u + piece] = vec4<u32>(packed4(row, column), packed4(row, column + 4u));
}
`;
}
