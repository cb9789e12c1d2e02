// What the backward attention kernels read and write: their parameters, their bindings, and how four neighbours of a row of
// queries, output gradients, keys and values are loaded from wherever their tensors lie.
//
// A head's P rebuilt and R rotary columns are counted as one run of quads, ⌈P/4⌉ + ⌈R/4⌉ of them, so that one loop covers
// both wherever they lie.

import type { MlaProblem } from "../../op/mla_problem.ts";
import { blockStruct } from "../schedule.ts";
import { scoreFloatFields, type ScoreTerms, scoreWordFields, storesHalves, termBinding } from "./score_terms.ts";
import { load4, type StorageElement } from "./storage_element.ts";

/** What one backward attention kernel computes: ∂query, or ∂K and ∂V, or ∂bias. */
export type GradTarget = "query" | "keys" | "bias";

/** What of a call the generated WGSL depends on. */
export interface AttendBackwardShape extends Pick<MlaProblem, "rope" | "qkNopeHeadDim" | "qkRopeHeadDim" | "vHeadDim"> {
  /** Queries as they are stored. */
  readonly query: StorageElement;
  /** Rotary queries as they are stored, with rope mode `shared`. */
  readonly ropeQuery: StorageElement;
  /** ∂out as it is stored. */
  readonly gradOutput: StorageElement;
  /** Keys, values and rotary keys, and ∂query, ∂K, ∂V and ∂rope likewise: quads when P, R and V are multiples of 4. */
  readonly expanded: "f32" | "vec4<f32>";
  /** What happens to the scores. */
  readonly terms: ScoreTerms;
}

/** Index of each operand's binding: eight storage buffers, WebGPU's default limit. */
export const attendBackwardBindings = {
  blocks: 1,
  query: 2,
  gradOutput: 3,
  stats: 4,
  expanded: 5,
  gradient: 6,
  bQ: 7,
  term: 8,
} as const;

/** The element types of every array that the kernels bind. */
export function whatItStores(shape: AttendBackwardShape): StorageElement[] {
  const { query, gradOutput, expanded, rope, ropeQuery, terms } = shape;
  return [
    ...[query, gradOutput, expanded],
    ...(rope === "shared" ? [ropeQuery] : []),
    ...(storesHalves(terms) ? ["f16" as const] : []),
  ];
}

/** How ∂query, ∂K … are stored by a kernel: elements of ∂bias stand alone. */
export function gradientElement(target: GradTarget, shape: AttendBackwardShape): "f32" | "vec4<f32>" {
  return target === "bias" ? "f32" : shape.expanded;
}

/** WGSL of the parameter block. */
export const attendBackwardParams = `struct Params {
${scoreFloatFields}
${scoreWordFields}
  firstHead: u32,    // first query head of this dispatch
  headCount: u32,    // query heads of this dispatch that one workgroup sums over
  firstKvHead: u32,  // first KV head of the head group
  groupKvHeads: u32, // KV heads in a row of keys and values
  valuesBase: u32,   // elements from the first key to the first value …
  ropeBase: u32,     // … and to the first rotary key
  firstBlock: u32,   // index of the first block of this dispatch
  groupSize: u32,    // query heads per KV head
  P: u32,            // widths of a head: rebuilt from latents, rotary, value
  R: u32,
  V: u32,
  rangeRows: u32,    // query rows of the range
  // Of each tensor: elements from the binding's start to the first row, from one row to the next, from one head to the
  // next, and by which a batch item starts later than if the items followed each other, modulo 2^32.
  queryBase: u32,
  queryRow: u32,
  queryHead: u32,
  queryGap: u32,
  gradBase: u32,
  gradRow: u32,
  gradHead: u32,
  gradGap: u32,
  ropeQueryBase: u32,
  ropeQueryRow: u32,
  ropeQueryGap: u32,
  // The gradient: ∂query by row and head, ∂bias by item, head and row; ∂K, ∂V and ∂rope lie as keys, values and rotary
  // keys of every head do.
  gradientBase: u32,
  gradientItem: u32,
  gradientHead: u32,
  gradientRow: u32,
  gradientValues: u32,
  gradientRope: u32,
  accumulate: u32,   // whether ∂K, ∂V and ∂rope add to what is there
  columnTiles: u32,  // ∂bias: tiles of columns of one head
}
`;

/** WGSL of the parameter block, the schedule and the bindings. */
export function declarations(target: GradTarget, shape: AttendBackwardShape): string {
  const { rope, query, ropeQuery, gradOutput, expanded, terms } = shape;
  const at = attendBackwardBindings;
  const bound = [
    `@group(0) @binding(0) var<uniform> params: Params;`,
    `@group(0) @binding(${at.blocks}) var<storage, read> blocks: array<Block>;`,
    `@group(0) @binding(${at.query}) var<storage, read> query: array<${query}>;`,
    `@group(0) @binding(${at.gradOutput}) var<storage, read> gradOutput: array<${gradOutput}>;`,
    `@group(0) @binding(${at.stats}) var<storage, read> stats: array<vec2<f32>>; // log2-sum-exp and D, [heads, rows]`,
    `@group(0) @binding(${at.expanded}) var<storage, read> expanded: array<${expanded}>; // keys, values, rotary keys`,
    `@group(0) @binding(${at.gradient}) var<storage, read_write> gradient: array<${gradientElement(target, shape)}>;`,
    rope === "shared" ? `@group(0) @binding(${at.bQ}) var<storage, read> ropeQuery: array<${ropeQuery}>;` : "",
    termBinding(terms, at.term),
  ];
  return `${attendBackwardParams}
${blockStruct}

${bound.filter((line) => line !== "").join("\n")}`;
}

/** Values of the parameter block's own fields, by name; {@link wordsOf} puts them in order. */
export interface BackwardWords {
  readonly firstHead: number;
  readonly headCount: number;
  readonly firstKvHead: number;
  readonly groupKvHeads: number;
  readonly valuesBase: number;
  readonly ropeBase: number;
  readonly firstBlock: number;
  readonly groupSize: number;
  readonly widths: readonly [P: number, R: number, V: number];
  readonly rangeRows: number;
  readonly query: readonly [base: number, row: number, head: number, gap: number];
  readonly gradOutput: readonly [base: number, row: number, head: number, gap: number];
  readonly ropeQuery: readonly [base: number, row: number, gap: number];
  readonly gradient: readonly [base: number, item: number, head: number, row: number];
  readonly gradientValues: number;
  readonly gradientRope: number;
  readonly accumulate: boolean;
  readonly columnTiles: number;
}

/** The words of the parameter block behind those of the score terms. */
export function wordsOf(words: BackwardWords): number[] {
  return [
    ...[words.firstHead, words.headCount, words.firstKvHead, words.groupKvHeads, words.valuesBase, words.ropeBase],
    ...[words.firstBlock, words.groupSize, ...words.widths, words.rangeRows],
    ...[...words.query, ...words.gradOutput, ...words.ropeQuery, ...words.gradient],
    ...[words.gradientValues, words.gradientRope, Number(words.accumulate), words.columnTiles],
  ];
}

/**
 * WGSL functions that load four neighbours of a row, zeros past `end` and past the head's width, and `rowStats`, the
 * log2-sum-exp and D of a query row: of a row past the end, and of one that sees no key, such that its probabilities are 0.
 */
export function loaders(shape: AttendBackwardShape): string {
  const { rope } = shape;
  const ropeOfQuery = rope === "in_query"
    ? `    return ${load4("query", shape.query, "offset + params.P", "column", "params.R")};`
    : `    let ropeOffset = params.ropeQueryBase + row * params.ropeQueryRow + rangeItem * params.ropeQueryGap;
    return ${load4("ropeQuery", shape.ropeQuery, "ropeOffset", "column", "params.R")};`;
  return `fn nopeQuads() -> u32 { return (params.P + 3u) / 4u; }

fn keyQuads() -> u32 { return nopeQuads() + (params.R + 3u) / 4u; }

fn loadQuery(row: u32, end: u32, rangeItem: u32, head: u32, quad: u32) -> vec4<f32> {
  if (row >= end || quad >= keyQuads()) { return vec4<f32>(); }
  let offset = params.queryBase + row * params.queryRow + rangeItem * params.queryGap + head * params.queryHead;${
    rope === "none" ? "" : `
  if (quad >= nopeQuads()) {
    let column = 4u * (quad - nopeQuads());
${ropeOfQuery}
  }`
  }
  let column = 4u * quad;
  return ${load4("query", shape.query, "offset", "column", "params.P")};
}

fn loadGrad(row: u32, end: u32, rangeItem: u32, head: u32, quad: u32) -> vec4<f32> {
  let column = 4u * quad;
  if (row >= end || column >= params.V) { return vec4<f32>(); }
  let offset = params.gradBase + row * params.gradRow + rangeItem * params.gradGap + head * params.gradHead;
  return ${load4("gradOutput", shape.gradOutput, "offset", "column", "params.V")};
}

fn loadKey(row: u32, end: u32, kvHead: u32, quad: u32) -> vec4<f32> {
  if (row >= end || quad >= keyQuads()) { return vec4<f32>(); }${
    rope === "none" ? "" : `
  if (quad >= nopeQuads()) {
    let column = 4u * (quad - nopeQuads());
    let ropeOffset = params.ropeBase + row * params.R;
    return ${load4("expanded", shape.expanded, "ropeOffset", "column", "params.R")};
  }`
  }
  let column = 4u * quad;
  let offset = (row * params.groupKvHeads + kvHead) * params.P;
  return ${load4("expanded", shape.expanded, "offset", "column", "params.P")};
}

fn loadValue(row: u32, end: u32, kvHead: u32, quad: u32) -> vec4<f32> {
  let column = 4u * quad;
  if (row >= end || column >= params.V) { return vec4<f32>(); }
  let offset = params.valuesBase + (row * params.groupKvHeads + kvHead) * params.V;
  return ${load4("expanded", shape.expanded, "offset", "column", "params.V")};
}

fn rowStats(row: u32, end: u32, head: u32) -> vec2<f32> {
  if (row >= end) { return vec2<f32>(-MASKED, 0.0); }
  return stats[head * params.rangeRows + row];
}`;
}

/** WGSL functions that store four neighbours of a row of a gradient. */
export function storers(target: GradTarget, shape: AttendBackwardShape): string {
  if (target === "bias") return "";
  const put = shape.expanded === "vec4<f32>"
    ? `  if (column >= width) { return; }
  let at = (offset + column) / 4u;
  var sum = value;
  if (params.accumulate != 0u) { sum += gradient[at]; }
  gradient[at] = sum;`
    : `  for (var i = 0u; i < 4u; i += 1u) {
    if (column + i >= width) { return; }
    let at = offset + column + i;
    var sum = value[i];
    if (params.accumulate != 0u) { sum += gradient[at]; }
    gradient[at] = sum;
  }`;
  const ropeAt = target === "query" ? "offset + params.P" : "ropeOffset";
  return `fn put(offset: u32, column: u32, width: u32, value: vec4<f32>) {
${put}
}

// One quad of a row of ${target === "query" ? "∂query" : "∂K or ∂rope"}.
fn putKey(offset: u32, ${target === "query" ? "" : "ropeOffset: u32, "}quad: u32, value: vec4<f32>) {
  if (quad < nopeQuads()) {
    put(offset, 4u * quad, params.P, value);
  } else {
    put(${ropeAt}, 4u * (quad - nopeQuads()), params.R, value);
  }
}`;
}
