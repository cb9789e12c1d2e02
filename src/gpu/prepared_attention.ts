// One planned call on one device: kernels compiled, memory borrowed, ready to be run, read back and timed.

import { FlashMLAError } from "../op/errors.ts";
import { type MlaProblem, outputShape } from "../op/mla_problem.ts";
import type { Tensor } from "../op/tensor.ts";
import { type AttentionPlan, type Dispatch, type Operand, paramsBytes, paramsStride } from "./attention_plan.ts";
import type { PooledUsage } from "./buffers.ts";
import { type GpuContext, unlessLost } from "./device.ts";
import type { ResidentCall } from "./resident_call.ts";
import { timeOnGpu } from "./timing.ts";

/** The kernels of a plan, by name. */
export type KernelName = Dispatch["kernel"];

interface BoundDispatch extends Dispatch {
  readonly pipeline: GPUComputePipeline;
  readonly bindGroup: GPUBindGroup;
}

/** A call made ready on a device. */
export class PreparedAttention {
  readonly #context: GpuContext;
  readonly #problem: MlaProblem;
  readonly #plan: AttentionPlan;
  readonly #call: ResidentCall;
  readonly #borrowed: { readonly usage: PooledUsage; readonly buffer: GPUBuffer }[] = [];
  #dispatches: BoundDispatch[] = [];

  private constructor(context: GpuContext, problem: MlaProblem, plan: AttentionPlan, call: ResidentCall) {
    this.#context = context;
    this.#problem = problem;
    this.#plan = plan;
    this.#call = call;
  }

  /**
   * Compiles a plan's kernels and borrows its memory.
   *
   * @param context The device.
   * @param problem The problem that was planned.
   * @param plan Its plan.
   * @param call Its memory on the same device; it must outlive the result.
   * @throws {FlashMLAError} When a kernel does not compile, memory is refused, or the device is lost.
   */
  static async create(
    context: GpuContext,
    problem: MlaProblem,
    plan: AttentionPlan,
    call: ResidentCall,
  ): Promise<PreparedAttention> {
    const names = Object.keys(plan.kernels) as KernelName[];
    const prepared = new PreparedAttention(context, problem, plan, call);
    try {
      await unlessLost(context, async () => {
        const compiled = await Promise.all(names.map((name) => context.pipelines.get(name, plan.kernels[name])));
        const pipelines = new Map(names.map((name, i) => [name, compiled[i]]));
        await prepared.#checked("allocate its buffers", () => prepared.#bind(pipelines));
      });
    } catch (error) {
      prepared.dispose();
      throw error;
    }
    return prepared;
  }

  /** Runs the call once and reads the result back. */
  async output(): Promise<Tensor> {
    const { device, buffers } = this.#context;
    const shape = outputShape(this.#problem);
    const rowLength = shape[2] * shape[3];
    const data = new Float32Array(shape[0] * shape[1] * rowLength);
    const readbacks = this.#plan.queryRanges.map(({ start, end }) => {
      const bytes = (end - start) * rowLength * 4;
      return { start, bytes, buffer: buffers.acquire("readback", bytes) };
    });
    try {
      await unlessLost(this.#context, async () => {
        await this.#checked("run its kernels", () => {
          const encoder = device.createCommandEncoder({ label: "flash-mla attention" });
          this.encode(encoder);
          readbacks.forEach(({ bytes, buffer }, i) =>
            encoder.copyBufferToBuffer(this.#call.get("output", i)!, 0, buffer, 0, bytes)
          );
          device.queue.submit([encoder.finish()]);
        });
        for (const { start, bytes, buffer } of readbacks) {
          await buffer.mapAsync(1, 0, bytes);
          data.set(new Float32Array(buffer.getMappedRange(0, bytes)), start * rowLength);
          buffer.unmap();
        }
      });
    } finally {
      for (const { buffer } of readbacks) buffers.release("readback", buffer);
    }
    return { data, shape };
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
    for (const { kernel, pipeline, bindGroup, workgroups } of this.#dispatches) {
      if (only !== undefined && !only.includes(kernel)) continue;
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, bindGroup);
      pass.dispatchWorkgroups(...workgroups);
    }
    pass.end();
  }

  /** Gives the borrowed memory back. */
  dispose(): void {
    for (const { usage, buffer } of this.#borrowed.splice(0)) this.#context.buffers.release(usage, buffer);
    this.#dispatches = [];
  }

  #bind(pipelines: ReadonlyMap<KernelName, GPUComputePipeline>): void {
    const { device, capabilities } = this.#context;
    const maxBinding = Math.floor(capabilities.limits.maxStorageBufferBindingSize / 16) * 16;
    const { queryRanges, params } = this.#plan;
    const paramsBuffer = this.#borrow("uniform", params.byteLength);
    device.queue.writeBuffer(paramsBuffer, 0, params);
    const blocks = queryRanges.map((range) => {
      const buffer = this.#borrow("storage", range.blocks.byteLength);
      device.queue.writeBuffer(buffer, 0, range.blocks);
      return buffer;
    });
    this.#dispatches = this.#plan.dispatches.map((dispatch) => {
      const pipeline = pipelines.get(dispatch.kernel)!;
      const resource = (operand: Operand): GPUBufferBinding => {
        if (operand === "params") {
          return { buffer: paramsBuffer, offset: dispatch.params * paramsStride, size: paramsBytes };
        }
        const buffer = operand === "blocks" ? blocks[dispatch.range] : this.#call.get(operand, dispatch.range)!;
        // Pooled buffers may be longer than the limit on a binding.
        return { buffer, size: Math.min(buffer.size, maxBinding) };
      };
      const entries = dispatch.bindings.map(({ binding, operand }) => ({ binding, resource: resource(operand) }));
      return {
        ...dispatch,
        pipeline,
        bindGroup: device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }),
      };
    });
  }

  #borrow(usage: PooledUsage, bytes: number): GPUBuffer {
    const buffer = this.#context.buffers.acquire(usage, bytes);
    this.#borrowed.push({ usage, buffer });
    return buffer;
  }

  /** Does one step between error scopes and turns what they caught into an error of ours. */
  async #checked(step: string, work: () => void): Promise<void> {
    const { device } = this.#context;
    device.pushErrorScope("out-of-memory");
    device.pushErrorScope("validation");
    let scopes: Promise<GPUError | null>[] = [];
    try {
      work();
    } finally {
      // Popped before anything is awaited: other calls push theirs in the meantime.
      scopes = [device.popErrorScope(), device.popErrorScope()];
      scopes.forEach((scope) => scope.catch(() => {}));
    }
    const caught = (await Promise.all(scopes)).find((error) => error !== null);
    if (caught) {
      throw new FlashMLAError("device", `The GPU device could not ${step}: ${caught.message}`, { cause: caught });
    }
  }
}
