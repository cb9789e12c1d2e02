// A few kernels in order with the memory that they borrow: bound, recorded, run and timed as one.

import type { BoundBuffers } from "./bind_groups.ts";
import type { PooledUsage } from "./buffers.ts";
import { type GpuContext, unlessLost } from "./device.ts";
import { foreignBuffer, inErrorScopes } from "./error_scopes.ts";
import { recordInto } from "./recording.ts";

/** A kernel to run. */
export interface KernelStep {
  /** Its name in messages. */
  readonly label: string;
  /** Its source. */
  readonly code: string;
  /** What its bindings are, by index; those that are undefined it does not have. */
  readonly bindings: Readonly<Record<number, GPUBufferBinding | undefined>>;
  /** Workgroups along x, y and z. */
  readonly workgroups: readonly [x: number, y?: number, z?: number];
}

/** A copy between buffers, before the kernels. */
export interface BufferCopy {
  readonly from: GPUBuffer;
  readonly fromOffset: number;
  readonly to: GPUBuffer;
  readonly toOffset: number;
  readonly size: number;
}

interface Bound {
  readonly label: string;
  readonly pipeline: GPUComputePipeline;
  readonly bindGroup: GPUBindGroup;
  readonly workgroups: readonly [x: number, y?: number, z?: number];
}

/** Kernels and what they borrow. */
export class KernelSteps {
  readonly #context: GpuContext;
  readonly #borrowed: { readonly usage: PooledUsage; readonly buffer: GPUBuffer }[] = [];
  readonly #params: GPUBuffer[] = [];
  readonly #copies: BufferCopy[] = [];
  readonly #last: { encode(pass: GPUComputePassEncoder): void; dispose(): void }[] = [];
  #bound: readonly Bound[] = [];

  /** @param context The device. */
  constructor(context: GpuContext) {
    this.#context = context;
  }

  /** Memory of arbitrary content. */
  borrow(bytes: number, usage: PooledUsage = "storage"): GPUBuffer {
    const buffer = this.#context.buffers.acquire(usage, Math.max(16, bytes));
    this.#borrowed.push({ usage, buffer });
    return buffer;
  }

  /** Memory that holds some bytes, a multiple of four. */
  upload(
    data: ArrayBuffer | Uint32Array<ArrayBuffer> | Int32Array<ArrayBuffer>,
    usage: "storage" | "storageAndUniform" = "storage",
  ): GPUBuffer {
    const buffer = this.borrow(data.byteLength, usage);
    if (data.byteLength > 0) this.#context.device.queue.writeBuffer(buffer, 0, data);
    return buffer;
  }

  /** A parameter block as a binding. */
  params(data: ArrayBuffer | Uint32Array<ArrayBuffer>): GPUBufferBinding {
    const size = Math.ceil(data.byteLength / 16) * 16;
    const whole = new Uint8Array(size);
    whole.set(new Uint8Array(data instanceof ArrayBuffer ? data : data.buffer, 0, data.byteLength));
    const buffer = this.#context.params.lend(new Uint16Array(whole.buffer));
    this.#params.push(buffer);
    return { buffer, size };
  }

  /** Adds a copy; copies happen before all kernels. */
  copy(copy: BufferCopy): void {
    this.#copies.push(copy);
  }

  /** Adds what is recorded behind the kernels. */
  after(work: { encode(pass: GPUComputePassEncoder): void; dispose(): void }): void {
    this.#last.push(work);
  }

  /**
   * Compiles and binds.
   *
   * @param what What the kernels do, after "could not".
   * @param steps The kernels in order.
   * @throws {FlashMLAError} When a kernel does not compile or a buffer cannot be bound.
   */
  async bind(what: string, steps: readonly KernelStep[]): Promise<void> {
    const { pipelines, bindGroups } = this.#context;
    const compiled = await unlessLost(
      this.#context,
      () => Promise.all(steps.map(({ label, code }) => pipelines.get(label, code))),
    );
    const wanted = steps.map(({ label, bindings }, i) => [compiled[i], label, entriesOf(bindings)] as const);
    const known = wanted.map((group) => bindGroups.find(...group));
    // Nothing is asked of the device, then, that it could refuse.
    const groups = known.every((group) => group !== undefined) ? known : await unlessLost(
      this.#context,
      () => inErrorScopes(this.#context, what, () => wanted.map((group) => bindGroups.get(...group))),
    ).catch((error) => {
      throw foreignBuffer(what, error) ?? error;
    });
    this.#bound = steps.map(({ label, workgroups }, i) => ({
      label,
      workgroups,
      pipeline: compiled[i],
      bindGroup: groups[i],
    }));
  }

  /** The names of the kernels. */
  get labels(): readonly string[] {
    return [...new Set(this.#bound.map(({ label }) => label))];
  }

  /** Records copies and kernels; of the kernels only some where they are named. */
  encode(
    encoder: GPUCommandEncoder,
    { only, timestampWrites }: {
      readonly only?: readonly string[];
      readonly timestampWrites?: GPUComputePassTimestampWrites;
    } = {},
  ): void {
    for (const { from, fromOffset, to, toOffset, size } of this.#copies) {
      encoder.copyBufferToBuffer(from, fromOffset, to, toOffset, size);
    }
    const pass = encoder.beginComputePass({ label: "flash-mla", timestampWrites });
    for (const { label, pipeline, bindGroup, workgroups: [x, y = 1, z = 1] } of this.#bound) {
      if (only !== undefined && !only.includes(label)) continue;
      if (x * y * z === 0) continue;
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, bindGroup);
      pass.dispatchWorkgroups(x, y, z);
    }
    if (only === undefined) { for (const work of this.#last) work.encode(pass); }
    pass.end();
  }

  /**
   * Runs everything and waits until the engine has accepted it.
   *
   * @param what What the kernels do, after "could not".
   * @param check Runs in the same turn as the submission.
   */
  async submit(what: string, check: () => void = () => {}): Promise<void> {
    await unlessLost(this.#context, () =>
      inErrorScopes(this.#context, what, () => {
        check();
        const encoder = this.#context.device.createCommandEncoder({ label: `flash-mla: ${what}` });
        this.encode(encoder);
        this.#context.device.queue.submit([encoder.finish()]);
      }));
  }

  /** Records everything into a caller's encoder. */
  async record(encoder: GPUCommandEncoder, what: string, check: () => void = () => {}): Promise<void> {
    await recordInto(this.#context, encoder, { what, owner: "the cache's" }, () => {
      check();
      this.encode(encoder);
    });
  }

  /** Gives the borrowed memory back, when the work was submitted or never will be. Calling it twice does no harm. */
  dispose(): void {
    const { buffers, params } = this.#context;
    // In the order in which the next call asks for them.
    for (const { usage, buffer } of this.#borrowed.splice(0).reverse()) buffers.release(usage, buffer);
    for (const buffer of this.#params.splice(0)) params.giveBack(buffer);
    for (const work of this.#last.splice(0)) work.dispose();
  }

  /** The same after a failure: any of the buffers may be one that the device refused. */
  discard(): void {
    const { buffers, params } = this.#context;
    for (const { buffer } of this.#borrowed.splice(0)) buffers.discard(buffer);
    for (const buffer of this.#params.splice(0)) params.discard(buffer);
    for (const work of this.#last.splice(0)) work.dispose();
  }
}

function entriesOf(bindings: KernelStep["bindings"]): BoundBuffers {
  return Object.entries(bindings).flatMap(([binding, resource]) =>
    resource === undefined ? [] : [{ binding: Number(binding), resource }]
  );
}
