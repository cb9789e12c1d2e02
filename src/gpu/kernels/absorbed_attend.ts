// Attention of absorbed queries over latent rows, online softmax, without matrix units: decoding on any device.
//
//   one workgroup = one work item: blockRows query rows of one sequence. Its latents stream through workgroup memory blockK
//   keys at a time, read from storage once for all rows; all columns of a block serve as keys, the first L as values
//
//   scores:  the columns are cut into 16 slices or more; an invocation multiplies its slice of four query rows by four keys
//            at a time, and keeps the queries in registers from the first block to the last
//   sums:    slices meet in workgroup memory; with subgroups, four of them by shuffles before
//   softmax: an invocation has four scores of one row; maxima meet by shuffles or through workgroup memory
//   values:  an invocation owns rows × column quads of the unnormalised result, in registers; probabilities come through
//            workgroup memory
//
// Keys of a block are j·KEY_GROUPS + g with j from 0 to 3, rows of a score patch r·ROW_GROUPS + g: neighbours read
// neighbouring rows, and a staged row is an odd number of four quads long, which keeps them off each other's banks.
//
// Workgroup memory:                                                          16 × 32, 256 invocations, 576 halves
//   latents  blockK · (columns + padding), as stored                         37.9 KB
//   sums     stored slices · (blockRows · blockK/4 + 4) vec4                  8.4 KB with subgroups, 33.8 KB without
//   probs    blockK · (blockRows/4 + 1) vec4                                  2.6 KB
//
// Why queries in registers: they are too large for workgroup memory beside the latents (36.9 KB in float32), and read anew
// for each block their loads took up to a third of the time. Queries that come as halves are faster, perhaps because
// compilers keep them packed: 0.35 against 0.39 ms for 32 sequences of 8192 keys, 16 heads, on an H100 with wgpu. With the
// steps over values copied out instead of looped over, that is 0.33 ms. All this makes long code. Tiles without subgroups
// are for software adapters and old devices: they read queries where they need them and loop, to compile in seconds.
//
// Masking is by selection: a masked score becomes the sentinel and its probability 0. Where rows may see different keys,
// blocks that mask replace what is not finite in the latents by 0 between scores and values: a row that sees such a latent
// is NaN by its score, the others must not become so by 0 · NaN. Keys that nobody sees are staged as zeros.

import type { DecodeConfig } from "../../op/decode_config.ts";
import type { Capabilities } from "../capabilities.ts";
import {
  absorbedDeclarations,
  absorbedFunctions,
  type AbsorbedShape,
  resultQuads,
  rowQuads,
  type RowStorage,
} from "./absorbed_operands.ts";
import { indent, stagedStride, unroll } from "./register_tile.ts";
import { whyTooLarge } from "./workgroup_limits.ts";

/** The tile of the kernel: the part of a configuration that it reads. */
export type AbsorbedTile = Pick<DecodeConfig, "blockRows" | "blockK" | "numWarps" | "subgroups" | "pinned">;

/** What the layout depends on. */
type Widths = Pick<AbsorbedShape, "kvLoraRank" | "qkRopeHeadDim" | "cache">;

/** Query quads that an invocation keeps of each of its four rows, at most where more slices can avoid it. */
const residentQuads = 10;

/** How invocations are laid over scores, over latents on their way, and over values. */
interface ThreadMap {
  readonly workgroupSize: number;
  /** Scores: rows and keys of a block in fours, slices of the columns, and key groups at a time. */
  readonly rowGroups: number;
  readonly keyGroups: number;
  readonly slices: number;
  readonly keyColumns: number;
  /** Slices that are summed by shuffles: 4 or 1. */
  readonly shuffled: number;
  /** Invocations that load one key. */
  readonly loaders: number;
  /** Values: invocations along columns and along rows, and rows and column quads of each. */
  readonly valueColumns: number;
  readonly valueRowGroups: number;
  readonly valueRows: number;
  readonly valueQuads: number;
}

function threadMap(tile: AbsorbedTile, shape: Widths): ThreadMap {
  const { blockRows, blockK } = tile;
  const workgroupSize = tile.numWarps * 32;
  const [rowGroups, keyGroups] = [blockRows / 4, blockK / 4];
  const depthQuads = Math.ceil((shape.kvLoraRank + shape.qkRopeHeadDim) / 4);
  const columnQuads = resultQuads(shape);

  const keyColumnsOf = (slices: number) => workgroupSize / (rowGroups * slices);
  let slices = 16;
  while (keyColumnsOf(slices) > keyGroups || (depthQuads > residentQuads * slices && keyColumnsOf(slices) % 2 === 0)) {
    slices *= 2;
  }

  const rowGroupsOf = (columns: number) => {
    let groups = Math.min(rowGroups, Math.floor(workgroupSize / columns));
    while (rowGroups % groups !== 0) groups--;
    return groups;
  };
  // Eight rows of an invocation share a conversion; beyond, wider is better than taller.
  let valueColumns = Math.min(workgroupSize, 2 ** Math.ceil(Math.log2(columnQuads)));
  while (
    blockRows / rowGroupsOf(valueColumns) > 8 && valueColumns % 2 === 0 &&
    rowGroupsOf(valueColumns / 2) > rowGroupsOf(valueColumns)
  ) valueColumns /= 2;
  const valueRowGroups = rowGroupsOf(valueColumns);
  return {
    workgroupSize,
    rowGroups,
    keyGroups,
    slices,
    keyColumns: keyColumnsOf(slices),
    shuffled: tile.subgroups ? 4 : 1,
    loaders: workgroupSize / blockK,
    valueColumns,
    valueRowGroups,
    valueRows: blockRows / valueRowGroups,
    valueQuads: Math.ceil(columnQuads / valueColumns),
  };
}

/** Quads of four columns from one staged key to the next: four more than a multiple of eight, for neighbouring banks. */
function latentStride(shape: Widths): number {
  const quads = rowQuads(shape, shape.cache) * (shape.cache === "halves" ? 2 : 1);
  return Math.ceil((quads - 4) / 8) * 8 + 4;
}

/** vec4 from one stored slice of sums to the next. */
function sumStride({ blockRows, blockK }: AbsorbedTile): number {
  return blockRows * blockK / 4 + 4;
}

/** Bytes of workgroup memory that the kernel declares. */
export function workgroupBytes(
  tile: AbsorbedTile,
  shape: Widths & Partial<Pick<AbsorbedShape, "sharded">>,
): number {
  const { blockRows, blockK } = tile;
  const { slices, shuffled, keyGroups } = threadMap(tile, shape);
  const latents = blockK * latentStride(shape) * (shape.cache === "halves" ? 8 : 16);
  const sums = 16 * slices / shuffled * sumStride(tile);
  const probs = 16 * blockK * stagedStride(blockRows);
  const exchange = tile.subgroups ? 0 : 4 * keyGroups * blockRows;
  return latents + sums + probs + exchange + 4 * blockRows + (shape.sharded ? 4 * blockK : 0);
}

/** Why this tile cannot run, or null when it can. */
export function whyInvalid(
  tile: AbsorbedTile,
  shape: Widths & Partial<Pick<AbsorbedShape, "sharded">>,
  { limits, subgroups }: Pick<Capabilities, "limits" | "subgroups">,
): string | null {
  const { blockRows, blockK, numWarps } = tile;
  for (const [name, value] of Object.entries({ blockRows, blockK, numWarps })) {
    if (!Number.isInteger(value) || value < 1) return `${name} must be a positive integer, got ${value}`;
  }
  for (const [name, value] of Object.entries({ subgroups: tile.subgroups, pinned: tile.pinned })) {
    if (typeof value !== "boolean") return `${name} must be true or false, got ${value}`;
  }
  if (blockRows % 4 !== 0) return `blockRows must be a multiple of 4, got ${blockRows}`;
  if (blockK % 4 !== 0) return `blockK must be a multiple of 4, got ${blockK}`;
  const { workgroupSize, rowGroups, keyGroups, keyColumns, loaders, valueRows, valueQuads } = threadMap(tile, shape);
  if (workgroupSize < blockRows * keyGroups) {
    return `numWarps ${numWarps} gives ${workgroupSize} invocations for the ${
      blockRows * keyGroups
    } score quads of a block`;
  }
  if (!Number.isInteger(keyColumns) || keyGroups % keyColumns !== 0) {
    return `numWarps ${numWarps} gives ${workgroupSize} invocations, which do not divide into ${rowGroups} × ${keyGroups} patches`;
  }
  if (!Number.isInteger(loaders)) {
    return `numWarps ${numWarps} gives ${workgroupSize} invocations, not a multiple of blockK ${blockK}`;
  }
  if (tile.subgroups) {
    if (subgroups === null) return "subgroups is true, the device has none";
    const most = Math.max(4, keyGroups);
    if (most > subgroups.minSize || (keyGroups & (keyGroups - 1)) !== 0) {
      return `subgroups is true: ${most} invocations do not share a subgroup of ${subgroups.minSize}`;
    }
  }
  const registers = 4 * valueRows * valueQuads;
  if (registers > 256) return `${registers} accumulators per invocation, at most 256 are kept in registers`;
  return whyTooLarge(workgroupSize, workgroupBytes(tile, shape), limits);
}

/** WGSL functions by how rows are stored: quad `quad` of the query row that begins at `base`, and a staged quad's columns. */
function quadFunctions({ query, cache }: AbsorbedShape): string {
  const columns: Record<RowStorage, string> = {
    halves: "vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y))",
    floats: "quad",
  };
  const load = query === "floats" ? "  return query[base + quad];" : `  let pair = query[base + quad / 2u];
  let words = select(pair.xy, pair.zw, (quad & 1u) == 1u);
  return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));`;
  return `fn queryQuad(base: u32, quad: u32) -> vec4<f32> {
${load}
}

fn columnsOf(quad: Quad) -> vec4<f32> { return ${columns[cache]}; }`;
}

/** WGSL: whether a block must mask, which is the same for the whole workgroup. */
function masking({ bounded, sharded }: AbsorbedShape): string {
  if (sharded) return "true";
  const cut = "keyBase + BLOCK_K > item.keyEnd";
  if (!bounded) return cut;
  // All rows see the whole block when the first sees its last key, and the last its first.
  return `${cut} || i32(keyBase + BLOCK_K) > firstPosition + params.right + 1 || i32(keyBase) < lastPosition - params.left`;
}

/** WGSL that hides the keys of `score` that its row does not see. */
function maskScores({ bounded, sharded }: AbsorbedShape, keyGroups: number): string {
  const steps = [0, 1, 2, 3].map((j) => j * keyGroups).join(", ");
  return `if (masking) {
  let key = vec4<i32>(i32(keyBase + scoreKeys)) + vec4<i32>(${steps});
  var seen = key < vec4<i32>(i32(item.keyEnd));
${
    bounded
      ? "  seen &= (key <= vec4<i32>(position + params.right)) & (key >= vec4<i32>(position - params.left));\n"
      : ""
  }${
    sharded ? `  seen &= vec4<bool>(${[0, 1, 2, 3].map((j) => `present[${j}][scoreKeys] != 0u`).join(", ")});\n` : ""
  }  score = select(vec4<f32>(MASKED), score, seen);${
    bounded
      ? `
  for (var quad = loader; quad < RESULT_QUADS; quad += LOADERS) {
    let kept = finite(latents[loadedKey / KEY_GROUPS][loadedKey % KEY_GROUPS][quad]);
    latents[loadedKey / KEY_GROUPS][loadedKey % KEY_GROUPS][quad] = kept;
  }`
      : ""
  }
}`;
}

/** WGSL of `finite(quad)`: a staged quad with zeros for what is NaN or infinite. */
function finiteFunction(halves: boolean): string {
  if (!halves) {
    return `fn finite(quad: Quad) -> Quad {
  let exponent = bitcast<vec4<u32>>(quad) & vec4<u32>(0x7f800000u);
  return select(quad, vec4<f32>(), exponent == vec4<u32>(0x7f800000u));
}`;
  }
  return `fn finite(quad: Quad) -> Quad {
  let low = select(quad & vec2<u32>(0xffffu), vec2<u32>(), (quad & vec2<u32>(0x7c00u)) == vec2<u32>(0x7c00u));
  let high = select(quad & vec2<u32>(0xffff0000u), vec2<u32>(), (quad & vec2<u32>(0x7c000000u)) == vec2<u32>(0x7c000000u));
  return low | high;
}`;
}

/** WGSL of a result quad with zeros for columns past L, where the rotary part begins. */
function withinWidth(quad: string, L: number, column: string): string {
  if (L % 4 === 0) return quad;
  return `select(${quad}, vec4<f32>(), vec4<u32>(4u * (${column})) + vec4<u32>(0u, 1u, 2u, 3u) >= vec4<u32>(${L}u))`;
}

/** The kernel's source. */
export function wgsl(
  tile: AbsorbedTile,
  shape: AbsorbedShape,
  capabilities: Pick<Capabilities, "subgroups">,
): string {
  const { blockRows, blockK, subgroups, pinned } = tile;
  const { kvLoraRank: L, qkRopeHeadDim: R, cache, bounded, sharded, sinkQuads, lse } = shape;
  const { workgroupSize, rowGroups, keyGroups, slices, keyColumns, shuffled, loaders } = threadMap(tile, shape);
  const { valueColumns, valueRowGroups, valueRows, valueQuads } = threadMap(tile, shape);
  const halves = cache === "halves";
  const depthQuads = Math.ceil((L + R) / 4);
  const pieces = rowQuads(shape, cache);
  const loads = Math.ceil(pieces / loaders);
  const [probQuads, rowQuadCount] = [stagedStride(blockRows), valueRows / 4];
  const word = halves ? "u32" : "f32";
  const directive = subgroups && capabilities.subgroups?.directive ? "enable subgroups;\n" : "";

  /** Emits a statement for each piece of a key that an invocation carries. */
  const eachPiece = (emit: (register: string, piece: string) => string) =>
    unroll(loads, (i) => {
      const piece = `loader + ${i * loaders}u`;
      const whole = (i + 1) * loaders <= pieces;
      return whole ? emit(`piece${i}`, piece) : `if (${piece} < ${pieces}u) { ${emit(`piece${i}`, piece)} }`;
    });
  const loadNext = `{
  let key = next + loadedKey;
  let start = cacheRowOf(item.sequence, min(key, item.keyEnd - 1u));
  let there = key < item.keyEnd && start != ABSENT;
${unroll(loads, (i) => `  piece${i} = vec4<${word}>();`)}
  if (there) {
${indent(eachPiece((register, piece) => `${register} = cache[start + ${piece}];`), 4)}
  }${sharded ? "\n  found = u32(there);" : ""}
}`;
  const stage = eachPiece((register, piece) =>
    halves
      ? `latents[loadedKey / KEY_GROUPS][loadedKey % KEY_GROUPS][2u * (${piece})] = ${register}.xy; ` +
        `latents[loadedKey / KEY_GROUPS][loadedKey % KEY_GROUPS][2u * (${piece}) + 1u] = ${register}.zw;`
      : `latents[loadedKey / KEY_GROUPS][loadedKey % KEY_GROUPS][${piece}] = ${register};`
  );

  /** A statement for every quad that a slice has of the columns; of the last, some slices have none. */
  const eachQuad = (emit: (step: number, quad: string) => string) =>
    unroll(Math.ceil(depthQuads / slices), (i) => {
      const quad = `slice + ${i * slices}u`;
      const all = (i + 1) * slices <= depthQuads;
      return `${all ? "" : `if (${quad} < ${depthQuads}u) `}{\n${indent(emit(i, quad), 2)}\n}`;
    });
  const loadQueries = eachQuad((i, quad) => unroll(4, (r) => `q${r}_${i} = queryQuad(query${r}, ${quad});`));
  const multiplyQuad = (query: (row: number) => string) =>
    `${unroll(4, (j) => `let k${j} = columnsOf(latents[${j}][keys][quad]);`)}
${unroll(4, (r) => `let a${r} = ${query(r)};`)}
${
      unroll(4, (x) =>
        `let c${x} = vec4<f32>(${[0, 1, 2, 3].map((j) => `k${j}[${x}]`).join(", ")});
${unroll(4, (r) => `s${r} = fma(vec4<f32>(a${r}[${x}]), c${x}, s${r});`)}`)
    }`;
  const multiplyScores = subgroups
    ? eachQuad((i, quad) => `let quad = ${quad};\n${multiplyQuad((r) => `q${r}_${i}`)}`)
    : `for (var quad = slice; quad < ${depthQuads}u; quad += ${slices}u) {
${indent(multiplyQuad((r) => `queryQuad(query${r}, quad)`), 2)}
}`;
  // Each of four neighbours begins with another row, so that what one sends is what the other keeps.
  const storeSums = subgroups
    ? `s0 += subgroupShuffleXor(s2, 1u);
s1 += subgroupShuffleXor(s3, 1u);
s0 += subgroupShuffleXor(s1, 2u);
sums[slice / 4u][row0 * KEY_GROUPS + keys] = s0;`
    : unroll(4, (r) => `sums[slice][row${r} * KEY_GROUPS + keys] = s${r};`);
  const row = (r: number) => subgroups ? `(${r}u ^ turn)` : `${r}u`;

  /** `value`, one scalar per invocation, combined over the KEY_GROUPS invocations of a row. */
  const overRow = (name: string, combine: (a: string, b: string) => string) =>
    subgroups
      ? unroll(
        Math.log2(keyGroups),
        (i) => `${name} = ${combine(name, `subgroupShuffleXor(${name}, ${1 << i}u)`)};`,
      )
      : `if (scoring) { exchange[scoreKeys][scoreRow] = ${name}; }
workgroupBarrier();
${name} = exchange[0][scoreRow];
${unroll(keyGroups - 1, (i) => `${name} = ${combine(name, `exchange[${i + 1}][scoreRow]`)};`)}`;

  const everyOutput = (emit: (name: string, row: number, quad: number) => string) =>
    unroll(valueRows, (r) => unroll(valueQuads, (c) => emit(`o${r}_${c}`, r, c)));
  const column = (c: number) => `valueColumn + ${c * valueColumns}u`;
  const multiplyValues = (g: string) =>
    unroll(4, (j) =>
      `{
${unroll(valueQuads, (c) => `  let v${c} = columnsOf(latents[${j}][${g}][column${c}]);`)}
${unroll(rowQuadCount, (q) => `  let p${q} = probs[${j}][${g}][valueGroup * ${rowQuadCount}u + ${q}u];`)}
${indent(everyOutput((o, r, c) => `${o} = fma(vec4<f32>(p${r >> 2}[${r & 3}]), v${c}, ${o});`), 2)}
}`);
  const overGroups = `for (var g = 0u; g < KEY_GROUPS; g += 1u) {
${indent(multiplyValues("g"), 2)}
}`;

  return `${directive}// MLA attention of absorbed queries over latent rows.
// ${blockRows} rows × ${blockK} keys, ${workgroupSize} invocations; scores 4 × 4 over 1/${slices} of the columns, values ${valueRows} × ${
    4 * valueQuads
  }
const BLOCK_ROWS = ${blockRows}u;
const BLOCK_K = ${blockK}u;
const ROW_GROUPS = ${rowGroups}u;
const KEY_GROUPS = ${keyGroups}u;
const KEY_COLUMNS = ${keyColumns}u;
const LOADERS = ${loaders}u;
const VALUE_COLUMNS = ${valueColumns}u;
const VALUE_ROWS = ${valueRows}u;
const QUERY_QUADS = ${rowQuads(shape, shape.query)}u;

${absorbedDeclarations(shape, { pinned })}

alias Quad = ${halves ? "vec2<u32>" : "vec4<f32>"}; // four columns
var<workgroup> latents: array<array<array<Quad, ${latentStride(shape)}>, ${keyGroups}>, 4>;
var<workgroup> sums: array<array<vec4<f32>, ${sumStride(tile)}>, ${slices / shuffled}>;
var<workgroup> probs: array<array<array<vec4<f32>, ${probQuads}>, ${keyGroups}>, 4>;
var<workgroup> factors: array<vec4<f32>, ${blockRows / 4}>; // of each row: what its sums are multiplied by
${subgroups ? "" : `var<workgroup> exchange: array<array<f32, ${blockRows}>, ${keyGroups}>;\n`}${
    sharded ? `var<workgroup> present: array<array<u32, ${keyGroups}>, 4>;\n` : ""
  }
${absorbedFunctions(shape)}

${quadFunctions(shape)}
${bounded ? `\n${finiteFunction(halves)}\n` : ""}
@compute @workgroup_size(${workgroupSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let index = workgroup.x + workgroup.y * params.gridX;
  if (index >= params.itemCount) { return; }
  let item = items[index];
  if (item.rows == 0u) { return; }

  // Scores: four rows, some key groups, and a slice of the columns. Neighbours are slices, then key groups, then rows.
  let keyColumn = (t / 4u) % KEY_COLUMNS;
  let rowGroup = (t / (4u * KEY_COLUMNS)) % ROW_GROUPS;
  let slice = t / (4u * KEY_COLUMNS * ROW_GROUPS) * 4u + t % 4u;
${subgroups ? "  let turn = (t & 1u) * 2u + ((t >> 1u) & 1u);\n" : ""}${
    unroll(4, (r) =>
      `  let row${r} = ${row(r)} * ROW_GROUPS + rowGroup;
  let query${r} = params.queryBase + (item.row + min(row${r}, item.rows - 1u)) * QUERY_QUADS;`)
  }
${
    !subgroups
      ? ""
      : `${unroll(Math.ceil(depthQuads / slices), (i) => unroll(4, (r) => `  var q${r}_${i} = vec4<f32>();`))}
${indent(loadQueries, 2)}
`
  }
  // Softmax: four scores of one row.
  let scoring = t < BLOCK_ROWS * KEY_GROUPS;
  let scoreKeys = t % KEY_GROUPS;
  let scoreRow = min(t / KEY_GROUPS, BLOCK_ROWS - 1u);
  let queryRow = item.row + min(scoreRow, item.rows - 1u);
${
    bounded
      ? `  let position = item.diagonal + i32(queryRow / params.heads);
  let firstPosition = item.diagonal + i32(item.row / params.heads);
  let lastPosition = item.diagonal + i32((item.row + item.rows - 1u) / params.heads);\n`
      : ""
  }  var top = MASKED;
  var total = 0.0;

  // Values: rows and column quads.
  let valueColumn = t % VALUE_COLUMNS;
  let valueGroup = min(t / VALUE_COLUMNS, ${valueRowGroups - 1}u);
${unroll(valueQuads, (c) => `  let column${c} = min(${column(c)}, RESULT_QUADS - 1u);`)}
${indent(everyOutput((o) => `var ${o} = vec4<f32>();`), 2)}

  // Latents on their way: an invocation carries pieces of one key.
  let loadedKey = t / LOADERS;
  let loader = t % LOADERS;
${unroll(loads, (i) => `  var piece${i} = vec4<${word}>();`)}${sharded ? "\n  var found = 0u;" : ""}

  // A round loads a block into registers, works on the one before meanwhile, and then stages what it loaded.
  for (var next = item.keyStart; ; next += BLOCK_K) {
    if (next < item.keyEnd) ${indent(loadNext, 4).trimStart()}
    if (next != item.keyStart) {
      let keyBase = next - BLOCK_K;
      let masking = ${masking(shape)};

      // Scores.
      for (var h = 0u; h < KEY_GROUPS; h += KEY_COLUMNS) {
        let keys = h + keyColumn;
${unroll(4, (r) => `        var s${r} = vec4<f32>();`)}
${indent(multiplyScores, 8)}
${indent(storeSums, 8)}
      }
      workgroupBarrier();

      // Softmax.
      var score = vec4<f32>();
      if (scoring) {
${
    subgroups
      ? unroll(slices / shuffled, (i) => `        score += sums[${i}][t];`)
      : `        for (var i = 0u; i < ${slices}u; i += 1u) { score += sums[i][t]; }`
  }
      }
      score = scoreOf(score);
${indent(maskScores(shape, keyGroups), 6)}
      var newTop = max(max(score.x, score.y), max(score.z, score.w));
${indent(overRow("newTop", (a, b) => `max(${a}, ${b})`), 6)}
      newTop = max(newTop, top);
      let prob = select(exp2(score - newTop), vec4<f32>(), score <= vec4<f32>(UNSEEN));
      let decay = exp2(top - newTop);
      total = total * decay + ((prob.x + prob.y) + (prob.z + prob.w));
      top = newTop;
      if (scoring) {
${unroll(4, (j) => `        probs[${j}][scoreKeys][scoreRow / 4u][scoreRow % 4u] = prob[${j}];`)}
        if (scoreKeys == 0u) { factors[scoreRow / 4u][scoreRow % 4u] = decay; }
      }
      workgroupBarrier();

      // Values.
${unroll(rowQuadCount, (q) => `      let decay${q} = factors[valueGroup * ${rowQuadCount}u + ${q}u];`)}
${indent(everyOutput((o, r) => `${o} *= decay${r >> 2}[${r & 3}];`), 6)}
${indent(subgroups ? unroll(keyGroups, (g) => multiplyValues(`${g}`)) : overGroups, 6)}
      workgroupBarrier();
    }
    if (next >= item.keyEnd) { break; }
${indent(stage, 4)}${
    sharded ? "\n    if (loader == 0u) { present[loadedKey / KEY_GROUPS][loadedKey % KEY_GROUPS] = found; }" : ""
  }
    workgroupBarrier();
  }

  // Row sums over the invocations of a row. A row that sees no key has none; a NaN sum is not 0 and must reach the output.
${indent(overRow("total", (a, b) => `${a} + ${b}`), 2)}
  let split = item.slot != NO_SLOT;
  let writes = scoring && scoreKeys == 0u && scoreRow < item.rows;
  var factor = 1.0;
  if (split) {
    if (writes) { stats[item.slot * BLOCK_ROWS + scoreRow] = vec2<f32>(top, total); }
  } else {
${
    sinkQuads === 0 ? "    factor = select(1.0 / total, 0.0, total == 0.0);" : `    let head = queryRow % params.heads;
    let sink = sinks[head / 4u][head % 4u];
    let unseen = total == 0.0;
    let newTop = max(top, sink);
    let down = exp2(top - newTop);
    total = select(total * down + exp2(sink - newTop), 0.0, unseen);
    factor = select(down / total, 0.0, unseen);
    top = newTop;`
  }
${
    lse
      ? "    if (writes) { storeLse(queryRow, select((top + log2(total)) * LN2, params.minusInfinity, total == 0.0)); }\n"
      : ""
  }  }
  if (scoring && scoreKeys == 0u) { factors[scoreRow / 4u][scoreRow % 4u] = factor; }
  workgroupBarrier();
  if (t >= VALUE_COLUMNS * ${valueRowGroups}u) { return; }
${
    unroll(valueRows, (r) =>
      `  {
    let row = valueGroup * VALUE_ROWS + ${r}u;
    let share = factors[row / 4u][row % 4u];
    if (row < item.rows) {
${
        unroll(valueQuads, (c) =>
          `      if (${column(c)} < RESULT_QUADS) {
        let result = select(${withinWidth(`o${r}_${c}`, L, column(c))} * share, vec4<f32>(), share == 0.0);
        if (split) {
          partial[(item.slot * BLOCK_ROWS + row) * RESULT_QUADS + ${column(c)}] = result;
        } else {
          storeResult(item.row + row, ${column(c)}, result);
        }
      }`)
      }
    }
  }`)
  }
}
`;
}
