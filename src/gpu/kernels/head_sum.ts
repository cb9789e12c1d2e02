// Strided rows, summed over heads in order: ∂bK and ∂bQ from the parts of every head, ∂query out of rows that hold more,
// and, with a single head, rotary keys from wherever they lie.
//
//   into[row, slot, column] = Σ_h from[row, slot, h, column]
//   one invocation = one element at a time, striding over the whole grid, columns first

import { storageDirectives } from "./storage_element.ts";

/** Invocations per workgroup. */
export const workgroupSize = 64;

/** The parameter block's values, in order; lengths are in elements. */
export interface HeadSumWords {
  /** Rows, slots of a row, heads that are summed, and columns. */
  readonly sizes: readonly [rows: number, slots: number, heads: number, columns: number];
  /** Where to read. */
  readonly from: readonly [base: number, row: number, slot: number, head: number, itemRows: number, gap: number];
  /** Where to write. */
  readonly into: readonly [base: number, row: number, slot: number];
  /** Whether to add to what is there. */
  readonly accumulate: boolean;
}

/** The words of the parameter block. */
export function wordsOf({ sizes, from, into, accumulate }: HeadSumWords): number[] {
  return [...sizes, ...from, ...into, Number(accumulate)];
}

/** The kernel's source. */
export function wgsl(from: "f32" | "f16"): string {
  return `${storageDirectives([from])}// Strided rows, summed over heads.
struct Params {
  rows: u32,
  slots: u32,
  heads: u32,
  columns: u32,
  fromBase: u32,  // elements from the binding's start to the first row, from one row to the next, and so on
  fromRow: u32,
  fromSlot: u32,
  fromHead: u32,
  itemRows: u32,  // rows of a batch item …
  fromGap: u32,   // … and further elements from one item to the next, modulo 2^32
  intoBase: u32,
  intoRow: u32,
  intoSlot: u32,
  accumulate: u32, // whether to add to what is there
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> rows: array<${from}>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let count = params.rows * params.slots * params.columns;
  for (var i = id.x; i < count; i += groups.x * ${workgroupSize}u) {
    let column = i % params.columns;
    let slot = (i / params.columns) % params.slots;
    let row = i / (params.columns * params.slots);
    let at = params.fromBase + row * params.fromRow + slot * params.fromSlot + row / params.itemRows * params.fromGap + column;
    let into = params.intoBase + row * params.intoRow + slot * params.intoSlot + column;
    var sum = 0.0;
    if (params.accumulate != 0u) { sum = sums[into]; }
    for (var head = 0u; head < params.heads; head += 1u) { sum += f32(rows[at + head * params.fromHead]); }
    sums[into] = sum;
  }
}
`;
}
