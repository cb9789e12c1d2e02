// Partial results of absorbed attention over the splits of a sequence's keys become the result.
//
//   m = max over splits and the sink      w_s = exp2(top_s − m)      Z = Σ_s w_s · sum_s + exp2(sink − m)
//   out = Σ_s w_s · O_s / Z               lse = (m + log2 Z) · ln 2
//
//   one workgroup = one query row × 32 quads of columns: 8 invocations to a quad, each with every eighth split, since a row of
//   one long sequence has many splits and there are few rows then. Splits are added up in a fixed order.
//   workgroup memory: 8 · 32 quads = 4 KiB

import { absorbedDeclarations, absorbedFunctions, type AbsorbedShape } from "./absorbed_operands.ts";

/** Words of one entry: first query row, rows, first slot, splits. */
export const mergeWords = 4;

/** Quads of columns of one workgroup. */
export const mergeQuads = 32;

const lanes = 8;

/** Invocations of a workgroup. */
export const mergeSize = mergeQuads * lanes;

/** The kernel's source. Workgroups: entries along x, rows of a block along y, columns along z. */
export function wgsl(shape: AbsorbedShape, blockRows: number): string {
  const { sinkQuads, lse } = shape;
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

${absorbedFunctions(shape, { merging: true })}

var<workgroup> sums: array<array<vec4<f32>, ${mergeQuads}>, ${lanes}>;

@compute @workgroup_size(${mergeSize})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) t: u32,
) {
  // Entries past what one axis takes lie along y.
  let index = workgroup.x + workgroup.y / BLOCK_ROWS * groups.x;
  let entry = merges[min(index, arrayLength(&merges) - 1u)];
  let blockRow = workgroup.y % BLOCK_ROWS;
  let lane = t / ${mergeQuads}u;
  let quad = workgroup.z * ${mergeQuads}u + t % ${mergeQuads}u;
  let isRow = index < arrayLength(&merges) && blockRow < entry.rows;
  var top = MASKED;
  var total = 0.0;
  var sum = vec4<f32>();
  if (isRow) {
    for (var s = 0u; s < entry.splits; s += 1u) { top = max(top, stats[(entry.slot + s) * BLOCK_ROWS + blockRow].x); }
${
    sinkQuads === 0
      ? ""
      : "    let head = (entry.row + blockRow) % params.heads;\n    let sink = sinks[head / 4u][head % 4u];\n    let seen = top > UNSEEN;\n    top = select(top, max(top, sink), seen);\n    total = select(0.0, exp2(sink - top), seen);"
  }
    for (var s = 0u; s < entry.splits; s += 1u) {
      let at = (entry.slot + s) * BLOCK_ROWS + blockRow;
      let part = stats[at];
      let weight = select(exp2(part.x - top), 0.0, part.x <= UNSEEN);
      total += weight * part.y;
      // A split that saw nothing takes no part, whatever lies in its slot.
      if (s % ${lanes}u == lane && quad < RESULT_QUADS && part.x > UNSEEN) {
        sum += weight * partial[at * RESULT_QUADS + quad];
      }
    }
  }
  sums[lane][t % ${mergeQuads}u] = sum;
  workgroupBarrier();
  if (lane == 0u && isRow && quad < RESULT_QUADS) {
    for (var other = 1u; other < ${lanes}u; other += 1u) { sum += sums[other][t]; }
    storeResult(entry.row + blockRow, quad, select(sum / total, vec4<f32>(), total == 0.0));
  }
${
    lse
      ? `  if (t == 0u && workgroup.z == 0u && isRow) {
    storeLse(entry.row + blockRow, select((top + log2(total)) * LN2, params.minusInfinity, total == 0.0));
  }`
      : ""
  }
}
`;
}
