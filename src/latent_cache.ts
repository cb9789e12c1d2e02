import { decodeRegistry } from "./decode_platforms.ts";
import { appendPlan, type AppendWhere, placesOf } from "./op/append_problem.ts";
import type { AppendStep, CacheStore, DecodeTarget } from "./op/decode_implementation.ts";
import type { CacheLayout } from "./op/decode_problem.ts";
import { checkSeqLens, type SeqLens, tableColumns } from "./op/sequence_places.ts";
import { FlashMLAError } from "./op/errors.ts";
import { type AnyIndexTensor, type IndexTensor, isGpuIndex } from "./op/index_tensor.ts";
import { holdTensor } from "./op/mla_problem.ts";
import { PageAllocator } from "./op/page_allocator.ts";
import type { Platform } from "./op/platform.ts";
import { type AnyTensor, isGpuTensor, kindOf } from "./op/tensor.ts";
import { detectPlatform } from "./platforms.ts";

/** What a {@link LatentCache} is made of. */
export interface LatentCacheOptions {
  /** Where it lives; `auto`, the default, takes WebGPU where there is an adapter and the reference elsewhere. */
  readonly platform?: Platform | "auto";
  /** The WebGPU device; the process's own when absent. */
  readonly device?: GPUDevice;
  /** How many pages it has. */
  readonly pages: number;
  /** Tokens of a page, a power of two from 1 to 256. Default 64. */
  readonly pageSize?: number;
  /** L, the width of a latent. */
  readonly kvLoraRank: number;
  /** R, the width of the rotated key part behind it; 0 without one. */
  readonly qkRopeHeadDim: number;
  /** How rows are stored. Default `f32`. */
  readonly dtype?: "f32" | "f16";
}

/** Room for new tokens of a batch of sequences; see {@link LatentCache.reserve}. */
export interface ReserveOptions {
  /** Page numbers of each sequence, `[sequences, maxPages]`; written to. */
  readonly blockTable: IndexTensor;
  /** Keys that each sequence has. */
  readonly seqLens: Int32Array | readonly number[];
  /** Keys that each sequence is to get: one number for all, or one each. */
  readonly newTokens: number | Int32Array | readonly number[];
}

/** An append that was recorded into an encoder of the caller's. */
export interface EncodedAppend {
  /** Gives back what the recorded commands need. Call it when they were submitted, or never will be. */
  dispose(): void;
  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void;
}

interface Inside {
  readonly target: DecodeTarget;
  readonly store: CacheStore;
  readonly allocator: PageAllocator;
  readonly layout: CacheLayout;
}

const insides = new WeakMap<LatentCache, Inside>();

/** The memory, layout and accounting of a cache; throws when it was disposed of. */
export function insideOf(cache: LatentCache): Inside {
  const inside = insides.get(cache);
  if (inside === undefined || cache.disposed) refuse("use", "it was disposed of");
  return inside;
}

function refuse(what: string, why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot ${what} the cache: ${why}`);
}

/**
 * The KV cache of MLA in pages: one row of a latent and a rotated key part for each token, `kvLoraRank + qkRopeHeadDim`
 * elements. A block table names the pages of each sequence, so that sequences grow page by page, lie anywhere, and share
 * what they have in common.
 *
 * Pages are counted: {@link LatentCache.allocate} takes free ones, {@link LatentCache.free} lets go of them, and
 * {@link LatentCache.fork} holds them for one more sequence. A page that several hold is copied before one of them appends to
 * it. Rows are read by `mlaDecode` and `mlaPrefillWithCache`.
 *
 * @example
 * ```ts
 * import { LatentCache, mlaDecode } from "@flash-mla/webgpu";
 *
 * const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
 * const cache = await LatentCache.create({ platform: "reference", pages: 8, pageSize: 4, kvLoraRank: 16, qkRopeHeadDim: 4 });
 * const blockTable = { data: new Int32Array(2 * 3), shape: [2, 3] };
 * const seqLens = new Int32Array(2);
 *
 * cache.reserve({ blockTable, seqLens, newTokens: 5 });
 * await cache.append(ones(2, 5, 20), { blockTable, seqLens });
 * seqLens.fill(5);
 * const output = await mlaDecode({
 *   query: ones(2, 1, 3, 8 + 4),
 *   cache,
 *   blockTable,
 *   seqLens,
 *   wKc: ones(16, 3, 8),
 *   wVc: ones(16, 3, 6),
 * });
 * console.log(output.shape, cache.freePages); // [2, 1, 3, 6] 4
 * ```
 */
export class LatentCache {
  /** Where it lives. */
  readonly platform: Platform;
  /** How many pages it has. */
  readonly pages: number;
  /** Tokens of a page. */
  readonly pageSize: number;
  /** L, the width of a latent. */
  readonly kvLoraRank: number;
  /** R, the width of the rotated key part. */
  readonly qkRopeHeadDim: number;
  /** How rows are stored. */
  readonly dtype: "f32" | "f16";
  #disposed = false;
  /** Appends run one after another. */
  #last: Promise<unknown> = Promise.resolve();

  private constructor(inside: Inside) {
    const { layout, target } = inside;
    this.platform = target.platform;
    this.pages = layout.pages;
    this.pageSize = layout.pageSize;
    this.kvLoraRank = layout.kvLoraRank;
    this.qkRopeHeadDim = layout.qkRopeHeadDim;
    this.dtype = layout.dtype;
    insides.set(this, inside);
  }

  /**
   * Makes an empty cache.
   *
   * @param options Its size, and where it lives.
   * @returns The cache. The caller disposes of it.
   * @throws {FlashMLAError} When an option is none (`invalid-input`), a page or the whole passes a limit of the device
   * (`limit`), the platform is not to be had (`unsupported-platform`), or the device has no memory left (`device`).
   */
  static async create(options: LatentCacheOptions): Promise<LatentCache> {
    const layout = checkLayout(options);
    const { device, platform = "auto" } = options;
    const found = await detectPlatform("flash_mla", platform === "auto" && device !== undefined ? "webgpu" : platform);
    const target = await decodeRegistry.get("mla_decode", { platform: found }).open(device);
    const store = await target.createCache(layout);
    return new LatentCache({ target, store, layout, allocator: new PageAllocator(layout.pages) });
  }

  /** Bytes of its memory. */
  get bytes(): number {
    return insideOf(this).store.bytes;
  }

  /** Its device; undefined on the reference. */
  get device(): GPUDevice | undefined {
    return insides.get(this)!.store.device;
  }

  /** Pages that nobody holds. */
  get freePages(): number {
    return insideOf(this).allocator.freePages;
  }

  /** True once it was disposed of. */
  get disposed(): boolean {
    return this.#disposed;
  }

  /**
   * Takes free pages, for block tables that the caller fills.
   *
   * @param count How many.
   * @returns Their numbers, each held once.
   * @throws {FlashMLAError} With code `limit` when fewer are free; nothing is taken then.
   */
  allocate(count: number): Int32Array {
    return insideOf(this).allocator.allocate(count);
  }

  /**
   * Lets go of pages. Those that nobody holds any more are free; their rows must not be read again.
   *
   * @param pages Their numbers.
   * @throws {FlashMLAError} With code `invalid-input` when one is not held; nothing is let go of then.
   */
  free(pages: ArrayLike<number>): void {
    insideOf(this).allocator.free(pages);
  }

  /**
   * Holds pages for one more sequence, which shares their rows: a prompt that several answers begin with. Both sequences may
   * append: whoever appends to a page that others hold gets a copy of it.
   *
   * @param pages Their numbers: a sequence's row of the block table, as far as it is used.
   * @returns The same numbers, for the new sequence's row.
   * @throws {FlashMLAError} With code `invalid-input` when one is free; nothing is held then.
   */
  fork(pages: ArrayLike<number>): Int32Array {
    insideOf(this).allocator.share(pages);
    return Int32Array.from(pages);
  }

  /**
   * Gives sequences the pages that new tokens need, and writes them into the block table, behind those that each sequence's
   * length says it has.
   *
   * @param options The table, the lengths, and how many tokens are to come.
   * @returns The pages that were taken.
   * @throws {FlashMLAError} When a sequence would outgrow its row of the table (`invalid-input`), or fewer pages are free
   * (`limit`); nothing is taken or written then.
   */
  reserve(options: ReserveOptions): Int32Array {
    const { allocator } = insideOf(this);
    const { blockTable, seqLens, newTokens } = options;
    const sequences = seqLens?.length ?? 0;
    const stop: (why: string) => never = (why) => refuse("reserve room in", why);
    if (isGpuIndex(blockTable)) stop("blockTable lies on a GPU; it is written on the host");
    const columns = tableColumns(blockTable, sequences, stop);
    const capacity = columns * this.pageSize;
    const place = `${columns} pages of ${this.pageSize} tokens`;
    const lens = checkSeqLens(seqLens, sequences, capacity, place, stop)!;
    const added = typeof newTokens === "number" ? lens.map(() => newTokens) : Array.from(newTokens ?? []);
    if (added.length !== sequences) stop(`newTokens has ${added.length} numbers, there are ${sequences} sequences`);
    const entries: number[] = [];
    lens.forEach((keys, sequence) => {
      const tokens = added[sequence];
      if (!Number.isSafeInteger(tokens) || tokens < 0) stop(`newTokens must hold whole numbers, got ${kindOf(tokens)}`);
      if (keys + tokens > capacity) {
        stop(
          `sequence ${sequence} has ${keys} keys and would get ${tokens}, its row of blockTable has room for ${capacity}`,
        );
      }
      const have = Math.ceil(keys / this.pageSize);
      const need = Math.ceil((keys + tokens) / this.pageSize);
      for (let column = have; column < need; column++) entries.push(sequence * columns + column);
    });
    const taken = allocator.allocate(entries.length);
    entries.forEach((entry, i) => blockTable.data[entry] = taken[i]);
    return taken;
  }

  /**
   * Writes the rows of new tokens behind what their sequences have. Pages must be in the block table by then
   * ({@link LatentCache.reserve}); lengths are the caller's to raise afterwards.
   *
   * @param rows Latents and, behind them, rotated key parts, `[batch, length, kvLoraRank + qkRopeHeadDim]`, or
   * `[1, total, …]` packed by `cuSeqlens`; any element type, rounded to the cache's.
   * @param where Block table and lengths. On a GPU nothing is checked, and shared pages are not copied.
   * @throws {FlashMLAError} When something does not fit (`invalid-input`), the copies of shared pages need more pages than
   * are free (`limit`), or the device fails (`device`). Cache, counts and table are then as they were.
   */
  async append(rows: AnyTensor, where: AppendWhere): Promise<void> {
    const { store } = insideOf(this);
    const { step, undo } = this.#begin(rows, where);
    const run = this.#last.then(() => store.append(step));
    this.#last = run.catch(() => {});
    try {
      await run;
    } catch (error) {
      undo();
      throw error;
    }
  }

  /**
   * Records that into a caller's encoder, so that a whole layer is one submission. Counts and block table change at once.
   *
   * @param encoder The encoder, outside any pass.
   * @param rows The rows; those on the host are uploaded at once.
   * @param where Block table and lengths.
   * @returns What to dispose of after the submission.
   * @throws {FlashMLAError} As {@link LatentCache.append} does; and with code `invalid-input` on the reference.
   */
  async encodeAppend(encoder: GPUCommandEncoder, rows: AnyTensor, where: AppendWhere): Promise<EncodedAppend> {
    const { store } = insideOf(this);
    if (typeof encoder?.beginComputePass !== "function") {
      refuse("record an append to", `encoder must be a GPUCommandEncoder, got ${kindOf(encoder)}`);
    }
    if (store.encodeAppend === undefined) refuse("record an append to", 'platform "reference" has nothing to record');
    const { step, undo } = this.#begin(rows, where);
    try {
      const { dispose } = await store.encodeAppend(encoder, step);
      return { dispose, [Symbol.dispose]: dispose };
    } catch (error) {
      undo();
      throw error;
    }
  }

  /** Frees all pages; what their rows hold is left. */
  clear(): void {
    insideOf(this).allocator.clear();
  }

  /** Gives the memory back; work that was submitted before still sees it. Calling it twice does no harm. */
  dispose(): void {
    if (!this.#disposed) insides.get(this)!.store.dispose();
    this.#disposed = true;
  }

  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  /** Validates an append, takes the pages that copies need, and puts them into the table. */
  #begin(rows: AnyTensor, where: AppendWhere): { readonly step: AppendStep; undo(): void } {
    const { allocator, store } = insideOf(this);
    const width = this.kvLoraRank + this.qkRopeHeadDim;
    const plan = appendPlan(rows, where, { width, pageSize: this.pageSize }, allocator);
    if (isGpuTensor(rows) && store.device === undefined) {
      refuse("append to", 'rows lie on a GPU, the cache is of platform "reference"; pass await toHost(rows)');
    }
    const { blockTable } = where;
    for (const [name, index] of Object.entries({ blockTable, seqLens: where.seqLens })) {
      if (store.device === undefined && isGpuIndex(index)) {
        refuse("append to", `${name} lies on a GPU, the cache does not`);
      }
    }
    const seqLens = asTensor(where.seqLens);
    const pages = allocator.allocate(plan.shared.length);
    const copies = plan.shared.map(({ page }, i) => [page, pages[i]] as const);
    allocator.free(plan.shared.map(({ page }) => page));
    const table = blockTable as IndexTensor;
    plan.shared.forEach(({ entry }, i) => table.data[entry] = pages[i]);
    const places = plan.places && copies.length > 0
      ? placesOf(table, Array.from((seqLens as IndexTensor).data), plan.rowStarts, this.pageSize)
      : plan.places;
    const undo = () => {
      plan.shared.forEach(({ entry, page }) => table.data[entry] = page);
      allocator.share(plan.shared.map(({ page }) => page));
      allocator.free(pages);
    };
    const step = { rows: holdTensor(rows), rowStarts: plan.rowStarts, places, blockTable, seqLens, copies };
    return { step, undo };
  }
}

/** Lengths as a tensor. */
export function asTensor(seqLens: SeqLens): AnyIndexTensor {
  if ("shape" in seqLens) return seqLens;
  return { data: Int32Array.from(seqLens), shape: [seqLens.length] };
}

function checkLayout(options: LatentCacheOptions): CacheLayout {
  if (typeof options !== "object" || options === null) {
    refuse("create", `options must be an object, got ${kindOf(options)}`);
  }
  const { pages, pageSize = 64, kvLoraRank, qkRopeHeadDim, dtype = "f32" } = options;
  const whole = (name: string, value: number, least: number) => {
    if (Number.isSafeInteger(value) && value >= least) return;
    refuse("create", `${name} must be a whole number from ${least}, got ${kindOf(value)}`);
  };
  whole("pages", pages, 1);
  whole("kvLoraRank", kvLoraRank, 1);
  whole("qkRopeHeadDim", qkRopeHeadDim, 0);
  whole("pageSize", pageSize, 1);
  if (Math.log2(pageSize) % 1 !== 0 || pageSize > 256) {
    refuse("create", `pageSize must be a power of two from 1 to 256, got ${pageSize}`);
  }
  if (pages * pageSize > 2 ** 31) {
    refuse("create", `pages · pageSize must be at most 2^31 tokens, got ${pages * pageSize}`);
  }
  if (dtype !== "f32" && dtype !== "f16") refuse("create", `dtype must be "f32" or "f16", got ${kindOf(dtype)}`);
  return { pages, pageSize, kvLoraRank, qkRopeHeadDim, dtype, keyLength: 0 };
}
