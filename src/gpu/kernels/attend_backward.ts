// Gradients of attention over expanded keys and values: ∂query, or ∂K and ∂V, or ∂bias, by recomputation.
//
//   S = Q·Kᵀ    p = exp2(S − lse)    ∂P = ∂out·Vᵀ    ∂s = p ∘ (∂P − D)
//   ∂query = scale · ∂s·K            ∂K = scale · ∂sᵀ·Q      ∂V = pᵀ·∂out
//
//   one workgroup owns rows: queries of one head for ∂query and ∂bias, keys of one KV head for ∂K and ∂V, for which it goes
//   through the query heads of the KV head; the other side's rows stream by as columns, `columns` at a time. Nothing is
//   shared between workgroups, so nothing is added atomically: two runs give the same bits.
//   invocation (ty, tx) of TY × TX owns rows/TY × columns/TX scores, and sums of as many rows, in registers:
//     row quads  rq·TY + ty        columns and column quads  c·TX + tx
//   scores:  S and then ∂P in slices of `depth` head columns
//   sums:    += p·∂out and += ∂s·K or ∂s·Q, in slices of `depth` columns; p and ∂s pass through workgroup memory
//            probColumns·TX columns at a time
//
// Workgroup memory in vec4 (16 bytes):
//   left   stages · depth · (rows/4 + 1)                        slices of the rows' operand
//   right  stages · depth · (max(columns, head width)/4 + 1)    slices of the columns' operand
//   probs  probColumns · TX · (rows/4 + 1)
// 64 × 128 with 128/64/128 heads, 2 stages of 8, 64 columns of probabilities: 34 KB; 32 × 32, 1 stage of 4: 4 KB.
//
// Masking is by selection: a pair that is not seen has p = 0, and ∂s = 0 whatever ∂P is. What such a pair's column holds
// may be NaN, which would reach the sums through 0 · NaN: blocks that mask anything watch the staged columns, as the
// forward kernel does, and fall back to a selecting product.
//
// Dropped probabilities are kept as negative numbers: their sign says that p · dropout is 0 while ∂s needs p.

import type { FlashMLAConfig } from "../../op/config.ts";
import type { GpuLimits } from "../capabilities.ts";
import {
  type AttendBackwardShape,
  declarations,
  type GradTarget,
  loaders,
  storers,
  whatItStores,
} from "./attend_backward_operands.ts";
import {
  indent,
  outerByColumns,
  outerByRows,
  overDepth,
  slicedLoop,
  stagedStride,
  type Staging,
  storeTransposed,
  unroll,
} from "./register_tile.ts";
import { scoreConstants, scoreFunctions } from "./score_terms.ts";
import { storageDirectives } from "./storage_element.ts";

/** The tile of one backward attention kernel. */
export interface GradTile {
  /** Rows that one workgroup owns. */
  readonly rows: number;
  /** Columns that pass at a time. */
  readonly columns: number;
  /** Invocations down the rows. */
  readonly threadRows: number;
  /** Invocations along the columns. */
  readonly threadColumns: number;
  /** Head columns, or columns, staged per step. */
  readonly depth: number;
  /** Staging buffers: 1 or 2. */
  readonly numStages: number;
  /** Columns per invocation whose probabilities pass through workgroup memory at a time. */
  readonly probColumns: number;
  /** Whether the steps of a staged slice are copied out or looped over. */
  readonly unrollDepth: boolean;
}

/** Widths of a head's rows. */
type HeadWidths = Pick<AttendBackwardShape, "qkNopeHeadDim" | "qkRopeHeadDim" | "vHeadDim">;

type Layout = readonly [rows: number, columns: number, threadRows: number, threadColumns: number, depth: number];

/** The tiles by `gradBlock`, the columns that pass at a time. */
const layouts: Readonly<Record<number, Layout>> = {
  32: [32, 32, 8, 8, 4],
  64: [64, 64, 16, 16, 8],
  128: [64, 128, 16, 16, 8],
  // For heads whose sums do not fit the registers of the others: 64 invocations share a row.
  256: [16, 256, 4, 64, 4],
};

/** ∂query keeps sums of one operand only, so that there is room for twice the rows. */
const queryLayouts: Readonly<Record<number, Layout>> = { ...layouts, 128: [128, 64, 16, 16, 8] };

/** What is staged, best first: the first that fits the device's workgroup memory is taken. */
const stagings: readonly (readonly [numStages: number, probColumns: number])[] = [[2, 4], [2, 2], [1, 2], [1, 1]];

/** The same for the tiles that have to compile fast: one stage, and all columns of an invocation at once where they fit. */
const smallStagings: typeof stagings = [[1, 4], [1, 1]];

/** Registers that an invocation may keep scores and sums in. */
const mostRegisters = 224;

/** The tile that goes with a configuration, or null for a `gradBlock` that there is none for. */
export function gradTile(
  target: GradTarget,
  { gradBlock, unrollDepth }: Pick<FlashMLAConfig, "gradBlock" | "unrollDepth">,
  widths: HeadWidths,
  limits: GpuLimits,
): GradTile | null {
  const layout = (target === "query" ? queryLayouts : layouts)[gradBlock];
  if (layout === undefined) return null;
  const [rows, columns, threadRows, threadColumns, depth] = layout;
  const small = depth === 4;
  const tiles = (small ? smallStagings : stagings).map(([numStages, probColumns]): GradTile => ({
    ...{ rows, columns, threadRows, threadColumns, depth, numStages, probColumns, unrollDepth },
  }));
  return tiles.find((tile) => workgroupBytes(target, tile, widths) <= limits.maxComputeWorkgroupStorageSize) ??
    tiles[tiles.length - 1];
}

interface ThreadMap {
  readonly workgroupSize: number;
  readonly rowQuads: number;
  /** Columns of an invocation. */
  readonly ownColumns: number;
  /** Quads of keys or queries, and of values or output gradients, that an invocation sums; 0 where the target has none. */
  readonly keyQuads: number;
  readonly valueQuads: number;
}

function threadMap(target: GradTarget, tile: GradTile, widths: HeadWidths): ThreadMap {
  const { rows, columns, threadRows, threadColumns } = tile;
  const { qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = widths;
  return {
    workgroupSize: threadRows * threadColumns,
    rowQuads: rows / threadRows / 4,
    ownColumns: columns / threadColumns,
    keyQuads: target === "bias" ? 0 : Math.ceil((Math.ceil(P / 4) + Math.ceil(R / 4)) / threadColumns),
    valueQuads: target === "keys" ? Math.ceil(Math.ceil(V / 4) / threadColumns) : 0,
  };
}

function rightWidth(target: GradTarget, tile: GradTile, widths: HeadWidths): number {
  const { keyQuads, valueQuads } = threadMap(target, tile, widths);
  return Math.max(tile.columns, 4 * tile.threadColumns * Math.max(keyQuads, valueQuads));
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(target: GradTarget, tile: GradTile, widths: HeadWidths): number {
  const { rows, numStages, depth, probColumns, threadColumns } = tile;
  const staged = numStages * depth * (stagedStride(rows) + stagedStride(rightWidth(target, tile, widths)));
  const probs = target === "bias" ? 0 : probColumns * threadColumns * stagedStride(rows);
  return 16 * (staged + probs + 1);
}

/** Why this configuration cannot run, or null when it can. */
export function whyInvalid(
  target: GradTarget,
  config: Pick<FlashMLAConfig, "gradBlock" | "unrollDepth">,
  widths: HeadWidths,
  limits: GpuLimits,
): string | null {
  const { gradBlock } = config;
  const tile = gradTile(target, config, widths, limits);
  if (tile === null) return `gradBlock must be 32, 64, 128 or 256, got ${gradBlock}`;
  const { workgroupSize, rowQuads, ownColumns, keyQuads, valueQuads } = threadMap(target, tile, widths);
  const registers = 4 * rowQuads * (2 * ownColumns + 4 * (keyQuads + valueQuads));
  if (registers > mostRegisters) {
    return `gradBlock ${gradBlock} needs ${registers} sums and scores per invocation, at most ${mostRegisters} are kept in registers`;
  }
  if (workgroupSize > limits.maxComputeInvocationsPerWorkgroup) {
    return `gradBlock ${gradBlock} needs ${workgroupSize} invocations, maxComputeInvocationsPerWorkgroup is ${limits.maxComputeInvocationsPerWorkgroup}`;
  }
  const bytes = workgroupBytes(target, tile, widths);
  if (bytes > limits.maxComputeWorkgroupStorageSize) {
    return `gradBlock ${gradBlock} needs ${bytes} bytes of workgroup memory, maxComputeWorkgroupStorageSize is ${limits.maxComputeWorkgroupStorageSize}`;
  }
  return null;
}

/** The kernel's source. */
export function wgsl(target: GradTarget, tile: GradTile, shape: AttendBackwardShape): string {
  const { rows, columns, threadRows, threadColumns, depth, numStages, probColumns, unrollDepth } = tile;
  const { terms } = shape;
  const { workgroupSize, rowQuads, ownColumns, keyQuads, valueQuads } = threadMap(target, tile, shape);
  const ownsKeys = target === "keys";
  const depthPieces = depth / 4;
  const leftStride = stagedStride(rows);
  const rightStride = stagedStride(rightWidth(target, tile, shape));
  const probSlices = (probColumns * threadColumns) / depth;
  const groups = ownColumns / probColumns;
  const slopes = terms.softCap && target !== "bias";

  const rowQuad = (r: number) => `ty + ${r * threadRows}u`;
  const columnQuad = (c: number) => `tx + ${c * threadColumns}u`;
  const names = (prefix: string, count: number) => Array.from({ length: count }, (_, i) => `${prefix}${i}`);
  const everyScore = (prefix: string, emit: (name: string, column: number, quad: number) => string) =>
    unroll(ownColumns, (j) => unroll(rowQuads, (r) => emit(`${prefix}${j}_${r}`, j, r)));
  const everySum = (prefix: string, quads: number, emit: (name: string, row: number, quad: number) => string) =>
    unroll(rowQuads * 4, (i) => unroll(quads, (c) => emit(`${prefix}${i}_${c}`, i, c)));
  /** The column, relative to the block, of score register j. */
  const columnOf = (j: number) => `4u * (${columnQuad(Math.floor(j / 4))}) + ${j % 4}u`;
  /** The positions of a query and a key within their batch item, from a row and a column. */
  const positions = (row: string, column: string) =>
    ownsKeys ? `position + ${column}, ${row} - origin` : `position + ${row}, ${column} - origin`;

  // Operands of the two score products: rows on the left, columns on the right.
  const query = (row: string, end: string, quad: string) => `loadQuery(${row}, ${end}, block.rangeItem, head, ${quad})`;
  const grad = (row: string, end: string, quad: string) => `loadGrad(${row}, ${end}, block.rangeItem, head, ${quad})`;
  const key = (row: string, end: string, quad: string) => `loadKey(${row}, ${end}, kvHead, ${quad})`;
  const value = (row: string, end: string, quad: string) => `loadValue(${row}, ${end}, kvHead, ${quad})`;
  const [rowScore, columnScore] = ownsKeys ? [key, query] : [query, key];
  const [rowGrad, columnGrad] = ownsKeys ? [value, grad] : [grad, value];
  const leftOf = (load: typeof query): Staging => ({
    name: "row",
    pieces: rows * depthPieces,
    load: (piece, slice) =>
      load(
        `block.rowStart + ${piece} / DEPTH_PIECES`,
        "block.rowEnd",
        `(${slice}) * DEPTH_PIECES + ${piece} % DEPTH_PIECES`,
      ),
    store: (piece, register, stage) => `stageRow(${piece}, ${stage}, ${register});`,
  });
  const rightOf = (load: typeof query): Staging => ({
    name: "column",
    pieces: columns * depthPieces,
    load: (piece, slice) =>
      load(
        `columnBase + ${piece} / DEPTH_PIECES`,
        "columnEnd",
        `(${slice}) * DEPTH_PIECES + ${piece} % DEPTH_PIECES`,
      ),
    store: (piece, register, stage) => `stageColumn(${piece}, ${stage}, ${register});`,
  });
  const summedOf = (load: typeof query, quads: number): Staging => ({
    name: "column",
    pieces: depth * quads * threadColumns,
    load: (piece, slice) =>
      load(
        `columnBase + sliceColumn(group, (${slice}) * DEPTH + ${piece} / ${quads * threadColumns}u)`,
        "columnEnd",
        `${piece} % ${quads * threadColumns}u`,
      ),
    store: (piece, register, stage) =>
      `stageSummed(${piece} / ${quads * threadColumns}u, ${piece} % ${quads * threadColumns}u, ${stage}, ${register});`,
  });

  const scores = (prefix: string, slices: string, left: Staging, right: Staging) =>
    slicedLoop({
      slices,
      workgroupSize,
      numStages,
      operands: [left, right],
      compute: (stage) =>
        overDepth(
          depth,
          unrollDepth,
          (d) =>
            `${unroll(rowQuads, (r) => `let a${r} = left[${stage}][${d}][${rowQuad(r)}];`)}
${unroll(ownColumns / 4, (c) => `let b${c} = right[${stage}][${d}][${columnQuad(c)}];`)}
${outerByRows(prefix, names("a", rowQuads), names("b", ownColumns / 4))}`,
        ),
    });

  /** Adds to sums: what `published` says of the scores times the columns' rows. */
  const summed = (prefix: string, quads: number, load: typeof query, published: (j: number, r: number) => string) => {
    const step = (stage: string, d: string) =>
      `${unroll(rowQuads, (r) => `let a${r} = probs[slice][${d}][${rowQuad(r)}];`)}
${unroll(quads, (c) => `let b${c} = right[${stage}][${d}][${columnQuad(c)}];`)}`;
    const publish = (g: number) =>
      unroll(
        probColumns,
        (j) =>
          unroll(rowQuads, (r) =>
            `probs[(tx + ${j * threadColumns}u) / DEPTH][(tx + ${j * threadColumns}u) % DEPTH][${rowQuad(r)}] = ${
              published(g * probColumns + j, r)
            };`),
      );
    const prologue = groups === 1 ? publish(0) : `switch group {
${unroll(groups, (g) => `  case ${g}u: {\n${indent(publish(g), 4)}\n  }`)}
  default: {}
}`;
    return `for (var group = 0u; group < ${groups}u; group += 1u) {
${
      indent(
        slicedLoop({
          slices: "PROB_SLICES",
          workgroupSize,
          numStages,
          operands: [summedOf(load, quads)],
          prologue,
          compute: (stage) =>
            `if (masking && atomicLoad(&poisoned[0]) != 0u) {
${
              indent(
                overDepth(depth, false, (d) =>
                  `${step(stage, d)}
${
                    everySum(prefix, quads, (o, i, c) => {
                      const p = `a${Math.floor(i / 4)}[${i % 4}]`;
                      return `${o} = select(fma(vec4<f32>(${p}), b${c}, ${o}), ${o}, ${p} == 0.0);`;
                    })
                  }`),
                2,
              )
            }
} else {
${
              indent(
                overDepth(depth, unrollDepth, (d) =>
                  `${step(stage, d)}
${outerByColumns(prefix, names("a", rowQuads), names("b", quads))}`),
                2,
              )
            }
}`,
        }),
        2,
      )
    }
}`;
  };

  const masked = everyScore("s", (s, j, r) => {
    const seen = `(column${j} < end${r}) & (column${j} >= start${r})`;
    if (terms.scoreTerm === "none") return `${s} = select(vec4<f32>(MASKED), ${s}, ${seen});`;
    return `{
  let seen = ${seen};
${
      unroll(
        4,
        (i) =>
          `  if (seen[${i}] && row${r}[${i}] < i32(block.rowEnd)) { ${s}[${i}] = withTerm(${s}[${i}], block.item, head, ${
            positions(`u32(row${r}[${i}])`, `u32(column${j}[${i}])`)
          }); } else { ${s}[${i}] = MASKED; }`,
      )
    }
}`;
  });

  /** Statistics of the queries of score register (j, r): vectors over rows, or one number for the column. */
  const statsOf = (part: "x" | "y", body: (name: (j: number, r: number) => string) => string) => {
    if (!ownsKeys) return body((_j, r) => `${part === "x" ? "logSum" : "delta"}${r}`);
    const column = (j: number) => `let stat${j} = rowStats(columnBase + ${columnOf(j)}, columnEnd, head).${part};`;
    return `{\n${indent(unroll(ownColumns, column), 2)}\n${indent(body((j) => `vec4<f32>(stat${j})`), 2)}\n}`;
  };
  const probabilities = statsOf(
    "x",
    (logSum) =>
      everyScore(
        "s",
        (s, j, r) => `${s} = select(exp2(${s} - ${logSum(j, r)}), vec4<f32>(), ${s} <= vec4<f32>(UNSEEN));`,
      ),
  );
  const dropped = everyScore(
    "s",
    (s, j, r) =>
      `${s} *= vec4<f32>(${
        [0, 1, 2, 3].map((i) =>
          `keptSign(dropKey, ${
            positions(`block.rowStart + 4u * (${rowQuad(r)}) + ${i}u`, `columnBase + ${columnOf(j)}`)
          })`
        ).join(", ")
      });`,
  );
  const weight = (j: number, r: number) =>
    terms.dropout ? `select(s${j}_${r} * params.keptFactor, vec4<f32>(), s${j}_${r} < vec4<f32>())` : `s${j}_${r}`;
  const gradScores = statsOf("y", (delta) =>
    everyScore("g", (g, j, r) => {
      const s = `s${j}_${r}`;
      const gradP = terms.dropout ? `select(${g} * params.keptFactor, vec4<f32>(), ${s} < vec4<f32>())` : g;
      const p = terms.dropout ? `abs(${s})` : s;
      const slope = slopes ? ` * slope${j}_${r}` : "";
      return `${g} = select(${p} * (${gradP} - ${delta(j, r)})${slope}, vec4<f32>(), ${s} == vec4<f32>());`;
    }));

  const block = `    // Scores.
${indent(everyScore("s", (s) => `var ${s} = vec4<f32>();`), 4)}
${indent(scores("s", "keySlices", leftOf(rowScore), rightOf(columnScore)), 4)}
${indent(everyScore("s", (s) => `${s} = scoreOf(${s});`), 4)}
${slopes ? indent(everyScore("s", (s, j, r) => `let slope${j}_${r} = capSlope(${s});`), 4) : ""}
    if (masking) {
${
    unroll(rowQuads, (r) =>
      `      let row${r} = vec4<i32>(i32(block.rowStart + 4u * (${rowQuad(r)}))) + vec4<i32>(0, 1, 2, 3);
      let start${r} = row${r} + block.diagonalStart;
      let end${r} = min(row${r} + block.diagonalEnd, vec4<i32>(i32(columnEnd)));`)
  }
${indent(unroll(ownColumns, (j) => `let column${j} = vec4<i32>(i32(columnBase + ${columnOf(j)}));`), 6)}
${indent(masked, 6)}
    }
${indent(probabilities, 4)}
${terms.dropout ? indent(dropped, 4) : ""}
${ownsKeys ? `    // ∂V += p·∂out.\n${indent(summed("v", valueQuads, columnGrad, weight), 4)}` : ""}

    // Gradients of the scores.
${indent(everyScore("g", (g) => `var ${g} = vec4<f32>();`), 4)}
${indent(scores("g", "valueSlices", leftOf(rowGrad), rightOf(columnGrad)), 4)}
${indent(gradScores, 4)}
${
    target === "bias"
      ? indent(everyScore("b", (b, j, r) => `${b} += g${j}_${r};`), 4)
      : indent(summed("k", keyQuads, columnScore, (j, r) => `g${j}_${r}`), 4)
  }`;

  const head = `    let kvHead = head / params.groupSize - params.firstKvHead;
${terms.dropout ? "    let dropKey = dropoutKey(block.item, head);\n" : ""}${
    ownsKeys ? "" : unroll(rowQuads, (r) =>
      `    var logSum${r}: vec4<f32>;
    var delta${r}: vec4<f32>;
${
        unroll(4, (i) =>
          `    {
      let stat = rowStats(block.rowStart + 4u * (${rowQuad(r)}) + ${i}u, block.rowEnd, head);
      logSum${r}[${i}] = stat.x;
      delta${r}[${i}] = stat.y;
    }`)
      }`)
  }`;

  const masking = terms.scoreTerm === "none"
    ? "columnBase < block.sharedStart || columnBase + COLUMNS > block.sharedEnd"
    : "true";
  const columnLoop = target === "bias"
    ? `  {\n    let masking = ${masking};\n${block}\n  }`
    : `  for (var columnBase = block.columnStart; columnBase < columnEnd; columnBase += COLUMNS) {
    let masking = ${masking};
${block}
  }`;

  return `${storageDirectives(whatItStores(shape))}// Gradient of MLA attention over expanded keys and values: ${
    { query: "∂query", keys: "∂K and ∂V", bias: "∂bias" }[target]
  }.
// ${rows} rows, ${columns} columns, ${threadRows} × ${threadColumns} invocations, depth ${depth}, ${numStages} stage(s)
const ROWS = ${rows}u;
const COLUMNS = ${columns}u;
const DEPTH = ${depth}u;
const DEPTH_PIECES = ${depthPieces}u;
const TX = ${threadColumns}u;
const PROB_SLICES = ${probSlices}u;
${scoreConstants}

${declarations(target, shape)}

var<workgroup> left: array<array<array<vec4<f32>, ${leftStride}>, ${depth}>, ${numStages}>;
var<workgroup> right: array<array<array<vec4<f32>, ${rightStride}>, ${depth}>, ${numStages}>;
${
    target === "bias"
      ? ""
      : `var<workgroup> probs: array<array<array<vec4<f32>, ${leftStride}>, ${depth}>, ${probSlices}>;
var<workgroup> poisoned: array<atomic<u32>, 4>; // [0] is set once a staged column held NaN or infinity`
  }

${scoreFunctions(terms)}
${
    terms.dropout
      ? `
fn keptSign(dropKey: vec2<u32>, position: u32, keyPosition: u32) -> f32 {
  return select(1.0, -1.0, keptFactor(dropKey, position, keyPosition) == 0.0);
}
`
      : ""
  }
${loaders(shape)}

${storers(target, shape)}

fn stageRow(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
${indent(storeTransposed("left", "stage", "depth", "row", "value"), 2)}
}

fn stageColumn(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
${indent(storeTransposed("right", "stage", "depth", "row", "value"), 2)}
}
${
    target === "bias" ? "" : `
fn stageSummed(row: u32, quad: u32, stage: u32, value: vec4<f32>) {
  let exponent = bitcast<vec4<u32>>(value) & vec4<u32>(0x7f800000u);
  if (any(exponent == vec4<u32>(0x7f800000u))) { atomicStore(&poisoned[0], 1u); }
  right[stage][row][quad] = value;
}

// Column, relative to the block, of entry entry of probability slice group. Neighbouring invocations have neighbouring
// entries, which lie in different banks of workgroup memory.
fn sliceColumn(group: u32, entry: u32) -> u32 {
  let own = group * ${probColumns}u + entry / TX;
  return (own / 4u) * 4u * TX + (entry % TX) * 4u + own % 4u;
}
`
  }
@compute @workgroup_size(${workgroupSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let block = blocks[params.firstBlock + workgroup.y];
  let tx = t % TX;
  let ty = t / TX;
${
    target === "bias"
      ? ""
      : "  if (t == 0u) { atomicStore(&poisoned[0], 0u); } // many barriers before its first use\n"
  }${
    target === "bias"
      ? `  let firstHead = params.firstHead + workgroup.x / params.columnTiles * params.headCount;
  let columnBase = block.columnStart + workgroup.x % params.columnTiles * COLUMNS;
  if (columnBase >= block.columnEnd) { return; }`
      : "  let firstHead = params.firstHead + workgroup.x * params.headCount;"
  }
  let columnEnd = block.columnEnd;
  let origin = block.item * params.keyLength; // first key row of the batch item
  let position = params.firstRow - block.item * params.queryLength; // of query row 0 in the batch item, modulo 2^32
  let keySlices = (keyQuads() + DEPTH_PIECES - 1u) / DEPTH_PIECES;
  let valueSlices = ((params.V + 3u) / 4u + DEPTH_PIECES - 1u) / DEPTH_PIECES;
${
    target === "bias"
      ? indent(everyScore("b", (b) => `var ${b} = vec4<f32>();`), 2)
      : `${indent(everySum("k", keyQuads, (k) => `var ${k} = vec4<f32>();`), 2)}
${ownsKeys ? indent(everySum("v", valueQuads, (v) => `var ${v} = vec4<f32>();`), 2) : ""}`
  }

  for (var head = firstHead; head < firstHead + params.headCount; head += 1u) {
${head}
${columnLoop}
  }

${
    target === "bias"
      ? `  let at = params.gradientBase + block.item * params.gradientItem + firstHead * params.gradientHead;
${
        unroll(rowQuads * 4, (i) =>
          `  {
    let row = block.rowStart + 4u * (${rowQuad(Math.floor(i / 4))}) + ${i % 4}u;
    if (row < block.rowEnd) {
      let rowAt = at + (position + row) * params.gradientRow - origin;
${
            unroll(ownColumns, (j) =>
              `      { let column = columnBase + ${
                columnOf(j)
              }; if (column < columnEnd) { gradient[rowAt + column] += b${j}_${Math.floor(i / 4)}[${i % 4}]; } }`)
          }
    }
  }`)
      }`
      : unroll(rowQuads * 4, (i) =>
        `  {
    let row = block.rowStart + 4u * (${rowQuad(Math.floor(i / 4))}) + ${i % 4}u;
    if (row < block.rowEnd) {
${
          ownsKeys
            ? `      let at = row * params.groupKvHeads + firstHead / params.groupSize - params.firstKvHead;
${
              unroll(keyQuads, (c) =>
                `      putKey(at * params.P, params.gradientRope + at * params.R, ${
                  columnQuad(c)
                }, params.softmaxScale * k${i}_${c});`)
            }
${
              unroll(
                valueQuads,
                (c) =>
                  `      put(params.gradientValues + at * params.V, 4u * (${columnQuad(c)}), params.V, v${i}_${c});`,
              )
            }`
            : `      let at = params.gradientBase + row * params.gradientRow + firstHead * params.gradientHead;
${unroll(keyQuads, (c) => `      putKey(at, ${columnQuad(c)}, params.softmaxScale * k${i}_${c});`)}`
        }
    }
  }`)
  }
}
`;
}
