// A call's memory on the GPU: its inputs, in the caller's buffers or uploaded, and the scratch and outputs that its kernels
// write. Every configuration that is tried on the call shares them, since none depends on the tile.

import { FlashMLAError } from "../op/errors.ts";
import { halfBits, toFloats } from "../op/half.ts";
import { mapTensors, type MlaInputs, type MlaProblem, tensorNames } from "../op/mla_problem.ts";
import {
  type AnyMask,
  type AnyTensor,
  denseStrides,
  dtypeOf,
  elementCount,
  type GpuTensor,
  type HostTensor,
  isGpuTensor,
} from "../op/tensor.ts";
import { type GpuContext, unlessLost } from "./device.ts";
import type { DispatchPlan, Operand, ScratchName } from "./dispatch_plan.ts";
import { type Scratch, scratchFor } from "./encoder_scratch.ts";
import { inErrorScopes } from "./error_scopes.ts";
import { type HalfCopy, halfCopy, halfPipeline } from "./half_copy.ts";
import { emptyBinding, type LaidOut, type StorageType } from "./operand_layout.ts";
import type { RowRange } from "./schedule.ts";

/** What a call works on beside its plan. */
export interface CallTensors {
  /** The inputs. */
  readonly inputs: MlaInputs;
  /** What takes the result on the GPU; memory of ours when absent. */
  readonly out?: GpuTensor;
  /** What takes the log-sum-exp on the GPU; memory of ours when absent, if the plan has one. */
  readonly lse?: GpuTensor;
  /** What the gradients are made from, and what takes them: for plans of gradients, in the place of `out` and `lse`. */
  readonly backward?: BackwardTensors;
}

/** What a call's gradients are made from beside the inputs, and what takes them. */
export interface BackwardTensors {
  /** The call's result. */
  readonly output: AnyTensor;
  /** Its log-sum-exp, in float32. */
  readonly lse: AnyTensor;
  /** The gradient of the result. */
  readonly gradOutput: AnyTensor;
  /** Sums of gradients in float32, by the name of the input. */
  readonly gradients: MlaInputs<GpuTensor>;
  /** Whether to make the sums zero first. */
  readonly clear: boolean;
}

/** The kernels for tensors of halves on a device without half precision. */
interface CopyKernels {
  readonly unpack?: GPUComputePipeline;
  readonly pack?: GPUComputePipeline;
}

/** The operands of one call in GPU memory. */
export class ResidentCall {
  readonly #context: GpuContext;
  readonly #copyKernels: CopyKernels;
  readonly #buffers = new Map<Operand, GPUBuffer[]>();
  readonly #borrowed: GPUBuffer[] = [];
  readonly #scratch: Scratch;
  readonly #tensors: readonly (readonly [name: string, tensor: AnyTensor | AnyMask])[];
  readonly #before: HalfCopy[] = [];
  readonly #after: HalfCopy[] = [];
  readonly #cleared: GPUBuffer[] = [];

  private constructor(context: GpuContext, tensors: CallTensors, copyKernels: CopyKernels, scratch: Scratch) {
    this.#context = context;
    const { inputs, out, lse, backward } = tensors;
    const named: (readonly [string, AnyTensor | AnyMask | undefined])[] = [
      ...[...tensorNames, "attentionMask" as const].map((name) => [name, inputs[name]] as const),
      ...[["out", out], ["lse", lse ?? backward?.lse], ["the output", backward?.output]] as const,
      ...[["gradOutput", backward?.gradOutput]] as const,
    ];
    this.#tensors = named.filter((entry): entry is [string, AnyTensor | AnyMask] => entry[1] !== undefined);
    this.#scratch = scratch;
    this.#copyKernels = copyKernels;
  }

  /**
   * Borrows memory and uploads the inputs that lie on the host. What is cut into query ranges gets one buffer for each.
   *
   * @param context The device.
   * @param problem The problem that the inputs were validated to.
   * @param tensors The tensors.
   * @param plan Any plan of the problem for this device and these tensors: ranges and scratch depend on those alone, and on
   * whether matrix units are used.
   * @param encoder The encoder that the call is recorded into, whose calls share their scratch.
   */
  static async create(
    context: GpuContext,
    problem: MlaProblem,
    tensors: CallTensors,
    plan: DispatchPlan,
    encoder?: GPUCommandEncoder,
  ): Promise<ResidentCall> {
    const kernels = await copyKernels(context, tensors, plan);
    const call = new ResidentCall(context, tensors, kernels, scratchFor(context, encoder));
    try {
      await unlessLost(
        context,
        () => inErrorScopes(context, "hold the call's tensors", () => call.#fill(problem, tensors, plan)),
      );
    } catch (error) {
      // Any of the buffers may be one that the device refused: nobody may get it from the pool.
      for (const buffer of call.#borrowed.splice(0)) context.buffers.discard(buffer);
      call.#scratch.discard();
      call.dispose();
      throw error;
    }
    return call;
  }

  /** The buffer of an operand, or undefined when the call has none; operands that are not split ignore the range. */
  get(operand: Operand, range: number): GPUBuffer | undefined {
    const buffers = this.#buffers.get(operand);
    return buffers?.[Math.min(range, buffers.length - 1)];
  }

  /**
   * Throws when a tensor was disposed of meanwhile: its buffer may be another tensor's by now. To be asked in the same turn
   * as the submission, which the buffer outlives.
   *
   * @throws {FlashMLAError} With code `invalid-input`.
   */
  checkAlive(): void {
    for (const [name, tensor] of this.#tensors) {
      if (!("buffer" in tensor) || tensor.disposed !== true) continue;
      const why = `${name} was disposed of while the call was under way; await the call first`;
      throw new FlashMLAError("invalid-input", `Cannot run MLA: ${why}`);
    }
  }

  /** Records what has to happen before any pass. */
  encodeClears(encoder: GPUCommandEncoder): void {
    for (const buffer of this.#cleared) encoder.clearBuffer(buffer);
  }

  /** Records what has to happen before the kernels. */
  encodeBefore(pass: GPUComputePassEncoder): void {
    for (const copy of this.#before) copy.encode(pass);
  }

  /** Records what has to happen after the kernels. */
  encodeAfter(pass: GPUComputePassEncoder): void {
    for (const copy of this.#after) copy.encode(pass);
  }

  /** Gives back the memory that was borrowed; the caller's stays. */
  dispose(): void {
    for (const buffer of this.#borrowed.splice(0)) this.#context.buffers.release("storage", buffer);
    this.#scratch.dispose();
    for (const copy of [...this.#before.splice(0), ...this.#after.splice(0)]) copy.dispose();
    this.#buffers.clear();
  }

  #fill(problem: MlaProblem, { inputs, out, lse, backward }: CallTensors, plan: DispatchPlan): void {
    const { keyValue, wKc, wVc, bK, query, bQ, bias, softmaxAux, attentionMask } = inputs;
    const { layouts, queryRanges, scratch } = plan;
    const stored = (name: LaidOut) => layouts[name]!.dtype as StorageType;
    for (const [name, bytes] of Object.entries(scratch)) {
      this.#put(name as ScratchName, this.#scratch.lend(name as ScratchName, bytes));
    }
    for (const [name, tensor] of present({ keyValue, wKc, wVc, bK, bias, softmaxAux })) {
      // Sinks have one or two axes: a row a head.
      const rows = tensor.shape.length < 3 ? tensor.shape[0] : tensor.shape[0] * tensor.shape[1];
      this.#bring(name, tensor, stored(name), { start: 0, end: rows });
    }
    for (const [name, tensor] of present({ query, bQ })) {
      for (const range of queryRanges) this.#bring(name, tensor, stored(name), range);
    }
    if (attentionMask !== undefined) this.#put("attentionMask", this.#mask(attentionMask));
    if (backward !== undefined) return this.#fillBackward(backward, plan);
    for (const range of queryRanges) this.#takeResult(problem, range, stored("output"), out);
    if (layouts.lse !== undefined) {
      const { batch, queryHeads, queryLength } = problem;
      this.#put("lse", lse?.buffer ?? this.#borrow(batch * queryHeads * queryLength * 4));
    }
  }

  #fillBackward(
    { output, lse, gradOutput, gradients, clear }: BackwardTensors,
    { layouts, queryRanges }: DispatchPlan,
  ) {
    for (const [name, tensor] of present({ output, gradOutput })) {
      for (const range of queryRanges) this.#bring(name, tensor, layouts[name]!.dtype as StorageType, range);
    }
    this.#bring("lse", lse, "f32", { start: 0, end: lse.shape[0] * lse.shape[1] });
    mapTensors(gradients, (tensor, name) => {
      this.#put(`grad.${name}`, tensor.buffer);
      if (clear) this.#cleared.push(tensor.buffer);
      return tensor;
    });
  }

  /** A mask's bytes on the GPU, padded to whole words. */
  #mask(mask: AnyMask): GPUBuffer {
    if (isGpuTensor(mask)) return mask.buffer;
    const words = new Uint8Array(Math.max(emptyBinding, Math.ceil(mask.data.length / 4) * 4));
    words.set(mask.data);
    const buffer = this.#borrow(words.byteLength);
    this.#context.device.queue.writeBuffer(buffer, 0, words);
    return buffer;
  }

  /** Makes rows of an input available to the kernels, stored as they expect. */
  #bring(name: LaidOut, tensor: AnyTensor, stored: StorageType, rows: RowRange): void {
    // Without keys there is still something to bind. Deno's writeBuffer panics on an empty ArrayBuffer.
    if (elementCount(tensor.shape) === 0) return this.#put(name, this.#borrow(emptyBinding));
    if (!isGpuTensor(tensor)) return this.#put(name, this.#upload(tensor, stored, rows));
    if (dtypeOf(tensor) === stored) return this.#put(name, tensor.buffer);
    const halves = tensor.shape.length < 3 ? inRows(tensor) : tensor;
    const floats = this.#borrow((rows.end - rows.start) * denseStrides(halves.shape)[1] * 4);
    this.#put(name, floats);
    this.#before.push(halfCopy(this.#context, this.#copyKernels.unpack!, halves, rows, floats));
  }

  #takeResult(problem: MlaProblem, rows: RowRange, stored: StorageType, out?: GpuTensor): void {
    if (out !== undefined && out.dtype === stored) return this.#put("output", out.buffer);
    const rowLength = problem.queryHeads * problem.vHeadDim;
    const buffer = this.#borrow((rows.end - rows.start) * rowLength * (stored === "f16" ? 2 : 4));
    this.#put("output", buffer);
    if (out !== undefined) this.#after.push(halfCopy(this.#context, this.#copyKernels.pack!, out, rows, buffer));
  }

  #put(operand: Operand, buffer: GPUBuffer): void {
    const buffers = this.#buffers.get(operand);
    if (buffers === undefined) this.#buffers.set(operand, [buffer]);
    else buffers.push(buffer);
  }

  #borrow(bytes: number): GPUBuffer {
    const buffer = this.#context.buffers.acquire("storage", bytes);
    this.#borrowed.push(buffer);
    return buffer;
  }

  #upload(tensor: HostTensor, stored: StorageType, rows: RowRange): GPUBuffer {
    const rowLength = tensor.shape.length < 3 ? denseStrides([...tensor.shape, 1])[0] : denseStrides(tensor.shape)[1];
    const cut = { ...tensor, data: subarray(tensor, rows.start * rowLength, rows.end * rowLength) } as HostTensor;
    const source = uploadable(stored === "f16" ? halfBits(cut.data as Uint16Array) : toFloats(cut).data);
    const buffer = this.#borrow(source.byteLength);
    this.#context.device.queue.writeBuffer(buffer, 0, source.buffer, source.byteOffset, source.byteLength);
    return buffer;
  }
}

/** A tensor of one or two axes as rows of one batch item. */
function inRows(tensor: GpuTensor): GpuTensor {
  const { shape: [rows, columns = 1], strides = denseStrides(tensor.shape) } = tensor;
  const { buffer, dtype, offset } = tensor;
  return { buffer, dtype, offset, shape: [1, rows, columns], strides: [0, strides[0], 1] };
}

async function copyKernels(
  context: GpuContext,
  { inputs, out, backward }: CallTensors,
  { layouts }: DispatchPlan,
): Promise<CopyKernels> {
  const differs = (name: LaidOut, tensor?: AnyTensor) =>
    tensor !== undefined && isGpuTensor(tensor) && tensor.dtype !== layouts[name]!.dtype;
  return {
    ...((tensorNames.some((name) => differs(name, inputs[name])) || differs("output", backward?.output) ||
      differs("gradOutput", backward?.gradOutput)) &&
      { unpack: await halfPipeline(context, "unpack") }),
    ...(differs("output", out) && { pack: await halfPipeline(context, "pack") }),
  };
}

function subarray(tensor: HostTensor, start: number, end: number): Float32Array | Uint16Array {
  const data = tensor.dtype === "f16" ? halfBits(tensor.data) : tensor.data;
  return data.subarray(start, end);
}

/**
 * The same bytes as engines take them: whole words, and no memory that is shared with other threads.
 */
function uploadable(data: Float32Array | Uint16Array): Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer> {
  if (data instanceof Uint16Array && data.length % 2 === 1) {
    const padded = new Uint16Array(data.length + 1);
    padded.set(data);
    return padded;
  }
  if (data.buffer instanceof ArrayBuffer) return data as Float32Array<ArrayBuffer>;
  return data instanceof Uint16Array ? new Uint16Array(data) : new Float32Array(data);
}

function present<T>(record: Partial<Record<LaidOut, T | undefined>>): [LaidOut, T][] {
  return Object.entries(record).filter(([, value]) => value !== undefined) as [LaidOut, T][];
}
