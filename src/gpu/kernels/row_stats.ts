// What the gradients need to know of a query row: its log-sum-exp in units of log2(e), and D = Σ_v ∂out · out.
//
//   one workgroup = 8 rows of one head, 8 invocations a row; each sums every eighth quad of columns, the first one adds up
//   workgroup memory: 64 numbers
//
// A row that sees no key takes no part: its log-sum-exp is so large that every probability becomes 0, and D is 0 whatever
// ∂out is.

import { scoreConstants } from "./score_terms.ts";
import { load4, storageDirectives, type StorageElement } from "./storage_element.ts";

/** Rows of one workgroup. */
export const rowsPerWorkgroup = 8;

/** What of a call the generated WGSL depends on. */
export interface RowStatsShape {
  /** The result as it is stored. */
  readonly output: StorageElement;
  /** ∂out as it is stored. */
  readonly gradOutput: StorageElement;
}

/** The parameter block's values, in order. Where rows lie: base, row, head, item gap. */
export interface RowStatsWords {
  /** Rows of the range, and which row of the call, counted through all batch items, is its first. */
  readonly rows: readonly [count: number, first: number];
  /** Query rows of a batch item, and the width of a value head. */
  readonly sizes: readonly [queryLength: number, vHeadDim: number];
  /** First row of this dispatch. */
  readonly firstTile: number;
  /** Of the result. */
  readonly output: readonly [base: number, row: number, head: number, gap: number];
  /** Of ∂out. */
  readonly gradOutput: readonly [base: number, row: number, head: number, gap: number];
  /** Of the log-sum-exps, whose rows are dense. */
  readonly lse: readonly [base: number, item: number, head: number];
}

/** The words of the parameter block. */
export function wordsOf({ rows, sizes, firstTile, output, gradOutput, lse }: RowStatsWords): number[] {
  return [...rows, ...sizes, firstTile, ...output, ...gradOutput, ...lse];
}

/** The kernel's source. Workgroups: tiles of rows along x, heads along y. */
export function wgsl(shape: RowStatsShape): string {
  return `${storageDirectives([shape.output, shape.gradOutput])}// Log-sum-exp and D of every query row.
${scoreConstants}

struct Params {
  rows: u32,        // of the range
  firstRow: u32,    // query row, counted through all batch items, that row 0 is
  queryLength: u32,
  V: u32,
  firstTile: u32,   // index of the first tile of rows of this dispatch
  outputBase: u32,  // elements from the binding's start to the first row, and so on
  outputRow: u32,
  outputHead: u32,
  outputGap: u32,
  gradBase: u32,
  gradRow: u32,
  gradHead: u32,
  gradGap: u32,
  lseBase: u32,
  lseItem: u32,
  lseHead: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> output: array<${shape.output}>;
@group(0) @binding(2) var<storage, read> gradOutput: array<${shape.gradOutput}>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read_write> stats: array<vec2<f32>>;

var<workgroup> sums: array<array<f32, 8>, 8>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let row = (params.firstTile + workgroup.x) * ${rowsPerWorkgroup}u + t / 8u;
  let head = workgroup.y;
  let whole = params.firstRow + row;
  let item = whole / params.queryLength;
  var sum = 0.0;
  if (row < params.rows) {
    let rangeItem = item - params.firstRow / params.queryLength;
    let outputAt = params.outputBase + row * params.outputRow + head * params.outputHead + rangeItem * params.outputGap;
    let gradAt = params.gradBase + row * params.gradRow + head * params.gradHead + rangeItem * params.gradGap;
    for (var column = (t % 8u) * 4u; column < params.V; column += 32u) {
      let result = ${load4("output", shape.output, "outputAt", "column", "params.V")};
      let grad = ${load4("gradOutput", shape.gradOutput, "gradAt", "column", "params.V")};
      sum += dot(result, grad);
    }
  }
  sums[t / 8u][t % 8u] = sum;
  workgroupBarrier();
  if (t % 8u == 0u && row < params.rows) {
    let logSum = lse[params.lseBase + item * params.lseItem + head * params.lseHead + whole % params.queryLength];
    if (bitcast<u32>(logSum) == 0xff800000u) {
      stats[head * params.rows + row] = vec2<f32>(-MASKED, 0.0);
    } else {
      var total = 0.0;
      for (var i = 0u; i < 8u; i += 1u) { total += sums[t / 8u][i]; }
      stats[head * params.rows + row] = vec2<f32>(logSum * LOG2E, total);
    }
  }
}
`;
}
