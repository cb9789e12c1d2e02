// The memory of a cache on a GPU: rows in pages, in one buffer, or in several where a binding cannot cover all.

import type { AppendStep, CacheStore } from "../op/decode_implementation.ts";
import type { CacheLayout } from "../op/decode_problem.ts";
import { FlashMLAError } from "../op/errors.ts";
import { type AnyIndexTensor, isGpuIndex } from "../op/index_tensor.ts";
import { placeOf } from "../op/sequence_places.ts";
import type { GpuTensor } from "../op/tensor.ts";
import { boundIndices, boundTensor } from "./bound_tensor.ts";
import { BufferUsage } from "./buffers.ts";
import { type GpuContext, unlessLost } from "./device.ts";
import { inErrorScopes } from "./error_scopes.ts";
import { type KernelStep, KernelSteps } from "./kernel_steps.ts";
import { quadElements, rowQuads, type RowStorage } from "./kernels/absorbed_operands.ts";
import * as append from "./kernels/append_latents.ts";
import * as gather from "./kernels/gather_latents.ts";
import * as place from "./kernels/place_rows.ts";
import { checkBinding } from "./limit_checks.ts";

/** The pages of one buffer. */
export interface CacheShard {
  /** The buffer. */
  readonly buffer: GPUBuffer;
  /** First page. */
  readonly firstPage: number;
  /** How many there are. */
  readonly pages: number;
}

/** Workgroups of kernels that stride over their work: enough to fill a device. */
const copyWorkgroups = 2048;

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
    const { steps, rows, dispose, discard } = await this.#prepareGather(blockTable, [sequence], first, count);
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
    const { steps, rows, dispose, discard } = await this.#prepareGather(blockTable, sequences, 0, count);
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

  /** Some keys of some sequences, `[sequences, count, L + R]`: their memory, and the kernels that fill it. */
  async #prepareGather(
    blockTable: AnyIndexTensor,
    sequences: readonly number[],
    first: number,
    keys: number,
  ): Promise<{ readonly steps: KernelSteps; readonly rows: GpuTensor; dispose(): void; discard(): void }> {
    const steps = new KernelSteps(this.#context);
    const width = this.layout.kvLoraRank + this.layout.qkRopeHeadDim;
    const stride = this.rowQuads * quadElements(this.storage);
    const count = sequences.length * keys;
    // Not among what the steps borrow: the rows outlive them.
    const { buffers, device } = this.#context;
    const bytes = Math.max(16, count * this.rowQuads * 16);
    checkBinding("gathered latents", bytes, this.#context.capabilities.limits);
    const gathered = buffers.acquire("storage", bytes);
    try {
      const offsets = sequences.flatMap((sequence) => Array.from({ length: keys }, (_, i) => [sequence, first + i]));
      const zeros = { data: new Int32Array(blockTable.shape[0]), shape: [blockTable.shape[0]] };
      const { places, before } = this.#places(steps, blockTable, zeros, offsets);
      const [shardPlaces, quads] = [this.layout.pageSize, this.rowQuads * quadElements(this.storage) / 4];
      const kernels = this.shards.map(({ buffer, firstPage, pages }): KernelStep => ({
        label: "gather latents",
        code: gather.wgsl(this.storage),
        bindings: {
          0: steps.params(Uint32Array.of(count, quads, firstPage * shardPlaces, pages * shardPlaces)),
          1: places,
          2: { buffer },
          3: { buffer: gathered, size: bytes },
        },
        workgroups: [Math.min(copyWorkgroups, Math.ceil(count * quads / gather.workgroupSize))],
      }));
      await steps.bind("read the cache", [...before, ...kernels]);
    } catch (error) {
      buffers.discard(gathered);
      steps.dispose();
      throw error;
    }
    let disposed = false;
    const rows: GpuTensor = {
      buffer: gathered,
      shape: [sequences.length, keys, width],
      strides: [keys * stride, stride, 1],
      dtype: this.layout.dtype,
      device,
      get disposed() {
        return disposed;
      },
    };
    const end = (give: () => void) => () => {
      if (!disposed) give();
      disposed = true;
    };
    return {
      steps,
      rows,
      dispose: end(() => buffers.release("storage", gathered)),
      discard: end(() => buffers.discard(gathered)),
    };
  }

  /** Where rows are: by the host, or by a kernel that runs before. */
  #places(
    steps: KernelSteps,
    blockTable: AnyIndexTensor,
    seqLens: AnyIndexTensor,
    rows: readonly (readonly number[])[],
  ): { readonly places: GPUBufferBinding; readonly before: KernelStep[] } {
    const { pageSize, pages } = this.layout;
    const size = Math.max(16, 4 * rows.length);
    if (!isGpuIndex(blockTable) && !isGpuIndex(seqLens)) {
      const found = rows.map(([sequence, offset]) =>
        placeOf(blockTable, sequence, seqLens.data[sequence] + offset, pageSize)
      );
      return { places: { buffer: steps.upload(Uint32Array.from(found)), size }, before: [] };
    }
    const places = { buffer: steps.borrow(size), size };
    const table = boundIndices(steps, blockTable);
    const lens = boundIndices(steps, seqLens);
    const before: KernelStep = {
      label: "place rows",
      code: place.wgsl(pageSize),
      bindings: {
        0: steps.params(Uint32Array.of(rows.length, blockTable.shape[1], pages, table.base, lens.base)),
        1: { buffer: steps.upload(Uint32Array.from(rows.flat())), size: Math.max(16, 8 * rows.length) },
        2: table.binding,
        3: lens.binding,
        4: places,
      },
      workgroups: [Math.min(copyWorkgroups, Math.ceil(rows.length / place.workgroupSize))],
    };
    return { places, before: [before] };
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
        ? this.#places(steps, blockTable, seqLens, offsets)
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
        workgroups: [Math.min(copyWorkgroups, Math.ceil(count * quads / append.workgroupSize))],
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
