// Expansion of latents to keys or values of a group of heads on matrix units: a GEMM [rows, L] × [L, heads · width], f16
// products and f32 sums, into halves laid out as matrix_scratch.ts says.
//
//   one workgroup = blockM × blockN of the result; each subgroup owns 16·rowFragments × 16·columnFragments of it
//   the latent axis streams through workgroup memory `depth` at a time; the next slice waits in registers meanwhile
//   workgroup memory in quads (128 × 256 × 32, 8 subgroups of 64 × 64: 37.4 KB):
//     latents  blockM · (depth/8 + 1)    weights  depth · (blockN/8 + 1)    results  subgroups · 16 · 5
//
// Sums past the largest half, 65,504, become that instead of infinity: keys that large decide the softmax either way.
//
// A model's linear layers are the same product with one head, some in float32 or with a bias (src/gpu/linear.ts).

import type { Capabilities } from "../capabilities.ts";
import { halfRange, loadHalves, paddedWidth } from "./matrix_scratch.ts";
import {
  fragmentQuads,
  fragmentSize,
  type MatrixBackend,
  type MatrixMemory,
  matrixUnit,
  memoryBytes,
  subgroupSize,
} from "./matrix_unit.ts";
import { biasDeclaration } from "./expand.ts";
import { indent, unroll } from "./register_tile.ts";
import { storageDirectives, type StorageElement } from "./storage_element.ts";
import { whyTooLarge } from "./workgroup_limits.ts";

/** The tile of one kernel. */
export interface MatrixExpandTile {
  /** Rows of the result that one workgroup owns. */
  readonly blockM: number;
  /** Columns of the result that one workgroup owns. */
  readonly blockN: number;
  /** Latent columns staged per step. */
  readonly depth: number;
  /** Rows of a subgroup, in fragments. */
  readonly rowFragments: number;
  /** Columns of a subgroup, in fragments. */
  readonly columnFragments: number;
}

/** What of a call the generated WGSL depends on; sizes are read at run time. */
export interface MatrixExpandShape {
  /** Latent rows as they are stored. */
  readonly latent: StorageElement;
  /** Weights as they are stored. */
  readonly weight: StorageElement;
  /** Width of one head of the result. */
  readonly headDim: number;
  /** Whether batch items of latents lie apart or overlap, so that finding a row takes a division. */
  readonly gapped: boolean;
  /** How sums are stored. Default `halves`. */
  readonly result?: "halves" | "floats";
  /** Whether a row of float32 is added to each row of the result, which has no padding then. */
  readonly bias?: boolean;
}

/** Quads from one row to the next of a result fragment that is stored by itself. */
const resultStride = fragmentSize / 4 + 1;

function layout({ blockM, blockN, depth, rowFragments, columnFragments }: MatrixExpandTile) {
  const subgroupRows = blockM / (rowFragments * fragmentSize);
  const subgroupColumns = blockN / (columnFragments * fragmentSize);
  const leftStride = depth / 8 + 1;
  const rightStride = blockN / 8 + 1;
  const subgroups = subgroupRows * subgroupColumns;
  const latents: MatrixMemory = { name: "latents", kind: "halves", quads: blockM * leftStride };
  const weights: MatrixMemory = { name: "weights", kind: "halves", quads: depth * rightStride };
  const results: MatrixMemory = { name: "results", kind: "floats", quads: subgroups * fragmentSize * resultStride };
  return { subgroupColumns, subgroups, leftStride, rightStride, latents, weights, results };
}

/** Invocations per workgroup. */
export function workgroupSize(tile: MatrixExpandTile): number {
  return layout(tile).subgroups * subgroupSize;
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(tile: MatrixExpandTile): number {
  const { latents, weights, results } = layout(tile);
  return memoryBytes([latents, weights, results]);
}

/** Why this tile cannot run, or null when it can. */
export function whyInvalid(tile: MatrixExpandTile, { limits }: Pick<Capabilities, "limits">): string | null {
  const { subgroups } = layout(tile);
  if (!Number.isInteger(subgroups) || tile.depth % fragmentSize !== 0) {
    return `${tile.blockM} × ${tile.blockN} × ${tile.depth} is not a whole number of the subgroups' parts`;
  }
  return whyTooLarge(workgroupSize(tile), workgroupBytes(tile), limits);
}

/** Columns of the result, padding included. */
export function paddedColumns(shape: Pick<MatrixExpandShape, "headDim">, heads: number): number {
  return heads * paddedWidth(shape.headDim);
}

/** The kernel's source. */
export function wgsl(tile: MatrixExpandTile, shape: MatrixExpandShape, backend: MatrixBackend): string {
  const { blockM, blockN, depth, rowFragments, columnFragments } = tile;
  const unit = matrixUnit(backend);
  const { subgroupColumns, leftStride, rightStride, latents, weights, results } = layout(tile);
  const size = workgroupSize(tile);
  const depthQuads = depth / 8;
  const columnQuads = blockN / 8;
  const padded = paddedWidth(shape.headDim);
  const floats = shape.result === "floats";
  const sum = (part: string, offset: number) =>
    `${unit.readQuad(results, part)}${shape.bias ? ` + biasAt(column${offset === 0 ? "" : ` + ${offset}u`})` : ""}`;
  const stored = floats
    ? `let at = (params.expandedBase + row * params.columns + column) / 4u;
    expanded[at] = ${sum("part", 0)};
    expanded[at + 1u] = ${sum("part + 1u", 4)};`
    : `expanded[(params.expandedBase + row * params.columns + column) / 8u] = packHalves(
      saturated(${sum("part", 0)}),
      saturated(${sum("part + 1u", 4)}),
    );`;

  const registersOf = (count: number) => Math.ceil(count / size);
  const pieces = (count: number, emit: (piece: string, i: number) => string) =>
    unroll(registersOf(count), (i) => {
      const piece = i === 0 ? "t" : `t + ${i * size}u`;
      const code = emit(piece, i);
      return (i + 1) * size <= count ? code : `if (${piece} < ${count}u) {\n${indent(code, 2)}\n}`;
    });
  const latentPieces = blockM * depthQuads;
  const weightPieces = depth * columnQuads;
  const load = (slice: string) =>
    `${pieces(latentPieces, (piece, i) => `latent${i} = loadLatents(${piece}, ${slice}, rowBase);`)}
${pieces(weightPieces, (piece, i) => `weight${i} = loadWeights(${piece}, ${slice}, columnBase);`)}`;
  const store = `${
    pieces(latentPieces, (piece, i) =>
      unit.writeQuad(
        latents,
        `(${piece}) / ${depthQuads}u * ${leftStride}u + (${piece}) % ${depthQuads}u`,
        `latent${i}`,
      ))
  }
${
    pieces(weightPieces, (piece, i) =>
      unit.writeQuad(
        weights,
        `(${piece}) / ${columnQuads}u * ${rightStride}u + (${piece}) % ${columnQuads}u`,
        `weight${i}`,
      ))
  }`;
  const sums = unit.fragments("c", "result", rowFragments, columnFragments);
  const multiply = unit.over("d", depth / fragmentSize, (d) =>
    `${
      unroll(rowFragments, (r) => {
        const at = `(subgroupRow * ${rowFragments}u + ${r}u) * ${
          fragmentSize * leftStride
        }u + ${d} * ${fragmentQuads}u`;
        return `let left${r} = ${unit.loadLeft(latents, at, leftStride)};`;
      })
    }
${
      unit.over("c0", columnFragments, (c) => {
        const at = `${d} * ${
          fragmentSize * rightStride
        }u + (subgroupColumn * ${columnFragments}u + ${c}) * ${fragmentQuads}u`;
        const right = unit.right("right", weights, at, rightStride, "row");
        return `${right.code}
${unroll(rowFragments, (r) => unit.accumulate(sums.at(`${r}u`, c), `left${r}`, right))}`;
      })
    }`);

  return `${
    unit.native ? unit.directives : storageDirectives([shape.latent, shape.weight])
  }// Latents × weights = keys or values of a head group in halves, on matrix units. ${blockM} × ${blockN}, depth ${depth}
const BLOCK_M = ${blockM}u;
const BLOCK_N = ${blockN}u;
const DEPTH = ${depth}u;
const WIDTH = ${shape.headDim}u; // of a head
const PADDED = ${padded}u; // the same in whole fragments

struct Params {
  rows: u32,         // latent rows
  columns: u32,      // columns of the result: heads of the group × padded width
  firstColumn: u32,  // first column of the group in the weights
  firstTile: u32,    // index of the first row tile of this dispatch
  L: u32,            // width of a latent row
  weightStride: u32, // columns of the weights: all KV heads × width
  latentBase: u32,   // elements from the binding's start to the first row
  latentRow: u32,    // elements from one row to the next
  latentRows: u32,   // rows of a batch item
  latentGap: u32,    // further elements from one batch item to the next, modulo 2^32
  weightBase: u32,
  expandedBase: u32, // ${floats ? "elements" : "halves"} from the scratch's start to the first row, a multiple of 8
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> latent: array<${shape.latent}>;
@group(0) @binding(2) var<storage, read> weight: array<${shape.weight}>;
@group(0) @binding(3) var<storage, read_write> expanded: array<${floats ? "vec4<f32>>;" : "vec4<u32>>; // halves"}
${shape.bias ? biasDeclaration : ""}
${unit.declarations([latents, weights, results])}

${halfRange}

// Loads stand outside of branches: those inside of one each wait for memory by itself.
fn loadLatents(piece: u32, slice: u32, rowBase: u32) -> vec4<u32> {
  let row = min(rowBase + piece / ${depthQuads}u, params.rows - 1u);
  let wanted = slice * DEPTH + piece % ${depthQuads}u * 8u;
  let exists = wanted < params.L;
  let column = select(0u, wanted, exists);
  let offset = params.latentBase + row * params.latentRow${
    shape.gapped ? " + (row / params.latentRows) * params.latentGap" : ""
  };
  return select(vec4<u32>(), ${
    loadHalves("latent", shape.latent, "offset", "column", "params.L", unit.native)
  }, exists);
}

fn loadWeights(piece: u32, slice: u32, columnBase: u32) -> vec4<u32> {
  let wanted = slice * DEPTH + piece / ${columnQuads}u;
  let column = columnBase + piece % ${columnQuads}u * 8u;
  let exists = wanted < params.L && column < params.columns && column % PADDED < WIDTH;
  let row = select(0u, wanted, exists);
  let head = select(0u, column / PADDED, exists);
  let within = select(0u, column % PADDED, exists);
  let offset = params.weightBase + row * params.weightStride + params.firstColumn + head * WIDTH;
  return select(vec4<u32>(), ${loadHalves("weight", shape.weight, "offset", "within", "WIDTH", unit.native)}, exists);
}

@compute @workgroup_size(${size})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
${unit.prologue}
  let rowBase = (params.firstTile + workgroup.y) * BLOCK_M;
  let columnBase = workgroup.x * BLOCK_N;
  let subgroupRow = subgroup / ${subgroupColumns}u;
  let subgroupColumn = subgroup % ${subgroupColumns}u;
  let slices = (params.L + DEPTH - 1u) / DEPTH;
${indent(sums.declaration, 2)}
${unroll(registersOf(latentPieces), (i) => `  var latent${i} = vec4<u32>();`)}
${unroll(registersOf(weightPieces), (i) => `  var weight${i} = vec4<u32>();`)}
${indent(load("0u"), 2)}
  for (var slice = 0u; slice < slices; slice += 1u) {
${indent(store, 4)}
    workgroupBarrier();
${indent(load("slice + 1u"), 4)}
${indent(multiply, 4)}
    workgroupBarrier();
  }

  // A fragment at a time, through the subgroup's own memory: half a row, eight halves, to an invocation.
  let part = subgroup * ${fragmentSize * resultStride}u + lane / 2u * ${resultStride}u + lane % 2u * 2u;
${
    indent(
      unit.over("r", rowFragments, (r) =>
        unit.over("n", columnFragments, (n) =>
          `${unit.storeResult(results, `subgroup * ${fragmentSize * resultStride}u`, resultStride, sums.at(r, n))}
workgroupBarrier();
{
  let row = rowBase + (subgroupRow * ${rowFragments}u + ${r}) * 16u + lane / 2u;
  let column = columnBase + (subgroupColumn * ${columnFragments}u + ${n}) * 16u + lane % 2u * 8u;
  if (row < params.rows && column < params.columns) {
    ${stored}
  }
}
workgroupBarrier();`)),
      2,
    )
  }
}
`;
}
