// Expansion of latents to keys or values of a group of heads on matrix units: a GEMM [rows, L] × [L, heads · width], f16
// products and f32 sums, into halves laid out as matrix_scratch.ts says.
//
//   one workgroup = blockM × blockN of the result; each subgroup owns 16·rowFragments × 16·columnFragments of it
//   the latent axis streams through workgroup memory `depth` at a time; the next slice waits in registers meanwhile
//   workgroup memory in quads (128 × 256 × 32, 8 subgroups of 64 × 64: 46.0 KB), in an array for each row or column of
//   subgroups, so that fragments lie at constant places (see matrix_attend.ts):
//     latents  blockM · (depth/8 + 1)    weights  columns of subgroups · depth · (width/8 + 1)    results  subgroups · 16 · 9
//
// Sums past the largest half, 65,504, become that instead of infinity: keys that large decide the softmax either way.
//
// A model's linear layers are the same product with one head, some in float32 or with a bias (src/gpu/linear.ts).

import type { Capabilities } from "../capabilities.ts";
import { halfRange, type HalvesElement, loadHalves, paddedWidth } from "./matrix_scratch.ts";
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
import { storageDirectives } from "./storage_element.ts";
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
  /** Latent rows as they are stored; eight halves at a time where {@link isWhole}. */
  readonly latent: HalvesElement;
  /** Weights as they are stored, likewise. */
  readonly weight: HalvesElement;
  /** Width of one head of the result. */
  readonly headDim: number;
  /** Whether batch items of latents lie apart or overlap, so that finding a row takes a division. */
  readonly gapped: boolean;
  /** How sums are stored. Default `halves`. */
  readonly result?: "halves" | "floats";
  /** Whether a row of float32 is added to each row of the result, which has no padding then. */
  readonly bias?: boolean;
}

/** Column fragments of a result that are stored at a time. */
const storedFragments = 2;

/** Quads from one of their rows to the next. */
const resultStride = storedFragments * fragmentSize / 4 + 1;

/**
 * Whether all rows and heads are whole numbers of what is staged, so that eight halves are loaded as they lie, from places
 * that are known before the loop.
 */
export function isWhole({ depth }: MatrixExpandTile, kvLoraRank: number, headDim: number): boolean {
  return kvLoraRank % depth === 0 && headDim % fragmentSize === 0;
}

function layout({ blockM, blockN, depth, rowFragments, columnFragments }: MatrixExpandTile) {
  const subgroupRows = blockM / (rowFragments * fragmentSize);
  const subgroupColumns = blockN / (columnFragments * fragmentSize);
  const leftStride = depth / 8 + 1;
  const rightStride = columnFragments * fragmentQuads + 1;
  const subgroups = subgroupRows * subgroupColumns;
  const latents: MatrixMemory = {
    ...{ name: "latents", kind: "halves", parts: subgroupRows },
    quads: rowFragments * fragmentSize * leftStride,
  };
  const weights: MatrixMemory = {
    ...{ name: "weights", kind: "halves", parts: subgroupColumns },
    quads: depth * rightStride,
  };
  const results: MatrixMemory = {
    ...{ name: "results", kind: "floats", parts: subgroups },
    quads: fragmentSize * resultStride,
  };
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
  const { columnFragments } = tile;
  if (
    !Number.isInteger(subgroups) || tile.depth % fragmentSize !== 0 ||
    columnFragments % Math.min(storedFragments, columnFragments) !== 0
  ) {
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
  const ownQuads = columnFragments * fragmentQuads;
  const padded = paddedWidth(shape.headDim);
  const own = unit.part(results, "subgroup");
  const floats = shape.result === "floats";
  const sum = (part: string, offset: number) =>
    `${unit.readQuad(own, part)}${shape.bias ? ` + biasAt(column${offset === 0 ? "" : ` + ${offset}u`})` : ""}`;
  const storage = floats
    ? `let at = (params.expandedBase + row * params.columns + column) / 4u;
    expanded[at] = ${sum("part", 0)};
    expanded[at + 1u] = ${sum("part + 1u", 4)};`
    : `expanded[(params.expandedBase + row * params.columns + column) / 8u] = packHalves(
      saturated(${sum("part", 0)}),
      saturated(${sum("part + 1u", 4)}),
    );`;

  const together = Math.min(storedFragments, columnFragments);
  const registersOf = (count: number) => Math.ceil(count / size);
  const pieces = (count: number, emit: (piece: string, i: number) => string) =>
    unroll(registersOf(count), (i) => {
      const piece = i === 0 ? "t" : `t + ${i * size}u`;
      const code = emit(piece, i);
      return (i + 1) * size <= count ? code : `if (${piece} < ${count}u) {\n${indent(code, 2)}\n}`;
    });
  const latentPieces = blockM * depthQuads;
  const weightPieces = depth * columnQuads;
  const whole = shape.latent === "vec4<u32>" && shape.weight === "vec4<u32>";
  const load = (slice: string) =>
    whole
      ? `${pieces(latentPieces, (_piece, i) => `latent${i} = latent[latentAt${i} + ${slice} * ${depthQuads}u];`)}
${pieces(weightPieces, (_piece, i) => `weight${i} = weight[weightAt${i} + ${slice} * weightStep];`)}`
      : `${pieces(latentPieces, (piece, i) => `latent${i} = loadLatents(${piece}, ${slice}, rowBase);`)}
${pieces(weightPieces, (piece, i) => `weight${i} = loadWeights(${piece}, ${slice}, columnBase);`)}`;
  const store = `${
    pieces(latentPieces, (piece, i) =>
      unit.writeQuad(
        unit.part(latents, `((${piece}) / ${rowFragments * fragmentSize * depthQuads}u)`),
        `(${piece}) / ${depthQuads}u % ${rowFragments * fragmentSize}u * ${leftStride}u + (${piece}) % ${depthQuads}u`,
        `latent${i}`,
      ))
  }
${
    pieces(weightPieces, (piece, i) =>
      unit.writeQuad(
        unit.part(weights, `((${piece}) % ${columnQuads}u / ${ownQuads}u)`),
        `(${piece}) / ${columnQuads}u * ${rightStride}u + (${piece}) % ${ownQuads}u`,
        `weight${i}`,
      ))
  }`;
  const sums = unit.fragments("c", "result", rowFragments, columnFragments);
  const multiply = unit.over("d", depth / fragmentSize, (d) =>
    `${
      unroll(rowFragments, (r) => {
        const at = `${r * fragmentSize * leftStride}u + ${d} * ${fragmentQuads}u`;
        return `let left${r} = ${unit.loadLeft(unit.part(latents, "subgroupRow"), at, leftStride)};`;
      })
    }
${
      unit.over("c0", columnFragments, (c) => {
        const at = `${d} * ${fragmentSize * rightStride}u + ${c} * ${fragmentQuads}u`;
        const right = unit.right("right", unit.part(weights, "subgroupColumn"), at, rightStride, "row");
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

${whole ? places(shape, depthQuads, columnQuads) : loads(shape, depthQuads, columnQuads, unit.native)}

@compute @workgroup_size(${size})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
${unit.prologue}
  // Tiles of the same columns run next to each other: weights may be larger than a card's cache, and are read once so.
  let rowBase = (params.firstTile + workgroup.x) * BLOCK_M;
  let columnBase = workgroup.y * BLOCK_N;
  let subgroupRow = subgroup / ${subgroupColumns}u;
  let subgroupColumn = subgroup % ${subgroupColumns}u;
  let slices = (params.L + DEPTH - 1u) / DEPTH;
${indent(sums.declaration, 2)}
${unroll(registersOf(latentPieces), (i) => `  var latent${i} = vec4<u32>();`)}
${unroll(registersOf(weightPieces), (i) => `  var weight${i} = vec4<u32>();`)}
${
    whole
      ? `${unroll(registersOf(latentPieces), (i) => `  let latentAt${i} = latentPlace(t + ${i * size}u, rowBase);`)}
${unroll(registersOf(weightPieces), (i) => `  let weightAt${i} = weightPlace(t + ${i * size}u, columnBase);`)}
  let weightStep = DEPTH * params.weightStride / 8u;`
      : ""
  }
${indent(load("0u"), 2)}
  for (var slice = 0u; slice < slices; slice += 1u) {
${indent(store, 4)}
    workgroupBarrier();
    // In a branch, or the driver moves the loads behind the products, to where they are stored, and waits for each: 167 → 227
    // TFLOP/s on an H100.
    if (slice + 1u < slices) {
${indent(load("(slice + 1u)"), 6)}
    }
${indent(multiply, 4)}
    workgroupBarrier();
  }

  // A few fragments at a time, through the subgroup's own memory: eight halves of a row to an invocation.
${
    indent(
      unit.over("r", rowFragments, (r) =>
        unit.over("n", columnFragments / together, (n) =>
          `${
            unroll(together, (i) => {
              const fragment = unit.native ? `${parseInt(n) * together + i}u` : `(${n} * ${together}u + ${i}u)`;
              return unit.storeResult(own, `${4 * i}u`, resultStride, sums.at(r, fragment));
            })
          }
workgroupBarrier();
${
            unroll(together, (i) =>
              `{
  let ownRow = (lane + ${i * subgroupSize}u) / ${2 * together}u;
  let eight = (lane + ${i * subgroupSize}u) % ${2 * together}u;
  let part = ownRow * ${resultStride}u + 2u * eight;
  let row = rowBase + (subgroupRow * ${rowFragments}u + ${r}) * 16u + ownRow;
  let column = columnBase + (subgroupColumn * ${columnFragments}u + ${n} * ${together}u) * 16u + eight * 8u;
  if (row < params.rows && column < params.columns) {
    ${storage}
  }
}`)
          }
workgroupBarrier();`)),
      2,
    )
  }
}
`;
}

/** WGSL functions that say where the quads that an invocation carries lie in the first slice; past the end, the last ones. */
function places({ gapped }: MatrixExpandShape, depthQuads: number, columnQuads: number): string {
  return `fn latentPlace(piece: u32, rowBase: u32) -> u32 {
  let row = min(rowBase + piece / ${depthQuads}u, params.rows - 1u);
  return (params.latentBase + row * params.latentRow${
    gapped ? " + (row / params.latentRows) * params.latentGap" : ""
  }) / 8u + piece % ${depthQuads}u;
}

fn weightPlace(piece: u32, columnBase: u32) -> u32 {
  let column = min(columnBase + piece % ${columnQuads}u * 8u, params.columns - 8u);
  return (params.weightBase + piece / ${columnQuads}u * params.weightStride + params.firstColumn + column) / 8u;
}`;
}

/** WGSL functions that load eight halves of any shape, with zeros past its end. */
function loads(
  { latent, weight, gapped }: MatrixExpandShape,
  depthQuads: number,
  columnQuads: number,
  native: boolean,
): string {
  return `// Loads stand outside of branches: those inside of one each wait for memory by itself.
fn loadLatents(piece: u32, slice: u32, rowBase: u32) -> vec4<u32> {
  let row = min(rowBase + piece / ${depthQuads}u, params.rows - 1u);
  let wanted = slice * DEPTH + piece % ${depthQuads}u * 8u;
  let exists = wanted < params.L;
  let column = select(0u, wanted, exists);
  let offset = params.latentBase + row * params.latentRow${
    gapped ? " + (row / params.latentRows) * params.latentGap" : ""
  };
  return select(vec4<u32>(), ${loadHalves("latent", latent, "offset", "column", "params.L", native)}, exists);
}

fn loadWeights(piece: u32, slice: u32, columnBase: u32) -> vec4<u32> {
  let wanted = slice * DEPTH + piece / ${columnQuads}u;
  let column = columnBase + piece % ${columnQuads}u * 8u;
  let exists = wanted < params.L && column < params.columns && column % PADDED < WIDTH;
  let row = select(0u, wanted, exists);
  let head = select(0u, column / PADDED, exists);
  let within = select(0u, column % PADDED, exists);
  let offset = params.weightBase + row * params.weightStride + params.firstColumn + head * WIDTH;
  return select(vec4<u32>(), ${loadHalves("weight", weight, "offset", "within", "WIDTH", native)}, exists);
}`;
}
