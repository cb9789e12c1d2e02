// The matrix-unit layer: what kernels say of fragments, in one of two back ends.
//
//   a subgroup multiplies 16 × 16 blocks as a whole: result (f32) += left (f16) · right (f16)
//   fragments come from workgroup memory and go back to it; nobody sees their elements
//   native    the experimental subgroup matrices of Dawn and Chromium, in either syntax that builds of them have
//   emulated  plain WGSL without subgroup operations, for adapters without the feature: slow, and meant for tests of
//             everything around the products. 32 neighbouring invocations stand for a subgroup. Lane l holds row l/2 of
//             a left fragment, columns 8·(l%2) … + 7 of row l/2 of a result, and of a right fragment only where it lies.
//
// Memory is counted in quads of 16 bytes throughout: 8 halves or 4 floats. Rows should be an odd number of quads apart:
// with even strides the rows of a fragment meet in the same banks, which costs more than the products do.

import { indent, unroll } from "./register_tile.ts";

/**
 * How fragments are written: `template`, the current syntax (`subgroupMatrixLoad<T, row_major>(…)`); `flag`, the deprecated
 * one of older builds (`subgroupMatrixLoad<T>(…, false, …)`), where arrays must be of the matrix's own element type; or
 * `emulated`.
 */
export type MatrixBackend = "template" | "flag" | "emulated";

/** A workgroup array that fragments are loaded from or stored to. */
export interface MatrixMemory {
  /** Its WGSL name. */
  readonly name: string;
  /** What it holds. */
  readonly kind: "halves" | "floats";
  /** Its length in quads of 16 bytes; of one part, where it has parts. */
  readonly quads: number;
  /** How many parts it is divided into; see {@link MatrixUnit.part}. */
  readonly parts?: number;
  /** WGSL expression of where a part of it begins, in quads, where the parts are no arrays of their own. */
  readonly start?: string;
}

/** Whether neighbours in memory are neighbours in a row or in a column. */
export type MatrixOrder = "row" | "column";

/** A right fragment: the statement that makes it, and what {@link MatrixUnit.accumulate} needs of it. */
export interface RightFragment {
  /** WGSL statement that declares it. */
  readonly code: string;
  /** Its WGSL name. */
  readonly name: string;
  /** Where it lies. */
  readonly memory: MatrixMemory;
  /** Quads from one row, or column, to the next. */
  readonly stride: number;
  /** Its order. */
  readonly order: MatrixOrder;
}

/** Left fragments or results that an invocation's subgroup keeps in registers, in rows and columns. */
export interface FragmentArray {
  /** WGSL statements that declare them; results begin as zeros. */
  readonly declaration: string;
  /** WGSL of one of them, by WGSL expressions of its row and column: those that {@link MatrixUnit.over} gives. */
  at(row: string, column: string): string;
}

/** A generator of WGSL over fragments. Offsets are WGSL expressions, strides numbers, both in quads. */
export interface MatrixUnit {
  /** Whether the products are those of the matrix units. */
  readonly native: boolean;
  /** WGSL lines that a kernel begins with. */
  readonly directives: string;
  /** WGSL of the types and functions that fragments need, and of the memory. */
  declarations(memories: readonly MatrixMemory[]): string;
  /** WGSL statements that `main` begins with; `t` is the invocation's index in the workgroup. */
  readonly prologue: string;
  /**
   * One part of a memory, by a WGSL expression of its index. Natively each is an array, in which fragments can lie at
   * constant places: Dawn checks the bounds of all others, and each check is a branch. An index it merely clamps.
   */
  part(memory: MatrixMemory, index: string): MatrixMemory;
  /**
   * WGSL statements for each value of an index below `count`, which they see as a constant natively; emulated, as the
   * expression.
   */
  cases(index: string, count: number, code: (index: string) => string): string;
  /** Declares fragments. */
  fragments(name: string, side: "left" | "result", rows: number, columns: number): FragmentArray;
  /**
   * A block of WGSL for each index below `count`: copied out where fragments are registers, which cannot be indexed at run
   * time; a loop where they are emulated, since software adapters take long to compile.
   */
  over(index: string, count: number, step: (index: string) => string): string;
  /** WGSL expression of a result of zeros. */
  readonly zero: string;
  /** WGSL expression of a left fragment; in row order when not said otherwise. */
  loadLeft(memory: MatrixMemory, offset: string, stride: number, order?: MatrixOrder): string;
  /** A right fragment. */
  right(name: string, memory: MatrixMemory, offset: string, stride: number, order: MatrixOrder): RightFragment;
  /** WGSL statement that adds left · right to the result named `result`. */
  accumulate(result: string, left: string, right: RightFragment): string;
  /** WGSL expression of a result, loaded in row order from floats. */
  loadResult(memory: MatrixMemory, offset: string, stride: number): string;
  /** WGSL statement that stores a result to floats; in row order when not said otherwise. */
  storeResult(memory: MatrixMemory, offset: string, stride: number, result: string, order?: MatrixOrder): string;
  /** WGSL expression of type f32: one of the four floats of a quad. */
  readFloat(memory: MatrixMemory, quad: string, float: string): string;
  /** WGSL expression of type vec4<f32> or vec4<u32>: a quad of memory. */
  readQuad(memory: MatrixMemory, index: string): string;
  /** WGSL statement that stores a vec4<f32> to floats, or eight packed halves, a vec4<u32>, to halves. */
  writeQuad(memory: MatrixMemory, index: string, value: string): string;
  /** WGSL statement that stores a vec4<f32> as four halves; `index` counts fours. */
  writeFour(memory: MatrixMemory, index: string, value: string): string;
  /**
   * WGSL statements that add up the vec4<f32> variable `value` of `count` invocations that lie `apart` from each other, for
   * each of them. In uniform control flow only.
   */
  sumQuads(value: string, apart: number, count: number): string;
  /**
   * WGSL statements that combine the f32 variable `value` of `width` neighbouring invocations, for each of them.
   * In uniform control flow only, and with at least one other barrier between two of them.
   */
  combine(value: string, width: number, how: "max" | "sum"): string;
}

/** Invocations of a subgroup, of either back end. */
export const subgroupSize = 32;

/** Rows and columns of a fragment. */
export const fragmentSize = 16;

/** Quads of a fragment's row of halves. */
export const fragmentQuads = 2;

/**
 * The matrix unit of a back end.
 *
 * @param backend Which.
 */
export function matrixUnit(backend: MatrixBackend): MatrixUnit {
  return backend === "emulated" ? emulated : native(backend);
}

/** Bytes of workgroup memory. */
export function memoryBytes(memories: readonly MatrixMemory[]): number {
  return memories.reduce((sum, { quads, parts = 1 }) => sum + 16 * quads * parts, 0);
}

const lane = `  let lane = t % ${subgroupSize}u;
  let subgroup = t / ${subgroupSize}u;`;

function native(syntax: "template" | "flag"): MatrixUnit {
  const type = (side: "left" | "right" | "result") =>
    `subgroup_matrix_${side}<${side === "result" ? "f32" : "f16"}, ${fragmentSize}, ${fragmentSize}>`;
  const isFlag = syntax === "flag";
  // Elements of the array to a quad.
  const unitOf = ({ kind }: MatrixMemory) => isFlag ? (kind === "halves" ? 8 : 4) : 1;
  const at = (memory: MatrixMemory, offset: string) => isFlag ? `(${offset}) * ${unitOf(memory)}u` : offset;
  const load = (
    side: "left" | "right" | "result",
    memory: MatrixMemory,
    offset: string,
    stride: number,
    order: MatrixOrder,
  ) =>
    isFlag
      ? `subgroupMatrixLoad<${type(side)}>(&${memory.name}, ${at(memory, offset)}, ${order === "column"}, ${
        stride * unitOf(memory)
      }u)`
      : `subgroupMatrixLoad<${type(side)}, ${
        order === "row" ? "row_major" : "col_major"
      }>(&${memory.name}, ${offset}, ${stride}u)`;
  const element = ({ kind }: MatrixMemory) => {
    if (isFlag) return kind === "halves" ? "f16" : "f32";
    return kind === "halves" ? "vec4<u32>" : "vec4<f32>";
  };
  return {
    native: true,
    // Which fragments a subgroup works on follows from its index, which the analysis of uniformity takes for divergent.
    directives: `enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
diagnostic(off, subgroup_uniformity);
`,
    declarations: (memories) =>
      `${
        memories.map((memory) => {
          const array = `array<${element(memory)}, ${memory.quads * unitOf(memory)}>`;
          const { name, parts } = memory;
          return `var<workgroup> ${name}: ${parts === undefined ? array : `array<${array}, ${parts}>`};`;
        }).join("\n")
      }

// Eight halves, rounded to nearest.
fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(bitcast<vec2<u32>>(vec4<f16>(low)), bitcast<vec2<u32>>(vec4<f16>(high)));
}`,
    prologue: lane,
    part: ({ name, kind, quads }, index) => ({ name: `${name}[${index}]`, kind, quads }),
    cases: (index, count, code) =>
      count === 1 ? code("0u") : `switch (${index}) {
${unroll(count, (i) => `  ${i === count - 1 ? "default" : `case ${i}u`}: {\n${indent(code(`${i}u`), 4)}\n  }`)}
}`,
    zero: `${type("result")}()`,
    over: (_index, count, step) => unroll(count, (i) => `{\n${indent(step(`${i}u`), 2)}\n}`),
    fragments: (name, side, rows, columns) => {
      const at = (row: string, column: string) => `${name}${parseInt(row)}_${parseInt(column)}`;
      return {
        at,
        declaration: unroll(rows, (r) => unroll(columns, (c) => `var ${at(`${r}`, `${c}`)}: ${type(side)};`)),
      };
    },
    loadLeft: (memory, offset, stride, order = "row") => load("left", memory, offset, stride, order),
    right: (name, memory, offset, stride, order) => ({
      ...{ name, memory, stride, order },
      code: `let ${name} = ${load("right", memory, offset, stride, order)};`,
    }),
    accumulate: (result, left, right) =>
      `${result} = subgroupMatrixMultiplyAccumulate(${left}, ${right.name}, ${result});`,
    loadResult: (memory, offset, stride) => load("result", memory, offset, stride, "row"),
    storeResult: (memory, offset, stride, result, order = "row") =>
      isFlag
        ? `subgroupMatrixStore(&${memory.name}, ${at(memory, offset)}, ${result}, ${order === "column"}, ${
          stride * unitOf(memory)
        }u);`
        : `subgroupMatrixStore<${
          order === "row" ? "row_major" : "col_major"
        }>(&${memory.name}, ${offset}, ${result}, ${stride}u);`,
    readFloat: ({ name }, quad, float) => isFlag ? `${name}[4u * (${quad}) + ${float}]` : `${name}[${quad}][${float}]`,
    readQuad: (memory, index) =>
      !isFlag
        ? `${memory.name}[${index}]`
        : `vec4<f32>(${[0, 1, 2, 3].map((i) => `${memory.name}[4u * (${index}) + ${i}u]`).join(", ")})`,
    writeQuad: (memory, index, value) => {
      if (!isFlag) return `${memory.name}[${index}] = ${value};`;
      if (memory.kind === "floats") {
        return unroll(4, (i) => `${memory.name}[4u * (${index}) + ${i}u] = ${value}[${i}];`);
      }
      return unroll(
        8,
        (i) => `${memory.name}[8u * (${index}) + ${i}u] = f16(unpack2x16float(${value}[${i >> 1}])[${i & 1}]);`,
      );
    },
    writeFour: (memory, index, value) =>
      isFlag ? unroll(4, (i) => `${memory.name}[4u * (${index}) + ${i}u] = f16(${value}[${i}]);`) : `{
  let words = bitcast<vec2<u32>>(vec4<f16>(${value}));
  ${memory.name}[(${index}) / 2u][2u * ((${index}) % 2u)] = words.x;
  ${memory.name}[(${index}) / 2u][2u * ((${index}) % 2u) + 1u] = words.y;
}`,
    sumQuads: (value, apart, count) =>
      unroll(Math.log2(count), (i) => `${value} = ${value} + subgroupShuffleXor(${value}, ${apart << i}u);`),
    combine: (value, width, how) =>
      unroll(Math.log2(width), (i) => {
        const other = `subgroupShuffleXor(${value}, ${1 << i}u)`;
        return how === "max" ? `${value} = max(${value}, ${other});` : `${value} = ${value} + ${other};`;
      }),
  };
}

const emulated: MatrixUnit = {
  native: false,
  directives: "",
  declarations: (memories) =>
    `struct LeftFragment { k0: vec4<f32>, k4: vec4<f32>, k8: vec4<f32>, k12: vec4<f32> }
struct ResultFragment { c0: vec4<f32>, c4: vec4<f32> }

var<private> lane: u32;
${
      memories.map(({ name, kind, quads, parts = 1 }) =>
        `var<workgroup> ${name}: array<${kind === "halves" ? "vec4<u32>" : "vec4<f32>"}, ${quads * parts}>;`
      ).join("\n")
    }
var<workgroup> exchanged: array<f32, ${exchangeLength}>;

fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(pack2x16float(low.xy), pack2x16float(low.zw), pack2x16float(high.xy), pack2x16float(high.zw));
}

fn lowHalves(quad: vec4<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y)); }
fn highHalves(quad: vec4<u32>) -> vec4<f32> { return vec4<f32>(unpack2x16float(quad.z), unpack2x16float(quad.w)); }

${memories.map((memory) => memory.kind === "halves" ? halvesFunctions(memory) : floatsFunctions(memory)).join("\n\n")}`,
  prologue: `  lane = t % ${subgroupSize}u;
  let subgroup = t / ${subgroupSize}u;`,
  zero: "ResultFragment()",
  over: (index, count, step) =>
    `for (var ${index} = 0u; ${index} < ${count}u; ${index} += 1u) {\n${indent(step(index), 2)}\n}`,
  fragments: (name, side, rows, columns) => ({
    declaration: `var ${name}: array<${side === "left" ? "LeftFragment" : "ResultFragment"}, ${rows * columns}>;`,
    at: (row, column) => `${name}[${row} * ${columns}u + ${column}]`,
  }),
  part: (memory, index) => ({ ...memory, start: `${index} * ${memory.quads}u + ` }),
  cases: (index, _count, code) => code(index),
  loadLeft: ({ name, start = "" }, offset, stride, order = "row") =>
    `${name}_left${order === "row" ? "" : "Column"}(${start}${offset}, ${stride}u)`,
  right: (name, memory, offset, stride, order) => ({
    ...{ name, memory, stride, order },
    code: `let ${name} = ${memory.start ?? ""}${offset};`,
  }),
  accumulate: (result, left, { name, memory, stride, order }) =>
    `${result} = ${memory.name}_${order}(${left}, ${name}, ${stride}u, ${result});`,
  loadResult: ({ name, start = "" }, offset, stride) => `${name}_load(${start}${offset}, ${stride}u)`,
  storeResult: ({ name, start = "" }, offset, stride, result, order = "row") =>
    `${name}_store${order === "row" ? "" : "Column"}(${start}${offset}, ${stride}u, ${result});`,
  readFloat: ({ name, start = "" }, quad, float) => `${name}[${start}${quad}][${float}]`,
  readQuad: ({ name, start = "" }, index) => `${name}[${start}${index}]`,
  writeQuad: ({ name, start = "" }, index, value) => `${name}[${start}${index}] = ${value};`,
  writeFour: ({ name, start = "" }, index, value) =>
    `{
  let quad = ${start}(${index}) / 2u;
  ${name}[quad][2u * ((${index}) % 2u)] = pack2x16float(${value}.xy);
  ${name}[quad][2u * ((${index}) % 2u) + 1u] = pack2x16float(${value}.zw);
}`,
  sumQuads: (value, apart, count) =>
    count === 1 ? "" : `for (var c = 0u; c < 4u; c += 1u) {
  exchanged[t] = ${value}[c];
  workgroupBarrier();
${unroll(count - 1, (i) => `  ${value}[c] = ${value}[c] + exchanged[t ^ ${(i + 1) * apart}u];`)}
  workgroupBarrier();
}`,
  combine: (value, width, how) =>
    width === 1 ? "" : `exchanged[t] = ${value};
workgroupBarrier();
${
      unroll(width - 1, (i) => {
        const other = `exchanged[t ^ ${i + 1}u]`;
        return how === "max" ? `${value} = max(${value}, ${other});` : `${value} = ${value} + ${other};`;
      })
    }`,
};

/** Floats that the emulation exchanges through: one per invocation of the largest workgroup. */
const exchangeLength = 256;

function halvesFunctions({ name }: MatrixMemory): string {
  return `fn ${name}_left(offset: u32, stride: u32) -> LeftFragment {
  let first = ${name}[offset + lane / 2u * stride];
  let second = ${name}[offset + lane / 2u * stride + 1u];
  return LeftFragment(lowHalves(first), highHalves(first), lowHalves(second), highHalves(second));
}

fn ${name}_leftColumn(offset: u32, stride: u32) -> LeftFragment {
  let row = lane / 2u;
  var halves: array<f32, 16>;
  for (var k = 0u; k < 16u; k += 1u) {
    let quad = ${name}[offset + k * stride + row / 8u];
    halves[k] = unpack2x16float(quad[row % 8u / 2u])[row % 2u];
  }
  return LeftFragment(
    vec4<f32>(halves[0], halves[1], halves[2], halves[3]),
    vec4<f32>(halves[4], halves[5], halves[6], halves[7]),
    vec4<f32>(halves[8], halves[9], halves[10], halves[11]),
    vec4<f32>(halves[12], halves[13], halves[14], halves[15]),
  );
}

fn ${name}_row(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var result = sum;
  var rows = array<vec4<f32>, 4>(left.k0, left.k4, left.k8, left.k12);
  for (var k = 0u; k < 16u; k += 1u) {
    let right = ${name}[offset + k * stride + lane % 2u];
    let factor = rows[k / 4u][k % 4u];
    result.c0 += factor * lowHalves(right);
    result.c4 += factor * highHalves(right);
  }
  return result;
}

fn ${name}_dot(left: LeftFragment, at: u32) -> f32 {
  let first = ${name}[at];
  let second = ${name}[at + 1u];
  return dot(left.k0, lowHalves(first)) + dot(left.k4, highHalves(first)) +
    dot(left.k8, lowHalves(second)) + dot(left.k12, highHalves(second));
}

fn ${name}_column(left: LeftFragment, offset: u32, stride: u32, sum: ResultFragment) -> ResultFragment {
  var sums: array<f32, 8>;
  for (var c = 0u; c < 8u; c += 1u) { sums[c] = ${name}_dot(left, offset + (lane % 2u * 8u + c) * stride); }
  return ResultFragment(
    sum.c0 + vec4<f32>(sums[0], sums[1], sums[2], sums[3]),
    sum.c4 + vec4<f32>(sums[4], sums[5], sums[6], sums[7]),
  );
}`;
}

function floatsFunctions({ name }: MatrixMemory): string {
  return `fn ${name}_load(offset: u32, stride: u32) -> ResultFragment {
  let at = offset + lane / 2u * stride + lane % 2u * 2u;
  return ResultFragment(${name}[at], ${name}[at + 1u]);
}

fn ${name}_store(offset: u32, stride: u32, result: ResultFragment) {
  let at = offset + lane / 2u * stride + lane % 2u * 2u;
  ${name}[at] = result.c0;
  ${name}[at + 1u] = result.c4;
}

fn ${name}_storeColumn(offset: u32, stride: u32, result: ResultFragment) {
  let row = lane / 2u;
  for (var c = 0u; c < 8u; c += 1u) {
    let at = offset + (lane % 2u * 8u + c) * stride + row / 4u;
    ${name}[at][row % 4u] = select(result.c4[c % 4u], result.c0[c % 4u], c < 4u);
  }
}`;
}
