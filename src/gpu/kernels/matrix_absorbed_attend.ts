// Absorbed attention on matrix units: f16 products, f32 sums and softmax. The contract is that of absorbed_operands.ts.
//
//   one workgroup = one work item: blockRows query rows × the item's keys, which stream through workgroup memory blockK at a
//     time. A latent row is read once for all rows; its first L columns serve as the value.
//   scores   the subgroups split rows × keys × depth, as far as there are row and key fragments; the rest splits depth, and
//            the softmax adds up what each part of the depth gave. Queries stay in registers.
//   outputs  each subgroup owns every n-th column fragment for all rows, in registers.
//   two barriers to a key block, the latents in two buffers:
//     one    outputs += probabilities · latents of block i − 1; scores of block i
//     other  store latents of i + 1, load those of i + 2, look up where those of i + 3 are; softmax of block i
//
// Workgroup memory in quads of 16 bytes (512 + 64 wide, 64 × 16, 8 subgroups: 48,912 bytes):
//   latents  2 · blockK · (D/8 + 1)       scores  blockRows · (parts · blockK/4 + 1)       D = L + R in whole fragments
//   probs    blockRows · blockK / 8, as 16 × 16 blocks                                   parts: of the depth
// Registers of an invocation there: outputs 128, queries 72, scores 8, latents on their way 20. 16 rows with 8 subgroups
// take 32 + 20 + 8 + 20, and two workgroups share a multiprocessor.
//
// Outputs are rescaled as in matrix_attend.ts: through workgroup memory, outside of the inner loop, and only when a row's
// maximum has grown by more than 8 (log2 units). Other rows are then multiplied by exactly 1: a row's result does not
// depend on what shares its block.
//
// Masking is by selection. Keys that do not exist, or whose page is not bound, are staged as zeros. A latent that is NaN or
// infinite would spoil rows that do not see it through 0 · NaN, so blocks that mask some rows clear it between the score
// products and the value products. A row that sees it still becomes NaN, through its score.

import type { Capabilities } from "../capabilities.ts";
import { absorbedDeclarations, absorbedFunctions, type AbsorbedShape, rowQuads } from "./absorbed_operands.ts";
import { halfRange } from "./matrix_scratch.ts";
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

/** The tile of one kernel. */
export interface MatrixAbsorbedTile {
  /** Query rows of a workgroup: 16, 32 or 64. */
  readonly blockRows: number;
  /** Keys of a block. */
  readonly blockK: number;
  /** Subgroups of a workgroup. */
  readonly subgroups: number;
  /** Whether the cache is bound as writable, which keeps some drivers from moving its loads to where they are used. */
  readonly pinned: boolean;
  readonly variant?: string;
}

/** What of a shape a layout depends on. */
type LatentWidths = Pick<AbsorbedShape, "kvLoraRank" | "qkRopeHeadDim">;

/** How a tile is laid out. */
interface Layout {
  readonly workgroupSize: number;
  readonly rowFragments: number;
  readonly keyFragments: number;
  readonly depthFragments: number;
  readonly columnFragments: number;
  /** How subgroups split the scores. */
  readonly rowGroups: number;
  readonly keyGroups: number;
  readonly depthParts: number;
  /** Fragments of one subgroup, at the most. */
  readonly ownRows: number;
  readonly ownKeys: number;
  readonly ownDepth: number;
  readonly ownColumns: number;
  /** Invocations to a row in the softmax. */
  readonly rowThreads: number;
  /** Invocations to a latent row, and quads that each carries. */
  readonly stageThreads: number;
  readonly stageQuads: number;
  readonly latentStride: number;
  readonly scoreStride: number;
  readonly memories: { readonly latents: MatrixMemory; readonly scores: MatrixMemory; readonly probs: MatrixMemory };
}

/** Quads from one row to the next of a result fragment that is stored by itself: memory is too short for odd strides. */
const ownStride = fragmentSize / 4;

function layout({ blockRows, blockK, subgroups }: MatrixAbsorbedTile, widths: LatentWidths): Layout {
  const workgroupSize = subgroups * subgroupSize;
  const rowFragments = blockRows / fragmentSize;
  const keyFragments = blockK / fragmentSize;
  const depthFragments = Math.ceil((widths.kvLoraRank + widths.qkRopeHeadDim) / fragmentSize);
  const columnFragments = Math.ceil(widths.kvLoraRank / fragmentSize);
  const rowGroups = Math.min(rowFragments, subgroups);
  const keyGroups = Math.min(keyFragments, subgroups / rowGroups);
  const depthParts = subgroups / rowGroups / keyGroups;
  const stageThreads = workgroupSize / blockK;
  const latentStride = depthFragments * fragmentQuads + 1;
  const scoreStride = depthParts * blockK / 4 + 1;
  return {
    ...{ workgroupSize, rowFragments, keyFragments, depthFragments, columnFragments, rowGroups, keyGroups, depthParts },
    ownRows: rowFragments / rowGroups,
    ownKeys: keyFragments / keyGroups,
    ownDepth: Math.ceil(depthFragments / depthParts),
    ownColumns: Math.ceil(columnFragments / subgroups),
    // Eight keys at least to an invocation: a quad of probabilities.
    rowThreads: Math.min(workgroupSize / blockRows, blockK / 8),
    stageThreads,
    stageQuads: Math.ceil((latentStride - 1) / stageThreads),
    latentStride,
    scoreStride,
    memories: {
      latents: { name: "latents", kind: "halves", quads: 2 * blockK * latentStride },
      scores: {
        name: "scores",
        kind: "floats",
        quads: Math.max(blockRows * scoreStride, subgroups * fragmentSize * ownStride),
      },
      probs: { name: "probs", kind: "halves", quads: blockRows * blockK / 8 },
    },
  };
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(tile: MatrixAbsorbedTile, widths: LatentWidths): number {
  return memoryBytes(Object.values(layout(tile, widths).memories)) + 4 * tile.blockRows + 16;
}

/** Why this tile cannot run, or null when it can. Whether the device has matrix units is the caller's to know. */
export function whyInvalid(
  tile: MatrixAbsorbedTile,
  shape: LatentWidths & Partial<Pick<AbsorbedShape, "query" | "cache">>,
  { limits }: Pick<Capabilities, "limits">,
): string | null {
  const { blockRows, blockK, subgroups } = tile;
  if (shape.query === "floats" || shape.cache === "floats") return "matrix units take queries and latents in halves";
  const isPower = (n: number) => Number.isInteger(Math.log2(n));
  if (!(blockRows >= fragmentSize && isPower(blockRows))) return `blockRows ${blockRows} is not 16, 32 or 64`;
  if (!(blockK >= fragmentSize && isPower(blockK))) return `blockK ${blockK} is not 16, 32 or 64`;
  if (!(subgroups >= 1 && isPower(subgroups))) return `${subgroups} subgroups are no power of two`;
  const { workgroupSize, ownRows, ownKeys, ownDepth, ownColumns, stageQuads, rowFragments } = layout(tile, shape);
  if (blockRows > workgroupSize || blockK > workgroupSize) {
    return `${workgroupSize} invocations are fewer than the rows of ${blockRows} × ${blockK}`;
  }
  const registers = rowFragments * ownColumns * 8 + ownRows * (ownDepth * 4 + ownKeys * 8) + stageQuads * 4;
  if (registers > 228) {
    return `${registers} registers per invocation for fragments and latents, at most 228 are to be had`;
  }
  if (workgroupSize > limits.maxComputeInvocationsPerWorkgroup) {
    return `${workgroupSize} invocations pass maxComputeInvocationsPerWorkgroup = ${limits.maxComputeInvocationsPerWorkgroup}`;
  }
  const bytes = workgroupBytes(tile, shape);
  return bytes <= limits.maxComputeWorkgroupStorageSize
    ? null
    : `${bytes} bytes of workgroup memory pass maxComputeWorkgroupStorageSize = ${limits.maxComputeWorkgroupStorageSize}`;
}

/** The kernel's source. */
export function wgsl(tile: MatrixAbsorbedTile, shape: AbsorbedShape, backend: MatrixBackend): string {
  const { blockRows, blockK, subgroups } = tile;
  const { bounded, sharded, sinkQuads, kvLoraRank } = shape;
  const unit = matrixUnit(backend);
  const map = layout(tile, shape);
  const { workgroupSize, rowFragments, keyFragments, depthFragments, columnFragments } = map;
  const { rowGroups, keyGroups, depthParts, ownRows, ownKeys, ownDepth, ownColumns } = map;
  const { rowThreads, stageThreads, stageQuads, latentStride, scoreStride } = map;
  const { memories: { latents, scores, probs } } = map;
  const ownQuads = blockK / 4 / rowThreads;
  const softThreads = blockRows * rowThreads;
  const variant = tile.variant ?? "";

  const queries = unit.fragments("q", "left", ownRows, ownDepth);
  const sums = unit.fragments("s", "result", ownRows, ownKeys);
  const outputs = unit.fragments("o", "result", rowFragments, ownColumns);
  /** WGSL index of a subgroup's row fragment, key fragment and depth fragment of scores, and column fragment of outputs. */
  const rowFragment = (r: string) => `(rowGroup * ${ownRows}u + ${r})`;
  const keyFragment = (k: string) => `(keyGroup * ${ownKeys}u + ${k})`;
  const depthFragment = (d: string) => `(${d} * ${depthParts}u + depthPart)`;
  const columnFragment = (c: string) => `(${c} * ${subgroups}u + subgroup)`;
  /** Code for the fragment that `index` names, left out where a subgroup has none: the last ones may not go round. */
  const ifThere = (index: string, sharers: number, fragment: string, count: number, code: string) => {
    const last = unit.native ? parseInt(index) : Math.ceil(count / sharers) - 1;
    return (last + 1) * sharers <= count ? code : `if (${fragment} < ${count}u) {\n${indent(code, 2)}\n}`;
  };
  const overDepth = (step: (d: string, fragment: string) => string) =>
    unit.over("d", ownDepth, (d) => {
      const fragment = depthFragment(d);
      return ifThere(d, depthParts, fragment, depthFragments, step(d, fragment));
    });
  const overColumns = (step: (c: string, fragment: string) => string) =>
    unit.over("c", ownColumns, (c) => {
      const fragment = columnFragment(c);
      return ifThere(c, subgroups, fragment, columnFragments, step(c, fragment));
    });
  const everyScore = (emit: (score: string, row: string, key: string) => string) =>
    unit.over("r", ownRows, (r) => unit.over("k", ownKeys, (k) => emit(sums.at(r, k), r, k)));

  /** The quads of one row that an invocation carries from storage to workgroup memory. */
  const carried = (emit: (i: number, quad: string) => string, width = latentStride - 1) =>
    unroll(stageQuads, (i) => {
      const code = emit(i, `stageQuad + ${i * stageThreads}u`);
      if ((i + 1) * stageThreads <= width) return code;
      return i * stageThreads >= width
        ? ""
        : `if (stageQuad + ${i * stageThreads}u < ${width}u) {\n${indent(code, 2)}\n}`;
    });
  const load = (buffer: string, at: string, name: string) =>
    `${unroll(stageQuads, (i) => `${name}${i} = vec4<u32>();`)}
if (${at} != ABSENT) {
${indent(carried((i, quad) => `${name}${i} = ${buffer}[${at} + ${quad}];`, rowQuads(shape, "halves")), 2)}
}`;
  const place = (buffer: string, quad: string) =>
    `(${buffer}) * ${blockK * latentStride}u + stageRow * ${latentStride}u + ${quad}`;
  const store = (buffer: string, name: string) =>
    carried((i, quad) => unit.writeQuad(latents, place(buffer, quad), `${name}${i}`));
  const clear = (buffer: string) =>
    carried((i, quad) =>
      `let finite${i} = finiteHalves(${readHalves(latents, place(buffer, quad), backend)});
${unit.writeQuad(latents, place(buffer, quad), `finite${i}`)}`
    );

  const multiplyScores = overDepth((d, fragment) =>
    unit.over("k", ownKeys, (k) => {
      const at = `(block & 1u) * ${blockK * latentStride}u + ${keyFragment(k)} * ${
        fragmentSize * latentStride
      }u + ${fragment} * ${fragmentQuads}u`;
      const key = unit.right("key", latents, at, latentStride, "column");
      return `${key.code}
${unit.over("r", ownRows, (r) => unit.accumulate(sums.at(r, k), queries.at(r, d), key))}`;
    })
  );
  const multiplyValues = unit.over("k", keyFragments, (k) =>
    `${
      unroll(rowFragments, (r) => {
        const at = `(${r * keyFragments}u + ${k}) * ${fragmentSize * fragmentQuads}u`;
        return `let prob${r} = ${unit.loadLeft(probs, at, fragmentQuads)};`;
      })
    }
${
      overColumns((c, fragment) => {
        const at = `((block + 1u) & 1u) * ${blockK * latentStride}u + ${k} * ${
          fragmentSize * latentStride
        }u + ${fragment} * ${fragmentQuads}u`;
        const value = unit.right("value", latents, at, latentStride, "row");
        return `${value.code}
${unroll(rowFragments, (r) => unit.accumulate(outputs.at(`${r}u`, c), `prob${r}`, value))}`;
      })
    }`);
  const storeScores = everyScore((score, r, k) =>
    unit.storeResult(
      scores,
      `${rowFragment(r)} * ${fragmentSize * scoreStride}u + depthPart * ${blockK / 4}u + ${keyFragment(k)} * 4u`,
      scoreStride,
      score,
    )
  );

  /** Queries pass through the second buffer of latents, blockK rows at a time. */
  const loadQueries = unit.over("round", Math.ceil(blockRows / blockK), (round) =>
    `{
  let row = ${round} * ${blockK}u + stageRow;
  let at = select(ABSENT, params.queryBase + (item.row + row) * ROW_QUADS, row < item.rows);
${unroll(stageQuads, (i) => `  var part${i}: vec4<u32>;`)}
${indent(load("query", "at", "part"), 2)}
  workgroupBarrier();
${indent(store("1u", "part"), 2)}
  workgroupBarrier();
${
      indent(
        unit.over("r", ownRows, (r) =>
          `if (${rowFragment(r)} / ${keyFragments}u == ${round}) {
${
            indent(
              overDepth((d, fragment) => {
                const at = `${blockK * latentStride}u + ${rowFragment(r)} % ${keyFragments}u * ${
                  fragmentSize * latentStride
                }u + ${fragment} * ${fragmentQuads}u`;
                return `${queries.at(r, d)} = ${unit.loadLeft(latents, at, latentStride)};`;
              }),
              2,
            )
          }
}`),
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
      const parts = Array.from({ length: depthParts }, (_, part) => {
        const at = `softRow * ${scoreStride}u + ${part * blockK / 4 + j}u + softPart * ${ownQuads}u`;
        return unit.readQuad(scores, at);
      });
      return `var x${j} = scoreOf(${parts.join(" +\n  ")});`;
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
${unit.combine("blockTop", rowThreads, "max", workgroupSize)}
var decay = 1.0;
if (blockTop > rowTop + 8.0) {
  // What was summed so far is zero before the first visible key.
  if (rowTop > UNSEEN) { rescale.x = 1u; }
  decay = exp2(rowTop - blockTop);
  rowTop = blockTop;
  rowSum *= decay;
}
if (softPart == 0u && isSoft) { rowFactor[softRow] = decay; }
${unroll(ownQuads, (j) => `var p${j} = exp2(x${j} - rowTop);`)}
if (masking) {
${unroll(ownQuads, (j) => `  p${j} = select(p${j}, vec4<f32>(), x${j} <= vec4<f32>(UNSEEN));`)}
}
${unroll(ownQuads, (j) => `rowSum += (p${j}.x + p${j}.y) + (p${j}.z + p${j}.w);`)}
if (isSoft) {
${
    unroll(ownQuads / 2, (q) => {
      const quad = `(softPart * ${ownQuads / 2}u + ${q}u)`;
      const at = `((softRow / 16u * ${keyFragments}u + ${quad} / 2u) * 16u + softRow % 16u) * 2u + ${quad} % 2u`;
      return `  let packed${q} = packHalves(p${2 * q}, p${2 * q + 1});
${indent(unit.writeQuad(probs, at, `packed${q}`), 2)}`;
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
        const there = (code: string) => ifThere(c, subgroups, columnFragment(c), columnFragments, code);
        const output = outputs.at(r, c);
        return `${there(unit.storeResult(scores, "own", ownStride, output))}
workgroupBarrier();
${
          there(unroll(2, (i) =>
            `{
  let quad = (lane + ${i * subgroupSize}u) % 4u;
  let ownRow = (lane + ${i * subgroupSize}u) / 4u;
  let index = own + ownRow * ${ownStride}u + quad;
${indent(emit(`(${r} * 16u + ownRow)`, columnFragment(c), "quad", "index"), 2)}
}`))
        }
workgroupBarrier();${
          again ? `\n${there(`${output} = ${unit.loadResult(scores, "own", ownStride)};`)}\nworkgroupBarrier();` : ""
        }`;
      }));

  return `${unit.directives}// Absorbed attention on matrix units.
// blockRows ${blockRows}, blockK ${blockK}, ${subgroups} subgroups: ${rowGroups} of rows × ${keyGroups} of keys × ${depthParts} of depth
const BLOCK_ROWS = ${blockRows}u;
const BLOCK_K = ${blockK}u;
const ROW_QUADS = ${rowQuads(shape, "halves")}u;
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
  let rowGroup = subgroup / ${keyGroups * depthParts}u;
  let keyGroup = subgroup / ${depthParts}u % ${keyGroups}u;
  let depthPart = subgroup % ${depthParts}u;
  let stageRow = t / ${stageThreads}u;
  let stageQuad = t % ${stageThreads}u;
  let softRow = t / ${rowThreads}u % BLOCK_ROWS;
  let softPart = t % ${rowThreads}u;
  let isSoft = t < ${softThreads}u;
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

  var nextRow = latentRowOf(item, item.keyStart + stageRow);
${indent(load("cache", "nextRow", "latent"), 2)}
  nextRow = latentRowOf(item, item.keyStart + BLOCK_K + stageRow);
  if (t == 0u) { rescale = vec4<u32>(); }
${indent(loadQueries, 2)}
  workgroupBarrier();
${indent(store("0u", "latent"), 2)}
${indent(load("cache", "nextRow", "latent"), 2)}
  nextRow = latentRowOf(item, item.keyStart + 2u * BLOCK_K + stageRow);
  // The first round of outputs adds zeros.
  let nothing = vec4<u32>();
${indent(carried((_, quad) => unit.writeQuad(latents, place("1u", quad), "nothing")), 2)}
  for (var i = t; i < ${probs.quads}u; i += ${workgroupSize}u) {
${indent(unit.writeQuad(probs, "i", "nothing"), 4)}
  }
  workgroupBarrier();

  var block = 0u; // the block to be scored; the outputs of the one before are still to be summed
  var finished = false;
  loop {
    loop {
${indent(multiplyValues, 6)}
      if (block >= count) {
        finished = true;
        break;
      }
${indent(everyScore((score) => `${score} = ${unit.zero};`), 6)}
${indent(multiplyScores, 6)}
${indent(storeScores, 6)}
      workgroupBarrier();

      let keyBase = item.keyStart + block * BLOCK_K;
      let masking = ${masking};
${variant.includes("softFirst") ? indent(guardedSoftmax, 6) : ""}
${indent(store("(block + 1u) & 1u", "latent"), 6)}
${indent(load("cache", "nextRow", "latent"), 6)}
      nextRow = latentRowOf(item, keyBase + 3u * BLOCK_K + stageRow);
${variant.includes("softFirst") ? "" : indent(guardedSoftmax, 6)}
${bounded ? `      if (masking) {\n${indent(clear("block & 1u"), 8)}\n      }` : ""}
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
${indent(unit.combine("rowSum", rowThreads, "sum", workgroupSize), 2)}
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
  if (isSoft && softPart == 0u && softRow < item.rows) {
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
function readHalves({ name }: MatrixMemory, index: string, backend: MatrixBackend): string {
  if (backend !== "flag") return `${name}[${index}]`;
  const word = (i: number) => {
    const at = `${name}[8u * (${index}) + ${2 * i}u`;
    return `bitcast<u32>(vec2<f16>(${at}], ${at} + 1u]))`;
  };
  return `vec4<u32>(${[0, 1, 2, 3].map(word).join(", ")})`;
}
