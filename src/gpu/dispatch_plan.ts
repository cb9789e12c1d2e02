// What the plans of forward and backward have in common: dispatches with their bindings and parameters, worked out on the
// host. No GPU is touched.

import type { BindingWindow, LaidOut, OperandLayouts } from "./operand_layout.ts";
import type { RowRange } from "./schedule.ts";

/** Bytes between two parameter blocks: WebGPU's strictest alignment of a uniform binding. */
export const paramsStride = 256;

/** Bytes of one parameter block, at least as many as the largest of the kernels' `Params`. */
export const paramsBytes = 208;

/** Schedules that a plan uploads once, one for each query range. */
export type Schedule = "blocks" | "queryBlocks" | "keyBlocks" | "biasBlocks";

/** Memory of ours that kernels write and read within one call. `sinks` is bound as a uniform, too. */
export type ScratchName = "expanded" | "sinks" | "gradExpanded" | "gradQuery" | "stats" | "staged" | "maxima";

/** The operands that dispatches bind. */
export type Operand = LaidOut | "params" | Schedule | ScratchName;

/** One binding of a dispatch. */
export interface Binding {
  /** Index in the kernel's group 0. */
  readonly binding: number;
  /** What is bound. */
  readonly operand: Operand;
  /** Bytes from the operand's start. */
  readonly offset: number;
  /** Bytes to bind. */
  readonly size: number;
}

/** One dispatch. */
export interface Dispatch {
  /** Which of the plan's kernels runs. */
  readonly kernel: string;
  /** What is bound; index 0 is the parameter block. */
  readonly bindings: readonly Binding[];
  /** Index of the dispatch's parameter block. */
  readonly params: number;
  /** Index of its query range; 0 for what is not cut into ranges. */
  readonly range: number;
  /** Workgroups along x and y. */
  readonly workgroups: readonly [number, number];
}

/** All that it takes to run one call, beside the data. */
export interface DispatchPlan {
  /** WGSL of each kernel. */
  readonly kernels: Readonly<Record<string, string>>;
  /** The dispatches in order. */
  readonly dispatches: readonly Dispatch[];
  /** The parameter blocks, {@link paramsStride} bytes apart. */
  readonly params: ArrayBuffer;
  /** Where the tensors lie. */
  readonly layouts: OperandLayouts;
  /** Ranges of query rows that are uploaded, computed and read back as one. */
  readonly queryRanges: readonly RowRange[];
  /** The words of each schedule, for each query range. */
  readonly schedules: Readonly<Partial<Record<Schedule, readonly Uint32Array<ArrayBuffer>[]>>>;
  /** Bytes of scratch. */
  readonly scratch: Readonly<Partial<Record<ScratchName, number>>>;
}

/** An operand's place among a kernel's bindings. */
export type Bound = readonly [binding: number, operand: Operand, window: Pick<BindingWindow, "offset" | "size">];

/** Collects dispatches, each with a parameter block of its own. */
export class DispatchList {
  /** The dispatches so far. */
  readonly dispatches: Dispatch[] = [];
  readonly #params: { readonly floats: readonly number[]; readonly words: readonly number[] }[] = [];

  /**
   * Adds a dispatch.
   *
   * @param dispatch Its kernel, range and size.
   * @param bound Its operands, but for the parameter block.
   * @param floats The f32 values that its parameter block begins with.
   * @param words The u32 values behind them; negative ones wrap around, as the kernels' arithmetic does.
   */
  add(
    dispatch: Pick<Dispatch, "kernel" | "range" | "workgroups">,
    bound: readonly Bound[],
    floats: readonly number[],
    words: readonly number[],
  ): void {
    const params = this.#params.length;
    const own: Bound = [0, "params", { offset: params * paramsStride, size: paramsBytes }];
    const bindings = [own, ...bound]
      .map(([binding, operand, { offset, size }]) => ({ binding, operand, offset, size }));
    this.dispatches.push({ ...dispatch, bindings, params });
    this.#params.push({ floats, words });
  }

  /** The parameter blocks as the plan uploads them. */
  packParams(): ArrayBuffer {
    const packed = new ArrayBuffer(Math.max(1, this.#params.length) * paramsStride);
    this.#params.forEach(({ floats, words }, i) => {
      new Float32Array(packed, i * paramsStride, floats.length).set(floats);
      new Uint32Array(packed, i * paramsStride + floats.length * 4, words.length).set(words.map((word) => word >>> 0));
    });
    return packed;
  }
}
