// The softmax of one block of keys in attention on matrix units: from scores in workgroup memory to probabilities there.
//
//   scores  of each subgroup in columns: `key · scoreStride` quads and a row. Lanes of a fragment hold neighbouring columns
//           of eight rows, which so come to lie in different banks (stored in rows they met in pairs: 190 → 202 TFLOP/s on
//           an H100), and the softmax reads a float of a different row in each lane
//   probs   16 × 16 blocks in rows, eight keys stored at once
//
// `rowThreads` neighbouring invocations to a row, each with as many quads of keys next to each other. Every other one begins
// with its second quad, so that neighbours read from different banks, and stores its second eight keys first.
//
// Where nothing but the scale stands between products and softmax, it is part of the exponent's multiply-add: 205 → 208
// TFLOP/s causal, 211 with the turned keys. Backward multiplies first; a score of 20 then differs by 1e-6.

import type { MatrixAttendLayout, MatrixAttendTile } from "./matrix_attend_layout.ts";
import { fragmentSize, type MatrixUnit } from "./matrix_unit.ts";
import { indent, unroll } from "./register_tile.ts";
import type { ScoreTerms } from "./score_terms.ts";

/**
 * WGSL of the softmax of the block at `keyBase`. It keeps each row's maximum and sum, `rowTop` and `rowSum`, and sets
 * `rescale.x` and `rowFactor` where a maximum has grown by more than 8.
 */
export function blockSoftmax(
  { blockK, rowFragments }: MatrixAttendTile,
  { rowThreads, sharing, keyFragments, ownKeys, scoreStride, memories: { scores, probs } }: MatrixAttendLayout,
  { terms }: { readonly terms: ScoreTerms },
  unit: MatrixUnit,
): string {
  const ownQuads = blockK / 4 / rowThreads;
  const isScaledLast = terms.scoreTerm === "none" && !terms.softCap;
  /** Where the j-th quad of an invocation lies behind its first one. */
  const turned = (j: number) =>
    rowThreads === 1 ? `${j}u` : j + 1 < ownQuads ? `${j}u + turn` : `${j}u - ${ownQuads - 1}u * turn`;
  /** WGSL index of it within the block. */
  const keyQuad = (j: number) => `(${ownQuads}u * softPart + ${turned(j)})`;

  const scoreQuad = (j: number) => {
    const [groupRows, groupQuads] = [rowFragments * fragmentSize, ownKeys * fragmentSize / 4];
    // Quads of one invocation are scores of one subgroup, unless it has more of them than a subgroup.
    const [share, quad] = groupQuads % ownQuads === 0
      ? [`${ownQuads}u * softPart / ${groupQuads}u`, `(${ownQuads}u * softPart % ${groupQuads}u + ${turned(j)})`]
      : [`${keyQuad(j)} / ${groupQuads}u`, `(${keyQuad(j)} % ${groupQuads}u)`];
    const part = unit.part(scores, `(softRow / ${groupRows}u * ${sharing}u + ${share})`);
    const column = (i: number) => `(4u * ${quad} + ${i}u) * ${scoreStride}u`;
    const read = (i: number) => unit.readFloat(part, `${column(i)} + softRow % ${groupRows}u / 4u`, "softRow % 4u");
    return `vec4<f32>(${[0, 1, 2, 3].map(read).join(", ")})`;
  };

  const seen = terms.window ? "(key < end) & (key >= start)" : "key < end";
  const masked = `let row = i32(block.rowStart + softRow);
let end = vec4<i32>(min(row + block.diagonalEnd, i32(block.columnEnd)));
${terms.window ? "let start = vec4<i32>(row + block.diagonalStart);\n" : ""}${
    unroll(ownQuads, (j) => {
      const key = `let key = vec4<i32>(i32(keyBase + 4u * ${keyQuad(j)})) + vec4<i32>(0, 1, 2, 3);`;
      if (terms.scoreTerm === "none") return `{ ${key} x${j} = select(vec4<f32>(MASKED), x${j}, ${seen}); }`;
      return `{
  ${key}
  let seen = ${seen};
${
        unroll(
          4,
          (i) =>
            `  if (seen[${i}] && row < i32(block.rowEnd)) { x${j}[${i}] = withTerm(x${j}[${i}], block.item, head, position + u32(row), u32(key[${i}]) - origin); } else { x${j}[${i}] = MASKED; }`,
        )
      }
}`;
    })
  }`;

  /** The block of probabilities that a WGSL index of eight keys falls into, and the quad of it. */
  const storeEight = (eight: string, value: string) =>
    unit.writeQuad(
      unit.part(probs, `(softRow / 16u * ${keyFragments}u + ${eight} / 2u)`),
      `softRow % 16u * 2u + ${eight} % 2u`,
      value,
    );
  const eights = ownQuads / 2;
  const packed = (first: number) => `packHalves(p${first % ownQuads}, p${(first + 1) % ownQuads})`;
  const storeProbs = unroll(eights, (i) =>
    rowThreads === 1
      ? `{
  let eight = ${packed(2 * i)};
${indent(storeEight(`${i}u`, "eight"), 2)}
}`
      : `{
  let eight = select(${packed(2 * i)}, ${packed(2 * i + 1)}, turn == 1u);
${indent(storeEight(`(${eights}u * softPart + (${i}u + turn) % ${eights}u)`, "eight"), 2)}
}`);

  return `${rowThreads === 1 ? "" : "let turn = softPart % 2u;\n"}${
    unroll(ownQuads, (j) => `var x${j} = ${isScaledLast ? "" : "scoreOf"}(${scoreQuad(j)});`)
  }
if (masking) {
${indent(masked, 2)}
}
var blockTop = max(max(x0.x, x0.y), max(x0.z, x0.w));
${
    unroll(ownQuads - 1, (j) =>
      `blockTop = max(blockTop, max(max(x${j + 1}.x, x${j + 1}.y), max(x${j + 1}.z, x${j + 1}.w)));`)
  }
${unit.combine("blockTop", rowThreads, "max")}
${isScaledLast ? "blockTop = select(blockTop * params.scaleLog2, MASKED, blockTop <= UNSEEN);" : ""}
var decay = 1.0;
if (blockTop > rowTop + 8.0) {
  // What was summed so far is zero before the first visible key.
  if (rowTop > UNSEEN) { rescale.x = 1u; }
  decay = exp2(rowTop - blockTop);
  rowTop = blockTop;
  rowSum *= decay;
}
if (softPart == 0u) { rowFactor[softRow] = decay; }
${
    unroll(ownQuads, (j) =>
      isScaledLast
        ? `var p${j} = exp2(fma(x${j}, vec4<f32>(params.scaleLog2), vec4<f32>(-rowTop)));`
        : `var p${j} = exp2(x${j} - rowTop);`)
  }
if (masking) {
${unroll(ownQuads, (j) => `  p${j} = select(p${j}, vec4<f32>(), x${j} <= vec4<f32>(UNSEEN));`)}
}
${unroll(ownQuads, (j) => `rowSum += (p${j}.x + p${j}.y) + (p${j}.z + p${j}.w);`)}
${
    !terms.dropout ? "" : unroll(ownQuads, (j) =>
      unroll(
        4,
        (i) =>
          `p${j}[${i}] = select(0.0, p${j}[${i}], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * ${
            keyQuad(j)
          } + ${i}u - origin) > 0.0);`,
      ))
  }
${storeProbs}`;
}
