// GPU memory: buffers are borrowed and given back, and reused by size.

import { FlashMLAError } from "../op/errors.ts";

/** WebGPU's buffer usage bits; numeric, since not every runtime defines the globals. */
export const BufferUsage = {
  MAP_READ: 0x1,
  COPY_SRC: 0x4,
  COPY_DST: 0x8,
  UNIFORM: 0x40,
  STORAGE: 0x80,
  QUERY_RESOLVE: 0x200,
} as const;

const usages = {
  storage: BufferUsage.STORAGE | BufferUsage.COPY_SRC | BufferUsage.COPY_DST,
  storageAndUniform: BufferUsage.STORAGE | BufferUsage.UNIFORM | BufferUsage.COPY_DST,
  readback: BufferUsage.MAP_READ | BufferUsage.COPY_DST,
} as const;

/** What a pooled buffer is for. */
export type PooledUsage = keyof typeof usages;

/**
 * Idle bytes that the pool keeps for the next call; more are freed, oldest first. A prompt of 2,048 tokens takes 0.6 GB in a
 * layer of DeepSeek-V3: what is freed has to be allocated again, and that takes longer than the kernels of a small call.
 */
const idleLimit = 2 ** 30;

/** Lends buffers of one device and reuses those that come back. */
export class BufferPool {
  readonly #device: GPUDevice;
  readonly #maxBufferSize: number;
  readonly #idle: { readonly usage: PooledUsage; readonly buffer: GPUBuffer }[] = [];
  readonly #answers: Promise<GPUError | null>[] = [];
  #idleBytes = 0;
  #lent = 0;
  #poison = false;

  /**
   * @param device The device to allocate on.
   * @param maxBufferSize Its limit on one buffer, in bytes.
   */
  constructor(device: GPUDevice, maxBufferSize: number) {
    this.#device = device;
    this.#maxBufferSize = maxBufferSize;
  }

  /** Buffers lent and not yet given back. */
  get lent(): number {
    return this.#lent;
  }

  /** Bytes that are kept for reuse. */
  get idleBytes(): number {
    return this.#idleBytes;
  }

  /** Makes every storage buffer start out full of NaN, so that tests see elements that nobody wrote. */
  set poison(on: boolean) {
    this.#poison = on;
  }

  /**
   * Borrows a buffer of at least `size` bytes; its content is arbitrary.
   *
   * @throws {FlashMLAError} With code `limit` when the size passes the device's limit.
   */
  acquire(usage: PooledUsage, size: number): GPUBuffer {
    if (size > this.#maxBufferSize) {
      throw new FlashMLAError(
        "limit",
        `Cannot allocate ${size} bytes on the GPU: maxBufferSize is ${this.#maxBufferSize}`,
      );
    }
    const rounded = Math.min(roundUp(size), this.#maxBufferSize);
    const found = this.#findIdle(usage, rounded);
    let buffer: GPUBuffer;
    if (found >= 0) {
      [{ buffer }] = this.#idle.splice(found, 1);
      this.#idleBytes -= rounded;
    } else {
      buffer = this.#create(usage, rounded);
    }
    if (this.#poison && usage.startsWith("storage")) {
      this.#device.queue.writeBuffer(buffer, 0, new Float32Array(rounded / 4).fill(NaN));
    }
    this.#lent++;
    return buffer;
  }

  /** Whether {@link acquire} would find one at once, and ask nothing of the device. */
  hasIdle(usage: PooledUsage, size: number): boolean {
    return this.#findIdle(usage, Math.min(roundUp(size), this.#maxBufferSize)) >= 0;
  }

  /**
   * What the device said, or will say, of the buffers that were made since this was asked last: null, or that it is out of
   * memory. Whoever uses buffers is to wait for it.
   */
  takeAnswers(): Promise<GPUError | null>[] {
    return this.#answers.splice(0);
  }

  /** Gives a borrowed buffer back. */
  release(usage: PooledUsage, buffer: GPUBuffer): void {
    this.#lent--;
    this.#idle.push({ usage, buffer });
    this.#idleBytes += buffer.size;
    while (this.#idleBytes > idleLimit) {
      const [{ buffer: oldest }] = this.#idle.splice(0, 1);
      this.#idleBytes -= oldest.size;
      oldest.destroy();
    }
  }

  /** Takes a borrowed buffer out of use, when it may be one that the device refused to allocate. */
  discard(buffer: GPUBuffer): void {
    this.#lent--;
    buffer.destroy();
  }

  /** A refused buffer is there all the same, and makes invalid what it is bound to: only the scope says why. */
  #create(usage: PooledUsage, size: number): GPUBuffer {
    this.#device.pushErrorScope("out-of-memory");
    try {
      return this.#device.createBuffer({ label: `flash-mla ${usage}`, size, usage: usages[usage] });
    } finally {
      const answer = this.#device.popErrorScope();
      answer.catch(() => {});
      this.#answers.push(answer);
    }
  }

  /** What came back last is lent first: calls alike get the same buffers, which are bound already. */
  #findIdle(usage: PooledUsage, size: number): number {
    return this.#idle.findLastIndex((idle) => idle.usage === usage && idle.buffer.size === size);
  }

  /** Frees every idle buffer. */
  clear(): void {
    for (const { buffer } of this.#idle.splice(0)) buffer.destroy();
    this.#idleBytes = 0;
  }
}

/** Sizes are rounded to eighths of a power of two, so that nearby lengths share buffers and at most 1/8 is wasted. */
function roundUp(size: number): number {
  const step = Math.max(256, 2 ** (Math.floor(Math.log2(Math.max(size, 1))) - 3));
  return Math.max(256, Math.ceil(size / step) * step);
}
