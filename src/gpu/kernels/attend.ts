// Attention over expanded keys and values, online softmax (FlashAttention-2 loop order).
//
//   one workgroup = one query head × blockQ query rows; keys stream through workgroup memory blockK at a time
//   invocation (ty, tx) of TY × TX owns rowsPerThread × blockK/TX scores and rowsPerThread × V/TX outputs, in registers:
//     row quads  rq·TY + ty   (rows 4·quad … 4·quad + 3)      key and value-column quads  c·TX + tx
//   scores:  S = Q·Kᵀ in slices of blockDepth head columns, first the P rebuilt ones, then the R rotary ones
//   softmax: row maxima meet in workgroup memory once per key block; row sums stay per invocation until the end
//   values:  O += P·V in slices of blockDepth keys; probabilities pass through workgroup memory probKeys·TX keys at a time
//
// Workgroup memory in vec4 (16 bytes):
//   left   stages · depth · (blockQ/4 + 1)                  Q slices
//   right  stages · depth · (max(blockK, V)/4 + 1)          K slices, then V slices
//   probs  probKeys · TX · (blockQ/4 + 1)                   probabilities; also the row-maximum exchange
//
// Masking is by selection: a masked score becomes the sentinel and its probability 0. A value row that holds NaN or
// infinity would still spoil masked rows through 0 · NaN, so blocks that mask anything watch the staged values and fall
// back to a selecting product once one was seen. Key blocks outside of what the rows see by window and causal mask are
// never visited; where there is a bias or a mask, every block counts as masking.
//
// Sinks join at the end: they change the denominator, never the maximum that the keys are summed under.

import type { FlashMLAConfig } from "../../op/config.ts";
import type { Capabilities } from "../capabilities.ts";
import { type AttendShape, declarations, loaders, whatItStores } from "./attend_operands.ts";
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
import { rowMaximum, rowTotal } from "./row_reduction.ts";
import { scoreConstants, scoreFunctions } from "./score_terms.ts";
import { storageDirectives, store4 } from "./storage_element.ts";
import { whyTooLarge } from "./workgroup_limits.ts";

/** The tile of one attention kernel: the part of a configuration that it reads. */
export type AttendTile = Pick<
  FlashMLAConfig,
  | "blockQ"
  | "blockK"
  | "numWarps"
  | "numStages"
  | "rowsPerThread"
  | "blockDepth"
  | "probKeys"
  | "unrollDepth"
  | "subgroups"
>;

/** How invocations are laid over a tile. */
interface ThreadMap {
  readonly workgroupSize: number;
  readonly threadRows: number;
  readonly threadColumns: number;
  readonly rowQuads: number;
  readonly keyQuads: number;
  readonly valueQuads: number;
}

function threadMap(tile: AttendTile, shape: Pick<AttendShape, "vHeadDim">): ThreadMap {
  const workgroupSize = tile.numWarps * 32;
  const threadRows = tile.blockQ / tile.rowsPerThread;
  const threadColumns = workgroupSize / threadRows;
  return {
    workgroupSize,
    threadRows,
    threadColumns,
    rowQuads: tile.rowsPerThread / 4,
    keyQuads: tile.blockK / (4 * threadColumns),
    valueQuads: Math.ceil(shape.vHeadDim / (4 * threadColumns)),
  };
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(tile: AttendTile, shape: Pick<AttendShape, "vHeadDim">): number {
  const { threadColumns, valueQuads } = threadMap(tile, shape);
  const rightWidth = Math.max(tile.blockK, valueQuads * threadColumns * 4);
  const staged = tile.numStages * tile.blockDepth * (stagedStride(tile.blockQ) + stagedStride(rightWidth));
  const probs = tile.probKeys * threadColumns * stagedStride(tile.blockQ);
  return 16 * (staged + probs + 1);
}

/** Why this tile cannot run, or null when it can. */
export function whyInvalid(
  tile: AttendTile,
  shape: Pick<AttendShape, "vHeadDim">,
  { limits, subgroups }: Capabilities,
): string | null {
  const { blockQ, blockK, numWarps, numStages, rowsPerThread, blockDepth, probKeys } = tile;
  for (const [name, value] of Object.entries({ blockQ, blockK, numWarps, blockDepth, rowsPerThread })) {
    if (!Number.isInteger(value) || value < 1) return `${name} must be a positive integer, got ${value}`;
  }
  if (typeof tile.unrollDepth !== "boolean") return `unrollDepth must be true or false, got ${tile.unrollDepth}`;
  if (numStages !== 1 && numStages !== 2) return `numStages must be 1 or 2, got ${numStages}`;
  if (![1, 2].includes(probKeys) && probKeys % 4 !== 0) {
    return `probKeys must be 1, 2 or a multiple of 4, got ${probKeys}`;
  }
  if (rowsPerThread % 4 !== 0) return `rowsPerThread must be a multiple of 4, got ${rowsPerThread}`;
  if (blockDepth % 4 !== 0) return `blockDepth must be a multiple of 4, got ${blockDepth}`;
  if (blockQ % rowsPerThread !== 0) return `blockQ ${blockQ} is not a multiple of rowsPerThread ${rowsPerThread}`;
  const { workgroupSize, threadRows, threadColumns, rowQuads, keyQuads, valueQuads } = threadMap(tile, shape);
  if (!Number.isInteger(threadColumns)) {
    return `numWarps ${numWarps} gives ${workgroupSize} invocations, not a multiple of the ${threadRows} row groups`;
  }
  if (!Number.isInteger(keyQuads)) return `blockK ${blockK} is not a multiple of 4 keys × ${threadColumns} columns`;
  if ((keyQuads * 4) % probKeys !== 0) {
    return `probKeys ${probKeys} does not divide the ${keyQuads * 4} keys of an invocation`;
  }
  if ((probKeys * threadColumns) % blockDepth !== 0) {
    return `blockDepth ${blockDepth} does not divide the ${probKeys * threadColumns} keys of a probability slice`;
  }
  if (typeof tile.subgroups !== "boolean") return `subgroups must be true or false, got ${tile.subgroups}`;
  if (tile.subgroups) {
    if (subgroups === null) return "subgroups is true, the device has none";
    if (threadColumns > subgroups.minSize || (threadColumns & (threadColumns - 1)) !== 0) {
      return `subgroups is true: a row's ${threadColumns} invocations do not share a subgroup of ${subgroups.minSize}`;
    }
  }
  const registers = rowQuads * 16 * (keyQuads + valueQuads);
  if (tile.unrollDepth && registers > 256) {
    return `${registers} accumulators per invocation, at most 256 are kept in registers`;
  }
  return whyTooLarge(workgroupSize, workgroupBytes(tile, shape), limits);
}

/** The kernel's source. */
export function wgsl(tile: AttendTile, shape: AttendShape, capabilities: Pick<Capabilities, "subgroups">): string {
  const { blockQ, blockK, numStages, rowsPerThread, blockDepth, probKeys, unrollDepth } = tile;
  const { rope, terms } = shape;
  const { workgroupSize, threadRows, threadColumns, rowQuads, keyQuads, valueQuads } = threadMap(tile, shape);
  const paddedValueQuads = valueQuads * threadColumns;
  const leftStride = stagedStride(blockQ);
  const rightStride = stagedStride(Math.max(blockK, paddedValueQuads * 4));
  const sliceKeys = probKeys * threadColumns;
  const probSlices = sliceKeys / blockDepth;
  const groups = (keyQuads * 4) / probKeys;
  const depthPieces = blockDepth / 4;

  const rowQuad = (r: number) => `ty + ${r * threadRows}u`;
  const keyQuad = (c: number) => `tx + ${c * threadColumns}u`;
  const names = (prefix: string, count: number) => Array.from({ length: count }, (_, i) => `${prefix}${i}`);
  const everyScore = (emit: (name: string, key: number, quad: number) => string) =>
    unroll(keyQuads * 4, (j) => unroll(rowQuads, (r) => emit(`s${j}_${r}`, j, r)));
  const everyOutput = (emit: (name: string, row: number, quad: number) => string) =>
    unroll(rowsPerThread, (i) => unroll(valueQuads, (c) => emit(`o${i}_${c}`, i, c)));
  /** The key, relative to the block, of score register j. */
  const keyOf = (j: number) => `4u * (${keyQuad(Math.floor(j / 4))}) + ${j % 4}u`;

  /** Multiplies four rows' probabilities of one key by what dropout leaves of them. */
  const dropped = (s: string, key: string, row: string) =>
    `${s} *= vec4<f32>(${
      [0, 1, 2, 3].map((i) =>
        `keptFactor(dropped, position + block.rowStart + 4u * (${row}) + ${i}u, keyBase + ${key} - origin)`
      ).join(", ")
    });`;

  const queries: Staging = {
    name: "query",
    pieces: blockQ * depthPieces,
    load: (piece, slice) => `loadQuery(block, head, ${piece}, ${slice})`,
    store: (piece, value, stage) => `stageQuery(${piece}, ${stage}, ${value});`,
  };
  const keys: Staging = {
    name: "key",
    pieces: blockK * depthPieces,
    load: (piece, slice) => `loadKey(block, kvHead, keyBase, ${piece}, ${slice})`,
    store: (piece, value, stage) => `stageKey(${piece}, ${stage}, ${value});`,
  };
  const values: Staging = {
    name: "value",
    pieces: blockDepth * paddedValueQuads,
    load: (piece, slice) => `loadValue(block, kvHead, keyBase, group, ${piece}, ${slice})`,
    store: (piece, value, stage) => `stageValue(${piece}, ${stage}, ${value});`,
  };

  const multiplyScores = (stage: string) =>
    overDepth(
      blockDepth,
      unrollDepth,
      (d) =>
        `${unroll(rowQuads, (r) => `let a${r} = left[${stage}][${d}][${rowQuad(r)}];`)}
${unroll(keyQuads, (c) => `let b${c} = right[${stage}][${d}][${keyQuad(c)}];`)}
${outerByRows("s", names("a", rowQuads), names("b", keyQuads))}`,
    );
  const multiplyValues = (stage: string) =>
    overDepth(
      blockDepth,
      unrollDepth,
      (d) =>
        `${unroll(rowQuads, (r) => `let a${r} = probs[slice][${d}][${rowQuad(r)}];`)}
${unroll(valueQuads, (c) => `let b${c} = right[${stage}][${d}][${keyQuad(c)}];`)}
${outerByColumns("o", names("a", rowQuads), names("b", valueQuads))}`,
    );
  const multiplyValuesSelecting = (stage: string) =>
    overDepth(blockDepth, false, (d) =>
      `${unroll(rowQuads, (r) => `let a${r} = probs[slice][${d}][${rowQuad(r)}];`)}
${unroll(valueQuads, (c) => `let b${c} = right[${stage}][${d}][${keyQuad(c)}];`)}
${
        everyOutput((o, i, c) => {
          const p = `a${Math.floor(i / 4)}[${i % 4}]`;
          return `${o} = select(fma(vec4<f32>(${p}), b${c}, ${o}), ${o}, ${p} == 0.0);`;
        })
      }`);

  const publishProbabilities = `switch group {
${
    unroll(groups, (g) => {
      return `  case ${g}u: {
${
        unroll(probKeys, (j) =>
          unroll(rowQuads, (r) =>
            `    probs[(tx * ${probKeys}u + ${j}u) / DEPTH][(tx * ${probKeys}u + ${j}u) % DEPTH][${rowQuad(r)}] = s${
              g * probKeys + j
            }_${r};`))
      }
  }`;
    })
  }
  default: {}
}`;

  const exchange = { subgroups: tile.subgroups, threadColumns, depth: blockDepth, rowQuads, rowQuad };
  const directive = tile.subgroups && capabilities.subgroups?.directive ? "enable subgroups;\n" : "";

  return `${directive}${storageDirectives(whatItStores(shape))}// MLA attention over expanded keys and values.
// blockQ ${blockQ}, blockK ${blockK}, ${threadRows} × ${threadColumns} invocations, ${rowsPerThread} rows each, depth ${blockDepth}, ${numStages} stage(s)
const BLOCK_Q = ${blockQ}u;
const BLOCK_K = ${blockK}u;
const DEPTH = ${blockDepth}u;
const DEPTH_PIECES = ${depthPieces}u;
const TX = ${threadColumns}u;
const PROB_SLICES = ${probSlices}u;
const VALUE_QUADS = ${paddedValueQuads}u;
${scoreConstants}

${declarations(shape)}

var<workgroup> left: array<array<array<vec4<f32>, ${leftStride}>, ${blockDepth}>, ${numStages}>;
var<workgroup> right: array<array<array<vec4<f32>, ${rightStride}>, ${blockDepth}>, ${numStages}>;
var<workgroup> probs: array<array<array<vec4<f32>, ${leftStride}>, ${blockDepth}>, ${probSlices}>;
var<workgroup> poisoned: array<atomic<u32>, 4>; // [0] is set once a staged value row held NaN or infinity

${scoreFunctions(terms)}

${loaders(shape, probKeys)}

fn stageQuery(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
${indent(storeTransposed("left", "stage", "depth", "row", "value"), 2)}
}

fn stageKey(piece: u32, stage: u32, value: vec4<f32>) {
  let row = piece / DEPTH_PIECES;
  let depth = (piece % DEPTH_PIECES) * 4u;
${indent(storeTransposed("right", "stage", "depth", "row", "value"), 2)}
}

fn stageValue(piece: u32, stage: u32, value: vec4<f32>) {
  let exponent = bitcast<vec4<u32>>(value) & vec4<u32>(0x7f800000u);
  if (any(exponent == vec4<u32>(0x7f800000u))) { atomicStore(&poisoned[0], 1u); }
  right[stage][piece / VALUE_QUADS][piece % VALUE_QUADS] = value;
}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let block = blocks[params.firstBlock + workgroup.y];
  let head = params.firstHead + workgroup.x;
  let kvHead = head / params.groupSize - params.firstKvHead;
  let scoreSlices = nopeSlices()${rope === "none" ? "" : " + (params.R + DEPTH - 1u) / DEPTH"};
  let tx = t % TX;
  let ty = t / TX;
  if (t == 0u) { atomicStore(&poisoned[0], 0u); } // many barriers before its first use
  let origin = block.item * params.keyLength; // first key row of the batch item
  let position = params.firstRow - block.item * params.queryLength; // of row 0 in the batch item, modulo 2^32
${terms.dropout ? "  let dropped = dropoutKey(block.item, head);\n" : ""}${
    unroll(rowQuads, (r) => `  var rowMax${r} = vec4<f32>(MASKED);\n  var rowSum${r} = vec4<f32>();`)
  }
${indent(everyOutput((o) => `var ${o} = vec4<f32>();`), 2)}

  for (var keyBase = block.columnStart; keyBase < block.columnEnd; keyBase += BLOCK_K) {
    let masking = ${
    terms.scoreTerm === "none"
      ? `${terms.window ? "keyBase < block.sharedStart || " : ""}keyBase + BLOCK_K > block.sharedEnd`
      : "true"
  };

    // Scores.
${indent(everyScore((s) => `var ${s} = vec4<f32>();`), 4)}
${
    indent(
      slicedLoop({
        slices: "scoreSlices",
        workgroupSize,
        numStages,
        operands: [queries, keys],
        compute: multiplyScores,
      }),
      4,
    )
  }
${indent(everyScore((s) => `${s} = scoreOf(${s});`), 4)}
    if (masking) {
${
    unroll(rowQuads, (r) =>
      `      let row${r} = vec4<i32>(i32(block.rowStart + 4u * (${rowQuad(r)}))) + vec4<i32>(0, 1, 2, 3);
      let end${r} = min(row${r} + block.diagonalEnd, vec4<i32>(i32(block.columnEnd)));${
        terms.window ? `\n      let start${r} = row${r} + block.diagonalStart;` : ""
      }`)
  }
${
    indent(
      unroll(keyQuads * 4, (j) =>
        `let key${j} = vec4<i32>(i32(keyBase + ${keyOf(j)}));
${
          unroll(rowQuads, (r) => {
            const seen = terms.window ? `(key${j} < end${r}) & (key${j} >= start${r})` : `key${j} < end${r}`;
            if (terms.scoreTerm === "none") return `s${j}_${r} = select(vec4<f32>(MASKED), s${j}_${r}, ${seen});`;
            return `{
  let seen = ${seen};
${
              unroll(
                4,
                (i) =>
                  `  if (seen[${i}] && row${r}[${i}] < i32(block.rowEnd)) { s${j}_${r}[${i}] = withTerm(s${j}_${r}[${i}], block.item, head, position + u32(row${r}[${i}]), u32(key${j}[${i}]) - origin); } else { s${j}_${r}[${i}] = MASKED; }`,
              )
            }
}`;
          })
        }`),
      6,
    )
  }
    }

    // Row maxima over the block, then over all that came before.
${
    unroll(rowQuads, (r) =>
      `    var newMax${r} = s0_${r};
${unroll(keyQuads * 4 - 1, (j) => `    newMax${r} = max(newMax${r}, s${j + 1}_${r});`)}`)
  }
${indent(rowMaximum(exchange), 4)}

    // Probabilities, and the rescaling of what was summed under the old maximum.
${
    unroll(rowQuads, (r) =>
      `    let decay${r} = exp2(rowMax${r} - newMax${r});
    rowMax${r} = newMax${r};
    rowSum${r} *= decay${r};`)
  }
${
    indent(
      everyScore((s, _j, r) =>
        `${s} = select(exp2(${s} - newMax${r}), vec4<f32>(), ${s} <= vec4<f32>(UNSEEN));
rowSum${r} += ${s};`
      ),
      4,
    )
  }
${terms.dropout ? indent(everyScore((s, j, r) => dropped(s, keyOf(j), rowQuad(r))), 4) : ""}
${indent(everyOutput((o, i) => `${o} *= decay${Math.floor(i / 4)}[${i % 4}];`), 4)}

    // Outputs.
    for (var group = 0u; group < ${groups}u; group += 1u) {
${
    indent(
      slicedLoop({
        slices: "PROB_SLICES",
        workgroupSize,
        numStages,
        operands: [values],
        prologue: publishProbabilities,
        compute: (stage) =>
          `if (masking && atomicLoad(&poisoned[0]) != 0u) {
${indent(multiplyValuesSelecting(stage), 2)}
} else {
${indent(multiplyValues(stage), 2)}
}`,
      }),
      6,
    )
  }
    }
  }

  // Row sums over the invocations of a row. A row that sees no key has none; a NaN sum is not 0 and must reach the output.
${indent(rowTotal(exchange), 2)}
${
    unroll(rowQuads, (r) =>
      shape.sinkQuads === 0
        ? `  let top${r} = rowMax${r};\n  let share${r} = select(1.0 / total${r}, vec4<f32>(), total${r} == vec4<f32>());`
        : `  let sink${r} = vec4<f32>(sinks[head / 4u][head % 4u]);
  let top${r} = max(rowMax${r}, sink${r});
  let unseen${r} = total${r} == vec4<f32>();
  let down${r} = exp2(rowMax${r} - top${r});
  total${r} = select(total${r} * down${r} + exp2(sink${r} - top${r}), vec4<f32>(), unseen${r});
  let share${r} = select(down${r} / total${r}, vec4<f32>(), unseen${r});`)
  }
${
    !shape.lse ? "" : `  if (tx == 0u) {
    let lseRow = params.lseBase + block.item * params.lseItem + head * params.lseHead + position;
${
      unroll(rowQuads, (r) => {
        const value =
          `select((top${r} + log2(total${r})) * LN2, vec4<f32>(params.minusInfinity), total${r} == vec4<f32>())`;
        return `    {
      let row = block.rowStart + 4u * (${rowQuad(r)});
      let logSum = ${value};
${unroll(4, (i) => `      if (row + ${i}u < block.rowEnd) { lse[lseRow + row + ${i}u] = logSum[${i}]; }`)}
    }`;
      })
    }
  }`
  }
${
    unroll(rowsPerThread, (i) => {
      const share = `share${Math.floor(i / 4)}[${i % 4}]`;
      return `  {
    let row = block.rowStart + 4u * (${rowQuad(Math.floor(i / 4))}) + ${i % 4}u;
    if (row < block.rowEnd) {
      let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
${
        unroll(valueQuads, (c) =>
          indent(
            `{
  let column = 4u * (${keyQuad(c)});
  let result = select(o${i}_${c} * ${share}, vec4<f32>(), ${share} == 0.0);
${indent(store4("output", shape.output, "offset", "column", "params.V", "result"), 2)}
}`,
            6,
          ))
      }
    }
  }`;
    })
  }
}
`;
}
