// What the register-tiled kernels share: unrolling, staging through workgroup memory, and the outer product.
//
// A workgroup multiplies through two staged operands. `left` holds depth × rows and `right` depth × columns, both as
// rows of vec4<f32> with the depth outermost, so that after unrolling every workgroup index is a constant but the
// invocation's own: the clamp that engines add to dynamic indices is then computed once instead of per load.
// Each depth row carries one vec4 of padding: an odd vec4 stride keeps transposed stores and probability columns off
// each other's banks.

/** Joins `count` copies of a piece of WGSL, one per index. */
export function unroll(count: number, piece: (index: number) => string): string {
  return Array.from({ length: count }, (_, i) => piece(i)).join("\n");
}

/** A block of WGSL for each of `count` depth steps, copied out or as a loop. */
export function overDepth(count: number, unrolled: boolean, step: (depth: string) => string): string {
  if (!unrolled) return `for (var d = 0u; d < ${count}u; d += 1u) {\n${indent(step("d"), 2)}\n}`;
  return unroll(count, (d) => `{\n${indent(step(`${d}`), 2)}\n}`);
}

/** Indents every line of a piece of WGSL. */
export function indent(text: string, spaces: number): string {
  return text.replace(/^(?=.)/gm, " ".repeat(spaces));
}

/** Length in vec4 of one staged depth row of `width` elements. */
export function stagedStride(width: number): number {
  return Math.ceil(width / 4) + 1;
}

/** How one operand's slice is carried from storage to workgroup memory. */
export interface Staging {
  /** Prefix of the registers that hold the slice on its way. */
  readonly name: string;
  /** Number of 4-element pieces in one slice. */
  readonly pieces: number;
  /** WGSL expression of type vec4<f32> that loads piece `piece` of slice `slice`. */
  load(piece: string, slice: string): string;
  /** WGSL statements that store `value` as piece `piece` into buffer `stage`. */
  store(piece: string, value: string, stage: string): string;
}

/**
 * A loop over slices: each is loaded to registers, stored to workgroup memory and multiplied.
 *
 * One stage: load, barrier, store, barrier, compute. Two stages: the next slice is loaded before this one is multiplied
 * and stored after it, with one barrier a slice. Both end behind a barrier, so that the staged memory is free again.
 */
export function slicedLoop(
  options: {
    readonly slices: string;
    readonly workgroupSize: number;
    readonly numStages: number;
    readonly operands: readonly Staging[];
    readonly compute: (stage: string) => string;
    /** Statements to run after the first slice was loaded to registers and before the first barrier. */
    readonly prologue?: string;
  },
): string {
  const { slices, workgroupSize, numStages, operands, compute, prologue = "" } = options;
  const each = (emit: (operand: Staging, piece: string, register: string, whole: boolean) => string) =>
    operands.map((operand) =>
      unroll(Math.ceil(operand.pieces / workgroupSize), (i) => {
        const whole = (i + 1) * workgroupSize <= operand.pieces;
        return emit(operand, `(t + ${i * workgroupSize}u)`, `${operand.name}${i}`, whole);
      })
    ).join("\n");
  const guarded = (operand: Staging, piece: string, whole: boolean, body: string) =>
    whole ? body : `if (${piece} < ${operand.pieces}u) { ${body} }`;
  const declare = each((_operand, _piece, register) => `var ${register} = vec4<f32>();`);
  const load = (slice: string) =>
    each((operand, piece, register, whole) =>
      guarded(operand, piece, whole, `${register} = ${operand.load(piece, slice)};`)
    );
  const store = (stage: string) =>
    each((operand, piece, register, whole) => guarded(operand, piece, whole, operand.store(piece, register, stage)));

  if (numStages === 1) {
    return `{
${indent(declare, 2)}
${indent(prologue, 2)}
  for (var slice = 0u; slice < ${slices}; slice += 1u) {
${indent(load("slice"), 4)}
${indent(store("0u"), 4)}
    workgroupBarrier();
${indent(compute("0u"), 4)}
    workgroupBarrier();
  }
}`;
  }
  return `{
${indent(declare, 2)}
${indent(load("0u"), 2)}
${indent(prologue, 2)}
${indent(store("0u"), 2)}
  workgroupBarrier();
  for (var slice = 0u; slice < ${slices}; slice += 1u) {
    let stage = slice & 1u;
    let more = slice + 1u < ${slices};
    if (more) {
${indent(load("slice + 1u"), 6)}
    }
${indent(compute("stage"), 4)}
    if (more) {
${indent(store("1u - stage"), 6)}
    }
    workgroupBarrier();
  }
}`;
}

/** WGSL statements that store `value`, four neighbours in depth of one row, into a depth-major staged operand. */
export function storeTransposed(operand: string, stage: string, depth: string, row: string, value: string): string {
  return unroll(4, (i) => `${operand}[${stage}][${depth} + ${i}u][${row} >> 2u][${row} & 3u] = ${value}[${i}];`);
}

const axis = "xyzw";

/**
 * One depth step of an outer product whose accumulators hold four rows each: `acc{column}_{rowQuad} += left · right`.
 *
 * @param rowQuads Names of vec4 registers over rows.
 * @param columnQuads Names of vec4 registers over columns.
 */
export function outerByRows(acc: string, rowQuads: readonly string[], columnQuads: readonly string[]): string {
  return columnQuads.flatMap((column, c) =>
    [0, 1, 2, 3].flatMap((j) =>
      rowQuads.map((row, r) => {
        const target = `${acc}${c * 4 + j}_${r}`;
        return `${target} = fma(${row}, vec4<f32>(${column}.${axis[j]}), ${target});`;
      })
    )
  ).join("\n");
}

/** The same with accumulators that hold four columns each: `acc{row}_{columnQuad} += left · right`. */
export function outerByColumns(acc: string, rowQuads: readonly string[], columnQuads: readonly string[]): string {
  return rowQuads.flatMap((row, r) =>
    [0, 1, 2, 3].flatMap((i) =>
      columnQuads.map((column, c) => {
        const target = `${acc}${r * 4 + i}_${c}`;
        return `${target} = fma(vec4<f32>(${row}.${axis[i]}), ${column}, ${target});`;
      })
    )
  ).join("\n");
}
