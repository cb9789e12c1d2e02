// Parameter blocks by their content: dimensions and strides, which one call after another has in common. A block that is known
// is not written again, and what binds it can be remembered, too.

import { BufferUsage } from "./buffers.ts";

/** Blocks that are kept. */
const mostBlocks = 1024;

interface Block {
  readonly key: string;
  readonly buffer: GPUBuffer;
  /** Calls that have it. */
  users: number;
}

/** The parameter blocks of one device. */
export class ParamBlocks {
  readonly #device: GPUDevice;
  /** In the order of their last use. */
  readonly #blocks = new Map<string, Block>();
  readonly #blockOf = new WeakMap<GPUBuffer, Block>();

  /** @param device The device. */
  constructor(device: GPUDevice) {
    this.#device = device;
  }

  /**
   * Lends a block; nobody may write to it.
   *
   * @param words Its content.
   */
  lend(words: Uint16Array<ArrayBuffer>): GPUBuffer {
    const key = String.fromCharCode.apply(null, words as unknown as number[]);
    let block = this.#blocks.get(key);
    if (block === undefined) {
      const usage = BufferUsage.UNIFORM | BufferUsage.COPY_DST;
      block = {
        key,
        buffer: this.#device.createBuffer({ label: "flash-mla params", size: words.byteLength, usage }),
        users: 0,
      };
      this.#device.queue.writeBuffer(block.buffer, 0, words);
      this.#blockOf.set(block.buffer, block);
    }
    block.users++;
    this.#blocks.delete(key);
    this.#blocks.set(key, block);
    this.#trim();
    return block.buffer;
  }

  /** Gives a block back. */
  giveBack(buffer: GPUBuffer): void {
    this.#blockOf.get(buffer)!.users--;
  }

  /** The same after a failure: it may be one that the device refused, and no other call gets it. */
  discard(buffer: GPUBuffer): void {
    this.giveBack(buffer);
    const block = this.#blockOf.get(buffer)!;
    if (this.#blocks.get(block.key) === block) this.#blocks.delete(block.key);
  }

  /** Forgets the blocks used longest ago, those in use excepted. */
  #trim(): void {
    if (this.#blocks.size <= mostBlocks) return;
    for (const [key, { buffer, users }] of this.#blocks) {
      if (users > 0) continue;
      this.#blocks.delete(key);
      buffer.destroy();
      if (this.#blocks.size <= mostBlocks) return;
    }
  }
}
