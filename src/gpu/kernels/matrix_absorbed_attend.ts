// Absorbed attention on matrix units: f16 products, f32 sums and softmax. The contract is that of absorbed_operands.ts.
//
//   one workgroup = one work item: blockRows query rows × the item's keys, which stream through workgroup memory blockK at a
//     time. A latent row is read once for all rows; its first L columns serve as the value.
//   scores   the subgroups split rows × keys × depth, as far as there are row and key fragments; the rest splits depth, and
//            the softmax adds up what each part of the depth gave. Queries stay in registers.
//   outputs  each subgroup owns every n-th column fragment for all rows, in registers.
//   up to 16 keys to a block: the latents in two buffers, two barriers
//     one    outputs += probabilities · latents of block i − 1; scores of block i
//     other  store latents of i + 1, load those of i + 2, look up where those of i + 3 are; softmax of block i
//   more keys: one buffer, four barriers, behind outputs of i − 1, latents of i, scores of i, softmax of i
//
// Workgroup memory in quads of 16 bytes (512 + 64 wide; 64 × 16: 48,912 bytes, 16 × 32: 46,928):
//   latents  buffers · blockK · (D/8 + 1)       scores  blockRows · (parts · blockK/4 + 1)       D = L + R in whole fragments
//   probs    blockRows · blockK / 8, as 16 × 16 blocks                                         parts: of the depth
// Registers of an invocation with 64 × 16: outputs 128, queries 72, scores 8, latents on their way 20; with 16 × 32: 32 + 36
// + 8 + 36.
//
// Few rows are bound by memory, and one workgroup is resident on a multiprocessor: 32 keys on their way draw 2,590 GB/s
// where twice 16 drew 2,025 (H100, B 32, H 16, Sk 8192, attention alone). Many rows have no registers left for 32.
// The softmax is everybody's: invocations that share a quad of keys add up the parts of the depth between them.
//
// What a subgroup does stands in a case of its own, so that fragments lie at constant places: for others Dawn checks the
// bounds, which makes each load a branch. Only the choice of the buffer is left, to an array index, as which it is clamped.
// 64 rows on an H100, B 128, H 128, Sk 4096: 26 → 187 TFLOP/s. Outputs and scores share one case: apart they gave 66.
// Without gain: two blocks of 16 keys on their way (16 rows, B 32, Sk 8192: 146 µs for 144), four subgroups (169 for 150).
//
// Outputs are rescaled as in matrix_attend.ts: through workgroup memory, outside of the inner loop, and only when a row's
// maximum has grown by more than 8 (log2 units). Other rows are then multiplied by exactly 1: a row's result does not
// depend on what shares its block.
//
// Masking is by selection. Keys that do not exist, or whose page is not bound, are staged as zeros. A latent that is NaN or
// infinite would spoil rows that do not see it through 0 · NaN, so blocks that mask some rows clear it between the score
// products and the value products. A row that sees it still becomes NaN, through its score.

import { absorbedDeclarations, absorbedFunctions, type AbsorbedShape, rowQuads } from "./absorbed_operands.ts";
import { matrixAbsorbedLayout, type MatrixAbsorbedTile, ownStride } from "./matrix_absorbed_layout.ts";
import { halfRange } from "./matrix_scratch.ts";
import {
  fragmentQuads,
  fragmentSize,
  type MatrixBackend,
  type MatrixMemory,
  matrixUnit,
  subgroupSize,
} from "./matrix_unit.ts";
import { indent, unroll } from "./register_tile.ts";

/** WGSL of what a subgroup owns: its groups of rows and of keys, its part of the depth, and its index. */
interface Own {
  readonly row: string;
  readonly key: string;
  readonly depth: string;
  readonly subgroup: string;
}

/** The kernel's source. */
export function wgsl(tile: MatrixAbsorbedTile, shape: AbsorbedShape, backend: MatrixBackend): string {
  const { blockRows, blockK, subgroups } = tile;
  const { bounded, sharded, sinkQuads, kvLoraRank } = shape;
  const unit = matrixUnit(backend);
  const map = matrixAbsorbedLayout(tile, shape);
  const { workgroupSize, rowFragments, keyFragments, depthFragments, columnFragments } = map;
  const { rowGroups, keyGroups, depthParts, ownRows, ownKeys, ownDepth, ownColumns } = map;
  const { rowThreads, sharers, stageThreads, stageQuads, latentStride, scoreStride, buffers } = map;
  const { memories: { latents, scores, probs } } = map;
  const width = rowQuads(shape, "halves");
  const ownQuads = blockK / 4 / rowThreads;
  const softThreads = blockRows * rowThreads * sharers;

  const queries = unit.fragments("q", "left", ownRows, ownDepth);
  const sums = unit.fragments("s", "result", ownRows, ownKeys);
  const outputs = unit.fragments("o", "result", rowFragments, ownColumns);
  /** Code for the fragment that a share's `index` names, left out where there is none: the last ones may not go round. */
  const ifThere = (index: string, sharers: number, share: string, count: number, code: string) => {
    const last = isNaN(parseInt(index)) ? Math.ceil(count / sharers) - 1 : parseInt(index);
    if (!isNaN(parseInt(share))) return last * sharers + parseInt(share) < count ? code : "";
    return (last + 1) * sharers <= count
      ? code
      : `if (${index} * ${sharers}u + ${share} < ${count}u) {\n${indent(code, 2)}\n}`;
  };
  const columnFragment = (c: string, subgroup: string) => `(${c} * ${subgroups}u + ${subgroup})`;
  const everyScore = (emit: (score: string, row: string, key: string) => string) =>
    unit.over("r", ownRows, (r) => unit.over("k", ownKeys, (k) => emit(sums.at(r, k), r, k)));
  /** The quads of one row that an invocation carries from storage to workgroup memory, where they lie in `index`. */
  const stagedWidth = latentStride - 1;
  const carried = (index: string, value: (i: number, quad: string, at: string) => string) =>
    unroll(stageQuads, (i) => {
      const quad = `stageQuad + ${i * stageThreads}u`;
      const at = `stageRow * ${latentStride}u + ${quad}`;
      const code = `let staged = ${value(i, quad, at)};\n${unit.writeQuad(unit.part(latents, index), at, "staged")}`;
      const condition = (i + 1) * stageThreads <= stagedWidth ? "" : `if (${quad} < ${stagedWidth}u) `;
      return `${condition}{\n${indent(code, 2)}\n}`;
    });
  // Loads stand outside of branches: those inside of one each wait for memory by itself (16 rows on an H100:
  // 1,739 → 2,020 GB/s, together with constant places of fragments). What is loaded for a row that does not exist is dropped when it is stored.
  const load = (source: string, start: string, name: string) =>
    unroll(stageQuads, (i) => {
      const quad = `stageQuad + ${i * stageThreads}u`;
      const clamped = (i + 1) * stageThreads <= width ? quad : `min(${quad}, ROW_QUADS - 1u)`;
      return `${name}${i} = ${source}[${start} + ${clamped}];`;
    });
  const store = (index: string, name: string, exists: string) =>
    carried(index, (i, quad) => {
      const there = width === stagedWidth ? exists : `${exists} && ${quad} < ROW_QUADS`;
      return `select(vec4<u32>(), ${name}${i}, ${there})`;
    });
  const clear = (index: string) =>
    carried(index, (_i, _quad, at) => `finiteHalves(${readHalves(unit.part(latents, index), at, backend)})`);

  const current = buffers === 1 ? "0u" : "(block & 1u)";
  const previous = buffers === 1 ? "0u" : "((block + 1u) & 1u)";
  /** The buffer that queries pass through, and that is zero at first. */
  const spare = `${buffers - 1}u`;

  /** Code of every subgroup, with what it owns as constants; emulated, that is known at run time. */
  const bySubgroup = (code: (own: Own) => string) =>
    unit.cases("subgroup", subgroups, (index) => {
      const i = parseInt(index);
      if (isNaN(i)) return code({ row: "rowGroup", key: "keyGroup", depth: "depthPart", subgroup: "subgroup" });
      return code({
        row: `${Math.floor(i / keyGroups / depthParts)}u`,
        key: `${Math.floor(i / depthParts) % keyGroups}u`,
        depth: `${i % depthParts}u`,
        subgroup: index,
      });
    });
  const multiplyScores = (own: Own) =>
    unit.over("d", ownDepth, (d) =>
      ifThere(
        d,
        depthParts,
        own.depth,
        depthFragments,
        unit.over("k", ownKeys, (k) => {
          const at = `(${own.key} * ${ownKeys}u + ${k}) * ${
            fragmentSize * latentStride
          }u + (${d} * ${depthParts}u + ${own.depth}) * ${fragmentQuads}u`;
          const key = unit.right("key", unit.part(latents, current), at, latentStride, "column");
          return `${key.code}
${unit.over("r", ownRows, (r) => unit.accumulate(sums.at(r, k), queries.at(r, d), key))}`;
        }),
      ));
  const multiplyValues = ({ subgroup }: Own) =>
    unit.over("k", keyFragments, (k) => {
      const values = Array.from({ length: ownColumns }, (_, c) => {
        const at = `${k} * ${fragmentSize * latentStride}u + ${columnFragment(`${c}u`, subgroup)} * ${fragmentQuads}u`;
        return unit.right(`value${c}`, unit.part(latents, previous), at, latentStride, "row");
      });
      const overColumns = (code: (c: number) => string) =>
        unroll(ownColumns, (c) => ifThere(`${c}u`, subgroups, subgroup, columnFragments, code(c)));
      return `${unit.native ? overColumns((c) => values[c].code) : values.map(({ code }) => code).join("\n")}
${
        unit.over("r", rowFragments, (r) => {
          const at = `(${r} * ${keyFragments}u + ${k}) * ${fragmentSize * fragmentQuads}u`;
          return `let prob = ${unit.loadLeft(probs, at, fragmentQuads)};
${overColumns((c) => unit.accumulate(outputs.at(r, `${c}u`), "prob", values[c]))}`;
        })
      }`;
    });
  const storeScores = (own: Own) =>
    everyScore((score, r, k) =>
      unit.storeResult(
        scores,
        `(${own.row} * ${ownRows}u + ${r}) * ${fragmentSize * scoreStride}u + ${own.depth} * ${
          blockK / 4
        }u + (${own.key} * ${ownKeys}u + ${k}) * 4u`,
        scoreStride,
        score,
      )
    );

  /** Queries pass through the last buffer of latents, blockK rows at a time. */
  const loadQueries = unroll(Math.ceil(blockRows / blockK), (round) =>
    `{
  let row = ${round * blockK}u + stageRow;
  let exists = row < item.rows;
  let origin = params.queryBase + select(0u, item.row + row, exists) * ROW_QUADS;
${unroll(stageQuads, (i) => `  var part${i}: vec4<u32>;`)}
${indent(load("query", "origin", "part"), 2)}
  workgroupBarrier();
${indent(store(spare, "part", "exists"), 2)}
  workgroupBarrier();
${
      indent(
        bySubgroup((own) =>
          unit.over("r", ownRows, (r) => {
            const fragment = `(${own.row} * ${ownRows}u + ${r})`;
            const code = unit.over("d", ownDepth, (d) => {
              const at = `${fragment} % ${keyFragments}u * ${
                fragmentSize * latentStride
              }u + (${d} * ${depthParts}u + ${own.depth}) * ${fragmentQuads}u`;
              return ifThere(
                d,
                depthParts,
                own.depth,
                depthFragments,
                `${queries.at(r, d)} = ${unit.loadLeft(unit.part(latents, spare), at, latentStride)};`,
              );
            });
            const mine = parseInt(own.row) * ownRows + parseInt(r);
            if (!isNaN(mine)) return Math.floor(mine / keyFragments) === round ? code : "";
            return `if (${fragment} / ${keyFragments}u == ${round}u) {\n${indent(code, 2)}\n}`;
          })
        ),
        2,
      )
    }
}`);

  const masked = unroll(ownQuads, (j) =>
    `{
  let key = vec4<i32>(i32(keyBase + 4u * (softPart * ${ownQuads}u + ${j}u))) + vec4<i32>(0, 1, 2, 3);
  let seen = ${
      bounded ? "(key < vec4<i32>(seenEnd)) & (key >= vec4<i32>(seenStart))" : "key < vec4<i32>(i32(item.keyEnd))"
    };
  x${j} = select(vec4<f32>(MASKED), x${j}, seen);
${
      sharded
        ? indent(
          unroll(4, (i) =>
            `if (seen[${i}]) {
  if (cacheRowOf(item.sequence, u32(key[${i}])) == ABSENT) { x${j}[${i}] = MASKED; }
}`),
          2,
        )
        : ""
    }
}`);
  const softmax = `${
    unroll(ownQuads, (j) => {
      const parts = Array.from({ length: depthParts / sharers }, (_, i) => {
        const part = sharers === 1 ? `${i * blockK / 4}u` : `(softShare + ${i * sharers}u) * ${blockK / 4}u`;
        return unit.readQuad(scores, `softRow * ${scoreStride}u + ${part} + softPart * ${ownQuads}u + ${j}u`);
      });
      return `var x${j} = ${parts.join(" +\n  ")};
${unit.sumQuads(`x${j}`, rowThreads, sharers)}
x${j} = scoreOf(x${j});`;
    })
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
var decay = 1.0;
if (blockTop > rowTop + 8.0) {
  // What was summed so far is zero before the first visible key.
  if (rowTop > UNSEEN) { rescale.x = 1u; }
  decay = exp2(rowTop - blockTop);
  rowTop = blockTop;
  rowSum *= decay;
}
if (isFirst) { rowFactor[softRow] = decay; }
${unroll(ownQuads, (j) => `var p${j} = exp2(x${j} - rowTop);`)}
if (masking) {
${unroll(ownQuads, (j) => `  p${j} = select(p${j}, vec4<f32>(), x${j} <= vec4<f32>(UNSEEN));`)}
}
${unroll(ownQuads, (j) => `rowSum += (p${j}.x + p${j}.y) + (p${j}.z + p${j}.w);`)}
if (isWriting) {
${
    unroll(ownQuads, (j) => {
      // Halves of a row of a 16 × 16 block, four at a time.
      const four = `(softPart * ${ownQuads}u + ${j}u)`;
      const at = `((softRow / 16u * ${keyFragments}u + ${four} / 4u) * 16u + softRow % 16u) * 4u + ${four} % 4u`;
      return indent(unit.writeFour(probs, at, `p${j}`), 2);
    })
  }
}`;
  // Idle subgroups skip it; the emulation's barriers do not let them.
  const guardedSoftmax = unit.native && softThreads < workgroupSize
    ? `if (isSoft) {\n${indent(softmax, 2)}\n}`
    : softmax;
  const masking = sharded
    ? "true"
    : bounded
    ? "i32(keyBase) < sharedStart || i32(keyBase + BLOCK_K) > sharedEnd"
    : "keyBase + BLOCK_K > item.keyEnd";

  /** Each output fragment by way of workgroup memory: two quads of it to each lane. */
  const everyOutput = (emit: (row: string, fragment: string, quad: string, index: string) => string, again: boolean) =>
    unit.over("r", rowFragments, (r) =>
      unit.over("c", ownColumns, (c) => {
        const there = (code: string) => ifThere(c, subgroups, "subgroup", columnFragments, code);
        const output = outputs.at(r, c);
        return `${there(unit.storeResult(scores, "own", ownStride, output))}
workgroupBarrier();
${
          there(unroll(2, (i) =>
            `{
  let quad = (lane + ${i * subgroupSize}u) % 4u;
  let ownRow = (lane + ${i * subgroupSize}u) / 4u;
  let index = own + ownRow * ${ownStride}u + quad;
${indent(emit(`(${r} * 16u + ownRow)`, columnFragment(c, "subgroup"), "quad", "index"), 2)}
}`))
        }
workgroupBarrier();${
          again ? `\n${there(`${output} = ${unit.loadResult(scores, "own", ownStride)};`)}\nworkgroupBarrier();` : ""
        }`;
      }));

  const fetch = `exists = nextRow != ABSENT;
nextRow = select(params.cacheBase, nextRow, exists);
${load("cache", "nextRow", "latent")}`;
  const clearScores = everyScore((score) => `${score} = ${unit.zero};`);
  const keyBase = `let keyBase = item.keyStart + block * BLOCK_K;
let masking = ${masking};`;
  /** From the outputs of the block before to the scores of this one. */
  const inTwoBuffers = `if (block < count) {
${indent(clearScores, 2)}
${indent(bySubgroup((own) => `${multiplyValues(own)}\n${multiplyScores(own)}\n${storeScores(own)}`), 2)}
} else {
${indent(bySubgroup(multiplyValues), 2)}
  finished = true;
  break;
}
workgroupBarrier();

${keyBase}
${store(previous, "latent", "exists")}
${fetch}
nextRow = latentRowOf(item, keyBase + 3u * BLOCK_K + stageRow);`;
  const inOneBuffer = `${bySubgroup(multiplyValues)}
if (block >= count) {
  finished = true;
  break;
}
workgroupBarrier();

${keyBase}
${store("0u", "latent", "exists")}
${fetch}
nextRow = latentRowOf(item, keyBase + 2u * BLOCK_K + stageRow);
workgroupBarrier();

${clearScores}
${bySubgroup((own) => `${multiplyScores(own)}\n${storeScores(own)}`)}
workgroupBarrier();
`;
  return `${unit.directives}// Absorbed attention on matrix units.
// blockRows ${blockRows}, blockK ${blockK}, ${subgroups} subgroups: ${rowGroups} of rows × ${keyGroups} of keys × ${depthParts} of depth
const BLOCK_ROWS = ${blockRows}u;
const BLOCK_K = ${blockK}u;
const ROW_QUADS = ${width}u;
${absorbedDeclarations(shape, { pinned: tile.pinned })}

${unit.declarations([latents, scores, probs])}
var<workgroup> rowFactor: array<f32, ${blockRows}>;
var<workgroup> rescale: vec4<u32>; // x is set once a row's maximum has outgrown what its sums are relative to

${halfRange}

${absorbedFunctions(shape)}

// Where a key's latents are; nothing is looked up past the item's keys.
fn latentRowOf(item: Item, key: u32) -> u32 {
  if (key >= item.keyEnd) { return ABSENT; }
  return cacheRowOf(item.sequence, key);
}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
${unit.prologue}
  let itemIndex = workgroup.x + workgroup.y * params.gridX;
  if (itemIndex >= params.itemCount) { return; }
  let item = items[itemIndex];
  if (item.rows == 0u) { return; }
  let rowGroup = subgroup / ${keyGroups * depthParts}u;
  let keyGroup = subgroup / ${depthParts}u % ${keyGroups}u;
  let depthPart = subgroup % ${depthParts}u;
  let stageRow = t / ${stageThreads}u;
  let stageQuad = t % ${stageThreads}u;
  let softRow = t / ${rowThreads * sharers}u % BLOCK_ROWS;
  let softShare = t / ${rowThreads}u % ${sharers}u;
  let softPart = t % ${rowThreads}u;
  let isSoft = t < ${softThreads}u;
  let isWriting = isSoft && softShare == 0u;
  let isFirst = isWriting && softPart == 0u;
  let own = subgroup * ${fragmentSize * ownStride}u;
  let count = (item.keyEnd - item.keyStart + BLOCK_K - 1u) / BLOCK_K;
  let row = item.row + softRow;
${
    bounded
      ? `  // Keys that all rows see, and those that this invocation's row sees.
  let sharedStart = item.diagonal + i32((item.row + item.rows - 1u) / params.heads) - params.left;
  let sharedEnd = min(item.diagonal + i32(item.row / params.heads) + params.right + 1, i32(item.keyEnd));
  let position = item.diagonal + i32(row / params.heads);
  let seenStart = position - params.left;
  let seenEnd = min(position + params.right + 1, i32(item.keyEnd));`
      : ""
  }
  var rowTop = MASKED;
  var rowSum = 0.0;
${indent([queries, sums, outputs].map(({ declaration }) => declaration).join("\n"), 2)}
${unroll(stageQuads, (i) => `  var latent${i}: vec4<u32>;`)}
  var exists: bool;

  var nextRow = latentRowOf(item, item.keyStart + stageRow);
${indent(fetch, 2)}
  nextRow = latentRowOf(item, item.keyStart + BLOCK_K + stageRow);
  if (t == 0u) { rescale = vec4<u32>(); }
${indent(loadQueries, 2)}
  workgroupBarrier();
${
    buffers === 1 ? "" : `${indent(store("0u", "latent", "exists"), 2)}
${indent(fetch, 2)}
  nextRow = latentRowOf(item, item.keyStart + 2u * BLOCK_K + stageRow);`
  }
  // The first round of outputs adds zeros.
  let nothing = vec4<u32>();
${indent(store(spare, "latent", "false"), 2)}
  for (var i = t; i < ${probs.quads}u; i += ${workgroupSize}u) {
${indent(unit.writeQuad(probs, "i", "nothing"), 4)}
  }
  workgroupBarrier();

  var block = 0u; // the block to be scored; the outputs of the one before are still to be summed
  var finished = false;
  loop {
    loop {
${indent(buffers === 1 ? inOneBuffer : inTwoBuffers, 6)}
${indent(guardedSoftmax, 6)}
${bounded ? `      if (masking) {\n${indent(clear(current), 8)}\n      }` : ""}
      block += 1u;
      if (workgroupUniformLoad(&rescale).x != 0u) { break; }
    }
    if (finished) { break; }
    // The scores are consumed, and their memory is free.
    if (t == 0u) { rescale = vec4<u32>(); }
${
    indent(
      everyOutput((row, _fragment, _quad, index) =>
        `let scaled = ${unit.readQuad(scores, index)} * rowFactor[${row}];
${unit.writeQuad(scores, index, "scaled")}`, true),
      4,
    )
  }
  }

  // A row that sees no key has no sum; a NaN sum is not 0 and must reach the output.
${indent(unit.combine("rowSum", rowThreads, "sum"), 2)}
  let isAlone = item.slot == NO_SLOT;
${
    sinkQuads === 0
      ? `  let top = rowTop;
  let total = rowSum;
  var part = select(1.0 / total, 0.0, total == 0.0);`
      : `  let head = row % params.heads;
  let sink = sinks[head / 4u][head % 4u];
  let top = max(rowTop, sink);
  let down = exp2(rowTop - top);
  let total = select(rowSum * down + exp2(sink - top), 0.0, rowSum == 0.0);
  var part = select(down / total, 0.0, rowSum == 0.0);`
  }
  if (!isAlone) { part = select(1.0, 0.0, rowSum == 0.0); }
  if (isFirst && softRow < item.rows) {
    rowFactor[softRow] = part;
    if (!isAlone) {
      stats[item.slot * BLOCK_ROWS + softRow] = vec2<f32>(rowTop, rowSum);
    }${
    shape.lse
      ? " else {\n      storeLse(row, select((top + log2(total)) * LN2, params.minusInfinity, total == 0.0));\n    }"
      : ""
  }
  }
  workgroupBarrier();
${
    indent(
      everyOutput((row, fragment, quad, index) =>
        `let resultQuad = ${fragment} * 4u + ${quad};
if (${row} < item.rows && resultQuad < RESULT_QUADS) {
  let factor = rowFactor[${row}];
  ${kvLoraRank % 4 === 0 ? "let" : "var"} result = select(${
          unit.readQuad(scores, index)
        } * factor, vec4<f32>(), factor == 0.0);
${
          kvLoraRank % 4 === 0 ? "" : `  let column = vec4<u32>(4u * resultQuad) + vec4<u32>(0u, 1u, 2u, 3u);
  result = select(vec4<f32>(), result, column < vec4<u32>(${kvLoraRank}u));\n`
        }  if (isAlone) {
    storeResult(item.row + ${row}, resultQuad, result);
  } else {
    partial[(item.slot * BLOCK_ROWS + ${row}) * RESULT_QUADS + resultQuad] = result;
  }
}`, false),
      2,
    )
  }
}
`;
}

/** WGSL expression of a quad of halves; {@link MatrixUnit.readQuad} has them in quads alone. */
function readHalves({ name, start = "" }: MatrixMemory, index: string, backend: MatrixBackend): string {
  if (backend !== "flag") return `${name}[${start}${index}]`;
  const word = (i: number) => {
    const at = `${name}[8u * (${index}) + ${2 * i}u`;
    return `bitcast<u32>(vec2<f16>(${at}], ${at} + 1u]))`;
  };
  return `vec4<u32>(${[0, 1, 2, 3].map(word).join(", ")})`;
}
