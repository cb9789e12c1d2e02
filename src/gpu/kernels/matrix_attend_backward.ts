// Gradients of attention over expanded keys and values on matrix units: ∂query, or ∂K and ∂V, by recomputation.
//
//   S = Q·Kᵀ    p = exp2(S − lse)    ∂P = ∂out·Vᵀ    ∂s = p ∘ (∂P − D)
//   ∂query = scale · ∂s·K            ∂K = scale · ∂sᵀ·Q      ∂V = pᵀ·∂out
//
//   one workgroup owns rows: queries of one head for ∂query; keys of one KV head for ∂K and ∂V, for which it goes through
//   the query heads of the KV head. The other side's rows stream through workgroup memory as columns, `columns` at a time,
//   and serve twice: as right factors of the scores, in columns, and of the sums, in rows.
//   Four subgroups share 16 · rowFragments rows: two of them make S (left factors of width P + R in registers), two ∂P (of
//   width V), each of half of the columns. The former sum up ∂V, the latter ∂K, and ∂query is divided such that all have
//   the same number of products: 40 a block at 192/128, with 24 fragment loads.
//
// Workgroup memory in quads of 16 bytes (192/128, 64 rows, 32 columns: 48,384 bytes):
//   wide    columns · (D/8 + 1)     narrow  columns · (V/8 + 1)       D = P + R; widths in whole fragments
//   scores, gradients  rows · (columns/4 + 1) each, in float32        probs, slopes  rows · columns / 8 each, in halves
//
// Nothing is shared between workgroups, so nothing is added atomically: two runs give the same bits. Halves hold p · 2^12
// and ∂s times the factor of matrix_staged.ts. Masking is by selection; columns that a block does not show to all rows are
// staged without NaN and infinities, which would reach the sums through 0 · NaN.

import type { Capabilities } from "../capabilities.ts";
import { blockStruct } from "../schedule.ts";
import { attendBackwardBindings as at, attendBackwardParams } from "./attend_backward_operands.ts";
import { halfRange, type HeadWidths, paddedWidth } from "./matrix_scratch.ts";
import { headerQuads } from "./matrix_staged.ts";
import {
  fragmentQuads,
  fragmentSize,
  type MatrixBackend,
  type MatrixMemory,
  matrixUnit,
  memoryBytes,
  subgroupSize,
} from "./matrix_unit.ts";
import { indent, unroll } from "./register_tile.ts";
import { scoreConstants, scoreFunctions, type ScoreTerms, storesHalves, termBinding } from "./score_terms.ts";
import { whyTooLarge } from "./workgroup_limits.ts";

/** What one kernel computes: ∂query, or ∂K, ∂V and ∂rope. */
export type MatrixGradTarget = "query" | "keys";

/** The tile of one kernel. */
export interface MatrixGradTile {
  /** Rows that one workgroup owns. */
  readonly rows: number;
  /** Columns that pass at a time. */
  readonly columns: number;
  /** Row fragments that a subgroup multiplies each staged fragment with. */
  readonly rowFragments: number;
  /** Whether what streams is bound as writable: see the forward kernel. */
  readonly pinned: boolean;
}

/** What of a call the generated WGSL depends on. */
export interface MatrixGradShape extends HeadWidths {
  /** What happens to the scores. */
  readonly terms: ScoreTerms;
  /** ∂query, ∂K, ∂V and ∂rope as they are to be stored: quads when P, R and V are multiples of 4. */
  readonly gradient: "f32" | "vec4<f32>";
}

/** Index of each operand's binding: those of the plain kernel, and the staged queries and ∂out in the place of both. */
export const matrixGradBindings = {
  blocks: at.blocks,
  staged: at.query,
  stats: at.stats,
  expanded: at.expanded,
  gradient: at.gradient,
  term: at.term,
} as const;

/** Subgroups that share rows. */
const sharing = 4;

/** Quads from one row to the next of a result fragment that is stored by itself: without padding, there is no room. */
const ownStride = fragmentSize / 4;

/** Probabilities are kept in halves times this. */
const probFactor = 4096;

function layout(tile: MatrixGradTile, widths: HeadWidths, target: MatrixGradTarget) {
  const { rows, columns, rowFragments } = tile;
  const subgroups = sharing * rows / (rowFragments * fragmentSize);
  const wideFragments = (paddedWidth(widths.qkNopeHeadDim) + paddedWidth(widths.qkRopeHeadDim)) / fragmentSize;
  const narrowFragments = paddedWidth(widths.vHeadDim) / fragmentSize;
  const half = Math.ceil(wideFragments / 2);
  const fewer = Math.min(half, Math.round(narrowFragments / 4));
  // Column fragments that a subgroup of either kind sums up.
  const [scoreSums, gradSums] = target === "keys" ? [Math.ceil(narrowFragments / 2), half] : [fewer, half - fewer];
  const wideStride = wideFragments * fragmentQuads + 1;
  const narrowStride = narrowFragments * fragmentQuads + 1;
  const scoreStride = columns / 4 + 1;
  const floats = (name: string): MatrixMemory => ({
    name,
    kind: "floats",
    parts: rows / fragmentSize,
    quads: fragmentSize * Math.max(scoreStride, sharing / rowFragments * ownStride),
  });
  const halves = (name: string, parts: number, quads: number): MatrixMemory => ({ name, kind: "halves", parts, quads });
  const blocks = rows * columns / fragmentSize ** 2;
  const memories = {
    wide: halves("wide", columns / fragmentSize, fragmentSize * wideStride),
    narrow: halves("narrow", columns / fragmentSize, fragmentSize * narrowStride),
    scores: floats("scores"),
    gradients: floats("gradients"),
    probs: halves("probs", blocks, fragmentSize * fragmentQuads),
    slopes: halves("slopes", blocks, fragmentSize * fragmentQuads),
  };
  return {
    ...{ subgroups, workgroupSize: subgroups * subgroupSize, wideFragments, narrowFragments, scoreSums, gradSums },
    ...{ wideStride, narrowStride, scoreStride, memories, rowThreads: subgroups * subgroupSize / rows },
  };
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(tile: MatrixGradTile, widths: HeadWidths, target: MatrixGradTarget): number {
  const { probs, ...memories } = layout(tile, widths, target).memories;
  return memoryBytes(Object.values(memories)) + (target === "keys" ? memoryBytes([probs]) + 8 * tile.columns : 0);
}

/** Why this tile cannot run, or null when it can. Whether the device has matrix units is the caller's to know. */
export function whyInvalid(
  tile: MatrixGradTile,
  widths: HeadWidths,
  target: MatrixGradTarget,
  { limits }: Pick<Capabilities, "limits">,
): string | null {
  const { rows, columns, rowFragments } = tile;
  if (rows % (rowFragments * fragmentSize) !== 0) {
    return `${rows} rows are not a multiple of ${rowFragments} fragments of ${fragmentSize}`;
  }
  const map = layout(tile, widths, target);
  if (columns % (2 * fragmentSize) !== 0 || columns % (8 * map.rowThreads) !== 0) {
    return `${columns} columns are not a multiple of two fragments, and of 8 × ${map.rowThreads} invocations of a row`;
  }
  const registers = rowFragments * (
    4 * Math.max(map.wideFragments, map.narrowFragments) + 8 * Math.max(map.scoreSums, map.gradSums) +
    columns / (2 * fragmentSize) * 8
  );
  if (registers > 224) return `${registers} registers per invocation for fragments, at most 224 are to be had`;
  return whyTooLarge(map.workgroupSize, workgroupBytes(tile, widths, target), limits);
}

/** The kernel's source. */
export function wgsl(
  target: MatrixGradTarget,
  tile: MatrixGradTile,
  shape: MatrixGradShape,
  backend: MatrixBackend,
): string {
  const { rows, columns, rowFragments } = tile;
  const { terms } = shape;
  const ownsKeys = target === "keys";
  const unit = matrixUnit(backend);
  const map = layout(tile, shape, target);
  const { subgroups, workgroupSize, wideFragments, narrowFragments, scoreSums, gradSums, rowThreads } = map;
  const { wideStride, narrowStride, scoreStride } = map;
  const { wide, narrow, scores, gradients, probs, slopes } = map.memories;
  const columnFragments = columns / fragmentSize;
  const ownFragments = columnFragments / 2;
  const ownQuads = columns / 4 / rowThreads;
  const slope = terms.softCap;
  const masks = terms.scoreTerm !== "none";

  const factors = unit.fragments("f", "left", rowFragments, Math.max(wideFragments, narrowFragments));
  const products = unit.fragments("s", "result", rowFragments, ownFragments);
  const sums = unit.fragments("g", "result", rowFragments, Math.max(scoreSums, gradSums));
  const rowFragment = (r: string) => `(rowGroup * ${rowFragments}u + ${r})`;

  const registersOf = (count: number) => Math.ceil(count / workgroupSize);
  const pieces = (count: number, emit: (piece: string, i: number) => string) =>
    unroll(registersOf(count), (i) => {
      const piece = i === 0 ? "t" : `t + ${i * workgroupSize}u`;
      const code = emit(piece, i);
      return (i + 1) * workgroupSize <= count ? code : `if (${piece} < ${count}u) {\n${indent(code, 2)}\n}`;
    });
  const widePieces = columns * (wideStride - 1);
  const narrowPieces = columns * (narrowStride - 1);
  const [loadRowWide, loadRowNarrow] = ownsKeys ? ["loadKey", "loadValue"] : ["loadQuery", "loadGrad"];
  const [loadColumnWide, loadColumnNarrow] = ownsKeys ? ["loadQuery", "loadGrad"] : ["loadKey", "loadValue"];
  const storeWide = (piece: string, value: string) =>
    unit.writeQuad(
      unit.part(wide, `((${piece}) / DEPTH_QUADS / 16u)`),
      `(${piece}) / DEPTH_QUADS % 16u * ${wideStride}u + (${piece}) % DEPTH_QUADS`,
      value,
    );
  const storeNarrow = (piece: string, value: string) =>
    unit.writeQuad(
      unit.part(narrow, `((${piece}) / VALUE_QUADS / 16u)`),
      `(${piece}) / VALUE_QUADS % 16u * ${narrowStride}u + (${piece}) % VALUE_QUADS`,
      value,
    );
  const load = (base: string, head: string) =>
    `${
      pieces(widePieces, (piece, i) =>
        `wide${i} = ${loadColumnWide}(${base} + (${piece}) / DEPTH_QUADS, columnEnd, ${head}, (${piece}) % DEPTH_QUADS);`)
    }
${
      pieces(narrowPieces, (piece, i) =>
        `narrow${i} = ${loadColumnNarrow}(${base} + (${piece}) / VALUE_QUADS, columnEnd, ${head}, (${piece}) % VALUE_QUADS);`)
    }${ownsKeys ? `\nif (t < ${columns}u) { stat = rowStats(${base} + t, columnEnd, ${head}); }` : ""}`;
  const store = `${pieces(widePieces, (piece, i) => storeWide(piece, `wide${i}`))}
${pieces(narrowPieces, (piece, i) => storeNarrow(piece, `narrow${i}`))}${
    ownsKeys ? `\nif (t < ${columns}u) { columnStats[t] = stat; }` : ""
  }`;

  /** The rows' own factors pass through the memory of columns, as many rows at a time as there are columns. */
  const perRound = columns / fragmentSize;
  const loadFactors = (round: string, memory: MatrixMemory, stride: number, fragments: number) =>
    unit.over("r", rowFragments, (r) =>
      `if (${rowFragment(r)} / ${perRound}u == ${round}) {
${
        unit.over("d", fragments, (d) => {
          const rows = unit.part(memory, `(${rowFragment(r)} % ${perRound}u)`);
          return `  ${factors.at(r, d)} = ${unit.loadLeft(rows, `${d} * ${fragmentQuads}u`, stride)};`;
        })
      }
}`);
  const loadRows = unit.over("round", Math.ceil(rows / columns), (round) =>
    `workgroupBarrier();
${
      pieces(widePieces, (piece) =>
        `{
  let quad = ${loadRowWide}(block.rowStart + ${round} * ${columns}u + (${piece}) / DEPTH_QUADS, block.rowEnd, firstHead, (${piece}) % DEPTH_QUADS);
${indent(storeWide(piece, "quad"), 2)}
}`)
    }
${
      pieces(narrowPieces, (piece) =>
        `{
  let quad = ${loadRowNarrow}(block.rowStart + ${round} * ${columns}u + (${piece}) / VALUE_QUADS, block.rowEnd, firstHead, (${piece}) % VALUE_QUADS);
${indent(storeNarrow(piece, "quad"), 2)}
}`)
    }
workgroupBarrier();
if (isScore) {
${indent(loadFactors(round, wide, wideStride, wideFragments), 2)}
} else {
${indent(loadFactors(round, narrow, narrowStride, narrowFragments), 2)}
}`);

  const multiply = (memory: MatrixMemory, stride: number, fragments: number, into: MatrixMemory) =>
    `${unit.over("r", rowFragments, (r) => unit.over("k", ownFragments, (k) => `${products.at(r, k)} = ${unit.zero};`))}
${
      unit.over("d", fragments, (d) =>
        unit.over("k", ownFragments, (k) => {
          const rows = unit.part(memory, `(share * ${ownFragments}u + ${k})`);
          const right = unit.right("right", rows, `${d} * ${fragmentQuads}u`, stride, "column");
          return `${right.code}
${unroll(rowFragments, (r) => unit.accumulate(products.at(`${r}u`, k), factors.at(`${r}u`, d), right))}`;
        }))
    }
${
      unit.cases("share", 2, (share) =>
        unit.over("r", rowFragments, (r) =>
          unit.over("k", ownFragments, (k) => {
            const offset = `(${share} * ${ownFragments}u + ${k}) * 4u`;
            return unit.storeResult(unit.part(into, rowFragment(r)), offset, scoreStride, products.at(r, k));
          })))
    }`;
  /** Which column fragment a subgroup sums up as its c-th; past the last one, the last one again. */
  const summedColumn = (first: string, share: string, count: number, fragments: number, c: string) => {
    const known = parseInt(first) + parseInt(share) * count + parseInt(c);
    return isNaN(known)
      ? `min(${first} + ${share} * ${count}u + ${c}, ${fragments - 1}u)`
      : `${Math.min(known, fragments - 1)}u`;
  };
  const sum = (left: MatrixMemory, memory: MatrixMemory, stride: number, first: string, count: number, all: number) =>
    count === 0
      ? ""
      : unit.cases("share", 2, (share) =>
        unit.over("k", columnFragments, (k) =>
          `${
            unroll(rowFragments, (r) => {
              const block = unit.part(left, `(${rowFragment(`${r}u`)} * ${columnFragments}u + ${k})`);
              return `let left${r} = ${unit.loadLeft(block, "0u", fragmentQuads)};`;
            })
          }
${
            unit.over("c", count, (c) => {
              const offset = `${summedColumn(first, share, count, all, c)} * ${fragmentQuads}u`;
              const right = unit.right("right", unit.part(memory, k), offset, stride, "row");
              return `${right.code}
${unroll(rowFragments, (r) => unit.accumulate(sums.at(`${r}u`, c), `left${r}`, right))}`;
            })
          }`));
  const sumScores = ownsKeys
    ? sum(probs, narrow, narrowStride, "0u", scoreSums, narrowFragments)
    : sum(slopes, wide, wideStride, "0u", scoreSums, wideFragments);
  const firstGradSum = ownsKeys ? "0u" : `${2 * scoreSums}u`;
  const sumGrads = sum(slopes, wide, wideStride, firstGradSum, gradSums, wideFragments);

  const own = (j: number) => `softPart * ${ownQuads}u + ${j}u`;
  const seen = "(column < end) & (column >= start)";
  const positions = (row: string, column: string) =>
    ownsKeys ? `position + ${column}, ${row} - origin` : `position + ${row}, ${column} - origin`;
  const masked = `let row = i32(block.rowStart + softRow);
let start = vec4<i32>(row + block.diagonalStart);
let end = vec4<i32>(min(row + block.diagonalEnd, i32(columnEnd)));
${
    unroll(ownQuads, (j) => {
      const column = `let column = vec4<i32>(i32(columnBase + 4u * (${own(j)}))) + vec4<i32>(0, 1, 2, 3);`;
      if (!masks) return `{ ${column} x${j} = select(vec4<f32>(MASKED), x${j}, ${seen}); }`;
      return `{
  ${column}
  let seen = ${seen};
${
        unroll(4, (i) =>
          `  if (seen[${i}] && row < i32(block.rowEnd)) { x${j}[${i}] = withTerm(x${j}[${i}], block.item, head, ${
            positions("u32(row)", `u32(column[${i}])`)
          }); } else { x${j}[${i}] = MASKED; }`)
      }
}`;
    })
  }`;
  const statsOf = (j: number) =>
    ownsKeys
      ? unroll(4, (i) => `let stat${j}_${i} = columnStats[4u * (${own(j)}) + ${i}u];`) + `
let logSum${j} = vec4<f32>(${[0, 1, 2, 3].map((i) => `stat${j}_${i}.x`).join(", ")});
let delta${j} = vec4<f32>(${[0, 1, 2, 3].map((i) => `stat${j}_${i}.y`).join(", ")});`
      : `let logSum${j} = vec4<f32>(stat.x);\nlet delta${j} = vec4<f32>(stat.y);`;
  const storeEight = (memory: MatrixMemory, q: number, value: string) =>
    unit.writeQuad(
      unit.part(memory, `(softRow / 16u * ${columnFragments}u + (${own(2 * q)}) / 4u)`),
      `softRow % 16u * 2u + (${own(2 * q)}) / 2u % 2u`,
      value,
    );
  const ofRow = (memory: MatrixMemory) => unit.part(memory, "(softRow / 16u)");
  const elementwise = `${
    unroll(ownQuads, (j) =>
      `var x${j} = scoreOf(${unit.readQuad(ofRow(scores), `softRow % 16u * ${scoreStride}u + ${own(j)}`)});
var y${j} = ${unit.readQuad(ofRow(gradients), `softRow % 16u * ${scoreStride}u + ${own(j)}`)} * ranges.x;${
        slope ? `\nlet slope${j} = capSlope(x${j});` : ""
      }`)
  }
if (masking) {
${indent(masked, 2)}
}
${
    unroll(ownQuads, (j) =>
      `${statsOf(j)}
let p${j} = select(exp2(x${j} - logSum${j}), vec4<f32>(), x${j} <= vec4<f32>(UNSEEN));${
        !terms.dropout ? `\nlet kept${j} = p${j};` : `
let isKept${j} = vec4<bool>(${
          [0, 1, 2, 3].map((i) =>
            `keptFactor(dropped, ${
              positions("block.rowStart + softRow", `columnBase + 4u * (${own(j)}) + ${i}u`)
            }) > 0.0`
          ).join(", ")
        });
let kept${j} = select(vec4<f32>(), p${j}, isKept${j});
y${j} = select(vec4<f32>(), y${j} * params.keptFactor, isKept${j});`
      }
y${j} = saturated(select(p${j} * (y${j} - delta${j})${
        slope ? ` * slope${j}` : ""
      } * ranges.y, vec4<f32>(), p${j} == vec4<f32>()));`)
  }
${
    unroll(ownQuads / 2, (q) =>
      `{
${
        ownsKeys
          ? `  let packedProbs = packHalves(${probFactor}.0 * kept${2 * q}, ${probFactor}.0 * kept${2 * q + 1});
${indent(storeEight(probs, q, "packedProbs"), 2)}
`
          : ""
      }  let packed = packHalves(y${2 * q}, y${2 * q + 1});
${indent(storeEight(slopes, q, "packed"), 2)}
}`)
  }`;

  const sharers = sharing / rowFragments;
  const ownPart = unit.part(scores, `(subgroup / ${sharers}u)`);
  /** Writes the sums of one kind of subgroup through its own memory. */
  const write = (first: string, count: number, all: number, isValue: boolean) =>
    unit.over(
      "r",
      rowFragments,
      (r) =>
        unit.over("c", count, (c) =>
          `${unit.storeResult(ownPart, "own", ownStride, sums.at(r, c))}
workgroupBarrier();
${
            unroll(2, (i) =>
              `{
  let ownRow = (lane + ${i * subgroupSize}u) / 4u;
  let ownQuad = (lane + ${i * subgroupSize}u) % 4u;
  let row = block.rowStart + ${rowFragment(r)} * 16u + ownRow;
  let fragment = ${first} + share * ${count}u + ${c};
  if (row < block.rowEnd && fragment < ${all}u && ${isValue ? "isScore" : "isWide"}) {
    put${isValue ? "Value" : "Key"}(row, firstHead, fragment * 16u + 4u * ownQuad, ${
                unit.readQuad(ownPart, `own + ownRow * ${ownStride}u + ownQuad`)
              });
  }
}`)
          }
workgroupBarrier();`),
    );
  // Every subgroup takes part in every barrier, whichever sums it has.
  const writeAll = ownsKeys
    ? `{
  let isWide = false;
${indent(write("0u", scoreSums, narrowFragments, true), 2)}
}
{
  let isWide = !isScore;
${indent(write("0u", gradSums, wideFragments, false), 2)}
}`
    : `${
      scoreSums === 0 ? "" : `{
  let isWide = isScore;
${indent(write("0u", scoreSums, wideFragments, false), 2)}
}
`
    }{
  let isWide = !isScore;
${indent(write(firstGradSum, gradSums, wideFragments, false), 2)}
}`;

  const masking = masks ? "true" : "columnBase < block.sharedStart || columnBase + COLUMNS > block.sharedEnd";

  return `${unit.directives}${
    unit.native || !storesHalves(terms) ? "" : "enable f16;\n"
  }// Gradient of MLA attention on matrix units: ${ownsKeys ? "∂K, ∂V and ∂rope" : "∂query"}.
// ${rows} rows, ${columns} columns, ${subgroups} subgroups
const COLUMNS = ${columns}u;
const NOPE_QUADS = ${paddedWidth(shape.qkNopeHeadDim) / 8}u;
const ROPE_QUADS = ${paddedWidth(shape.qkRopeHeadDim) / 8}u;
const DEPTH_QUADS = ${wideStride - 1}u;
const VALUE_QUADS = ${narrowStride - 1}u;
const HEADER_QUADS = ${headerQuads}u;
${scoreConstants}

${declarations(tile, shape)}

${unit.declarations([wide, narrow, scores, gradients, ...(ownsKeys ? [probs] : []), slopes])}
${ownsKeys ? `var<workgroup> columnStats: array<vec2<f32>, ${columns}>;` : ""}

${scoreFunctions(terms)}

${halfRange}

${loaders(shape)}

${storers(target, shape)}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
${unit.prologue}
  let block = blocks[params.firstBlock + workgroup.y];
  let firstHead = params.firstHead + workgroup.x * params.headCount;
  let rowGroup = subgroup / ${sharing}u;
  let isScore = subgroup % ${sharing}u < 2u; // makes S; the others make ∂P
  let share = subgroup % 2u;
  let softRow = t / ${rowThreads}u;
  let softPart = t % ${rowThreads}u;
  let columnEnd = block.columnEnd;
  let origin = block.item * params.keyLength; // first key row of the batch item
  let position = params.firstRow - block.item * params.queryLength; // of query row 0 in the batch item, modulo 2^32
  let blockCount = (columnEnd - block.columnStart + COLUMNS - 1u) / COLUMNS;
  let count = blockCount * params.headCount;
  let ranges = bitcast<vec4<f32>>(staged[0]); // ∂out's inverse factor, ∂s's factor, its inverse
${indent([factors, products, sums].map(({ declaration }) => declaration).join("\n"), 2)}
${unroll(registersOf(widePieces), (i) => `  var wide${i} = vec4<u32>();`)}
${unroll(registersOf(narrowPieces), (i) => `  var narrow${i} = vec4<u32>();`)}
${ownsKeys ? "  var stat = vec2<f32>();" : "  let stat = rowStats(block.rowStart + softRow, block.rowEnd, firstHead);"}

${indent(loadRows, 2)}
  workgroupBarrier();

${indent(load("block.columnStart", "firstHead"), 2)}
  for (var step = 0u; step < count; step += 1u) {
    let head = firstHead + step / blockCount;
    let columnBase = block.columnStart + step % blockCount * COLUMNS;
    let masking = ${masking};
${terms.dropout ? "    let dropped = dropoutKey(block.item, head);\n" : ""}    if (masking) {
${unroll(registersOf(widePieces), (i) => `      wide${i} = finiteHalves(wide${i});`)}
${unroll(registersOf(narrowPieces), (i) => `      narrow${i} = finiteHalves(narrow${i});`)}
    }
${indent(store, 4)}
    workgroupBarrier();
    {
      let next = min(step + 1u, count - 1u);
      let nextBase = block.columnStart + next % blockCount * COLUMNS;
${indent(load("nextBase", "(firstHead + next / blockCount)"), 6)}
    }
    if (isScore) {
${indent(multiply(wide, wideStride, wideFragments, scores), 6)}
    } else {
${indent(multiply(narrow, narrowStride, narrowFragments, gradients), 6)}
    }
    workgroupBarrier();
${indent(elementwise, 4)}
    workgroupBarrier();
    if (isScore) {
${indent(sumScores, 6)}
    } else {
${indent(sumGrads, 6)}
    }
    workgroupBarrier();
  }

  let own = subgroup % ${sharers}u * ${fragmentSize * ownStride}u;
  let keyFactor = params.softmaxScale * ranges.z;
${ownsKeys ? `  let valueFactor = ranges.x * ${1 / probFactor}${terms.dropout ? " * params.keptFactor" : ""};` : ""}
${indent(writeAll.replaceAll("putKey(", "putKey(keyFactor, ").replaceAll("putValue(", "putValue(valueFactor, "), 2)}
}
`;
}

function declarations({ pinned }: MatrixGradTile, { terms, gradient }: MatrixGradShape): string {
  const access = pinned ? "read_write" : "read";
  const bindings = matrixGradBindings;
  return `${attendBackwardParams}
${blockStruct}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(${bindings.blocks}) var<storage, read> blocks: array<Block>;
@group(0) @binding(${bindings.staged}) var<storage, ${access}> staged: array<vec4<u32>>; // header, queries, ∂out
@group(0) @binding(${bindings.stats}) var<storage, read> stats: array<vec2<f32>>; // log2-sum-exp and D, [heads, rows]
@group(0) @binding(${bindings.expanded}) var<storage, ${access}> expanded: array<vec4<u32>>; // keys, values, rotary keys
@group(0) @binding(${bindings.gradient}) var<storage, read_write> gradient: array<${gradient}>;
${termBinding(terms, bindings.term)}`;
}

/**
 * WGSL functions that load eight neighbours of a row as halves. Past the last row stands the last one again: its pairs are
 * masked, or its sums dropped. Loads stand outside of branches: those inside of one each wait for memory by itself. Heads
 * are query heads throughout.
 */
function loaders({ qkRopeHeadDim }: MatrixGradShape): string {
  return `fn within(row: u32, end: u32) -> u32 { return min(row, max(end, 1u) - 1u); }

fn loadQuery(row: u32, end: u32, head: u32, quad: u32) -> vec4<u32> {
  return staged[HEADER_QUADS + (within(row, end) * params.queryHeads + head) * DEPTH_QUADS + quad];
}

fn loadGrad(row: u32, end: u32, head: u32, quad: u32) -> vec4<u32> {
  let grads = HEADER_QUADS + params.rangeRows * params.queryHeads * DEPTH_QUADS;
  return staged[grads + (within(row, end) * params.queryHeads + head) * VALUE_QUADS + quad];
}

fn loadKey(row: u32, end: u32, head: u32, quad: u32) -> vec4<u32> {
  let key = within(row, end);
  let nope = (key * params.groupKvHeads + head / params.groupSize - params.firstKvHead) * NOPE_QUADS + quad;
${
    qkRopeHeadDim === 0
      ? "  return expanded[nope];"
      : `  return expanded[select(params.ropeBase / 8u + key * ROPE_QUADS + quad - NOPE_QUADS, nope, quad < NOPE_QUADS)];`
  }
}

fn loadValue(row: u32, end: u32, head: u32, quad: u32) -> vec4<u32> {
  let kvHead = head / params.groupSize - params.firstKvHead;
  let at = (within(row, end) * params.groupKvHeads + kvHead) * VALUE_QUADS + quad;
  return expanded[params.valuesBase / 8u + at];
}

fn rowStats(row: u32, end: u32, head: u32) -> vec2<f32> { return stats[head * params.rangeRows + within(row, end)]; }`;
}

/** WGSL functions that store four neighbours of a row of a gradient; columns count padded widths. */
function storers(target: MatrixGradTarget, { gradient }: MatrixGradShape): string {
  const put = gradient === "vec4<f32>"
    ? `  if (column >= width) { return; }
  let at = (offset + column) / 4u;
  var sum = value;
  if (params.accumulate != 0u) { sum += gradient[at]; }
  gradient[at] = sum;`
    : `  for (var i = 0u; i < 4u; i += 1u) {
    if (column + i >= width) { return; }
    let at = offset + column + i;
    var sum = value[i];
    if (params.accumulate != 0u) { sum += gradient[at]; }
    gradient[at] = sum;
  }`;
  const [nope, rope] = target === "query"
    ? [
      "params.gradientBase + row * params.gradientRow + head * params.gradientHead",
      "params.gradientBase + row * params.gradientRow + head * params.gradientHead + params.P",
    ]
    : ["ofKv(row, head) * params.P", "params.gradientRope + ofKv(row, head) * params.R"];
  return `fn put(offset: u32, column: u32, width: u32, value: vec4<f32>) {
${put}
}

fn ofKv(row: u32, head: u32) -> u32 { return row * params.groupKvHeads + head / params.groupSize - params.firstKvHead; }

fn putKey(factor: f32, row: u32, head: u32, column: u32, value: vec4<f32>) {
  if (column < 8u * NOPE_QUADS) {
    put(${nope}, column, params.P, factor * value);
  } else {
    put(${rope}, column - 8u * NOPE_QUADS, params.R, factor * value);
  }
}
${
    target === "query" ? "" : `
fn putValue(factor: f32, row: u32, head: u32, column: u32, value: vec4<f32>) {
  put(params.gradientValues + ofKv(row, head) * params.V, column, params.V, factor * value);
}`
  }`;
}
