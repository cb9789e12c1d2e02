// Expansion of latents to keys or values of a group of heads: a GEMM [rows, L] × [L, columns].
//
//   one workgroup = block × block of the result; 256 invocations (64 for block 32) in a square, each block/side wide
//   invocation (ty, tx) owns row quads r·side + ty and column quads c·side + tx, in registers
//   the latent axis streams through workgroup memory DEPTH = 16 at a time: latents transposed, weights as they lie
//   workgroup memory: stages · DEPTH · 2 · (block/4 + 1) vec4   (block 128, 1 stage: 16.9 KB; block 64: 8.7 KB)
//
// The result is [rows, columns] with the head dimension fastest, so that attention stages it with vec4 loads.
//
// A model's linear layers are the same product, some with a bias (src/gpu/linear.ts).

import type { FlashMLAConfig } from "../../op/config.ts";
import type { GpuLimits } from "../capabilities.ts";
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
import { load4, storageDirectives, type StorageElement, store4 } from "./storage_element.ts";

/** The tile of one expansion kernel. */
export interface ExpandTile {
  /** Rows of the result that one workgroup owns. */
  readonly blockM: number;
  /** Columns of the result that one workgroup owns. */
  readonly blockN: number;
  /** Invocations down the rows. */
  readonly threadRows: number;
  /** Invocations along the columns. */
  readonly threadColumns: number;
  /** Latent columns staged per step. */
  readonly depth: number;
  /** Staging buffers: 1 or 2. */
  readonly numStages: number;
  /** Whether the steps of a staged slice are copied out or looped over. */
  readonly unrollDepth: boolean;
}

/** What of a call the generated WGSL depends on; sizes are read at run time. */
export interface ExpandShape {
  /** Latent rows as they are stored. */
  readonly latent: StorageElement;
  /** Weights as they are stored. */
  readonly weight: StorageElement;
  /** Keys or values as they are to be stored. */
  readonly expanded: StorageElement;
  /** Whether batch items of latents lie apart or overlap, so that finding a row takes a division. */
  readonly gapped: boolean;
  /** Whether a row of float32 is added to each row of the result. */
  readonly bias?: boolean;
}

/** The tile that goes with a configuration. */
export function expandTile(config: Pick<FlashMLAConfig, "expandBlock" | "unrollDepth">, limits: GpuLimits): ExpandTile {
  const { expandBlock, unrollDepth } = config;
  const side = expandBlock === 32 ? 8 : 16;
  const tile: ExpandTile = unrollDepth
    ? {
      blockM: expandBlock,
      blockN: expandBlock,
      threadRows: side,
      threadColumns: side,
      depth: expandBlock === 128 ? 8 : 16,
      numStages: 2,
      unrollDepth,
    }
    : { blockM: 128, blockN: expandBlock, threadRows: 32, threadColumns: 1, depth: 16, numStages: 1, unrollDepth };
  return workgroupBytes(tile) <= limits.maxComputeWorkgroupStorageSize ? tile : { ...tile, numStages: 1 };
}

/** Invocations per workgroup. */
export function workgroupSize(tile: ExpandTile): number {
  return tile.threadRows * tile.threadColumns;
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(tile: ExpandTile): number {
  return 16 * tile.numStages * tile.depth * (stagedStride(tile.blockM) + stagedStride(tile.blockN));
}

/** Why this tile cannot run, or null when it can. */
export function whyInvalid(tile: ExpandTile, limits: GpuLimits): string | null {
  if (![32, 64, 128].includes(tile.blockN)) return `expandBlock must be 32, 64 or 128, got ${tile.blockN}`;
  if (workgroupSize(tile) > limits.maxComputeInvocationsPerWorkgroup) {
    return `expandBlock ${tile.blockN} needs ${
      workgroupSize(tile)
    } invocations, maxComputeInvocationsPerWorkgroup is ${limits.maxComputeInvocationsPerWorkgroup}`;
  }
  if (workgroupBytes(tile) > limits.maxComputeWorkgroupStorageSize) {
    return `expandBlock ${tile.blockN} needs ${
      workgroupBytes(tile)
    } bytes of workgroup memory, maxComputeWorkgroupStorageSize is ${limits.maxComputeWorkgroupStorageSize}`;
  }
  return null;
}

/** WGSL of the bias and of a function that loads four of it; what is past the last column is not stored. */
export const biasDeclaration = `@group(0) @binding(4) var<storage, read> bias: array<f32>;

fn biasAt(column: u32) -> vec4<f32> {
  let last = arrayLength(&bias) - 1u;
  return vec4<f32>(
    bias[min(column, last)],
    bias[min(column + 1u, last)],
    bias[min(column + 2u, last)],
    bias[min(column + 3u, last)],
  );
}
`;

/** WGSL of a sum with the bias of its columns. */
function added(sum: string, { bias }: ExpandShape): string {
  return bias ? `(${sum} + biasAt(column))` : sum;
}

/** The kernel's source. */
export function wgsl(tile: ExpandTile, shape: ExpandShape): string {
  const { blockM, blockN, threadRows, threadColumns, depth, numStages } = tile;
  const size = workgroupSize(tile);
  const rowQuads = blockM / threadRows / 4;
  const columnQuads = blockN / threadColumns / 4;
  const depthPieces = depth / 4;
  const names = (prefix: string, count: number) => Array.from({ length: count }, (_, i) => `${prefix}${i}`);

  const latents: Staging = {
    name: "latent",
    pieces: blockM * depthPieces,
    load: (piece, slice) => `loadLatent(${piece}, ${slice}, rowBase)`,
    store: (piece, value, stage) => `stageLatent(${piece}, ${stage}, ${value});`,
  };
  const weights: Staging = {
    name: "weight",
    pieces: depth * (blockN / 4),
    load: (piece, slice) => `loadWeight(${piece}, ${slice}, columnBase)`,
    store: (piece, value, stage) => `right[${stage}][${piece} / BLOCK_QUADS][${piece} % BLOCK_QUADS] = ${value};`,
  };
  const everyResult = (emit: (name: string, row: number, quad: number) => string) =>
    unroll(rowQuads * 4, (i) => unroll(columnQuads, (c) => emit(`c${i}_${c}`, i, c)));

  return `${
    storageDirectives([shape.latent, shape.weight, shape.expanded])
  }// Latents × weights = keys or values of a head group. ${blockM} × ${blockN}, depth ${depth}, ${numStages} stage(s)
const BLOCK_M = ${blockM}u;
const BLOCK_N = ${blockN}u;
const BLOCK_QUADS = ${blockN / 4}u;
const DEPTH = ${depth}u;
const DEPTH_PIECES = ${depthPieces}u;
const TX = ${threadColumns}u;

struct Params {
  rows: u32,         // latent rows
  columns: u32,      // columns of the result: heads of the group × head dimension
  firstColumn: u32,  // first column of the group in the weights
  firstTile: u32,    // index of the first row tile of this dispatch
  L: u32,            // width of a latent row
  weightStride: u32, // columns of the weights: all KV heads × head dimension
  latentBase: u32,   // elements from the binding's start to the first row
  latentRow: u32,    // elements from one row to the next
  latentRows: u32,   // rows of a batch item
  latentGap: u32,    // further elements from one batch item to the next, modulo 2^32
  weightBase: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> latent: array<${shape.latent}>;
@group(0) @binding(2) var<storage, read> weight: array<${shape.weight}>;
@group(0) @binding(3) var<storage, read_write> expanded: array<${shape.expanded}>;
${shape.bias ? biasDeclaration : ""}
var<workgroup> left: array<array<array<vec4<f32>, ${stagedStride(blockM)}>, ${depth}>, ${numStages}>;
var<workgroup> right: array<array<array<vec4<f32>, ${stagedStride(blockN)}>, ${depth}>, ${numStages}>;

fn loadLatent(piece: u32, slice: u32, rowBase: u32) -> vec4<f32> {
  let row = rowBase + piece / DEPTH_PIECES;
  let column = slice * DEPTH + (piece % DEPTH_PIECES) * 4u;
  if (row >= params.rows || column >= params.L) { return vec4<f32>(); }
  let offset = params.latentBase + row * params.latentRow${
    shape.gapped ? " + (row / params.latentRows) * params.latentGap" : ""
  };
  return ${load4("latent", shape.latent, "offset", "column", "params.L")};
}

fn stageLatent(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
${indent(storeTransposed("left", "stage", "depth", "row", "value"), 2)}
}

fn loadWeight(piece: u32, slice: u32, columnBase: u32) -> vec4<f32> {
  let row = slice * DEPTH + piece / BLOCK_QUADS;
  let column = columnBase + (piece % BLOCK_QUADS) * 4u;
  if (row >= params.L || column >= params.columns) { return vec4<f32>(); }
  let offset = params.weightBase + row * params.weightStride + params.firstColumn;
  return ${load4("weight", shape.weight, "offset", "column", "params.columns")};
}

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
        slices: "(params.L + DEPTH - 1u) / DEPTH",
        workgroupSize: size,
        numStages,
        operands: [latents, weights],
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
      `  {
    let row = rowBase + 4u * (ty + ${Math.floor(i / 4) * threadRows}u) + ${i % 4}u;
    let column = columnBase + 4u * (tx + ${q * threadColumns}u);
    if (row < params.rows) {
${indent(store4("expanded", shape.expanded, "row * params.columns", "column", "params.columns", added(c, shape)), 6)}
    }
  }`
    )
  }
}
`;
}
