// One planned call on one device, bound to its memory: ready to be recorded, run, read back and timed.

import { FlashMLAError } from "../op/errors.ts";
import { halfBits, toFloats, writeFloats } from "../op/half.ts";
import { lseShape, type MlaProblem, outputShape } from "../op/mla_problem.ts";
import { elementBytes, elementCount, type F16Tensor, type Tensor } from "../op/tensor.ts";
import type { CompiledPlan } from "./compiled_plan.ts";
import { type GpuContext, unlessLost } from "./device.ts";
import type { Binding, Dispatch, Operand, Schedule } from "./dispatch_plan.ts";
import { foreignBuffer, inErrorScopes } from "./error_scopes.ts";
import type { StorageType } from "./operand_layout.ts";
import { recordInto } from "./recording.ts";
import type { ResidentCall } from "./resident_call.ts";
import { settled } from "./settled.ts";
import { timeOnGpu } from "./timing.ts";

/** A buffer that is read back when the call has run. */
interface Readback {
  readonly buffer: GPUBuffer;
  readonly bytes: number;
  /** Takes the bytes, which are gone afterwards. */
  take(bytes: ArrayBuffer): void;
}

interface BoundDispatch extends Dispatch {
  readonly pipeline: GPUComputePipeline;
  readonly bindGroup: GPUBindGroup;
}

/** A call made ready on a device. */
export class PreparedAttention {
  readonly #context: GpuContext;
  readonly #problem: MlaProblem;
  readonly #compiled: CompiledPlan;
  readonly #call: ResidentCall;
  readonly #dispatches: readonly BoundDispatch[];

  private constructor(
    context: GpuContext,
    problem: MlaProblem,
    compiled: CompiledPlan,
    call: ResidentCall,
    dispatches: readonly BoundDispatch[],
  ) {
    this.#context = context;
    this.#problem = problem;
    this.#compiled = compiled;
    this.#call = call;
    this.#dispatches = dispatches;
  }

  /**
   * Binds a plan's kernels to a call's memory.
   *
   * @param context The device.
   * @param problem The problem that was planned.
   * @param compiled Its plan on the same device; it must outlive the result, as must the call.
   * @param call Its memory on the same device.
   * @throws {FlashMLAError} When the memory cannot be bound, or the device is lost.
   */
  static async create(
    context: GpuContext,
    problem: MlaProblem,
    compiled: CompiledPlan,
    call: ResidentCall,
  ): Promise<PreparedAttention> {
    const dispatches = await unlessLost(
      context,
      () => inErrorScopes(context, "bind the call's buffers", () => bindDispatches(context, compiled, call)),
    ).catch((error) => {
      throw foreignBuffer("run MLA", error) ?? error;
    });
    return new PreparedAttention(context, problem, compiled, call, dispatches);
  }

  /** The names of the kernels that it dispatches. */
  get kernelNames(): readonly string[] {
    return [...new Set(this.#dispatches.map(({ kernel }) => kernel))];
  }

  /** Runs the call once and waits until the engine has accepted it; the result is where the call put it. */
  async submit(): Promise<void> {
    await unlessLost(this.#context, () =>
      inErrorScopes(this.#context, "run its kernels", () => {
        const { device } = this.#context;
        this.#call.checkAlive();
        const encoder = device.createCommandEncoder({ label: "flash-mla attention" });
        this.encode(encoder);
        device.queue.submit([encoder.finish()]);
      }));
  }

  /** Records the call into a caller's encoder. */
  async record(encoder: GPUCommandEncoder): Promise<void> {
    await recordInto(this.#context, encoder, { what: "record MLA", owner: "the tensors'" }, () => {
      this.#call.checkAlive();
      this.encode(encoder);
    });
  }

  /** Runs the call once and reads the result back in float32. */
  async output(): Promise<Tensor> {
    const shape = outputShape(this.#problem);
    const result = { data: new Float32Array(elementCount(shape)), shape };
    await this.outputInto(result, 0);
    return result;
  }

  /**
   * Runs the call once and reads the result into a host tensor.
   *
   * @param target The tensor, of either element type.
   * @param start First element to write.
   * @param takeLse Takes the log-sum-exp, `[batch, queryHeads, queryLength]`, if the plan has one.
   */
  async outputInto(
    target: Tensor | F16Tensor,
    start: number,
    takeLse?: (lse: Float32Array) => void,
  ): Promise<void> {
    const { plan } = this.#compiled;
    const stored = plan.layouts.output!.dtype as StorageType;
    const rowLength = this.#problem.queryHeads * this.#problem.vHeadDim;
    const rows = plan.queryRanges.map((range, i): Readback => {
      const elements = (range.end - range.start) * rowLength;
      return {
        buffer: this.#call.get("output", i)!,
        bytes: elements * elementBytes(stored),
        take: (bytes) => writeStored(target, start + range.start * rowLength, bytes, elements, stored),
      };
    });
    const lse: Readback[] = takeLse === undefined ? [] : [{
      buffer: this.#call.get("lse", 0)!,
      bytes: elementCount(lseShape(this.#problem)) * 4,
      take: (bytes) => takeLse(new Float32Array(bytes, 0, elementCount(lseShape(this.#problem)))),
    }];
    await this.#runAndRead([...rows, ...lse]);
  }

  async #runAndRead(reads: readonly Readback[]): Promise<void> {
    const { device, buffers } = this.#context;
    // Copies are whole words: the half behind an odd number of them is padding.
    const readbacks = reads.filter(({ bytes }) => bytes > 0).map((read) => {
      const bytes = Math.ceil(read.bytes / 4) * 4;
      return { ...read, bytes, mapped: buffers.acquire("readback", bytes) };
    });
    try {
      await unlessLost(this.#context, async () => {
        await inErrorScopes(this.#context, "run its kernels", () => {
          this.#call.checkAlive();
          const encoder = device.createCommandEncoder({ label: "flash-mla attention" });
          this.encode(encoder);
          for (const { buffer, mapped, bytes } of readbacks) encoder.copyBufferToBuffer(buffer, 0, mapped, 0, bytes);
          device.queue.submit([encoder.finish()]);
        });
        for (const { mapped, bytes, take } of readbacks) {
          await settled(device, mapped.mapAsync(1, 0, bytes));
          try {
            take(mapped.getMappedRange(0, bytes));
          } finally {
            mapped.unmap();
          }
        }
      });
    } catch (error) {
      // One may be mapped or waiting for it: nobody may get it from the pool.
      for (const { mapped } of readbacks.splice(0)) buffers.discard(mapped);
      throw error;
    }
    for (const { mapped } of readbacks) buffers.release("readback", mapped);
  }

  /**
   * Runs the call's kernels `repeats` times back to back.
   *
   * @param repeats How often.
   * @param only The kernels to run; all of them when absent.
   * @returns Milliseconds for all repeats together.
   */
  async time(repeats: number, only?: readonly string[]): Promise<number> {
    return await unlessLost(
      this.#context,
      () =>
        timeOnGpu(
          this.#context,
          (encoder, timestampWrites) => this.encode(encoder, { only, timestampWrites }),
          repeats,
        ),
    );
  }

  /** Records the call's dispatches as one compute pass. */
  encode(
    encoder: GPUCommandEncoder,
    options: { only?: readonly string[]; timestampWrites?: GPUComputePassTimestampWrites } = {},
  ): void {
    const { only, timestampWrites } = options;
    if (only === undefined) this.#call.encodeClears(encoder);
    const pass = encoder.beginComputePass({ label: "flash-mla", timestampWrites });
    if (only === undefined) this.#call.encodeBefore(pass);
    for (const { kernel, pipeline, bindGroup, workgroups } of this.#dispatches) {
      if (only !== undefined && !only.includes(kernel)) continue;
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, bindGroup);
      pass.dispatchWorkgroups(...workgroups);
    }
    if (only === undefined) this.#call.encodeAfter(pass);
    pass.end();
  }
}

/** Writes elements as a kernel stored them to a host tensor. */
function writeStored(
  target: Tensor | F16Tensor,
  start: number,
  bytes: ArrayBuffer,
  elements: number,
  stored: StorageType,
): void {
  if (target.data.length < start + elements) {
    throw new FlashMLAError(
      "invalid-input",
      `Cannot run MLA: out needs ${
        start + elements
      } elements or more, its data has ${target.data.length} by now: it was ` +
        "transferred or resized during the call",
    );
  }
  if (stored === "f32") return writeFloats(target, new Float32Array(bytes, 0, elements), start);
  const bits = new Uint16Array(bytes, 0, elements);
  if (target.dtype === "f16") halfBits(target.data).set(bits, start);
  else target.data.set(toFloats({ data: bits, shape: [elements], dtype: "f16" }).data, start);
}

function bindDispatches(context: GpuContext, compiled: CompiledPlan, call: ResidentCall): BoundDispatch[] {
  const buffer = (operand: Operand, range: number): GPUBuffer => {
    if (operand === "params") return compiled.params;
    return compiled.schedules[operand as Schedule]?.[range] ?? call.get(operand, range)!;
  };
  return compiled.plan.dispatches.map((dispatch) => {
    const pipeline = compiled.pipelines[dispatch.kernel];
    const entries = dispatch.bindings.map(({ binding, operand, offset, size }: Binding) => ({
      binding,
      resource: { buffer: buffer(operand, dispatch.range), offset, size },
    }));
    const bindGroup = context.bindGroups.get(pipeline, dispatch.kernel, entries);
    return { ...dispatch, pipeline, bindGroup };
  });
}
