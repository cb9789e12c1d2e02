// The rotary embedding: the last R columns of each head turn by the angles of the row's position, the columns before them are
// copied; and the whole head is multiplied where the model says so by position.
//
//   y[p] = f · x[p]                                  p < before
//   y[a] = f · (x[a] · cos − x[b] · sin)             (a, b) a pair: neighbours, or R/2 apart
//   y[b] = f · (x[b] · cos + x[a] · sin)
//
//   one invocation = four neighbours of a row at a time, striding over the whole grid
//
// A query goes from what its projection stored to what attention reads; the shared key goes, behind its latent, to the row
// that the cache takes. Cosines and sines come from the host: WGSL bounds their error up to an angle of π only, and far
// positions turn by more than 100,000.

import { indent, unroll } from "./register_tile.ts";
import { load4, storageDirectives, type StorageElement, store4 } from "./storage_element.ts";

/** What of a call the generated WGSL depends on; sizes are read at run time. */
export interface RotateShape {
  /** Rows as they are stored. */
  readonly source: StorageElement;
  /** Rows as they are to be stored. */
  readonly result: StorageElement;
  /** Columns of a head before those that turn. */
  readonly before: number;
  /** R, the columns that turn; even. */
  readonly dim: number;
  /** Which columns are a pair; null where none turns. */
  readonly layout: "interleaved" | "half" | null;
  /** Whether rows have a factor each. */
  readonly tempered: boolean;
}

/** Invocations of a workgroup. */
export const workgroupSize = 256;

/** Whether every four neighbours are of one head and turn alike, or not at all. */
export function inQuads({ before, dim, layout }: Pick<RotateShape, "before" | "dim" | "layout">): boolean {
  return before % 4 === 0 && dim % (layout === "half" ? 8 : 4) === 0;
}

/** The kernel's source: bindings are the parameters, the rows, the turns, the factors, and the results. */
export function wgsl(shape: RotateShape): string {
  const { source, result, before, dim, layout, tempered } = shape;
  const quads = source.startsWith("vec4") && result.startsWith("vec4");
  return `${storageDirectives([source, result])}// Rotary embedding, ${layout ?? "none"}.
const BEFORE = ${before}u;
const PAIRS = ${dim / 2}u;
const WIDTH = ${before + dim}u; // of a head

struct Params {
  rows: u32,
  columns: u32,   // heads × WIDTH
  sourceBase: u32, // elements from the binding's start to the first row, and from one row to the next
  sourceRow: u32,
  resultRow: u32, // elements from one row of the result to the next
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> source: array<${source}>;
${layout === null ? "" : "@group(0) @binding(2) var<storage, read> turns: array<vec2<f32>>; // cosine and sine"}
${tempered ? "@group(0) @binding(3) var<storage, read> factors: array<f32>;" : ""}
@group(0) @binding(4) var<storage, read_write> result: array<${result}>;

${quads ? quadFunctions(shape) : elementFunctions(shape)}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let quads = (params.columns + 3u) / 4u;
  for (var i = id.x; i < params.rows * quads; i += groups.x * ${workgroupSize}u) {
    let row = i / quads;
    let column = i % quads * 4u;
    let at = params.sourceBase + row * params.sourceRow;
    let quad = ${quads ? "turned(at, row, column)" : "turnedEach(at, row, column)"}${tempered ? " * factors[row]" : ""};
${indent(store4("result", result, "row * params.resultRow", "column", "params.columns", "quad"), 4)}
  }
}
`;
}

function quadFunctions({ source, layout }: RotateShape): string {
  const load = (column: string) => load4("source", source, "at", column, "params.columns");
  if (layout === null) return `fn turned(at: u32, row: u32, column: u32) -> vec4<f32> { return ${load("column")}; }`;
  const head = `fn turned(at: u32, row: u32, column: u32) -> vec4<f32> {
  let quad = ${load("column")};
  let d = column % WIDTH;
  if (d < BEFORE) { return quad; }`;
  if (layout === "interleaved") {
    return `${head}
  let first = turns[row * PAIRS + (d - BEFORE) / 2u];
  let second = turns[row * PAIRS + (d - BEFORE) / 2u + 1u];
  let cosines = vec4<f32>(first.xx, second.xx);
  let sines = vec4<f32>(-first.y, first.y, -second.y, second.y);
  return quad * cosines + quad.yxwz * sines;
}`;
  }
  return `${head}
  let isSecond = d - BEFORE >= PAIRS;
  let partner = select(column + PAIRS, column - PAIRS, isSecond);
  let other = ${load("partner")};
  let pair = row * PAIRS + (d - BEFORE) % PAIRS;
${indent(unroll(4, (i) => `let turn${i} = turns[pair + ${i}u];`), 2)}
  let cosines = vec4<f32>(turn0.x, turn1.x, turn2.x, turn3.x);
  let sines = vec4<f32>(turn0.y, turn1.y, turn2.y, turn3.y);
  return quad * cosines + select(-other, other, isSecond) * sines;
}`;
}

function elementFunctions({ source, layout }: RotateShape): string {
  const scalar = source.startsWith("vec4");
  const load = (column: string) => {
    if (scalar) return `f32(source[(at + ${column}) / 4u][(at + ${column}) % 4u])`;
    return `f32(source[at + ${column}])`;
  };
  const [pair, isSecond, apart] = layout === "half"
    ? ["c % PAIRS", "c >= PAIRS", "PAIRS"]
    : ["c / 2u", "c % 2u == 1u", "1u"];
  const turn = layout === null ? `  return ${load("column")};` : `  let own = ${load("column")};
  let d = column % WIDTH;
  if (d < BEFORE) { return own; }
  let c = d - BEFORE;
  let isSecond = ${isSecond};
  let partner = select(column + ${apart}, column - ${apart}, isSecond);
  let other = ${load("partner")};
  let turn = turns[row * PAIRS + ${pair}];
  return own * turn.x + select(-other, other, isSecond) * turn.y;`;
  return `fn element(at: u32, row: u32, column: u32) -> f32 {
  if (column >= params.columns) { return 0.0; }
${turn}
}

fn turnedEach(at: u32, row: u32, column: u32) -> vec4<f32> {
  return vec4<f32>(
    element(at, row, column),
    element(at, row, column + 1u),
    element(at, row, column + 2u),
    element(at, row, column + 3u),
  );
}`;
}
