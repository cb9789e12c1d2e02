import type { CacheStore } from "../op/decode_implementation.ts";
import { FlashMLAError } from "../op/errors.ts";
import type { IndexTensor } from "../op/index_tensor.ts";
import { kindOf } from "../op/tensor.ts";
import { insideOf as insideOfLatents, LatentCache, type LatentCacheOptions } from "../latent_cache.ts";

/** What a {@link MlaLayerCache} is made of. */
export interface MlaLayerCacheOptions {
  /** How many sequences it holds. */
  readonly batch: number;
  /** The most tokens that each of them may have. */
  readonly length: number;
  /** Tokens of a page, a power of two from 1 to 256. Default 64. */
  readonly pageSize?: number;
  /** How rows are stored. Default: as the layer's weights are. */
  readonly dtype?: "f32" | "f16";
}

/** A room that was taken for new tokens and is kept or given back. */
export interface Reserved {
  /** Keys that each sequence had before. */
  readonly before: readonly number[];
  /** Lets the sequences have the tokens. */
  keep(): void;
  /** Gives the pages back; lengths are what they were. */
  undo(): void;
}

interface Inside {
  readonly latents: LatentCache;
  readonly blockTable: IndexTensor;
  readonly lengths: Int32Array;
  /** The layer whose tokens it holds. */
  readonly owner: object;
  /** Calls run one after another. */
  last: Promise<unknown>;
  /** Calls that are not done. */
  calls: number;
}

const insides = new WeakMap<MlaLayerCache, Inside>();

function refuse(what: string, why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot ${what} the layer's cache: ${why}`);
}

/**
 * What a layer's forward calls remember of a batch of sequences: the latents and rotated keys of their tokens, in pages, with
 * the block table and the lengths. Made by `MlaAttention.createCache`.
 *
 * @example
 * ```ts
 * import { MlaAttention, presets } from "@flash-mla/webgpu";
 *
 * const config = {
 *   ...presets.youtuLlm.config,
 *   ...{ hidden_size: 8, num_attention_heads: 2, q_lora_rank: null, kv_lora_rank: 4 },
 *   ...{ qk_nope_head_dim: 4, qk_rope_head_dim: 2, v_head_dim: 3 },
 * };
 * const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
 * const weights = {
 *   "q_proj.weight": ones(2 * 6, 8),
 *   "kv_a_proj_with_mqa.weight": ones(4 + 2, 8),
 *   "kv_a_layernorm.weight": ones(4),
 *   "kv_b_proj.weight": ones(2 * 7, 4),
 *   "o_proj.weight": ones(8, 2 * 3),
 * };
 * const layer = await MlaAttention.load(config, weights, { platform: "reference" });
 * const cache = await layer.createCache({ batch: 2, length: 16 });
 * await layer.forward(ones(2, 5, 8), { cache });
 * console.log(cache.lengths, cache.length); // Int32Array [5, 5] 16
 * cache.reset(1);
 * console.log(cache.lengths); // Int32Array [5, 0]
 * ```
 */
export class MlaLayerCache {
  /** How many sequences it holds. */
  readonly batch: number;
  /** The most tokens that each of them may have. */
  readonly length: number;
  /** How rows are stored. */
  readonly dtype: "f32" | "f16";

  /**
   * Made by `MlaAttention.createCache`, which gives it its memory.
   *
   * @param batch How many sequences.
   * @param length Tokens of a sequence.
   * @param dtype How rows are stored.
   */
  constructor(batch: number, length: number, dtype: "f32" | "f16") {
    this.batch = batch;
    this.length = length;
    this.dtype = dtype;
  }

  /** Tokens that each sequence has, `[batch]`; a copy. */
  get lengths(): Int32Array {
    return Int32Array.from(insides.get(this)?.lengths ?? []);
  }

  /** Bytes of its rows. */
  get bytes(): number {
    return layerCacheInside(this).latents.bytes;
  }

  /** True once it was disposed of. */
  get disposed(): boolean {
    return insides.get(this)?.latents.disposed ?? true;
  }

  /**
   * Forgets the tokens of a sequence, or of all.
   *
   * @param sequence Which one; all when absent.
   * @throws {FlashMLAError} With code `invalid-input`, when there is no such sequence, a call is under way, or the cache was
   * disposed of.
   */
  reset(sequence?: number): void {
    const { latents, blockTable, lengths, calls } = layerCacheInside(this);
    if (calls > 0) refuse("reset", "a call is under way; await it first");
    if (sequence !== undefined && (!Number.isSafeInteger(sequence) || sequence < 0 || sequence >= this.batch)) {
      refuse("reset", `sequence must be a whole number below ${this.batch}, got ${kindOf(sequence)}`);
    }
    const columns = blockTable.shape[1];
    lengths.forEach((keys, s) => {
      if (sequence !== undefined && sequence !== s) return;
      latents.free(blockTable.data.subarray(s * columns, s * columns + Math.ceil(keys / latents.pageSize)));
      lengths[s] = 0;
    });
  }

  /** Gives the memory back; work that was submitted before still sees it. Calling it twice does no harm. */
  dispose(): void {
    insides.get(this)?.latents.dispose();
  }

  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}

/**
 * Makes an empty cache.
 *
 * @param options Its size.
 * @param owner The layer whose tokens it is to hold.
 * @param place Where it lives, and how wide its rows are.
 */
export async function createLayerCache(
  options: MlaLayerCacheOptions,
  owner: object,
  place: Pick<LatentCacheOptions, "platform" | "device" | "kvLoraRank" | "qkRopeHeadDim" | "dtype">,
): Promise<MlaLayerCache> {
  if (typeof options !== "object" || options === null) {
    refuse("create", `expected { batch, length }, got ${kindOf(options)}`);
  }
  const known = ["batch", "length", "pageSize", "dtype"];
  for (const name of Object.keys(options)) {
    if (!known.includes(name)) refuse("create", `unknown option "${name}"; known are ${known.join(", ")}`);
  }
  const { batch, length, pageSize = 64, dtype = place.dtype } = options;
  for (const [name, value] of Object.entries({ batch, length })) {
    if (!Number.isSafeInteger(value) || value < 1) {
      refuse("create", `${name} must be a whole number from 1, got ${kindOf(value)}`);
    }
  }
  // A page size that is none is LatentCache's to refuse.
  const columns = Math.max(1, Math.ceil(length / (pageSize > 0 ? pageSize : 1)));
  const latents = await LatentCache.create({ ...place, dtype, pages: batch * columns, pageSize });
  const cache = new MlaLayerCache(batch, length, latents.dtype);
  insides.set(cache, {
    latents,
    blockTable: { data: new Int32Array(batch * columns), shape: [batch, columns] },
    lengths: new Int32Array(batch),
    owner,
    last: Promise.resolve(),
    calls: 0,
  });
  return cache;
}

/** The memory, table and lengths of a cache; throws when it was disposed of. */
export function layerCacheInside(cache: MlaLayerCache): Inside {
  const inside = insides.get(cache);
  if (inside === undefined) refuse("use", "it was not made by MlaAttention.createCache()");
  if (inside.latents.disposed) refuse("use", "it was disposed of");
  return inside;
}

/** The memory of a cache's rows. */
export function storeOf(cache: MlaLayerCache): CacheStore {
  return insideOfLatents(layerCacheInside(cache).latents).store;
}

/**
 * Takes pages for new tokens.
 *
 * @param cache The cache.
 * @param added New tokens of each sequence.
 * @throws {FlashMLAError} With code `limit` when pages are missing; nothing is taken then.
 */
export function reserveTokens(cache: MlaLayerCache, added: readonly number[]): Reserved {
  const { latents, blockTable, lengths } = layerCacheInside(cache);
  const before = Array.from(lengths);
  const pages = latents.reserve({ blockTable, seqLens: before, newTokens: added });
  return {
    before,
    keep: () => added.forEach((tokens, s) => lengths[s] = before[s] + tokens),
    undo: () => latents.disposed || latents.free(pages),
  };
}

/** Runs work on a cache when all that was asked of it before is done. */
export async function inTurn<Result>(cache: MlaLayerCache, work: () => Promise<Result>): Promise<Result> {
  const inside = layerCacheInside(cache);
  const run = inside.last.then(work);
  inside.last = run.catch(() => {});
  inside.calls++;
  try {
    return await run;
  } finally {
    inside.calls--;
  }
}
