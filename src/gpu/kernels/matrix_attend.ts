// Attention over expanded keys and values on matrix units: f16 products, f32 sums and softmax.
//
//   one workgroup = one query head × blockQ query rows; keys stream through workgroup memory blockK at a time, last first:
//     under a causal mask the blocks that mask come first, and no long workgroup ends with them
//   `sharing` subgroups share 16 · rowFragments rows: each makes the scores of blockK/sharing keys and the outputs of
//     V/sharing columns. Queries (left fragments) and outputs stay in registers, 192/128 wide: 96 + 64 of them.
//   two barriers to a key block:
//     one    softmax of block i, products of block i + 1; store probabilities and values of i, load values of i + 1
//     other  store scores of i + 1, outputs += probabilities · values of i; store keys of i + 2, load keys of i + 3
//
// Workgroup memory in quads of 16 bytes (192/128, 128 × 32: 48,656 bytes):
//   keys    blockK · (D/8 + 1)       values  blockK · (V/8 + 1)        D = P + R; widths in whole fragments
//   scores  blockQ · (blockK/4 + 1)  probs   blockQ · blockK / 8       probs as 16 × 16 blocks
//
// Nobody sees a fragment's elements: scores go to the softmax through workgroup memory, and outputs are rescaled there.
// Rescaling is therefore lazy: only when a row's maximum has grown by more than 8 (log2 units, so probabilities stay below
// 256), and outside of the inner loop, which is broken off and resumed (217 → 231 TFLOP/s on an H100 when it was measured
// as a prototype).
//
// Masking is by selection: a masked score becomes the sentinel and its probability 0. A value that is NaN or infinite would
// spoil masked rows through 0 · NaN, so blocks that mask stage zeros for it. A row that sees a NaN latent still becomes
// NaN, through the key of that latent.

import type { Capabilities } from "../capabilities.ts";
import { blockStruct } from "../schedule.ts";
import { attendBindings as at, attendParams, type AttendShape, whatItStores } from "./attend_operands.ts";
import { halfRange, type HeadWidths, paddedWidth } from "./matrix_scratch.ts";
import {
  fragmentQuads,
  fragmentSize,
  type MatrixBackend,
  type MatrixMemory,
  type MatrixUnit,
  matrixUnit,
  memoryBytes,
  subgroupSize,
} from "./matrix_unit.ts";
import { indent, unroll } from "./register_tile.ts";
import { scoreConstants, scoreFunctions, termBinding } from "./score_terms.ts";
import { load4, storageDirectives, store4 } from "./storage_element.ts";
import { whyTooLarge } from "./workgroup_limits.ts";

/** The tile of one kernel. */
export interface MatrixAttendTile {
  /** Query rows of a workgroup. */
  readonly blockQ: number;
  /** Keys of a block. */
  readonly blockK: number;
  /** Subgroups of a workgroup. */
  readonly subgroups: number;
  /** Row fragments that a subgroup multiplies each staged fragment with. */
  readonly rowFragments: number;
  /**
   * Whether the scratch is bound as writable. A driver that moves loads towards their use, past barriers, leaves those of
   * writable memory where they are: 220 → 247 TFLOP/s on an H100.
   */
  readonly pinned: boolean;
}

/** What of a call the generated WGSL depends on. */
export interface MatrixAttendShape extends Omit<AttendShape, "expanded" | "ropeKey">, HeadWidths {}

/** How a tile is laid out. */
interface Layout {
  readonly workgroupSize: number;
  /** Subgroups that share rows. */
  readonly sharing: number;
  readonly depthFragments: number;
  readonly keyFragments: number;
  /** Value column fragments, padded to a multiple of `sharing`. */
  readonly valueFragments: number;
  /** Invocations to a row in the softmax. */
  readonly rowThreads: number;
  readonly memories: {
    readonly keys: MatrixMemory;
    readonly values: MatrixMemory;
    readonly scores: MatrixMemory;
    readonly probs: MatrixMemory;
  };
  readonly keyStride: number;
  readonly valueStride: number;
  readonly scoreStride: number;
}

/** Quads from one row to the next of a result fragment that is stored by itself. */
const ownStride = fragmentSize / 4 + 1;

function layout(tile: MatrixAttendTile, widths: HeadWidths): Layout {
  const { blockQ, blockK, subgroups, rowFragments } = tile;
  const workgroupSize = subgroups * subgroupSize;
  const sharing = subgroups * rowFragments * fragmentSize / blockQ;
  const depth = paddedWidth(widths.qkNopeHeadDim) + paddedWidth(widths.qkRopeHeadDim);
  const valueFragments = Math.ceil(widths.vHeadDim / fragmentSize / sharing) * sharing;
  const keyStride = depth / 8 + 1;
  const valueStride = valueFragments * fragmentQuads + 1;
  const scoreStride = blockK / 4 + 1;
  return {
    workgroupSize,
    sharing,
    depthFragments: depth / fragmentSize,
    keyFragments: blockK / fragmentSize,
    valueFragments,
    rowThreads: workgroupSize / blockQ,
    memories: {
      keys: { name: "keys", kind: "halves", quads: blockK * keyStride },
      values: { name: "values", kind: "halves", quads: blockK * valueStride },
      scores: {
        name: "scores",
        kind: "floats",
        quads: Math.max(blockQ * scoreStride, subgroups * fragmentSize * ownStride),
      },
      probs: { name: "probs", kind: "halves", quads: blockQ * blockK / 8 },
    },
    keyStride,
    valueStride,
    scoreStride,
  };
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(tile: MatrixAttendTile, widths: HeadWidths): number {
  return memoryBytes(Object.values(layout(tile, widths).memories)) + 4 * tile.blockQ + 16;
}

/** Why this tile cannot run, or null when it can. Whether the device has matrix units is the caller's to know. */
export function whyInvalid(
  tile: MatrixAttendTile,
  widths: HeadWidths,
  { limits }: Pick<Capabilities, "limits">,
): string | null {
  const { blockQ, blockK, subgroups, rowFragments } = tile;
  if (blockQ % (rowFragments * fragmentSize) !== 0) {
    return `blockQ ${blockQ} is not a multiple of ${rowFragments} fragments of ${fragmentSize} rows`;
  }
  const { workgroupSize, sharing, keyFragments, rowThreads, depthFragments, valueFragments } = layout(tile, widths);
  if (!Number.isInteger(sharing)) return `${subgroups} subgroups do not divide the rows of blockQ ${blockQ}`;
  if (!Number.isInteger(keyFragments / sharing)) {
    return `blockK ${blockK} is not a multiple of ${fragmentSize} keys × ${sharing} subgroups that share rows`;
  }
  if (![1, 2, 4, 8].includes(rowThreads)) return `blockQ ${blockQ} does not suit ${workgroupSize} invocations`;
  if (blockK % (8 * rowThreads) !== 0) {
    return `blockK ${blockK} is not a multiple of 8 keys × ${rowThreads} invocations`;
  }
  const registers = rowFragments * (depthFragments * 4 + (valueFragments / sharing) * 8 + keyFragments / sharing * 8);
  if (registers > 224) return `${registers} registers per invocation for fragments, at most 224 are to be had`;
  return whyTooLarge(workgroupSize, workgroupBytes(tile, widths), limits);
}

/** The kernel's source. */
export function wgsl(tile: MatrixAttendTile, shape: MatrixAttendShape, backend: MatrixBackend): string {
  const { blockQ, blockK, subgroups, rowFragments } = tile;
  const { terms, sinkQuads } = shape;
  const unit = matrixUnit(backend);
  const map = layout(tile, shape);
  const { workgroupSize, sharing, depthFragments, keyFragments, valueFragments, rowThreads } = map;
  const { memories: { keys, values, scores, probs }, keyStride, valueStride, scoreStride } = map;
  const ownKeyFragments = keyFragments / sharing;
  const ownValueFragments = valueFragments / sharing;
  const ownQuads = blockK / 4 / rowThreads;
  const masks = terms.scoreTerm !== "none";

  const queries = unit.fragments("q", "left", rowFragments, depthFragments);
  const sums = unit.fragments("s", "result", rowFragments, ownKeyFragments);
  const outputs = unit.fragments("o", "result", rowFragments, ownValueFragments);
  const everyScore = (emit: (score: string, row: string, key: string) => string) =>
    unit.over("r", rowFragments, (r) => unit.over("k", ownKeyFragments, (k) => emit(sums.at(r, k), r, k)));
  const everyOutput = (emit: (output: string, row: string, column: string) => string) =>
    unit.over("r", rowFragments, (r) => unit.over("c", ownValueFragments, (c) => emit(outputs.at(r, c), r, c)));
  /** WGSL index of the row fragment r within the block. */
  const rowFragment = (r: string) => `(rowGroup * ${rowFragments}u + ${r})`;

  /** Registers that hold an operand on its way. */
  const registersOf = (count: number) => Math.ceil(count / workgroupSize);
  const pieces = (count: number, emit: (piece: string, i: number) => string) =>
    unroll(registersOf(count), (i) => {
      const piece = i === 0 ? "t" : `t + ${i * workgroupSize}u`;
      const code = emit(piece, i);
      return (i + 1) * workgroupSize <= count ? code : `if (${piece} < ${count}u) {\n${indent(code, 2)}\n}`;
    });
  const keyPieces = blockK * (keyStride - 1);
  const valuePieces = blockK * (valueStride - 1);
  const loadKeys = (base: string) =>
    pieces(keyPieces, (piece, i) => `key${i} = loadKey(block, kvHead, ${base}, ${piece});`);
  const storeKeys = pieces(
    keyPieces,
    (piece, i) => unit.writeQuad(keys, `(${piece}) / DEPTH_QUADS * KEY_STRIDE + (${piece}) % DEPTH_QUADS`, `key${i}`),
  );
  const loadValues = (base: string) =>
    pieces(valuePieces, (piece, i) => `value${i} = loadValue(block, kvHead, ${base}, ${piece});`);
  const storeValues = pieces(
    valuePieces,
    (piece, i) =>
      unit.writeQuad(values, `(${piece}) / VALUE_QUADS * VALUE_STRIDE + (${piece}) % VALUE_QUADS`, `value${i}`),
  );

  const multiplyScores = unit.over("d", depthFragments, (d) =>
    unit.over("k", ownKeyFragments, (k) => {
      const at = `(share * ${ownKeyFragments}u + ${k}) * ${fragmentSize * keyStride}u + ${d} * ${fragmentQuads}u`;
      const key = unit.right("key", keys, at, keyStride, "column");
      return `${key.code}
${unit.over("r", rowFragments, (r) => unit.accumulate(sums.at(r, k), queries.at(r, d), key))}`;
    }));
  const multiplyValues = unit.over("k", keyFragments, (k) =>
    `${
      unroll(rowFragments, (r) => {
        const at = `(${rowFragment(`${r}u`)} * ${keyFragments}u + ${k}) * 32u`;
        return `let prob${r} = ${unit.loadLeft(probs, at, fragmentQuads)};`;
      })
    }
${
      unit.over("c", ownValueFragments, (c) => {
        const at = `${k} * ${fragmentSize * valueStride}u + (share * ${ownValueFragments}u + ${c}) * ${fragmentQuads}u`;
        const value = unit.right("value", values, at, valueStride, "row");
        return `${value.code}
${unroll(rowFragments, (r) => unit.accumulate(outputs.at(`${r}u`, c), `prob${r}`, value))}`;
      })
    }`);
  const storeScores = everyScore((score, r, k) =>
    unit.storeResult(
      scores,
      `${rowFragment(r)} * ${fragmentSize * scoreStride}u + (share * ${ownKeyFragments}u + ${k}) * 4u`,
      scoreStride,
      score,
    )
  );

  /** Queries pass through the memory of keys, as many rows at a time as there are keys in a block. */
  const fragmentsPerRound = blockK / fragmentSize;
  const loadQueries = unit.over("round", Math.ceil(blockQ / blockK), (round) =>
    `workgroupBarrier();
${
      pieces(keyPieces, (piece) =>
        `{
  let packed = loadQuery(block, head, ${round} * ${blockK}u, ${piece});
${indent(unit.writeQuad(keys, `(${piece}) / DEPTH_QUADS * KEY_STRIDE + (${piece}) % DEPTH_QUADS`, "packed"), 2)}
}`)
    }
workgroupBarrier();
${
      unit.over("r", rowFragments, (r) =>
        `if (${rowFragment(r)} / ${fragmentsPerRound}u == ${round}) {
${
          unit.over("d", depthFragments, (d) => {
            const at = `${rowFragment(r)} % ${fragmentsPerRound}u * ${
              fragmentSize * keyStride
            }u + ${d} * ${fragmentQuads}u`;
            return `  ${queries.at(r, d)} = ${unit.loadLeft(keys, at, keyStride)};`;
          })
        }
}`)
    }`);

  /** Two quads of a fragment to each lane; `own` is where the subgroup's fragment lies. */
  const everyOwnQuad = (emit: (row: string, quad: string, index: string) => string) =>
    unroll(2, (i) =>
      `{
  let ownRow = (lane + ${i * subgroupSize}u) / 4u;
  let ownQuad = (lane + ${i * subgroupSize}u) % 4u;
${indent(emit("ownRow", "ownQuad", `own + ownRow * ${ownStride}u + ownQuad`), 2)}
}`);

  const seen = terms.window ? "(key < end) & (key >= start)" : "key < end";
  const masked = `let row = i32(block.rowStart + softRow);
let end = vec4<i32>(min(row + block.diagonalEnd, i32(block.columnEnd)));
${terms.window ? "let start = vec4<i32>(row + block.diagonalStart);\n" : ""}${
    unroll(ownQuads, (j) => {
      const key = `let key = vec4<i32>(i32(keyBase + 4u * (softPart * ${ownQuads}u + ${j}u))) + vec4<i32>(0, 1, 2, 3);`;
      if (!masks) return `{ ${key} x${j} = select(vec4<f32>(MASKED), x${j}, ${seen}); }`;
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
  const probQuad = (q: number) =>
    `((softRow / 16u * ${keyFragments}u + (softPart * ${ownQuads}u + ${
      2 * q
    }u) / 4u) * 16u + softRow % 16u) * 2u + ((softPart * ${ownQuads}u + ${2 * q}u) / 2u) % 2u`;
  const softmax = `${
    unroll(ownQuads, (j) =>
      `var x${j} = scoreOf(${unit.readQuad(scores, `softRow * ${scoreStride}u + softPart * ${ownQuads}u + ${j}u`)});`)
  }
if (masking) {
${indent(masked, 2)}
}
var blockTop = max(max(x0.x, x0.y), max(x0.z, x0.w));
${
    unroll(ownQuads - 1, (j) =>
      `blockTop = max(blockTop, max(max(x${j + 1}.x, x${j + 1}.y), max(x${j + 1}.z, x${j + 1}.w)));`)
  }
${unit.combine("blockTop", rowThreads, "max", workgroupSize)}
var decay = 1.0;
if (blockTop > rowTop + 8.0) {
  // What was summed so far is zero before the first visible key.
  if (rowTop > UNSEEN) { rescale.x = 1u; }
  decay = exp2(rowTop - blockTop);
  rowTop = blockTop;
  rowSum *= decay;
}
if (softPart == 0u) { rowFactor[softRow] = decay; }
${unroll(ownQuads, (j) => `var p${j} = exp2(x${j} - rowTop);`)}
if (masking) {
${unroll(ownQuads, (j) => `  p${j} = select(p${j}, vec4<f32>(), x${j} <= vec4<f32>(UNSEEN));`)}
}
${unroll(ownQuads, (j) => `rowSum += (p${j}.x + p${j}.y) + (p${j}.z + p${j}.w);`)}
${
    !terms.dropout ? "" : unroll(ownQuads, (j) =>
      unroll(
        4,
        (i) =>
          `p${j}[${i}] = select(0.0, p${j}[${i}], keptFactor(dropped, position + block.rowStart + softRow, keyBase + 4u * (softPart * ${ownQuads}u + ${j}u) + ${i}u - origin) > 0.0);`,
      ))
  }
${
    unroll(ownQuads / 2, (q) =>
      `{
  let packed = packHalves(p${2 * q}, p${2 * q + 1});
${indent(unit.writeQuad(probs, probQuad(q), "packed"), 2)}
}`)
  }`;

  return `${unit.directives}${
    unit.native ? "" : storageDirectives(whatItStores({ ...shape, expanded: "f32", ropeKey: "f32" }))
  }// MLA attention over expanded keys and values, on matrix units.
// blockQ ${blockQ}, blockK ${blockK}, ${subgroups} subgroups, ${sharing} to ${rowFragments * fragmentSize} rows
const BLOCK_K = ${blockK}u;
const NOPE_QUADS = ${paddedWidth(shape.qkNopeHeadDim) / 8}u;
const ROPE_QUADS = ${paddedWidth(shape.qkRopeHeadDim) / 8}u;
const DEPTH_QUADS = ${keyStride - 1}u;
const KEY_STRIDE = ${keyStride}u;
const STORED_VALUE_QUADS = ${paddedWidth(shape.vHeadDim) / 8}u;
const VALUE_QUADS = ${valueStride - 1}u;
const VALUE_STRIDE = ${valueStride}u;
${scoreConstants}

${declarations(shape, tile.pinned)}

${unit.declarations([keys, values, scores, probs])}
var<workgroup> rowFactor: array<f32, ${blockQ}>;
var<workgroup> rescale: vec4<u32>; // x is set once a row's maximum has outgrown what its sums are relative to

${scoreFunctions(terms)}

${halfRange}

${loaders(shape)}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
${unit.prologue}
  let block = blocks[params.firstBlock + workgroup.y];
  let head = params.firstHead + workgroup.x;
  let kvHead = head / params.groupSize - params.firstKvHead;
  let rowGroup = subgroup / ${sharing}u;
  let share = subgroup % ${sharing}u;
  let softRow = t / ${rowThreads}u;
  let softPart = t % ${rowThreads}u;
  let origin = block.item * params.keyLength; // first key row of the batch item
  let position = params.firstRow - block.item * params.queryLength; // of row 0 in the batch item, modulo 2^32
  let count = (block.columnEnd - block.columnStart + BLOCK_K - 1u) / BLOCK_K;
  let lastBase = block.columnStart + (count - 1u) * BLOCK_K; // arbitrary when there is no key: what is loaded then is not used
${terms.dropout ? "  let dropped = dropoutKey(block.item, head);\n" : ""}  var rowTop = MASKED;
  var rowSum = 0.0;
${indent([queries, sums, outputs].map(({ declaration }) => declaration).join("\n"), 2)}
${unroll(registersOf(keyPieces), (i) => `  var key${i} = vec4<u32>();`)}
${unroll(registersOf(valuePieces), (i) => `  var value${i} = vec4<u32>();`)}

  if (t == 0u) { rescale = vec4<u32>(); }
${indent(loadQueries, 2)}
  workgroupBarrier();
${indent(loadKeys("lastBase"), 2)}
${indent(storeKeys, 2)}
  // The first round of outputs adds zeros.
${indent(pieces(probs.quads, (piece) => writeZero(unit, probs, piece)), 2)}
${indent(pieces(values.quads, (piece) => writeZero(unit, values, piece)), 2)}
  workgroupBarrier();
${indent(loadKeys("lastBase - BLOCK_K"), 2)}
${indent(loadValues("lastBase"), 2)}
${indent(multiplyScores, 2)}
  workgroupBarrier();

  var next = 0u; // the block whose scores are in registers; the outputs of the one before are still to be summed
  var finished = false;
  loop {
    loop {
${indent(storeScores, 6)}
${indent(multiplyValues, 6)}
      if (next >= count) {
        finished = true;
        break;
      }
      let keyBase = lastBase - next * BLOCK_K;
${indent(storeKeys, 6)}
${indent(loadKeys("keyBase - 2u * BLOCK_K"), 6)}
      workgroupBarrier();

      let masking = ${
    masks ? "true" : `${terms.window ? "keyBase < block.sharedStart || " : ""}keyBase + BLOCK_K > block.sharedEnd`
  };
${indent(softmax, 6)}
${indent(everyScore((score) => `${score} = ${unit.zero};`), 6)}
${indent(multiplyScores, 6)}
      if (masking) {
${unroll(registersOf(valuePieces), (i) => `        value${i} = finiteHalves(value${i});`)}
      }
${indent(storeValues, 6)}
${indent(loadValues("keyBase - BLOCK_K"), 6)}
      next += 1u;
      if (workgroupUniformLoad(&rescale).x != 0u) { break; }
    }
    if (finished) { break; }
    // The scores are consumed, and their memory is free.
    if (t == 0u) { rescale = vec4<u32>(); }
    let own = subgroup * ${fragmentSize * ownStride}u;
${
    indent(
      everyOutput((output, r) =>
        `${unit.storeResult(scores, "own", ownStride, output)}
workgroupBarrier();
${
          everyOwnQuad((row, _quad, index) =>
            `let scaled = ${unit.readQuad(scores, index)} * rowFactor[${rowFragment(r)} * 16u + ${row}];
${unit.writeQuad(scores, index, "scaled")}`
          )
        }
workgroupBarrier();
${output} = ${unit.loadResult(scores, "own", ownStride)};
workgroupBarrier();`
      ),
      4,
    )
  }
  }

  // A row that sees no key has no sum; a NaN sum is not 0 and must reach the output.
${indent(unit.combine("rowSum", rowThreads, "sum", workgroupSize), 2)}
${
    sinkQuads === 0
      ? `  let top = rowTop;
  let total = rowSum;
  let part = select(1.0 / total, 0.0, total == 0.0);`
      : `  let sink = sinks[head / 4u][head % 4u];
  let top = max(rowTop, sink);
  let down = exp2(rowTop - top);
  let total = select(rowSum * down + exp2(sink - top), 0.0, rowSum == 0.0);
  let part = select(down / total, 0.0, rowSum == 0.0);`
  }
  if (softPart == 0u) {
    rowFactor[softRow] = part${terms.dropout ? " * params.keptFactor" : ""};
${
    shape.lse
      ? `    if (block.rowStart + softRow < block.rowEnd) {
      lse[params.lseBase + block.item * params.lseItem + head * params.lseHead + position + block.rowStart + softRow] =
        select((top + log2(total)) * LN2, params.minusInfinity, total == 0.0);
    }`
      : ""
  }
  }
  workgroupBarrier();
  let own = subgroup * ${fragmentSize * ownStride}u;
${
    indent(
      everyOutput((output, r, c) =>
        `${unit.storeResult(scores, "own", ownStride, output)}
workgroupBarrier();
${
          everyOwnQuad((row, quad, index) =>
            `let blockRow = ${rowFragment(r)} * 16u + ${row};
let row = block.rowStart + blockRow;
let column = (share * ${ownValueFragments}u + ${c}) * 16u + 4u * ${quad};
if (row < block.rowEnd && column < params.V) {
  let factor = rowFactor[blockRow];
  let result = select(${unit.readQuad(scores, index)} * factor, vec4<f32>(), factor == 0.0);
  let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
${indent(store4("output", shape.output, "offset", "column", "params.V", "result"), 2)}
}`
          )
        }
workgroupBarrier();`
      ),
      2,
    )
  }
}
`;
}

function writeZero(unit: MatrixUnit, memory: MatrixMemory, piece: string): string {
  return `{
  let zero = vec4<u32>();
${indent(unit.writeQuad(memory, piece, "zero"), 2)}
}`;
}

/** WGSL of the parameter block, the schedule and the bindings; the rotary keys are in the scratch. */
function declarations(shape: MatrixAttendShape, pinned: boolean): string {
  const { rope, query, output, ropeQuery, terms, sinkQuads, lse } = shape;
  const bound = [
    `@group(0) @binding(0) var<uniform> params: Params;`,
    `@group(0) @binding(${at.blocks}) var<storage, read> blocks: array<Block>;`,
    `@group(0) @binding(${at.query}) var<storage, read> query: array<${query}>;`,
    `@group(0) @binding(${at.expanded}) var<storage, ${
      pinned ? "read_write" : "read"
    }> expanded: array<vec4<u32>>; // halves: keys, values, rotary keys`,
    `@group(0) @binding(${at.output}) var<storage, read_write> output: array<${output}>;`,
    rope === "shared" ? `@group(0) @binding(${at.bQ}) var<storage, read> ropeQuery: array<${ropeQuery}>;` : "",
    lse ? `@group(0) @binding(${at.lse}) var<storage, read_write> lse: array<f32>;` : "",
    termBinding(terms, at.term),
    sinkQuads === 0 ? "" : `@group(0) @binding(${at.sinks}) var<uniform> sinks: array<vec4<f32>, ${sinkQuads}>;`,
  ];
  return `${attendParams}
${blockStruct}

${bound.filter((line) => line !== "").join("\n")}`;
}

/** WGSL functions that load one piece, eight neighbours of one row as halves, of queries, keys or values. */
function loaders(shape: MatrixAttendShape): string {
  const { rope } = shape;
  const nope = load4("query", shape.query, "offset", "column", "params.P");
  const ropeQuery = rope === "in_query"
    ? load4("query", shape.query, "offset + params.P", "column", "params.R")
    : load4("ropeQuery", shape.ropeQuery, "ropeOffset", "column", "params.R");
  return `fn loadQuery4(block: Block, head: u32, row: u32, at: u32) -> vec4<f32> {
  let offset = params.queryBase + row * params.queryRow + block.rangeItem * params.queryGap + head * params.queryHead;
  if (row >= block.rowEnd) { return vec4<f32>(); }
  if (at < 8u * NOPE_QUADS) {
    let column = at;
    if (column < params.P) { return ${nope}; }
  }${
    rope === "none" ? "" : ` else {
    let column = at - 8u * NOPE_QUADS;${
      rope === "shared"
        ? "\n    let ropeOffset = params.ropeQueryBase + row * params.ropeQueryRow + block.rangeItem * params.ropeQueryGap;"
        : ""
    }
    if (column < params.R) { return ${ropeQuery}; }
  }`
  }
  return vec4<f32>();
}

fn loadQuery(block: Block, head: u32, firstRow: u32, piece: u32) -> vec4<u32> {
  let row = block.rowStart + firstRow + piece / DEPTH_QUADS;
  let at = piece % DEPTH_QUADS * 8u;
  return packHalves(saturated(loadQuery4(block, head, row, at)), saturated(loadQuery4(block, head, row, at + 4u)));
}

// Here loads inside of a branch are the faster ones, unlike in the other kernels: 0.52 ms where clamped rows took 0.55, at
// 16 heads and 4,096 tokens on an H100.
fn loadKey(block: Block, kvHead: u32, keyBase: u32, piece: u32) -> vec4<u32> {
  let row = keyBase + piece / DEPTH_QUADS;
  let at = piece % DEPTH_QUADS;
  if (row >= block.columnEnd) { return vec4<u32>(); }
${
    rope === "none"
      ? "  return expanded[(row * params.groupKvHeads + kvHead) * NOPE_QUADS + at];"
      : `  let rope = params.ropeKeyBase / 8u + row * ROPE_QUADS + at - NOPE_QUADS;
  return expanded[select(rope, (row * params.groupKvHeads + kvHead) * NOPE_QUADS + at, at < NOPE_QUADS)];`
  }
}

fn loadValue(block: Block, kvHead: u32, keyBase: u32, piece: u32) -> vec4<u32> {
  let row = keyBase + piece / VALUE_QUADS;
  let at = piece % VALUE_QUADS;
  if (row >= block.columnEnd || at >= STORED_VALUE_QUADS) { return vec4<u32>(); }
  return expanded[params.valuesBase / 8u + (row * params.groupKvHeads + kvHead) * STORED_VALUE_QUADS + at];
}`;
}
