// The softmax of one block of keys in attention on matrix units: from scores in workgroup memory to probabilities there.
//
//   scores  of each subgroup in columns: `key · scoreStride` quads and a row. Lanes of a fragment hold neighbouring columns
//           of eight rows, which so come to lie in different banks (stored in rows they met in pairs: 190 → 202 TFLOP/s on
//           an H100), and the softmax reads a float of a different row in each lane
//   probs   16 × 16 blocks in rows, eight keys stored at once
//
// Two invocations to a row and two subgroups that share rows: each invocation takes a subgroup's 16 keys, the second one
// beginning four further on, so that both read from different banks, and storing its last eight keys first. Otherwise
// neighbours take every rowThreads-th quad of keys and swap halves, so that each has eight keys to store.
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
  const rotates = rowThreads === 2 && sharing === 2 && ownKeys === 1;
  const isScaledLast = terms.scoreTerm === "none" && !terms.softCap;
  /** WGSL index of an invocation's j-th quad of keys within the block. */
  const keyQuad = (j: number) =>
    rotates
      ? j < 3 ? `(${j}u + 5u * softPart)` : "(3u + softPart)"
      : rowThreads === 1
      ? `${j}u`
      : `(${rowThreads * j}u + softPart)`;

  const groupRows = rowFragments * fragmentSize;
  const scoreQuad = (j: number) => {
    const ownQuadsOfKeys = ownKeys * fragmentSize / 4;
    if (rotates) {
      const part = unit.part(scores, `(softRow / ${groupRows}u * 2u + softPart)`);
      const quad = j < 3 ? `(${j}u + softPart)` : "(3u - 3u * softPart)";
      const read = (i: number) =>
        unit.readFloat(
          part,
          `(4u * ${quad} + ${i}u) * ${scoreStride}u + softRow % ${groupRows}u / 4u`,
          "softRow % 4u",
        );
      return `vec4<f32>(${[0, 1, 2, 3].map(read).join(", ")})`;
    }
    const isOne = ownQuadsOfKeys % rowThreads === 0;
    const share = isOne ? `${Math.floor(rowThreads * j / ownQuadsOfKeys)}u` : `${keyQuad(j)} / ${ownQuadsOfKeys}u`;
    const part = unit.part(scores, `(softRow / ${groupRows}u * ${sharing}u + ${share})`);
    const column = (i: number) => `(4u * (${keyQuad(j)} % ${ownQuadsOfKeys}u) + ${i}u) * ${scoreStride}u`;
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
  const storeProbs = rotates
    ? `{
  let isOdd = softPart == 1u;
  let first = packHalves(p0, p1);
  let second = packHalves(p2, p3);
  let one = select(first, vec4<u32>(first.zw, second.xy), isOdd);
  let other = select(second, vec4<u32>(second.zw, first.xy), isOdd);
${indent(storeEight("(3u * softPart)", "one"), 2)}
${indent(storeEight("(1u + softPart)", "other"), 2)}
}`
    : rowThreads === 1
    ? unroll(ownQuads / 2, (q) =>
      `{
  let packed = packHalves(p${2 * q}, p${2 * q + 1});
${indent(storeEight(`${q}u`, "packed"), 2)}
}`)
    : unit.native
    ? `let isOdd = softPart % 2u == 1u;
let firstEight = (softPart + ${rowThreads}u * (softPart % 2u)) / 2u;
${
      unroll(ownQuads / 2, (m) =>
        `{
  let both = packHalves(p${2 * m}, p${2 * m + 1});
  let sent = select(both.zw, both.xy, isOdd);
  let got = vec2<u32>(subgroupShuffleXor(sent.x, 1u), subgroupShuffleXor(sent.y, 1u));
  let packed = select(vec4<u32>(both.xy, got), vec4<u32>(got, both.zw), isOdd);
${indent(storeEight(`(${rowThreads * m}u + firstEight)`, "packed"), 2)}
}`)
    }`
    : unroll(ownQuads, (j) =>
      unit.writeFour(
        unit.part(probs, `(softRow / 16u * ${keyFragments}u + ${keyQuad(j)} / 4u)`),
        `softRow % 16u * 4u + ${keyQuad(j)} % 4u`,
        `p${j}`,
      ));

  return `${unroll(ownQuads, (j) => `var x${j} = ${isScaledLast ? "" : "scoreOf"}(${scoreQuad(j)});`)}
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
