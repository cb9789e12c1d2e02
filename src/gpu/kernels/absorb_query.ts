// Queries as absorbed attention reads them: q_c = q_nope · wKc and, behind it, q_rope; padded with zeros to whole quads.
//
//   q_c[t, h, l] = Σ_p q[t, h, p] · wKc[l, g, p]      g = ⌊h / headsPerKvHead⌋
//
//   tile: see head_product.ts. Without weights the query was absorbed before, and its rows are copied.

import type { RowStorage } from "./absorbed_operands.ts";
import { headProduct } from "./head_product.ts";
import { type PackedElements, packedLoad, packedType, packQuad } from "./packed_element.ts";

/** What of a call the generated WGSL depends on. */
export interface AbsorbQueryShape {
  /** The query as it is stored. */
  readonly query: PackedElements;
  /** wKc as it is stored; null with a query that was absorbed before. */
  readonly weight: PackedElements | null;
  /** How the rows are to be stored. */
  readonly result: RowStorage;
  /** L. */
  readonly kvLoraRank: number;
  /** P; 0 without weights. */
  readonly qkNopeHeadDim: number;
  /** R. */
  readonly qkRopeHeadDim: number;
}

/** Index of each operand's binding. */
export const absorbQueryBindings = { query: 1, weight: 2, rows: 3 } as const;

/** WGSL of the parameter block: words in this order. */
export const absorbQueryParams = `struct Params {
  tokens: u32,
  queryLength: u32, // tokens of a batch item
  heads: u32,
  kvHeads: u32,
  base: u32,        // elements from the binding's start to the first query, and from one item, token and head to the next
  item: u32,
  row: u32,
  head: u32,
  weightBase: u32,
}`;

/** The kernel's source. Workgroups: columns along x, tokens along y, heads along z. */
export function wgsl(shape: AbsorbQueryShape): string {
  const { query, weight, result, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R } = shape;
  const halves = result === "halves";
  const width = Math.ceil((L + R) / (halves ? 8 : 4)) * (halves ? 8 : 4);
  const head = `// Absorbed queries.
const DEPTH = ${P}u;
const L = ${L}u;
const WIDTH = ${width}u; // of a row of the result

${absorbQueryParams}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> query: array<${packedType(query)}>;
${weight === null ? "" : `@group(0) @binding(2) var<storage, read> weight: array<${packedType(weight)}>;`}
@group(0) @binding(3) var<storage, read_write> rows_out: array<${halves ? "vec2<u32>" : "vec4<f32>"}>;

${packedLoad("query", query)}
${weight === null ? "" : packedLoad("weight", weight)}
${halves ? packQuad : ""}

fn queryAt(token: u32, head: u32) -> u32 {
  return params.base + token / params.queryLength * params.item + token % params.queryLength * params.row + head * params.head;
}

// One element: columns past what was multiplied begin at any place of a row.
fn element(at: u32, column: u32, end: u32) -> f32 {
  return load_query(at, column / 4u * 4u, end)[column % 4u];
}

fn store(token: u32, head: u32, column: u32, value: vec4<f32>) {
  let at = ((token * params.heads + head) * WIDTH + column) / 4u;
  rows_out[at] = ${halves ? "packQuad(value)" : "value"};
}
`;
  if (weight === null) {
    return `${head}
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let count = params.tokens * params.heads * (WIDTH / 4u);
  for (var i = id.x; i < count; i += groups.x * 64u) {
    let column = i % (WIDTH / 4u) * 4u;
    let row = i / (WIDTH / 4u);
    let at = queryAt(row / params.heads, row % params.heads);
    store(row / params.heads, row % params.heads, column, load_query(at, column, ${L + R}u));
  }
}
`;
  }
  return `${head}
// What lies past the last token or column is another one's, and is not stored; past the depth weights are zeros.
fn tile(token: u32, head: u32, k: u32) -> vec4<f32> {
  return load_query(queryAt(min(token, params.tokens - 1u), head), k, ${P + R}u);
}

fn weights(kvHead: u32, k: u32, n: u32) -> vec4<f32> {
  return load_weight(params.weightBase + (min(n, L - 1u) * params.kvHeads + kvHead) * DEPTH, k, DEPTH);
}

${
    headProduct({
      left: (token, k) => `tile(${token}, head, ${k})`,
      weight: (k, n) => `weights(kvHead, ${k}, ${n})`,
      weightAlongDepth: true,
      prologue: "  let kvHead = head * params.kvHeads / params.heads;",
      store: `    if (token >= params.tokens || column >= WIDTH) { continue; }
    var value = sum;
    for (var c = 0u; c < 4u; c += 1u) {
      if (column + c >= L) {
        value[c] = select(0.0, element(queryAt(token, head), DEPTH + column + c - L, ${P + R}u), column + c < ${
        L + R
      }u);
      }
    }
    store(token, head, column, value);`,
    })
  }`;
}
