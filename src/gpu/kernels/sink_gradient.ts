// Gradients of the sinks: ∂aux_n = −Σ_i exp(aux_n − lse_i) · D_i, over the rows of one head, or of all heads that share it.
//
//   one workgroup = one sink; its invocations stride over heads × rows, the first one adds their sums up in order
//   workgroup memory: 1 KiB

import { scoreConstants } from "./score_terms.ts";
import { storageDirectives } from "./storage_element.ts";

/** Invocations per workgroup. */
const workgroupSize = 256;

/** The parameter block's values, in order. */
export interface SinkGradientWords {
  /** Query rows of the range. */
  readonly rows: number;
  /** Heads that share a row of sinks. */
  readonly heads: number;
  /** Sinks of a row. */
  readonly sinks: number;
  /** Of the sinks as they are given: elements to the first one, and from row to row. */
  readonly aux: readonly [base: number, row: number];
  /** Elements to the first gradient; they are dense. */
  readonly gradientBase: number;
  /** Whether to add to what is there. */
  readonly accumulate: boolean;
}

/** The words of the parameter block. */
export function wordsOf(words: SinkGradientWords): number[] {
  const { rows, heads, sinks, aux, gradientBase, accumulate } = words;
  return [rows, heads, sinks, ...aux, gradientBase, Number(accumulate)];
}

/** The kernel's source. Workgroups: sinks of a row along x, rows of sinks along y. */
export function wgsl(aux: "f32" | "f16"): string {
  return `${storageDirectives([aux])}// Gradients of the sinks.
${scoreConstants}

struct Params {
  rows: u32,         // query rows of the range
  heads: u32,        // heads that share a row of sinks
  sinks: u32,        // of a row
  auxBase: u32,      // elements from the binding's start to the first sink, and from row to row
  auxRow: u32,
  gradientBase: u32,
  accumulate: u32,   // whether to add to what is there
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> aux: array<${aux}>;
@group(0) @binding(2) var<storage, read> stats: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> gradient: array<f32>;

var<workgroup> sums: array<f32, ${workgroupSize}>;

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let sink = f32(aux[params.auxBase + workgroup.y * params.auxRow + workgroup.x]) * LOG2E;
  let first = workgroup.y * params.heads * params.rows;
  var sum = 0.0;
  for (var i = t; i < params.heads * params.rows; i += ${workgroupSize}u) {
    let stat = stats[first + i];
    sum += exp2(sink - stat.x) * stat.y;
  }
  sums[t] = sum;
  workgroupBarrier();
  for (var step = ${workgroupSize / 2}u; step > 0u; step /= 2u) {
    if (t < step) { sums[t] += sums[t + step]; }
    workgroupBarrier();
  }
  if (t == 0u) {
    let at = params.gradientBase + workgroup.y * params.sinks + workgroup.x;
    var total = -sums[0];
    if (params.accumulate != 0u) { total += gradient[at]; }
    gradient[at] = total;
  }
}
`;
}
