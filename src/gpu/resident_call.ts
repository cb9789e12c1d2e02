// A call's memory on the GPU: its inputs, uploaded once, and the scratch and outputs that its kernels write. Every
// configuration that is tried on the call shares them, since none depends on the tile.

import type { MlaInputs, MlaProblem } from "../op/mla_problem.ts";
import type { AttentionPlan, Operand } from "./attention_plan.ts";
import type { GpuContext } from "./device.ts";

/** The operands of one call in GPU memory, borrowed from the device's pool. */
export class ResidentCall {
  readonly #context: GpuContext;
  readonly #buffers = new Map<Operand, GPUBuffer[]>();

  /**
   * Borrows memory and uploads the inputs. Queries and outputs get one buffer per query range of the plan.
   *
   * @param context The device.
   * @param problem The problem that the inputs were validated to.
   * @param inputs The tensors.
   * @param plan Any plan of the problem for this device: ranges and scratch depend on those alone.
   */
  constructor(context: GpuContext, problem: MlaProblem, inputs: MlaInputs, plan: AttentionPlan) {
    this.#context = context;
    const { query, keyValue, wKc, wVc, bQ, bK } = inputs;
    const { queryHeads, vHeadDim } = problem;
    try {
      for (const [operand, tensor] of entries({ keyValue, wKc, wVc, bK })) this.#upload(operand, tensor.data);
      this.#borrow("keys", plan.keysBytes);
      this.#borrow("values", plan.valuesBytes);
      for (const { start, end } of plan.queryRanges) {
        for (const [operand, tensor] of entries({ query, bQ })) {
          const rowLength = tensor.data.length / (problem.batch * problem.queryLength);
          this.#upload(operand, tensor.data.subarray(start * rowLength, end * rowLength));
        }
        this.#borrow("output", (end - start) * queryHeads * vHeadDim * 4);
      }
    } catch (error) {
      this.dispose();
      throw error;
    }
  }

  /** The buffer of an operand, or undefined when the call has none; operands that are not split ignore the range. */
  get(operand: Operand, range: number): GPUBuffer | undefined {
    const buffers = this.#buffers.get(operand);
    return buffers?.[Math.min(range, buffers.length - 1)];
  }

  /** Gives the memory back. */
  dispose(): void {
    for (const buffer of [...this.#buffers.values()].flat()) this.#context.buffers.release("storage", buffer);
    this.#buffers.clear();
  }

  #borrow(operand: Operand, bytes: number): GPUBuffer {
    const buffer = this.#context.buffers.acquire("storage", bytes);
    const buffers = this.#buffers.get(operand);
    if (buffers === undefined) this.#buffers.set(operand, [buffer]);
    else buffers.push(buffer);
    return buffer;
  }

  #upload(operand: Operand, data: Float32Array): void {
    // A rotary part of width 0 has no data and is not bound; Deno's writeBuffer panics on an empty ArrayBuffer.
    if (data.byteLength === 0) return;
    const buffer = this.#borrow(operand, data.byteLength);
    // Engines take no shared memory: what is shared with other threads is copied first.
    const source = data.buffer instanceof ArrayBuffer ? data : new Float32Array(data);
    const bytes = source.buffer as ArrayBuffer;
    this.#context.device.queue.writeBuffer(buffer, 0, bytes, source.byteOffset, source.byteLength);
  }
}

function entries<T>(record: Partial<Record<Operand, T | undefined>>): [Operand, T][] {
  return Object.entries(record).filter(([, value]) => value !== undefined) as [Operand, T][];
}
