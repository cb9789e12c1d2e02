// The memory of a cache on a GPU: rows in pages, in one buffer, or in several where a binding cannot cover all.

import type { AppendStep, CacheStore } from "../op/decode_implementation.ts";
import type { CacheLayout } from "../op/decode_problem.ts";
import { FlashMLAError } from "../op/errors.ts";
import type { AnyIndexTensor } from "../op/index_tensor.ts";
import type { GpuTensor } from "../op/tensor.ts";
import { boundTensor } from "./bound_tensor.ts";
import { BufferUsage } from "./buffers.ts";
import { stridingWorkgroups } from "./decode_call.ts";
import { type GpuContext, unlessLost } from "./device.ts";
import { inErrorScopes } from "./error_scopes.ts";
import { gatheredRows } from "./gathered_rows.ts";
import { type KernelStep, KernelSteps } from "./kernel_steps.ts";
import { quadElements, rowQuads, type RowStorage } from "./kernels/absorbed_operands.ts";
import * as append from "./kernels/append_latents.ts";
import { rowPlaces } from "./row_places.ts";

/** The pages of one buffer. */
export interface CacheShard {
  /** The buffer. */
  readonly buffer: GPUBuffer;
  /** First page. */
  readonly firstPage: number;
  /** How many there are. */
  readonly pages: number;
}

/** Pages of latents on a GPU. */
export class GpuLatentStore implements CacheStore {
  /** The rows' layout. */
  readonly layout: CacheLayout;
  /** How elements are stored. */
  readonly storage: RowStorage;
  /** Quads of 16 bytes from one row to the next. */
  readonly rowQuads: number;
  /** The buffers in order of their pages. */
  readonly shards: readonly CacheShard[];
  readonly #context: GpuContext;

  private constructor(context: GpuContext, layout: CacheLayout, shards: readonly CacheShard[]) {
    this.#context = context;
    this.layout = layout;
    this.storage = layout.dtype === "f16" ? "halves" : "floats";
    this.rowQuads = rowQuads(layout, this.storage);
    this.shards = shards;
  }

  /**
   * Allocates a cache.
   *
   * @param context The device.
   * @param layout Its layout.
   * @param maxBytes Most bytes of one buffer; what a binding can cover when absent.
   * @throws {FlashMLAError} With code `limit` when a page passes it, `device` when the device has no memory left.
   */
  static async create(context: GpuContext, layout: CacheLayout, maxBytes?: number): Promise<GpuLatentStore> {
    const { maxStorageBufferBindingSize, maxBufferSize } = context.capabilities.limits;
    const most = maxBytes ?? Math.min(maxStorageBufferBindingSize, maxBufferSize);
    const pageBytes = layout.pageSize * rowQuads(layout, layout.dtype === "f16" ? "halves" : "floats") * 16;
    const perShard = Math.floor(most / pageBytes);
    if (perShard < 1) {
      throw new FlashMLAError(
        "limit",
        `Cannot create the cache: a page takes ${pageBytes} bytes, maxStorageBufferBindingSize is ${most}; use a smaller ` +
          "pageSize",
      );
    }
    const made: CacheShard[] = [];
    try {
      await unlessLost(context, () =>
        inErrorScopes(context, "hold the cache", () => {
          for (let firstPage = 0; firstPage < layout.pages; firstPage += perShard) {
            const pages = Math.min(perShard, layout.pages - firstPage);
            const usage = BufferUsage.STORAGE | BufferUsage.COPY_SRC | BufferUsage.COPY_DST;
            const buffer = context.device.createBuffer({ label: "flash-mla cache", size: pages * pageBytes, usage });
            made.push({ buffer, firstPage, pages });
          }
        }));
    } catch (error) {
      for (const { buffer } of made) buffer.destroy();
      throw error;
    }
    return new GpuLatentStore(context, layout, made);
  }

  get device(): GPUDevice {
    return this.#context.device;
  }

  get bytes(): number {
    return this.shards.reduce((sum, { buffer }) => sum + buffer.size, 0);
  }

  async append(step: AppendStep): Promise<void> {
    const steps = await this.#prepareAppend(step);
    try {
      await steps.submit("append to the cache", () => checkAlive(step));
    } finally {
      steps.dispose();
    }
  }

  async encodeAppend(encoder: GPUCommandEncoder, step: AppendStep): Promise<{ dispose(): void }> {
    const steps = await this.#prepareAppend(step);
    try {
      await steps.record(encoder, "append to the cache", () => checkAlive(step));
      return { dispose: () => steps.dispose() };
    } catch (error) {
      steps.dispose();
      throw error;
    }
  }

  async gather(
    blockTable: AnyIndexTensor,
    sequence: number,
    first: number,
    count: number,
  ): Promise<{ readonly rows: GpuTensor; dispose(): void }> {
    const { steps, rows, dispose, discard } = await gatheredRows(this.#context, this, {
      blockTable,
      sequences: [sequence],
      first,
      count,
    });
    try {
      await steps.submit("read the cache");
    } catch (error) {
      discard();
      throw error;
    } finally {
      steps.dispose();
    }
    return { rows, dispose };
  }

  async encodeGather(
    encoder: GPUCommandEncoder,
    blockTable: AnyIndexTensor,
    sequences: readonly number[],
    count: number,
  ): Promise<{ readonly rows: GpuTensor; dispose(): void }> {
    const { steps, rows, dispose, discard } = await gatheredRows(this.#context, this, {
      blockTable,
      sequences,
      first: 0,
      count,
    });
    try {
      await steps.record(encoder, "read the cache");
    } catch (error) {
      discard();
      steps.dispose();
      throw error;
    }
    return {
      rows,
      dispose: () => {
        dispose();
        steps.dispose();
      },
    };
  }

  dispose(): void {
    for (const { buffer } of this.shards) buffer.destroy();
  }

  async #prepareAppend({ rows, rowStarts, places, blockTable, seqLens, copies }: AppendStep): Promise<KernelSteps> {
    const { capabilities } = this.#context;
    const steps = new KernelSteps(this.#context);
    try {
      const count = rowStarts[rowStarts.length - 1];
      const pageBytes = this.layout.pageSize * this.rowQuads * 16;
      const at = (page: number): [GPUBuffer, number] => {
        const shard = this.shards.find(({ firstPage, pages }) => page < firstPage + pages)!;
        return [shard.buffer, (page - shard.firstPage) * pageBytes];
      };
      for (const [fromPage, toPage] of copies) {
        const [[from, fromOffset], [to, toOffset]] = [at(fromPage), at(toPage)];
        if (from !== to) {
          steps.copy({ from, fromOffset, to, toOffset, size: pageBytes });
          continue;
        }
        // WebGPU copies nothing within a buffer.
        const between = steps.borrow(pageBytes);
        steps.copy({ from, fromOffset, to: between, toOffset: 0, size: pageBytes });
        steps.copy({ from: between, fromOffset: 0, to, toOffset, size: pageBytes });
      }
      if (count === 0) {
        await steps.bind("append to the cache", []);
        return steps;
      }
      const source = boundTensor(steps, "rows", rows, capabilities.limits);
      const offsets = places === null
        ? rowStarts.slice(1).flatMap((end, sequence) =>
          Array.from({ length: end - rowStarts[sequence] }, (_, i) => [sequence, i])
        )
        : [];
      const found = places === null
        ? rowPlaces(steps, this.layout, { blockTable, seqLens, rows: offsets })
        : { places: { buffer: steps.upload(places), size: Math.max(16, places.byteLength) }, before: [] };
      const [, length, width] = rows.shape;
      const quads = this.rowQuads * quadElements(this.storage) / 4;
      const { pageSize } = this.layout;
      const kernels = this.shards.map(({ buffer, firstPage, pages }): KernelStep => ({
        label: "append latents",
        code: append.wgsl(source.elements, this.storage),
        bindings: {
          0: steps.params(
            Uint32Array.of(
              ...[count, width, quads, length, source.base, source.strides[0], source.strides[1]],
              ...[firstPage * pageSize, pages * pageSize],
            ),
          ),
          1: source.binding,
          2: found.places,
          3: { buffer },
        },
        workgroups: [Math.min(stridingWorkgroups, Math.ceil(count * quads / append.workgroupSize))],
      }));
      await steps.bind("append to the cache", [...found.before, ...kernels]);
      return steps;
    } catch (error) {
      steps.discard();
      throw error;
    }
  }
}

/** Throws when the rows were disposed of while the append was under way. */
function checkAlive({ rows }: AppendStep): void {
  if (!("buffer" in rows) || rows.disposed !== true) return;
  throw new FlashMLAError(
    "invalid-input",
    "Cannot append to the cache: rows were disposed of while the call was under way; await it first",
  );
}
