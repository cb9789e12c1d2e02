// What the attention kernel reads and writes: its parameters, its bindings, and how slices of queries, keys and values are
// loaded from wherever their tensors lie.

import type { MlaProblem } from "../../op/mla_problem.ts";
import { blockStruct } from "../schedule.ts";
import { scoreFloatFields, type ScoreTerms, scoreWordFields, storesHalves, termBinding } from "./score_terms.ts";
import { load4, type StorageElement } from "./storage_element.ts";

/**
 * What of a call the generated WGSL depends on. Lengths, head counts, head dimensions and strides are read at run time:
 * they only bound loops and scale offsets, and one pipeline then serves many shapes.
 */
export interface AttendShape extends Pick<MlaProblem, "vHeadDim" | "rope"> {
  /** Queries as they are stored. */
  readonly query: StorageElement;
  /** Expanded keys and values as they are stored. */
  readonly expanded: StorageElement;
  /** Outputs as they are to be stored. */
  readonly output: StorageElement;
  /** Rotary keys as they are stored, with rope modes that have them. */
  readonly ropeKey: StorageElement;
  /** Rotary queries as they are stored, with rope mode `shared`. */
  readonly ropeQuery: StorageElement;
  /** What happens to the scores. */
  readonly terms: ScoreTerms;
  /** Vectors of four heads' sinks in the uniform of sinks; 0 without sinks. */
  readonly sinkQuads: number;
  /** Whether the log-sum-exp is stored. */
  readonly lse: boolean;
}

/** The element types of every array that the kernel binds. */
export function whatItStores(shape: AttendShape): StorageElement[] {
  const { query, expanded, output, rope, ropeKey, ropeQuery, terms } = shape;
  return [
    ...[query, expanded, output],
    ...(rope === "none" ? [] : [ropeKey]),
    ...(rope === "shared" ? [ropeQuery] : []),
    ...(storesHalves(terms) ? ["f16" as const] : []),
  ];
}

/** Index of each operand's binding. Storage buffers are eight at most, WebGPU's default limit; sinks are a uniform. */
export const attendBindings = {
  blocks: 1,
  query: 2,
  expanded: 3,
  output: 4,
  bK: 5,
  bQ: 6,
  lse: 7,
  term: 8,
  sinks: 9,
} as const;

/** WGSL of the parameter block. */
export const attendParams = `struct Params {
${scoreFloatFields}
${scoreWordFields}
  firstHead: u32,    // first query head of this dispatch
  firstKvHead: u32,  // first KV head of the head group, which keys and values begin with
  groupKvHeads: u32, // KV heads in a row of keys and values
  valuesBase: u32,   // elements from the first key to the first value
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
  // Elements from the binding's start to the first log-sum-exp, from one item and one head to the next.
  lseBase: u32,
  lseItem: u32,
  lseHead: u32,
}
`;

/** WGSL of the parameter block, the schedule and the bindings. */
export function declarations(shape: AttendShape): string {
  const { rope, query, expanded, output, ropeKey, ropeQuery, terms, sinkQuads, lse } = shape;
  const at = attendBindings;
  const bound = [
    `@group(0) @binding(0) var<uniform> params: Params;`,
    `@group(0) @binding(${at.blocks}) var<storage, read> blocks: array<Block>;`,
    `@group(0) @binding(${at.query}) var<storage, read> query: array<${query}>;`,
    `@group(0) @binding(${at.expanded}) var<storage, read> expanded: array<${expanded}>; // keys, then values`,
    `@group(0) @binding(${at.output}) var<storage, read_write> output: array<${output}>;`,
    rope === "none" ? "" : `@group(0) @binding(${at.bK}) var<storage, read> ropeKey: array<${ropeKey}>;`,
    rope === "shared" ? `@group(0) @binding(${at.bQ}) var<storage, read> ropeQuery: array<${ropeQuery}>;` : "",
    lse ? `@group(0) @binding(${at.lse}) var<storage, read_write> lse: array<f32>;` : "",
    termBinding(terms, at.term),
    sinkQuads === 0 ? "" : `@group(0) @binding(${at.sinks}) var<uniform> sinks: array<vec4<f32>, ${sinkQuads}>;`,
  ];
  return `${attendParams}
${blockStruct}

${bound.filter((line) => line !== "").join("\n")}`;
}

/** WGSL functions that load one piece, four neighbours of one row, of a slice of queries, keys or values. */
export function loaders(shape: AttendShape, probKeys: number): string {
  const { rope } = shape;
  const ropeQuery = rope === "in_query"
    ? load4("query", shape.query, "offset + params.P", "column", "params.R")
    : load4("ropeQuery", shape.ropeQuery, "ropeOffset", "column", "params.R");
  return `fn nopeSlices() -> u32 { return (params.P + DEPTH - 1u) / DEPTH; }

fn loadQuery(block: Block, head: u32, piece: u32, slice: u32) -> vec4<f32> {
  let row = block.rowStart + piece / DEPTH_PIECES;
  let within = (piece % DEPTH_PIECES) * 4u;
  let offset = params.queryBase + row * params.queryRow + block.rangeItem * params.queryGap + head * params.queryHead;
  if (row >= block.rowEnd) { return vec4<f32>(); }
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
  if (row >= block.columnEnd) { return vec4<f32>(); }
  if (slice < nopeSlices()) {
    let column = slice * DEPTH + within;
    if (column < params.P) { return ${load4("expanded", shape.expanded, "offset", "column", "params.P")}; }
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
  let offset = params.valuesBase + (row * params.groupKvHeads + kvHead) * params.V;
  if (row >= block.columnEnd || column >= params.V) { return vec4<f32>(); }
  return ${load4("expanded", shape.expanded, "offset", "column", "params.V")};
}`;
}
