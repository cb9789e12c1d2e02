// Where the elements of a call's tensors lie in GPU memory, as far as plans and kernels care.

import {
  lseShape,
  type MlaInputs,
  type MlaProblem,
  outputShape,
  type TensorName,
  tensorNames,
} from "../op/mla_problem.ts";
import { sinksPerHead } from "../op/score_options.ts";
import {
  type AnyMask,
  type AnyTensor,
  denseStrides,
  dtypeOf,
  elementBytes,
  type GpuMaskTensor,
  type GpuTensor,
  isGpuTensor,
} from "../op/tensor.ts";

/** What kernels load and store. */
export type StorageType = "f32" | "f16";

/** The tensors of a call that lie in GPU memory while it runs. */
export type LaidOut = TensorName | "attentionMask" | "output" | "lse" | "gradOutput" | GradientName;

/** The name of a tensor's gradient. */
export type GradientName = `grad.${TensorName}`;

/** How one tensor lies in GPU memory. Lengths are in elements. */
export interface OperandLayout {
  /** How kernels load and store it; masks are bytes. */
  readonly dtype: StorageType | "u8";
  /**
   * Whether kernels work on the caller's buffer. Otherwise the tensor is dense in memory of ours: one buffer, or one for
   * each query range.
   */
  readonly resident: boolean;
  /** From the buffer's start to the first element; 0 unless resident. */
  readonly offset: number;
  /** From one batch item to the next; 0 where all items share one. */
  readonly batch: number;
  /** From one position to the next. */
  readonly row: number;
  /** From one head to the next; the row itself for tensors without heads, 0 where all heads share one. */
  readonly head: number;
}

/** The layouts of a call's tensors; those that the call lacks are missing. */
export type OperandLayouts = Readonly<Partial<Record<LaidOut, OperandLayout>>>;

/** A part of a buffer to bind. */
export interface BindingWindow {
  /** Bytes from the buffer's start, a multiple of 256. */
  readonly offset: number;
  /** Bytes, a multiple of 4. */
  readonly size: number;
  /** Elements from the window's start to the first element of the part. */
  readonly base: number;
}

/** Bytes to bind of a tensor without elements: a binding holds at least one element of its array. */
export const emptyBinding = 16;

/** WebGPU's strictest alignment of a binding's offset. */
const bindingAlignment = 256;

/** Bytes by which the window of a part may be longer than that of an equally long part that begins aligned. */
export const windowSlack = 252;

/** A dense tensor in memory of ours. */
function denseLayout(shape: readonly number[], dtype: StorageType): OperandLayout {
  return { dtype, resident: false, offset: 0, ...axes(shape, denseStrides(shape)) };
}

/** A tensor in the caller's buffer. */
export function residentLayout(tensor: GpuTensor): OperandLayout {
  const { shape, dtype, offset = 0, strides = denseStrides(shape) } = tensor;
  return { dtype, resident: true, offset: offset / elementBytes(dtype), ...axes(shape, strides) };
}

/** What takes a call's results on the GPU. */
export interface ResultPlaces {
  /** The tensor that takes the output, or the element type of one in memory of ours. */
  readonly out: GpuTensor | StorageType;
  /** The tensor that takes the log-sum-exp, or whether one in memory of ours does; not wanted when absent. */
  readonly lse?: GpuTensor | boolean;
}

/**
 * The layouts of a call.
 *
 * @param problem The call's dimensions.
 * @param inputs The call's tensors.
 * @param f16 Whether kernels can load and store halves; without, halves are brought to float32 first.
 * @param places What takes the results.
 */
export function operandLayouts(
  problem: MlaProblem,
  inputs: MlaInputs,
  f16: boolean,
  { out, lse = false }: ResultPlaces,
): OperandLayouts {
  const layoutOf = (tensor: AnyTensor): OperandLayout => {
    const half = dtypeOf(tensor) === "f16";
    if (isGpuTensor(tensor) && (f16 || !half)) return residentLayout(tensor);
    return denseLayout(tensor.shape, half && f16 ? "f16" : "f32");
  };
  const layouts: Partial<Record<LaidOut, OperandLayout>> = {};
  for (const name of tensorNames) {
    const tensor = inputs[name];
    if (tensor !== undefined) layouts[name] = layoutOf(tensor);
  }
  const { bias, attentionMask, softmaxAux } = inputs;
  if (bias !== undefined) layouts.bias = scoreLayout(bias, layouts.bias!);
  if (attentionMask !== undefined) layouts.attentionMask = scoreLayout(attentionMask, maskLayout(attentionMask));
  if (softmaxAux !== undefined) {
    const [stride] = stridesIn(softmaxAux, layouts.softmaxAux!);
    const head = sinksPerHead(softmaxAux.shape, problem.queryHeads) ? stride : 0;
    layouts.softmaxAux = { ...layouts.softmaxAux!, batch: 0, row: 0, head };
  }
  layouts.output = typeof out === "string"
    ? denseLayout(outputShape(problem), out === "f16" && f16 ? "f16" : "f32")
    : layoutOf(out);
  if (lse !== false) layouts.lse = lseLayout(lse === true ? denseLayout(lseShape(problem), "f32") : layoutOf(lse), lse);
  return layouts;
}

/**
 * The layouts of a call's gradients.
 *
 * @param problem The call's dimensions.
 * @param inputs The call's tensors.
 * @param f16 Whether kernels can load and store halves.
 * @param tensors What the gradients are made from, and what takes them.
 */
export function backwardLayouts(
  problem: MlaProblem,
  inputs: MlaInputs,
  f16: boolean,
  { output, lse, gradOutput, gradients }: {
    readonly output: AnyTensor;
    readonly lse: AnyTensor;
    readonly gradOutput: AnyTensor;
    readonly gradients: MlaInputs<GpuTensor>;
  },
): OperandLayouts {
  const placeOf = (tensor: AnyTensor) => isGpuTensor(tensor) ? tensor : dtypeOf(tensor) === "f16" ? "f16" : "f32";
  const layouts = operandLayouts(problem, inputs, f16, {
    out: placeOf(output),
    lse: isGpuTensor(lse) ? lse : true,
  });
  const sums = operandLayouts(problem, gradients, f16, { out: "f32" });
  const named = Object.entries(sums).filter(([name]) => name !== "output").map(([name, layout]) => [
    `grad.${name}`,
    layout,
  ]);
  const { output: gradLayout } = operandLayouts(problem, inputs, f16, { out: placeOf(gradOutput) });
  return { ...layouts, ...Object.fromEntries(named), gradOutput: gradLayout };
}

/** A mask's layout as if it were an ordinary tensor of four axes. */
function maskLayout(mask: AnyMask): OperandLayout {
  const { shape } = mask;
  if (!isGpuTensor(mask)) return { dtype: "u8", resident: false, offset: 0, ...axes(shape, denseStrides(shape)) };
  const { offset = 0, strides = denseStrides(shape) } = mask;
  return { dtype: "u8", resident: true, offset, ...axes(shape, strides) };
}

/** The strides of a tensor where kernels find it. */
function stridesIn(tensor: AnyTensor | AnyMask, { resident }: OperandLayout): readonly number[] {
  const dense = denseStrides(tensor.shape);
  return resident ? (tensor as GpuTensor | GpuMaskTensor).strides ?? dense : dense;
}

/** The layout of a bias or mask, whose axes are batch, head and query: what has length 1 is shared. */
function scoreLayout(tensor: AnyTensor | AnyMask, layout: OperandLayout): OperandLayout {
  const strides = stridesIn(tensor, layout);
  const shared = (axis: number) => tensor.shape[axis] === 1 ? 0 : strides[axis];
  return { ...layout, batch: shared(0), head: shared(1), row: strides[2] };
}

/** The layout of log-sum-exps, whose axes are batch, head and query. */
function lseLayout(layout: OperandLayout, lse: GpuTensor | true): OperandLayout {
  if (lse === true) return { ...layout, head: layout.row, row: 1 };
  const { shape, strides = denseStrides(shape) } = lse;
  return { ...layout, batch: strides[0], head: strides[1], row: strides[2] };
}

/** The layouts of a call whose tensors are all dense in float32, in memory of ours. */
export function denseLayouts(problem: MlaProblem): OperandLayouts {
  const { batch, queryLength, keyLength, queryHeads, kvHeads, kvLoraRank, qkRopeHeadDim: R, rope } = problem;
  const { qkNopeHeadDim: P, vHeadDim, scoreTerm, sinks } = problem;
  const dense = (...shape: number[]) => denseLayout(shape, "f32");
  const scores = dense(batch, queryHeads, queryLength, keyLength);
  const term = { ...scores, row: keyLength, head: queryLength * keyLength };
  return {
    query: dense(batch, queryLength, queryHeads, rope === "in_query" ? P + R : P),
    keyValue: dense(batch, keyLength, kvLoraRank),
    wKc: dense(kvLoraRank, kvHeads, P),
    wVc: dense(kvLoraRank, kvHeads, vHeadDim),
    ...(rope === "none" ? {} : { bK: dense(batch, keyLength, R) }),
    ...(rope === "shared" ? { bQ: dense(batch, queryLength, R) } : {}),
    ...(scoreTerm === "bias" ? { bias: term } : {}),
    ...(scoreTerm === "mask" ? { attentionMask: { ...term, dtype: "u8" } } : {}),
    ...(sinks > 0 ? { softmaxAux: { ...dense(queryHeads, sinks), batch: 0, row: 0, head: sinks } } : {}),
    output: dense(...outputShape(problem)),
  };
}

/** Elements by which a batch item starts later than if the items followed each other; negative for overlapping items. */
export function batchGap(layout: OperandLayout, rows: number): number {
  return layout.batch - rows * layout.row;
}

/** Whether every run of four columns that starts at a multiple of four is aligned. */
export function isQuadAligned({ offset, batch, row, head }: OperandLayout): boolean {
  return [offset, batch, row, head].every((elements) => elements % 4 === 0);
}

/** Whether a tensor is of halves, and every run of eight columns that starts at a multiple of eight is aligned. */
export function isEightAligned({ dtype, offset, batch, row, head }: OperandLayout): boolean {
  return dtype === "f16" && [offset, batch, row, head].every((elements) => elements % 8 === 0);
}

/**
 * The window that holds some rows of a tensor.
 *
 * @param layout Where the tensor lies.
 * @param rowsPerItem Rows of a batch item.
 * @param start First row, counted through all batch items.
 * @param end One past the last row.
 * @param width Elements from the first to one past the last of a row, all heads included.
 */
export function rowWindow(
  layout: OperandLayout,
  rowsPerItem: number,
  start: number,
  end: number,
  width: number,
): BindingWindow {
  if (start === end) return { offset: 0, size: emptyBinding, base: 0 };
  const item = (row: number) => Math.floor(row / rowsPerItem);
  const at = (row: number) => item(row) * layout.batch + (row % rowsPerItem) * layout.row;
  // Items may overlap or repeat: the nearest row is the first one or an item's first, the furthest the last or an item's
  // last.
  const several = item(end - 1) > item(start);
  const nearest = Math.min(at(start), several ? (item(start) + 1) * layout.batch : Infinity);
  const furthest = Math.max(at(end - 1), several ? at(item(end - 1) * rowsPerItem - 1) : 0);
  const origin = layout.resident ? layout.offset : -nearest;
  return window(layout.dtype, origin + nearest, origin + furthest + width, origin + at(start));
}

/** The window that holds a whole tensor of items, heads and so many elements in a row, its base the first element. */
export function plainWindow(layout: OperandLayout, items: number, heads: number, count: number): BindingWindow {
  if (items * heads * count === 0) return { offset: 0, size: emptyBinding, base: 0 };
  const span = (items - 1) * layout.batch + (heads - 1) * layout.head + count;
  return window(layout.dtype, layout.offset, layout.offset + span, layout.offset);
}

/** The window that holds a dense tensor of `count` elements. */
export function denseWindow(layout: OperandLayout, count: number): BindingWindow {
  return window(layout.dtype, layout.offset, layout.offset + count, layout.offset);
}

/**
 * The window that holds a part of a bias or mask.
 *
 * @param layout Where the tensor lies.
 * @param problem The call's dimensions.
 * @param queries First query row, counted through all batch items, and one past the last.
 * @param heads First query head, and one past the last.
 * @returns The window, its base the place of the very first element of the tensor; negative where the window begins
 * behind it.
 */
export function termWindow(
  layout: OperandLayout,
  { queryLength, keyLength }: MlaProblem,
  queries: { readonly start: number; readonly end: number },
  heads: { readonly start: number; readonly end: number },
): BindingWindow {
  const count = queries.end - queries.start;
  if (count * keyLength * (heads.end - heads.start) === 0) return { offset: 0, size: emptyBinding, base: 0 };
  const items = { start: Math.floor(queries.start / queryLength), last: Math.floor((queries.end - 1) / queryLength) };
  const several = items.last > items.start;
  const rows = several ? { first: 0, last: queryLength - 1 } : {
    first: queries.start % queryLength,
    last: (queries.end - 1) % queryLength,
  };
  const at = (item: number, head: number, row: number) =>
    layout.offset + item * layout.batch + head * layout.head + row * layout.row;
  const start = at(items.start, heads.start, rows.first);
  return window(layout.dtype, start, at(items.last, heads.end - 1, rows.last) + keyLength, layout.offset);
}

/** Bytes of one element as it is laid out. */
export function layoutBytes({ dtype }: Pick<OperandLayout, "dtype">): number {
  return dtype === "u8" ? 1 : elementBytes(dtype);
}

function window(dtype: OperandLayout["dtype"], start: number, end: number, first: number): BindingWindow {
  const bytes = layoutBytes({ dtype });
  const offset = Math.floor(start * bytes / bindingAlignment) * bindingAlignment;
  return { offset, size: Math.ceil((end * bytes - offset) / 4) * 4, base: first - offset / bytes };
}

function axes(shape: readonly number[], strides: readonly number[]): Pick<OperandLayout, "batch" | "row" | "head"> {
  const [batch, row = 0, head] = strides;
  // One batch item has no distance to the next: without a gap, more calls share a kernel.
  return { batch: shape[0] <= 1 ? shape[1] * row : batch, row, head: shape.length === 4 ? head : row };
}
