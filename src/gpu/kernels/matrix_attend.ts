// Attention over expanded keys and values on matrix units: f16 products, f32 sums and softmax.
//
//   one workgroup = one query head × blockQ query rows; keys stream through workgroup memory blockK at a time, last first:
//     under a causal mask the blocks that mask come first, and no long workgroup ends with them
//   `sharing` subgroups share 16 · rowFragments rows: each makes the scores of blockK/sharing keys and the outputs of
//     V/sharing columns. Queries (left fragments) and outputs stay in registers, 192/128 wide: 96 + 64 of them.
//   two phases to a key block, three barriers (workgroupUniformLoad is two)
//     products   load keys of block i + 1 and values of i; outputs += probabilities · values of i − 1; scores of i
//     softmax    of block i (matrix_attend_softmax.ts); store what was loaded
//
// Workgroup memory in quads of 16 bytes (192/128, 128 × 32: 49,136 bytes):
//   keys    blockK · (D/8 + 1)             values  sharing · blockK · (V/sharing/8 + 1)     D = P + R; whole fragments
//   scores  sharing · blockK · (rows/4 + 1) of every 16 · rowFragments rows                 probs   blockQ · blockK / 8
//
// What fragments are loaded from and stored to lies in arrays of its own for each subgroup or fragment (parts), so that
// places in it are constants: for others Dawn checks the bounds, which makes each load a branch (165 → 179 TFLOP/s at 64
// heads, 4,096 tokens, causal, on an H100). A switch with a case for each subgroup gave 133: eight times the code.
//
// The driver moves loads from memory that is only read to where they are used, so what is read here is bound as writable
// (`pinned`; 222 against 166 TFLOP/s, full masks, 32 heads). It also decides how much a phase hides: with the loads at the
// end of the softmax, a whole block ahead, this structure gave 200. Products of one block under the softmax of another, in
// one phase or by two groups of subgroups in turns, gave 202 and 130.
//
// Nobody sees a fragment's elements: scores go to the softmax through workgroup memory, and outputs are rescaled there.
// Rescaling is therefore lazy: only when a row's maximum has grown by more than 8 (log2 units, so probabilities stay below
// 256), and outside of the inner loop, which is broken off and resumed (217 → 231 TFLOP/s when it was measured as a
// prototype).
//
// Masking is by selection: a masked score becomes the sentinel and its probability 0. A value that is NaN or infinite would
// spoil masked rows through 0 · NaN, so blocks that mask stage zeros for it. A row that sees a NaN latent still becomes
// NaN, through the key of that latent.

import { blockStruct } from "../schedule.ts";
import { attendBindings as at, attendParams, type AttendShape, whatItStores } from "./attend_operands.ts";
import { matrixAttendLayout, type MatrixAttendTile } from "./matrix_attend_layout.ts";
import { blockSoftmax } from "./matrix_attend_softmax.ts";
import { halfRange, type HeadWidths, paddedWidth } from "./matrix_scratch.ts";
import { fragmentQuads, fragmentSize, type MatrixBackend, matrixUnit, subgroupSize } from "./matrix_unit.ts";
import { indent, unroll } from "./register_tile.ts";
import { scoreConstants, scoreFunctions, termBinding } from "./score_terms.ts";
import { load4, storageDirectives, store4 } from "./storage_element.ts";

/** What of a call the generated WGSL depends on. */
export interface MatrixAttendShape extends Omit<AttendShape, "expanded" | "ropeKey">, HeadWidths {}

/** The kernel's source. */
export function wgsl(tile: MatrixAttendTile, shape: MatrixAttendShape, backend: MatrixBackend): string {
  const { blockQ, blockK, subgroups, rowFragments } = tile;
  const { terms, sinkQuads } = shape;
  const unit = matrixUnit(backend);
  const map = matrixAttendLayout(tile, shape);
  const { workgroupSize, sharing, depthFragments, keyFragments, ownKeys, ownValues, rowThreads, stageThreads } = map;
  const { memories: { keys, values, scores, probs }, keyStride, valueStride, scoreStride, together } = map;

  const queries = unit.fragments("q", "left", rowFragments, depthFragments);
  const sums = unit.fragments("s", "result", rowFragments, ownKeys);
  const outputs = unit.fragments("o", "result", rowFragments, ownValues);
  const everyScore = (emit: (score: string, row: string, key: string) => string) =>
    unit.over("r", rowFragments, (r) => unit.over("k", ownKeys, (k) => emit(sums.at(r, k), r, k)));

  /** The quads of a row that an invocation carries, by the index of its register. */
  const carried = (count: number, emit: (quad: string, i: number, first: number) => string) =>
    unroll(count, (i) => emit(i === 0 ? "stageQuad" : `stageQuad + ${i * stageThreads}u`, i, i * stageThreads));
  const ifWithin = (first: number, quad: string, width: number, code: string) =>
    first + stageThreads <= width ? code : `if (${quad} < ${width}u) {\n${indent(code, 2)}\n}`;
  const clamped = (first: number, quad: string, width: number) =>
    first + stageThreads <= width ? quad : `min(${quad}, ${width - 1}u)`;
  const depthQuads = keyStride - 1;
  const valueQuads = sharing * ownValues * fragmentQuads;
  const loadKeys = (base: string) =>
    `{
  let row = rowWithin(${base} + stageRow, block);
  let nope = (row * params.groupKvHeads + kvHead) * NOPE_QUADS;
${shape.rope === "none" ? "" : "  let rope = params.ropeKeyBase / 8u + row * ROPE_QUADS - NOPE_QUADS;"}
${
      indent(
        carried(map.keyQuads, (quad, i, first) => {
          const nopeQuads = paddedWidth(shape.qkNopeHeadDim) / 8;
          const start = shape.rope === "none" || first + stageThreads <= nopeQuads
            ? "nope"
            : first >= nopeQuads
            ? "rope"
            : `select(rope, nope, ${quad} < NOPE_QUADS)`;
          return `key${i} = expanded[${start} + ${clamped(first, quad, depthQuads)}];`;
        }),
        2,
      )
    }
}`;
  /** Where the i-th quad of a row of keys, or of queries on their way, lies. */
  const storeRow = (name: string) =>
    carried(map.keyQuads, (quad, i, first) => {
      const rows = unit.part(keys, "(stageRow / 16u)");
      return ifWithin(
        first,
        quad,
        depthQuads,
        unit.writeQuad(rows, `stageRow % 16u * KEY_STRIDE + ${quad}`, `${name}${i}`),
      );
    });
  const loadValues = (base: string) =>
    `{
  let row = rowWithin(${base} + stageRow, block);
  let start = params.valuesBase / 8u + (row * params.groupKvHeads + kvHead) * STORED_VALUE_QUADS;
${
      indent(
        carried(map.valueQuads, (quad, i, first) => {
          const within = clamped(first, quad, paddedWidth(shape.vHeadDim) / 8);
          return `value${i} = expanded[start + ${within}];`;
        }),
        2,
      )
    }
}`;
  const storeValues = carried(map.valueQuads, (quad, i, first) => {
    const own = valueStride - 1;
    const last = first + stageThreads - 1;
    // Natively every part is an array: a constant index is not clamped.
    const [share, at] = Math.floor(first / own) === Math.floor(last / own)
      ? [`${Math.floor(first / own)}u`, `${quad} - ${Math.floor(first / own) * own}u`]
      : [`((${quad}) / ${own}u)`, `(${quad}) % ${own}u`];
    return ifWithin(
      first,
      quad,
      valueQuads,
      unit.writeQuad(unit.part(values, share), `stageRow * VALUE_STRIDE + ${at}`, `value${i}`),
    );
  });

  /** WGSL index of the row fragment r within the block. */
  const rowFragment = (r: string) => `(rowGroup * ${rowFragments}u + ${r})`;

  const multiplyScores = unit.over("d", depthFragments, (d) =>
    unit.over("k", ownKeys, (k) => {
      const rows = unit.part(keys, `(share * ${ownKeys}u + ${k})`);
      const key = unit.right("key", rows, `${d} * ${fragmentQuads}u`, keyStride, "column");
      return `${key.code}
${unit.over("r", rowFragments, (r) => unit.accumulate(sums.at(r, k), queries.at(r, d), key))}`;
    }));
  const multiplyValues = unit.over("k", keyFragments, (k) =>
    `${
      unroll(rowFragments, (r) => {
        const block = unit.part(probs, `(${rowFragment(`${r}u`)} * ${keyFragments}u + ${k})`);
        return `let prob${r} = ${unit.loadLeft(block, "0u", fragmentQuads)};`;
      })
    }
${
      unit.over("c", ownValues, (c) => {
        const at = `${k} * ${fragmentSize * valueStride}u + ${c} * ${fragmentQuads}u`;
        const value = unit.right("value", unit.part(values, "share"), at, valueStride, "row");
        return `${value.code}
${unroll(rowFragments, (r) => unit.accumulate(outputs.at(`${r}u`, c), `prob${r}`, value))}`;
      })
    }`);
  const ownScores = unit.part(scores, "subgroup");
  const storeScores = everyScore((score, r, k) =>
    unit.storeResult(ownScores, `${k} * ${fragmentSize * scoreStride}u + ${r} * 4u`, scoreStride, score, "column")
  );

  /** Queries pass through the memory of keys, as many rows at a time as there are keys in a block. */
  const rounds = Math.ceil(blockQ / blockK);
  const loadQueries = (round: string) =>
    carried(
      map.keyQuads,
      (quad, i, first) =>
        `query${i} = loadQuery(block, head, ${round} * BLOCK_K + stageRow, ${clamped(first, quad, depthQuads)});`,
    );
  const everyRound = `${loadQueries("0u")}
for (var round = 0u; round < ${rounds}u; round += 1u) {
  workgroupBarrier();
${indent(storeRow("query"), 2)}
  workgroupBarrier();
${rounds > 1 ? `  if (round < ${rounds - 1}u) {\n${indent(loadQueries("(round + 1u)"), 4)}\n  }` : ""}
${
    indent(
      unit.over("r", rowFragments, (r) =>
        `if (${rowFragment(r)} / ${keyFragments}u == round) {
${
          indent(
            unit.over("d", depthFragments, (d) => {
              const rows = unit.part(keys, `(${rowFragment(r)} % ${keyFragments}u)`);
              return `${queries.at(r, d)} = ${unit.loadLeft(rows, `${d} * ${fragmentQuads}u`, keyStride)};`;
            }),
            2,
          )
        }
}`),
      2,
    )
  }
}`;

  /** Output fragments by way of the subgroup's own memory, as many side by side as it holds; quads of them to each lane. */
  const ownStride = together * fragmentSize / 4 + 1;
  const everyOutput = (emit: (row: string, column: string, index: string) => string, again: boolean) =>
    unit.over("r", rowFragments, (r) =>
      unit.over("c", ownValues / together, (c) => {
        const fragments = Array.from({ length: together }, (_, i) => {
          const own = unit.native ? `${parseInt(c) * together + i}u` : `(${c} * ${together}u + ${i}u)`;
          return { output: outputs.at(r, own), at: `${4 * i}u` };
        });
        return `${fragments.map(({ output, at }) => unit.storeResult(ownScores, at, ownStride, output)).join("\n")}
workgroupBarrier();
${
          unroll(2 * together, (i) =>
            `{
  let ownRow = (lane + ${i * subgroupSize}u) / ${4 * together}u;
  let ownQuad = (lane + ${i * subgroupSize}u) % ${4 * together}u;
  let index = ownRow * ${ownStride}u + ownQuad;
${indent(emit(`(${rowFragment(r)} * 16u + ownRow)`, `(${c} * ${together}u * 16u + 4u * ownQuad)`, "index"), 2)}
}`)
        }
workgroupBarrier();${
          again
            ? `\n${
              fragments.map(({ output, at }) => `${output} = ${unit.loadResult(ownScores, at, ownStride)};`).join("\n")
            }\nworkgroupBarrier();`
            : ""
        }`;
      }));

  const masking = terms.scoreTerm !== "none"
    ? "true"
    : `${terms.window ? "keyBase < block.sharedStart || " : ""}keyBase + BLOCK_K > block.sharedEnd`;

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
  let stageRow = t / ${stageThreads}u;
  let stageQuad = t % ${stageThreads}u;
  let origin = block.item * params.keyLength; // first key row of the batch item
  let position = params.firstRow - block.item * params.queryLength; // of row 0 in the batch item, modulo 2^32
  let count = (block.columnEnd - block.columnStart + BLOCK_K - 1u) / BLOCK_K;
  let lastBase = block.columnStart + (count - 1u) * BLOCK_K; // arbitrary when there is no key: what is loaded then is not used
${terms.dropout ? "  let dropped = dropoutKey(block.item, head);\n" : ""}  var rowTop = MASKED;
  var rowSum = 0.0;
${indent([queries, sums, outputs].map(({ declaration }) => declaration).join("\n"), 2)}
${unroll(map.keyQuads, (i) => `  var query${i} = vec4<u32>();\n  var key${i} = vec4<u32>();`)}
${unroll(map.valueQuads, (i) => `  var value${i} = vec4<u32>();`)}

  if (t == 0u) { rescale = vec4<u32>(); }
${indent(everyRound, 2)}
  workgroupBarrier();
${indent(loadKeys("lastBase"), 2)}
${indent(storeRow("key"), 2)}
  // The first round of outputs adds zeros.
  let zero = vec4<u32>();
  for (var i = t; i < ${probs.quads * probs.parts!}u; i += ${workgroupSize}u) {
${indent(unit.writeQuad(unit.part(probs, `(i / ${probs.quads}u)`), `i % ${probs.quads}u`, "zero"), 4)}
  }
  for (var i = t; i < ${values.quads * values.parts!}u; i += ${workgroupSize}u) {
${indent(unit.writeQuad(unit.part(values, `(i / ${values.quads}u)`), `i % ${values.quads}u`, "zero"), 4)}
  }
  workgroupBarrier();

  var next = 0u; // the block to be scored; the outputs of the one before are still to be summed
  var finished = false;
  loop {
    loop {
      let keyBase = lastBase - next * BLOCK_K;
${indent(loadKeys("keyBase - BLOCK_K"), 6)}
${indent(loadValues("keyBase"), 6)}
${indent(everyScore((score) => `${score} = ${unit.zero};`), 6)}
${indent(multiplyValues, 6)}
${indent(multiplyScores, 6)}
      if (next >= count) {
        finished = true;
        break;
      }
${indent(storeScores, 6)}
      workgroupBarrier();

      let masking = ${masking};
${indent(blockSoftmax(tile, map, shape, unit), 6)}
      if (masking) {
${unroll(map.valueQuads, (i) => `        value${i} = finiteHalves(value${i});`)}
      }
${indent(storeValues, 6)}
${indent(storeRow("key"), 6)}
      next += 1u;
      if (workgroupUniformLoad(&rescale).x != 0u) { break; }
    }
    if (finished) { break; }
    // The scores are consumed, and their memory is free.
    if (t == 0u) { rescale = vec4<u32>(); }
${
    indent(
      everyOutput((row, _column, index) =>
        `let scaled = ${unit.readQuad(ownScores, index)} * rowFactor[${row}];
${unit.writeQuad(ownScores, index, "scaled")}`, true),
      4,
    )
  }
  }

  // A row that sees no key has no sum; a NaN sum is not 0 and must reach the output.
${indent(unit.combine("rowSum", rowThreads, "sum"), 2)}
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
${
    indent(
      everyOutput((blockRow, ownColumn, index) =>
        `let row = block.rowStart + ${blockRow};
let column = share * ${ownValues * fragmentSize}u + ${ownColumn};
if (row < block.rowEnd && column < params.V) {
  let factor = rowFactor[${blockRow}];
  let result = select(${unit.readQuad(ownScores, index)} * factor, vec4<f32>(), factor == 0.0);
  let offset = params.outputBase + row * params.outputRow + block.rangeItem * params.outputGap + head * params.outputHead;
${indent(store4("output", shape.output, "offset", "column", "params.V", "result"), 2)}
}`, false),
      2,
    )
  }
}
`;
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

fn loadQuery(block: Block, head: u32, firstRow: u32, quad: u32) -> vec4<u32> {
  let row = block.rowStart + firstRow;
  let at = quad * 8u;
  return packHalves(saturated(loadQuery4(block, head, row, at)), saturated(loadQuery4(block, head, row, at + 4u)));
}

// Past the last key stands the last one again: its scores are masked, and its values are multiplied by 0.
fn rowWithin(row: u32, block: Block) -> u32 { return min(row, max(block.columnEnd, 1u) - 1u); }`;
}
