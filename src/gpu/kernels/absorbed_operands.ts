// What the kernels of absorbed attention agree on: bindings, parameters, work items, and how a key's latent row is found.
//
//   score = scale · (q_c · c + q_r · k_r)     out = softmax(score) · c          q_c = q_nope · wKc
//
// A row of the cache is c and, behind it, k_r: L + R elements, padded with zeros to whole quads of 16 bytes. Queries are rows
// of the same layout. Query rows are counted through [tokens, heads]: all heads of one token, then those of the next, since
// they share every latent. A work item is a block of such rows of one sequence against some of its keys; where a sequence's
// keys are split, each item leaves a partial result in a slot, and merge_splits.ts joins them.

import { scoreConstants, scoreFunctions } from "./score_terms.ts";

/** How rows are stored: halves two to a word, which core WGSL unpacks, or floats. */
export type RowStorage = "halves" | "floats";

/** What of a call the generated WGSL depends on. */
export interface AbsorbedShape {
  /** L. */
  readonly kvLoraRank: number;
  /** R. */
  readonly qkRopeHeadDim: number;
  /** How query rows are stored. */
  readonly query: RowStorage;
  /** How the cache's rows are. */
  readonly cache: RowStorage;
  /** How result rows are; halves only where L is a multiple of 4. */
  readonly output: RowStorage;
  /** Keys of a page, a power of two; 0 without a block table, when the keys of a sequence follow each other. */
  readonly pageSize: number;
  /** Whether only a part of the pages is bound, so that the keys of the others are hidden. */
  readonly sharded: boolean;
  /** Whether rows of a block may see different keys: several tokens under a causal mask, or a window. */
  readonly bounded: boolean;
  /** Whether scores are capped. */
  readonly softCap: boolean;
  /** Length of the uniform array of sinks, in vec4; 0 without sinks. */
  readonly sinkQuads: number;
  /** Whether the log-sum-exp is written. */
  readonly lse: boolean;
}

/** Elements in a quad of 16 bytes. */
export function quadElements(storage: RowStorage): number {
  return storage === "halves" ? 8 : 4;
}

/** Quads of one row of queries or of the cache. */
export function rowQuads(
  { kvLoraRank, qkRopeHeadDim }: Pick<AbsorbedShape, "kvLoraRank" | "qkRopeHeadDim">,
  storage: RowStorage,
): number {
  return Math.ceil((kvLoraRank + qkRopeHeadDim) / quadElements(storage));
}

/** Four-element quads of one row of results. */
export function resultQuads({ kvLoraRank }: Pick<AbsorbedShape, "kvLoraRank">): number {
  return Math.ceil(kvLoraRank / 4);
}

/** Index of each operand's binding. */
export const absorbedBindings = {
  items: 1,
  query: 2,
  cache: 3,
  table: 4,
  partial: 5,
  stats: 6,
  output: 7,
  lse: 8,
  sinks: 9,
} as const;

/** Words of one work item. */
export const itemWords = 8;

/** The slot of an item that has its rows for itself, and writes the result. */
export const noSlot = 0xffffffff;

/** WGSL of a work item. */
export const itemStruct = `struct Item {
  sequence: u32, // row of the block table, or of the batch
  row: u32,      // first query row, counted through [tokens, heads]
  rows: u32,     // how many there are, from 1 to BLOCK_ROWS
  keyStart: u32, // first key
  keyEnd: u32,   // one past the last key; equal to keyStart when the rows see none
  diagonal: i32, // the position of row r's token among the keys is diagonal + i32(r / heads)
  slot: u32,     // where the partial result goes, or NO_SLOT: the result is written at once
  pad: u32,
}`;

/** WGSL of the parameter block; see {@link absorbedParams}. */
export const absorbedParamsStruct = `struct Params {
  scaleLog2: f32,     // softmaxScale · log2(e)
  capLog2: f32,       // logitsSoftCap · log2(e)
  scaleOverCap: f32,  // softmaxScale / logitsSoftCap
  minusInfinity: f32, // WGSL has no literal for it
  left: i32,          // a token at position p sees the keys from p − left
  right: i32,         // to p + right; both are large where nothing bounds them
  heads: u32,
  queryLength: u32,   // tokens of a batch item, for the places of log-sum-exps
  itemCount: u32,
  gridX: u32,         // workgroups along x
  queryBase: u32,     // quads from the binding's start to the first query row
  outputBase: u32,    // the same for results, in quads of four elements
  lseBase: u32,
  maxPages: u32,      // columns of the block table
  tableBase: u32,     // words from the binding's start to the table
  cacheBase: u32,     // quads from the binding's start to the first row
  cacheRow: u32,      // quads from one row of the cache to the next
  sequenceRows: u32,  // without a block table: rows from one sequence to the next
  firstPage: u32,     // the pages that are bound
  pageCount: u32,
}`;

/** The values of the parameter block. */
export interface AbsorbedParams {
  readonly softmaxScale: number;
  readonly logitsSoftCap: number | null;
  readonly left: number;
  readonly right: number;
  readonly heads: number;
  readonly queryLength: number;
  readonly itemCount: number;
  readonly gridX: number;
  readonly queryBase: number;
  readonly outputBase: number;
  readonly lseBase: number;
  readonly maxPages: number;
  readonly tableBase: number;
  readonly cacheBase: number;
  readonly cacheRow: number;
  readonly sequenceRows: number;
  readonly firstPage: number;
  readonly pageCount: number;
}

/** Keys that no sequence has: where nothing bounds a window. */
export const unbounded = 2 ** 30;

/** The parameter block's bytes. */
export function absorbedParams(values: AbsorbedParams): ArrayBuffer {
  const { softmaxScale, logitsSoftCap, left, right } = values;
  const cap = logitsSoftCap ?? 1;
  const packed = new ArrayBuffer(80);
  new Float32Array(packed).set([softmaxScale * Math.LOG2E, cap * Math.LOG2E, softmaxScale / cap, -Infinity]);
  const reach = [left, right].map((keys) => Math.min(keys, unbounded));
  const { heads, queryLength, itemCount, gridX, queryBase, outputBase, lseBase, maxPages, tableBase } = values;
  const { cacheBase, cacheRow, sequenceRows, firstPage, pageCount } = values;
  new Uint32Array(packed, 16).set([
    ...[...reach, heads, queryLength, itemCount, gridX, queryBase, outputBase, lseBase, maxPages, tableBase],
    ...[cacheBase, cacheRow, sequenceRows, firstPage, pageCount],
  ]);
  return packed;
}

/** WGSL of constants, the structs, and the bindings that every absorbed kernel has; of those that merging has alone. */
export function absorbedDeclarations(
  shape: AbsorbedShape,
  { pinned, merging = false }: { readonly pinned: boolean; readonly merging?: boolean },
): string {
  const { query, cache, output, pageSize, lse, sinkQuads } = shape;
  const at = absorbedBindings;
  const quad = (storage: RowStorage) => storage === "halves" ? "vec4<u32>" : "vec4<f32>";
  const access = merging ? "read" : "read_write";
  const attending = merging ? [] : [
    `@group(0) @binding(${at.items}) var<storage, read> items: array<Item>;`,
    `@group(0) @binding(${at.query}) var<storage, read> query: array<${quad(query)}>;`,
    `@group(0) @binding(${at.cache}) var<storage, ${pinned ? "read_write" : "read"}> cache: array<${quad(cache)}>;`,
    pageSize > 0 ? `@group(0) @binding(${at.table}) var<storage, read> pages: array<u32>;` : "",
  ];
  const lines = [
    `@group(0) @binding(0) var<uniform> params: Params;`,
    ...attending,
    `@group(0) @binding(${at.partial}) var<storage, ${access}> partial: array<vec4<f32>>; // unnormalised sums, by slot and row`,
    `@group(0) @binding(${at.stats}) var<storage, ${access}> stats: array<vec2<f32>>; // maximum in log2 units, and sum`,
    `@group(0) @binding(${at.output}) var<storage, read_write> output: array<${
      output === "halves" ? "vec2<u32>" : "vec4<f32>"
    }>;`,
    lse ? `@group(0) @binding(${at.lse}) var<storage, read_write> lse: array<f32>;` : "",
    sinkQuads > 0 ? `@group(0) @binding(${at.sinks}) var<uniform> sinks: array<vec4<f32>, ${sinkQuads}>;` : "",
  ];
  return `${scoreConstants}
const NO_SLOT = 0xffffffffu;
const ABSENT = 0xffffffffu; // a key whose page is not bound
const RESULT_QUADS = ${resultQuads(shape)}u;

${itemStruct}

${absorbedParamsStruct}

${lines.filter((line) => line !== "").join("\n")}`;
}

/**
 * WGSL functions:
 *
 * - `scoreOf(raw)`: scaled and capped, four at a time, in log2 units.
 * - `cacheRowOf(sequence, key)`: the quad that a key's row begins with, or ABSENT.
 * - `storeResult(row, quad, value)`: four columns of a finished row; with `storeLse(row, value)` where it is asked for.
 *
 * Merging has the last ones alone.
 */
export function absorbedFunctions(
  shape: AbsorbedShape,
  { merging = false }: { readonly merging?: boolean } = {},
): string {
  const { softCap, pageSize, output, lse } = shape;
  const score = scoreFunctions({ scoreTerm: "none", softCap, window: false, bias: "f32", dropout: false });
  const place = pageSize === 0
    ? `fn cacheRowOf(sequence: u32, key: u32) -> u32 {
  return params.cacheBase + (sequence * params.sequenceRows + key) * params.cacheRow;
}`
    : `fn cacheRowOf(sequence: u32, key: u32) -> u32 {
  let page = pages[params.tableBase + sequence * params.maxPages + key / ${pageSize}u] - params.firstPage;
  if (page >= params.pageCount) { return ABSENT; }
  return params.cacheBase + (page * ${pageSize}u + key % ${pageSize}u) * params.cacheRow;
}`;
  const stored = output === "halves" ? "vec2<u32>(pack2x16float(value.xy), pack2x16float(value.zw))" : "value";
  return `${merging ? "" : `${score}\n\n${place}\n`}
fn storeResult(row: u32, quad: u32, value: vec4<f32>) {
  output[params.outputBase + row * RESULT_QUADS + quad] = ${stored};
}${
    lse
      ? `

fn storeLse(row: u32, value: f32) {
  let token = row / params.heads;
  let item = token / params.queryLength;
  lse[params.lseBase + (item * params.heads + row % params.heads) * params.queryLength + token % params.queryLength] = value;
}`
      : ""
  }`;
}
