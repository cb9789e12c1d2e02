// What the attention kernel reads and writes: its parameters, its bindings, and how slices of queries, keys and values are
// loaded from wherever their tensors lie.

import type { MlaProblem } from "../../op/mla_problem.ts";
import { load4, type StorageElement } from "./storage_element.ts";

/**
 * What of a call the generated WGSL depends on. Lengths, head counts, head dimensions and strides are read at run time:
 * they only bound loops and scale offsets, and one pipeline then serves many shapes.
 */
export interface AttendShape extends Pick<MlaProblem, "vHeadDim" | "rope"> {
  /** Queries as they are stored. */
  readonly query: StorageElement;
  /** Expanded keys as they are stored. */
  readonly keys: StorageElement;
  /** Expanded values as they are stored. */
  readonly values: StorageElement;
  /** Outputs as they are to be stored. */
  readonly output: StorageElement;
  /** Rotary keys as they are stored, with rope modes that have them. */
  readonly ropeKey: StorageElement;
  /** Rotary queries as they are stored, with rope mode `shared`. */
  readonly ropeQuery: StorageElement;
}

/** The element types of every array that the kernel binds. */
export function whatItStores({ query, keys, values, output, rope, ropeKey, ropeQuery }: AttendShape): StorageElement[] {
  return [
    ...[query, keys, values, output],
    ...(rope === "none" ? [] : [ropeKey]),
    ...(rope === "shared" ? [ropeQuery] : []),
  ];
}

/** WGSL of the parameter block, the schedule and the bindings. */
export function declarations(shape: AttendShape): string {
  const { rope, query, keys, values, output, ropeKey, ropeQuery } = shape;
  return `struct Params {
  scaleLog2: f32,    // softmaxScale · log2(e)
  firstHead: u32,    // first query head of this head group
  groupKvHeads: u32, // KV heads in a row of keys and values
  firstBlock: u32,   // index of the first block of this dispatch
  groupSize: u32,    // query heads per KV head
  P: u32,            // widths of a head: rebuilt from latents, rotary, value
  R: u32,
  V: u32,
  // Of each tensor: elements from the binding's start to the first row, from one row to the next, from one head to the
  // next, and by which a batch item starts later than if the items followed each other, modulo 2^32.
  queryBase: u32,
  queryRow: u32,
  queryHead: u32,
  queryGap: u32,
  outputBase: u32,
  outputRow: u32,
  outputHead: u32,
  outputGap: u32,
  ropeKeyBase: u32,
  ropeKeyRow: u32,
  ropeKeyGap: u32,
  ropeQueryBase: u32,
  ropeQueryRow: u32,
  ropeQueryGap: u32,
}

struct Block {
  queryStart: u32,
  queryEnd: u32,
  keyStart: u32,
  keyEnd: u32,    // one past the last key that any row sees
  sharedEnd: u32, // one past the last key that every row sees
  diagonal: i32,  // causal: row i sees keys below i + diagonal
  item: u32,      // batch item
  rangeItem: u32, // batch item, counted from that of the query range's first row
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> blocks: array<Block>;
@group(0) @binding(2) var<storage, read> query: array<${query}>;
@group(0) @binding(3) var<storage, read> keys: array<${keys}>;
@group(0) @binding(4) var<storage, read> values: array<${values}>;
@group(0) @binding(5) var<storage, read_write> output: array<${output}>;
${rope === "none" ? "" : `@group(0) @binding(6) var<storage, read> ropeKey: array<${ropeKey}>;`}
${rope === "shared" ? `@group(0) @binding(7) var<storage, read> ropeQuery: array<${ropeQuery}>;` : ""}`;
}

/** WGSL functions that load one piece, four neighbours of one row, of a slice of queries, keys or values. */
export function loaders(shape: AttendShape, probKeys: number): string {
  const { rope } = shape;
  const ropeQuery = rope === "in_query"
    ? load4("query", shape.query, "offset + params.P", "column", "params.R")
    : load4("ropeQuery", shape.ropeQuery, "ropeOffset", "column", "params.R");
  return `fn nopeSlices() -> u32 { return (params.P + DEPTH - 1u) / DEPTH; }

fn loadQuery(block: Block, head: u32, piece: u32, slice: u32) -> vec4<f32> {
  let row = block.queryStart + piece / DEPTH_PIECES;
  let within = (piece % DEPTH_PIECES) * 4u;
  let offset = params.queryBase + row * params.queryRow + block.rangeItem * params.queryGap + head * params.queryHead;
  if (row >= block.queryEnd) { return vec4<f32>(); }
  if (slice < nopeSlices()) {
    let column = slice * DEPTH + within;
    if (column < params.P) { return ${load4("query", shape.query, "offset", "column", "params.P")}; }
  }${
    rope === "none" ? "" : ` else {
    let column = (slice - nopeSlices()) * DEPTH + within;${
      rope === "shared"
        ? "\n    let ropeOffset = params.ropeQueryBase + row * params.ropeQueryRow + block.rangeItem * params.ropeQueryGap;"
        : ""
    }
    if (column < params.R) { return ${ropeQuery}; }
  }`
  }
  return vec4<f32>();
}

fn loadKey(block: Block, kvHead: u32, keyBase: u32, piece: u32, slice: u32) -> vec4<f32> {
  let row = keyBase + piece / DEPTH_PIECES;
  let within = (piece % DEPTH_PIECES) * 4u;
  let offset = (row * params.groupKvHeads + kvHead) * params.P;
  if (row >= block.keyEnd) { return vec4<f32>(); }
  if (slice < nopeSlices()) {
    let column = slice * DEPTH + within;
    if (column < params.P) { return ${load4("keys", shape.keys, "offset", "column", "params.P")}; }
  }${
    rope === "none" ? "" : ` else {
    let column = (slice - nopeSlices()) * DEPTH + within;
    let ropeOffset = params.ropeKeyBase + row * params.ropeKeyRow + block.item * params.ropeKeyGap;
    if (column < params.R) { return ${load4("ropeKey", shape.ropeKey, "ropeOffset", "column", "params.R")}; }
  }`
  }
  return vec4<f32>();
}

// Key, relative to the block, of entry entry of probability slice group.
fn sliceKey(group: u32, entry: u32) -> u32 {
  let own = group * ${probKeys}u + entry % ${probKeys}u;
  return (own / 4u) * 4u * TX + (entry / ${probKeys}u) * 4u + own % 4u;
}

fn loadValue(block: Block, kvHead: u32, keyBase: u32, group: u32, piece: u32, slice: u32) -> vec4<f32> {
  let row = keyBase + sliceKey(group, slice * DEPTH + piece / VALUE_QUADS);
  let column = (piece % VALUE_QUADS) * 4u;
  let offset = (row * params.groupKvHeads + kvHead) * params.V;
  if (row >= block.keyEnd || column >= params.V) { return vec4<f32>(); }
  return ${load4("values", shape.values, "offset", "column", "params.V")};
}`;
}
