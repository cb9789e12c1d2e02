// One planned call on one device, bound to its memory: ready to be recorded, run, read back and timed.

import { FlashMLAError } from "../op/errors.ts";
import { halfBits, toFloats, writeFloats } from "../op/half.ts";
import { type MlaProblem, outputShape } from "../op/mla_problem.ts";
import { elementBytes, elementCount, type F16Tensor, type Tensor } from "../op/tensor.ts";
import type { Binding, Dispatch, Operand } from "./attention_plan.ts";
import type { CompiledPlan, KernelName } from "./compiled_plan.ts";
import { type GpuContext, unlessLost } from "./device.ts";
import { foreignBuffer, inErrorScopes } from "./error_scopes.ts";
import type { StorageType } from "./operand_layout.ts";
import type { ResidentCall } from "./resident_call.ts";
import { settled } from "./settled.ts";
import { timeOnGpu } from "./timing.ts";

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
    await inErrorScopes(this.#context, "record its kernels", () => {
      this.#call.checkAlive();
      this.encode(encoder);
    }).catch((error) => {
      if (!(error instanceof FlashMLAError) || error.code !== "device" || this.#context.lost() !== null) throw error;
      const why = `encoder must be open, outside of any pass, and of the tensors' device (${error.message})`;
      throw new FlashMLAError("invalid-input", `Cannot record MLA: ${why}`, { cause: error });
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
   */
  async outputInto(target: Tensor | F16Tensor, start: number): Promise<void> {
    const { device, buffers } = this.#context;
    const { plan } = this.#compiled;
    const stored = plan.layouts.output!.dtype;
    const rowLength = this.#problem.queryHeads * this.#problem.vHeadDim;
    const readbacks = plan.queryRanges.map((range) => {
      const elements = (range.end - range.start) * rowLength;
      // Copies are whole words: the half behind an odd number of them is padding.
      const bytes = Math.ceil(elements * elementBytes(stored) / 4) * 4;
      return { first: start + range.start * rowLength, elements, bytes, buffer: buffers.acquire("readback", bytes) };
    });
    try {
      await unlessLost(this.#context, async () => {
        await inErrorScopes(this.#context, "run its kernels", () => {
          this.#call.checkAlive();
          const encoder = device.createCommandEncoder({ label: "flash-mla attention" });
          this.encode(encoder);
          readbacks.forEach(({ bytes, buffer }, i) =>
            encoder.copyBufferToBuffer(this.#call.get("output", i)!, 0, buffer, 0, bytes)
          );
          device.queue.submit([encoder.finish()]);
        });
        for (const { first, elements, bytes, buffer } of readbacks) {
          await settled(device, buffer.mapAsync(1, 0, bytes));
          try {
            writeStored(target, first, buffer.getMappedRange(0, bytes), elements, stored);
          } finally {
            buffer.unmap();
          }
        }
      });
    } catch (error) {
      // One may be mapped or waiting for it: nobody may get it from the pool.
      for (const { buffer } of readbacks.splice(0)) buffers.discard(buffer);
      throw error;
    }
    for (const { buffer } of readbacks) buffers.release("readback", buffer);
  }

  /**
   * Runs the call's kernels `repeats` times back to back.
   *
   * @param repeats How often.
   * @param only The kernels to run; all of them when absent.
   * @returns Milliseconds for all repeats together.
   */
  async time(repeats: number, only?: readonly KernelName[]): Promise<number> {
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
    options: { only?: readonly KernelName[]; timestampWrites?: GPUComputePassTimestampWrites } = {},
  ): void {
    const { only, timestampWrites } = options;
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
    return operand === "blocks" ? compiled.blocks[range] : call.get(operand, range)!;
  };
  return compiled.plan.dispatches.map((dispatch) => {
    const pipeline = compiled.pipelines[dispatch.kernel];
    const entries = dispatch.bindings.map(({ binding, operand, offset, size }: Binding) => ({
      binding,
      resource: { buffer: buffer(operand, dispatch.range), offset, size },
    }));
    const bindGroup = context.device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries });
    return { ...dispatch, pipeline, bindGroup };
  });
}
