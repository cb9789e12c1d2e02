// Expansion of latents to keys or values of a group of heads: a GEMM [rows, L] × [L, columns].
//
//   one workgroup = block × block of the result; 256 invocations (64 for block 32) in a square, each block/side wide
//   invocation (ty, tx) owns row quads r·side + ty and column quads c·side + tx, in registers
//   the latent axis streams through workgroup memory DEPTH = 16 at a time: latents transposed, weights as they lie
//   workgroup memory: stages · DEPTH · 2 · (block/4 + 1) vec4   (block 128, 1 stage: 16.9 KB; block 64: 8.7 KB)
//
// The result is [rows, columns] with the head dimension fastest, so that attention stages it with vec4 loads.

import type { MlaProblem } from "../../op/mla_problem.ts";
import type { GpuLimits } from "../capabilities.ts";
import {
  indent,
  load4,
  outerByColumns,
  slicedLoop,
  stagedStride,
  type Staging,
  storeTransposed,
  unroll,
} from "./register_tile.ts";

/** The tile of one expansion kernel. */
export interface ExpandTile {
  /** Side of the square of the result that one workgroup owns: 32, 64 or 128. */
  readonly block: number;
  /** Latent columns staged per step. */
  readonly depth: number;
  /** Staging buffers: 1 or 2. */
  readonly numStages: number;
}

/** What of a problem the generated WGSL depends on. */
export interface ExpandShape {
  /** L. */
  readonly kvLoraRank: number;
  /** Hkv. */
  readonly kvHeads: number;
  /** Width of one head of the result: P for keys, V for values. */
  readonly headDim: number;
}

/** The two expansions of a problem. */
export function expandShapes(problem: MlaProblem): { readonly keys: ExpandShape; readonly values: ExpandShape } {
  const { kvLoraRank, kvHeads, qkNopeHeadDim, vHeadDim } = problem;
  return {
    keys: { kvLoraRank, kvHeads, headDim: qkNopeHeadDim },
    values: { kvLoraRank, kvHeads, headDim: vHeadDim },
  };
}

/** The tile that goes with a configuration's `expandBlock`. */
export function expandTile(expandBlock: number, limits: GpuLimits): ExpandTile {
  const two = { block: expandBlock, depth: expandBlock === 128 ? 8 : 16, numStages: 2 };
  return workgroupBytes(two) <= limits.maxComputeWorkgroupStorageSize ? two : { ...two, numStages: 1 };
}

/** Invocations per workgroup. */
export function workgroupSize(tile: ExpandTile): number {
  return tile.block === 32 ? 64 : 256;
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(tile: ExpandTile): number {
  return 16 * tile.numStages * tile.depth * 2 * stagedStride(tile.block);
}

/** Why this tile cannot run, or null when it can. */
export function whyInvalid(tile: ExpandTile, limits: GpuLimits): string | null {
  if (![32, 64, 128].includes(tile.block)) return `expandBlock must be 32, 64 or 128, got ${tile.block}`;
  if (workgroupSize(tile) > limits.maxComputeInvocationsPerWorkgroup) {
    return `expandBlock ${tile.block} needs ${
      workgroupSize(tile)
    } invocations, maxComputeInvocationsPerWorkgroup is ${limits.maxComputeInvocationsPerWorkgroup}`;
  }
  if (workgroupBytes(tile) > limits.maxComputeWorkgroupStorageSize) {
    return `expandBlock ${tile.block} needs ${
      workgroupBytes(tile)
    } bytes of workgroup memory, maxComputeWorkgroupStorageSize is ${limits.maxComputeWorkgroupStorageSize}`;
  }
  return null;
}

/** The kernel's source. */
export function wgsl(tile: ExpandTile, shape: ExpandShape): string {
  const { block, depth, numStages } = tile;
  const { kvLoraRank: L, kvHeads, headDim } = shape;
  const size = workgroupSize(tile);
  const side = Math.sqrt(size);
  const quads = block / side / 4;
  const vectorLatent = L % 4 === 0;
  const vectorHead = headDim % 4 === 0;
  const element = (vectorized: boolean) => (vectorized ? "vec4<f32>" : "f32");
  const depthPieces = depth / 4;
  const stride = stagedStride(block);
  const names = (prefix: string) => Array.from({ length: quads }, (_, i) => `${prefix}${i}`);

  const latents: Staging = {
    name: "latent",
    pieces: block * depthPieces,
    load: (piece, slice) => `loadLatent(${piece}, ${slice}, rowBase)`,
    store: (piece, value, stage) => `stageLatent(${piece}, ${stage}, ${value});`,
  };
  const weights: Staging = {
    name: "weight",
    pieces: depth * (block / 4),
    load: (piece, slice) => `loadWeight(${piece}, ${slice}, columnBase)`,
    store: (piece, value, stage) => `right[${stage}][${piece} / BLOCK_QUADS][${piece} % BLOCK_QUADS] = ${value};`,
  };
  const everyResult = (emit: (name: string, row: number, quad: number) => string) =>
    unroll(quads * 4, (i) => unroll(quads, (c) => emit(`c${i}_${c}`, i, c)));

  return `// Latents × weights = keys or values of a head group. ${block} × ${block}, depth ${depth}, ${numStages} stage(s)
const BLOCK = ${block}u;
const BLOCK_QUADS = ${block / 4}u;
const DEPTH = ${depth}u;
const DEPTH_PIECES = ${depthPieces}u;
const SIDE = ${side}u;
const L = ${L}u;
const WEIGHT_STRIDE = ${kvHeads * headDim}u;

struct Params {
  rows: u32,        // latent rows
  columns: u32,     // columns of the result: heads of the group × head dimension
  firstColumn: u32, // first column of the group in the weights
  firstTile: u32,   // index of the first row tile of this dispatch
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> latent: array<${element(vectorLatent)}>;
@group(0) @binding(2) var<storage, read> weight: array<${element(vectorHead)}>;
@group(0) @binding(3) var<storage, read_write> expanded: array<${element(vectorHead)}>;

var<workgroup> left: array<array<array<vec4<f32>, ${stride}>, ${depth}>, ${numStages}>;
var<workgroup> right: array<array<array<vec4<f32>, ${stride}>, ${depth}>, ${numStages}>;

fn loadLatent(piece: u32, slice: u32, rowBase: u32) -> vec4<f32> {
  let row = rowBase + piece / DEPTH_PIECES;
  let column = slice * DEPTH + (piece % DEPTH_PIECES) * 4u;
  if (row >= params.rows || column >= L) { return vec4<f32>(); }
  return ${load4("latent", vectorLatent, "row * L", "column", L)};
}

fn stageLatent(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
${indent(storeTransposed("left", "stage", "depth", "row", "value"), 2)}
}

fn loadWeight(piece: u32, slice: u32, columnBase: u32) -> vec4<f32> {
  let row = slice * DEPTH + piece / BLOCK_QUADS;
  let column = columnBase + (piece % BLOCK_QUADS) * 4u;
  if (row >= L || column >= params.columns) { return vec4<f32>(); }
  let offset = row * WEIGHT_STRIDE + params.firstColumn;
${
    vectorHead ? "  return weight[(offset + column) / 4u];" : `  let last = params.columns - 1u;
  return vec4<f32>(${
      [0, 1, 2, 3].map((i) =>
        `select(0.0, weight[offset + min(column + ${i}u, last)], column + ${i}u < params.columns)`
      ).join(", ")
    });`
  }
}

@compute @workgroup_size(${size})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let tx = t % SIDE;
  let ty = t / SIDE;
  let rowBase = (params.firstTile + workgroup.y) * BLOCK;
  let columnBase = workgroup.x * BLOCK;
${indent(everyResult((c) => `var ${c} = vec4<f32>();`), 2)}
${
    indent(
      slicedLoop({
        slices: `${Math.ceil(L / depth)}u`,
        workgroupSize: size,
        numStages,
        operands: [latents, weights],
        compute: (stage) =>
          unroll(depth, (d) =>
            `{
${unroll(quads, (r) => `  let a${r} = left[${stage}][${d}][ty + ${r}u * SIDE];`)}
${unroll(quads, (c) => `  let b${c} = right[${stage}][${d}][tx + ${c}u * SIDE];`)}
${indent(outerByColumns("c", names("a"), names("b")), 2)}
}`),
      }),
      2,
    )
  }
${
    everyResult((c, i, q) =>
      `  {
    let row = rowBase + 4u * (ty + ${Math.floor(i / 4)}u * SIDE) + ${i % 4}u;
    let column = columnBase + 4u * (tx + ${q}u * SIDE);
    let offset = row * params.columns + column;
${
        vectorHead ? `    if (row < params.rows && column < params.columns) { expanded[offset / 4u] = ${c}; }` : unroll(
          4,
          (j) =>
            `    if (row < params.rows && column + ${j}u < params.columns) { expanded[offset + ${j}u] = ${c}[${j}]; }`,
        )
      }
  }`
    )
  }
}
`;
}
