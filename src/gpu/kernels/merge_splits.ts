// Partial results of absorbed attention over the splits of a sequence's keys become the result.
//
//   m = max over splits and the sink      w_s = exp2(top_s − m)      Z = Σ_s w_s · sum_s + exp2(sink − m)
//   out = Σ_s w_s · O_s / Z               lse = (m + log2 Z) · ln 2
//
//   one workgroup = one query row × some quads of columns. First 256 invocations meet over maxima and sums, one split each,
//   in a tree; then `lanes` of them share a quad of columns, each with every lanes-th split, four loads at a time. One long
//   sequence has many splits and few rows, a batch the reverse: lanes follow the number of splits.
//   workgroup memory: 256 weights and 256 pairs, later 256 quads = 7 KiB
//
// Where every invocation walked through all maxima in storage by itself, 128 splits took 43 µs on an H100. Splits are added
// up in a fixed order. More than 256 come in rounds, what was summed before rescaled.

import { absorbedDeclarations, absorbedFunctions, type AbsorbedShape } from "./absorbed_operands.ts";
import { indent, unroll } from "./register_tile.ts";

/** Words of one entry: first query row, rows, first slot, splits. */
export const mergeWords = 4;

/** Invocations of a workgroup, and splits of a round. */
export const mergeSize = 256;

/** Splits that one invocation loads at a time. */
const loads = 4;

/** Invocations that share a quad of columns where their number may not depend on the batch. */
export const fixedLanes = 8;

/** Invocations that share a quad of columns, for entries of so many splits at the most. */
export function mergeLanes(splits: number): number {
  return [4, 8, 32].find((lanes) => splits <= lanes * loads) ?? 32;
}

/** Quads of columns of one workgroup. */
export function mergeQuads(lanes: number): number {
  return mergeSize / lanes;
}

/** The kernel's source. Workgroups: entries along x, rows of a block along y, columns along z. */
export function wgsl(shape: AbsorbedShape, blockRows: number, lanes: number): string {
  const { sinkQuads, lse } = shape;
  const quads = mergeQuads(lanes);
  return `// Splits of absorbed attention, merged.
${absorbedDeclarations(shape, { pinned: false, merging: true })}

struct Merge {
  row: u32,
  rows: u32,
  slot: u32,
  splits: u32,
}

@group(0) @binding(1) var<storage, read> merges: array<Merge>;

const BLOCK_ROWS = ${blockRows}u;
const LANES = ${lanes}u;

${absorbedFunctions(shape, { merging: true })}

var<workgroup> parts: array<vec2<f32>, ${mergeSize}>;
var<workgroup> weights: array<f32, ${mergeSize}>;
var<workgroup> sums: array<vec4<f32>, ${mergeSize}>;

// Of two parts, as maximum and sum relative to it. One that saw nothing has weight 0; its sum counts if it is NaN.
fn joined(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
  let top = max(a.x, b.x);
  return vec2<f32>(top, weightOf(a.x, top) * a.y + weightOf(b.x, top) * b.y);
}

fn weightOf(own: f32, top: f32) -> f32 { return select(exp2(own - top), 0.0, own <= UNSEEN); }

@compute @workgroup_size(${mergeSize})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) t: u32,
) {
  // Entries past what one axis takes lie along y.
  let index = workgroup.x + workgroup.y / BLOCK_ROWS * groups.x;
  let blockRow = workgroup.y % BLOCK_ROWS;
  if (index >= arrayLength(&merges)) { return; }
  let entry = merges[index];
  if (blockRow >= entry.rows) { return; }
  let lane = t / ${quads}u;
  let quad = workgroup.z * ${quads}u + t % ${quads}u;
  let column = min(quad, RESULT_QUADS - 1u);
  var whole = vec2<f32>(MASKED, 0.0);
  var sum = vec4<f32>();
  for (var first = 0u; first < entry.splits; first += ${mergeSize}u) {
    let count = min(entry.splits - first, ${mergeSize}u);
    let slot = entry.slot + first;
    var own = vec2<f32>(MASKED, 0.0);
    if (t < count) { own = stats[(slot + t) * BLOCK_ROWS + blockRow]; }
    parts[t] = own;
    for (var half = ${mergeSize / 2}u; half > 0u; half /= 2u) {
      workgroupBarrier();
      if (t < half) { parts[t] = joined(parts[t], parts[t + half]); }
    }
    workgroupBarrier();
    let before = whole;
    whole = joined(before, parts[0]);
    sum *= weightOf(before.x, whole.x);
    weights[t] = weightOf(own.x, whole.x);
    workgroupBarrier();
    for (var s = lane; s < count; s += ${loads}u * LANES) {
      // Loads first, of splits that exist; a split that saw nothing takes no part, whatever lies in its slot.
${
    unroll(loads, (i) =>
      `      let at${i} = min(s + ${i}u * LANES, count - 1u);
      let part${i} = partial[((slot + at${i}) * BLOCK_ROWS + blockRow) * RESULT_QUADS + column];`)
  }
${
    unroll(loads, (i) =>
      `      let weight${i} = select(0.0, weights[at${i}], s + ${i}u * LANES < count);
      if (weight${i} != 0.0) { sum += weight${i} * part${i}; }`)
  }
    }
  }
${
    sinkQuads === 0 ? "  let top = whole.x;\n  let total = whole.y;" : indent(
      `let head = (entry.row + blockRow) % params.heads;
let sink = sinks[head / 4u][head % 4u];
let seen = whole.x > UNSEEN;
let top = select(whole.x, max(whole.x, sink), seen);
let total = select(whole.y, whole.y * weightOf(whole.x, top) + exp2(sink - top), seen);
sum *= select(1.0, weightOf(whole.x, top), seen);`,
      2,
    )
  }
  sums[t] = sum;
  workgroupBarrier();
  if (lane == 0u && quad < RESULT_QUADS) {
    for (var other = 1u; other < LANES; other += 1u) { sum += sums[other * ${quads}u + t]; }
    storeResult(entry.row + blockRow, quad, select(sum / total, vec4<f32>(), total == 0.0));
  }
${
    lse
      ? `  if (t == 0u && workgroup.z == 0u) {
    storeLse(entry.row + blockRow, select((top + log2(total)) * LN2, params.minusInfinity, total == 0.0));
  }`
      : ""
  }
}
`;
}
