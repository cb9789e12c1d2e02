// A call's inputs on the GPU, uploaded once and shared by every configuration that runs on them.

import type { MlaInputs, MlaProblem } from "../op/mla_problem.ts";
import type { Operand, QueryRange } from "./attention_plan.ts";
import type { GpuContext } from "./device.ts";

/** The inputs of one call in GPU memory. */
export class ResidentInputs {
  readonly #context: GpuContext;
  readonly #whole = new Map<Operand, GPUBuffer>();
  readonly #byRange = new Map<Operand, GPUBuffer[]>();

  /**
   * Uploads the inputs; queries go to one buffer per range.
   *
   * @param context The device.
   * @param problem The problem that the inputs were validated to.
   * @param inputs The tensors.
   * @param ranges The query ranges of the plan, which depend on the problem and the limits alone.
   */
  constructor(context: GpuContext, problem: MlaProblem, inputs: MlaInputs, ranges: readonly QueryRange[]) {
    this.#context = context;
    const { query, keyValue, wKc, wVc, bQ, bK } = inputs;
    try {
      for (const [operand, tensor] of Object.entries({ keyValue, wKc, wVc, bK } as const)) {
        if (tensor !== undefined) this.#whole.set(operand as Operand, this.#upload(tensor.data));
      }
      for (const [operand, tensor] of Object.entries({ query, bQ } as const)) {
        if (tensor === undefined) continue;
        const rowLength = tensor.data.length / (problem.batch * problem.queryLength);
        const buffers: GPUBuffer[] = [];
        this.#byRange.set(operand as Operand, buffers);
        for (const { start, end } of ranges) {
          buffers.push(this.#upload(tensor.data.subarray(start * rowLength, end * rowLength)));
        }
      }
    } catch (error) {
      this.dispose();
      throw error;
    }
  }

  /** The buffer of an operand, or undefined when it is not an input. */
  get(operand: Operand, range: number): GPUBuffer | undefined {
    return this.#whole.get(operand) ?? this.#byRange.get(operand)?.[range];
  }

  /** Gives the memory back. */
  dispose(): void {
    for (const buffer of [...this.#whole.values(), ...[...this.#byRange.values()].flat()]) {
      this.#context.buffers.release("storage", buffer);
    }
    this.#whole.clear();
    this.#byRange.clear();
  }

  #upload(data: Float32Array): GPUBuffer {
    const buffer = this.#context.buffers.acquire("storage", data.byteLength);
    this.#context.device.queue.writeBuffer(buffer, 0, data.buffer as ArrayBuffer, data.byteOffset, data.byteLength);
    return buffer;
  }
}
