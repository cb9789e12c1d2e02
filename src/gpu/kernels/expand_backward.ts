// Gradients of the expansion of latents to keys or values of a group of heads: two GEMMs.
//
//   latents:  ∂c [rows, L]        += ∂K [rows, columns] · wᵀ           w [L, columns], a row of it as long as all heads
//   weights:  ∂w [L, columns]      = cᵀ · ∂K                           c [rows, L]
//
//   tile, invocations and workgroup memory as in expand.ts; what lies along the summed axis is transposed while it is staged
//
// Latents of a row that nobody saw may hold anything: in the weights' gradients, NaN and infinity among the latents count
// as 0. Where the row was seen, they reached its keys or values, and come back through ∂K.

import type { ExpandTile } from "./expand.ts";
import { workgroupSize } from "./expand.ts";
import {
  indent,
  outerByColumns,
  overDepth,
  slicedLoop,
  stagedStride,
  type Staging,
  storeTransposed,
  unroll,
} from "./register_tile.ts";
import { load4, storageDirectives, type StorageElement } from "./storage_element.ts";

/** Which of the two gradients a kernel computes. */
export type ExpandGradient = "latents" | "weights";

/** What of a call the generated WGSL depends on. */
export interface ExpandBackwardShape {
  /** ∂K, or the latents, as they are stored. */
  readonly left: StorageElement;
  /** Weights, or ∂K, as they are stored. */
  readonly right: StorageElement;
  /** The gradient as it is stored. */
  readonly gradient: "f32" | "vec4<f32>";
  /** Whether batch items of latents lie apart or overlap, so that finding a row takes a division. */
  readonly gapped: boolean;
}

/** The parameter block's values, in order. */
export interface ExpandBackwardWords {
  /** Rows, columns and summed length of the product. */
  readonly sizes: readonly [rows: number, columns: number, depth: number];
  /** Index of the first row tile of this dispatch. */
  readonly firstTile: number;
  /** Of the left operand: elements to the first row, from row to row; rows of a batch item, and the gap between items. */
  readonly left: readonly [base: number, row: number, itemRows: number, gap: number];
  /** Of the right operand. */
  readonly right: readonly [base: number, row: number];
  /** Of the gradient. */
  readonly gradient: readonly [base: number, row: number];
  /** Whether to add to what is there. */
  readonly accumulate: boolean;
}

/** The words of the parameter block. */
export function wordsOf({ sizes, firstTile, left, right, gradient, accumulate }: ExpandBackwardWords): number[] {
  return [...sizes, firstTile, ...left, ...right, ...gradient, Number(accumulate)];
}

/** The parameters of both gradients' products, whatever units compute them. */
export const projectionParams = `struct Params {
  rows: u32,         // of the product
  columns: u32,
  depth: u32,        // length of the summed axis
  firstTile: u32,    // index of the first row tile of this dispatch
  leftBase: u32,     // elements from the binding's start to the first row
  leftRow: u32,      // elements from one row to the next
  leftItemRows: u32, // rows of a batch item of latents
  leftGap: u32,      // further elements from one batch item to the next, modulo 2^32
  rightBase: u32,
  rightRow: u32,
  gradientBase: u32,
  gradientRow: u32,
  accumulate: u32,   // whether to add to what is there
}`;

/** WGSL of `put`, which adds four neighbours to the gradient or stores them. */
export function storeGradient(shape: Pick<ExpandBackwardShape, "gradient">): string {
  return `fn put(row: u32, column: u32, value: vec4<f32>) {
  if (row >= params.rows) { return; }
  let offset = params.gradientBase + row * params.gradientRow;
${
    shape.gradient === "vec4<f32>"
      ? `  if (column >= params.columns) { return; }
  let at = (offset + column) / 4u;
  var sum = value;
  if (params.accumulate != 0u) { sum += gradient[at]; }
  gradient[at] = sum;`
      : `  for (var i = 0u; i < 4u; i += 1u) {
    if (column + i >= params.columns) { return; }
    let at = offset + column + i;
    var sum = value[i];
    if (params.accumulate != 0u) { sum += gradient[at]; }
    gradient[at] = sum;
  }`
  }
}`;
}

/** The kernel's source. */
export function wgsl(which: ExpandGradient, tile: ExpandTile, shape: ExpandBackwardShape): string {
  const { blockM, blockN, threadRows, threadColumns, depth, numStages } = tile;
  const size = workgroupSize(tile);
  const rowQuads = blockM / threadRows / 4;
  const columnQuads = blockN / threadColumns / 4;
  const names = (prefix: string, count: number) => Array.from({ length: count }, (_, i) => `${prefix}${i}`);
  const toLatents = which === "latents";

  const left: Staging = {
    name: "left",
    pieces: blockM * depth / 4,
    load: (piece, slice) => `loadLeft(${piece}, ${slice}, rowBase)`,
    store: (piece, value, stage) => `stageLeft(${piece}, ${stage}, ${value});`,
  };
  const right: Staging = {
    name: "right",
    pieces: depth * blockN / 4,
    load: (piece, slice) => `loadRight(${piece}, ${slice}, columnBase)`,
    store: (piece, value, stage) => `stageRight(${piece}, ${stage}, ${value});`,
  };
  const everyResult = (emit: (name: string, row: number, quad: number) => string) =>
    unroll(rowQuads * 4, (i) => unroll(columnQuads, (c) => emit(`c${i}_${c}`, i, c)));
  const latentRow = (row: string) =>
    `params.leftBase + ${row} * params.leftRow${
      shape.gapped ? ` + (${row} / params.leftItemRows) * params.leftGap` : ""
    }`;

  const loads = toLatents
    ? `// Four neighbours along the summed axis of one row.
fn loadLeft(piece: u32, slice: u32, rowBase: u32) -> vec4<f32> {
  let row = rowBase + piece / DEPTH_PIECES;
  let column = slice * DEPTH + (piece % DEPTH_PIECES) * 4u;
  if (row >= params.rows || column >= params.depth) { return vec4<f32>(); }
  let offset = params.leftBase + row * params.leftRow;
  return ${load4("leftRows", shape.left, "offset", "column", "params.depth")};
}

fn stageLeft(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
${indent(storeTransposed("left", "stage", "depth", "row", "value"), 2)}
}

fn loadRight(piece: u32, slice: u32, columnBase: u32) -> vec4<f32> {
  let row = columnBase + piece / DEPTH_PIECES;
  let column = slice * DEPTH + (piece % DEPTH_PIECES) * 4u;
  if (row >= params.columns || column >= params.depth) { return vec4<f32>(); }
  let offset = params.rightBase + row * params.rightRow;
  return ${load4("rightRows", shape.right, "offset", "column", "params.depth")};
}

fn stageRight(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
${indent(storeTransposed("right", "stage", "depth", "row", "value"), 2)}
}`
    : `// Four neighbours across the summed axis, of one row of it.
fn loadLeft(piece: u32, slice: u32, rowBase: u32) -> vec4<f32> {
  let row = slice * DEPTH + piece / ${blockM / 4}u;
  let column = rowBase + (piece % ${blockM / 4}u) * 4u;
  if (row >= params.depth || column >= params.rows) { return vec4<f32>(); }
  let offset = ${latentRow("row")};
  let value = ${load4("leftRows", shape.left, "offset", "column", "params.rows")};
  let exponent = bitcast<vec4<u32>>(value) & vec4<u32>(0x7f800000u);
  return select(value, vec4<f32>(), exponent == vec4<u32>(0x7f800000u));
}

fn stageLeft(piece: u32, stage: u32, value: vec4<f32>) {
  left[stage][piece / ${blockM / 4}u][piece % ${blockM / 4}u] = value;
}

fn loadRight(piece: u32, slice: u32, columnBase: u32) -> vec4<f32> {
  let row = slice * DEPTH + piece / ${blockN / 4}u;
  let column = columnBase + (piece % ${blockN / 4}u) * 4u;
  if (row >= params.depth || column >= params.columns) { return vec4<f32>(); }
  let offset = params.rightBase + row * params.rightRow;
  return ${load4("rightRows", shape.right, "offset", "column", "params.columns")};
}

fn stageRight(piece: u32, stage: u32, value: vec4<f32>) {
  right[stage][piece / ${blockN / 4}u][piece % ${blockN / 4}u] = value;
}`;

  return `${storageDirectives([shape.left, shape.right])}// Gradient of the expansion: ${
    toLatents ? "latents += ∂K · wᵀ" : "weights = cᵀ · ∂K"
  }. ${blockM} × ${blockN}, depth ${depth}, ${numStages} stage(s)
const BLOCK_M = ${blockM}u;
const BLOCK_N = ${blockN}u;
const DEPTH = ${depth}u;
const DEPTH_PIECES = ${depth / 4}u;
const TX = ${threadColumns}u;

${projectionParams}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> leftRows: array<${shape.left}>;
@group(0) @binding(2) var<storage, read> rightRows: array<${shape.right}>;
@group(0) @binding(3) var<storage, read_write> gradient: array<${shape.gradient}>;

var<workgroup> left: array<array<array<vec4<f32>, ${stagedStride(blockM)}>, ${depth}>, ${numStages}>;
var<workgroup> right: array<array<array<vec4<f32>, ${stagedStride(blockN)}>, ${depth}>, ${numStages}>;

${loads}

${storeGradient(shape)}

@compute @workgroup_size(${size})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let tx = t % TX;
  let ty = t / TX;
  let rowBase = (params.firstTile + workgroup.y) * BLOCK_M;
  let columnBase = workgroup.x * BLOCK_N;
${indent(everyResult((c) => `var ${c} = vec4<f32>();`), 2)}
${
    indent(
      slicedLoop({
        slices: "(params.depth + DEPTH - 1u) / DEPTH",
        workgroupSize: size,
        numStages,
        operands: [left, right],
        compute: (stage) =>
          overDepth(depth, tile.unrollDepth, (d) =>
            `${
              unroll(rowQuads, (r) => `let a${r} = left[${stage}][${d}][ty + ${r * threadRows}u];`)
            }
${unroll(columnQuads, (c) => `let b${c} = right[${stage}][${d}][tx + ${c * threadColumns}u];`)}
${outerByColumns("c", names("a", rowQuads), names("b", columnQuads))}`),
      }),
      2,
    )
  }
${
    everyResult((c, i, q) =>
      `  put(rowBase + 4u * (ty + ${Math.floor(i / 4) * threadRows}u) + ${i % 4}u, columnBase + 4u * (tx + ${
        q * threadColumns
      }u), ${c});`
    )
  }
}
`;
}
