// One call against a cache of latent rows, validated: its dimensions, and where each sequence's queries and keys are.

import { FlashMLAError } from "./errors.ts";
import type { AnyIndexTensor } from "./index_tensor.ts";
import { checkOffsets, checkSeqLens, type SeqLens, tableColumns } from "./sequence_places.ts";
import { checkSinks, checkSoftCap, checkWindow } from "./score_options.ts";
import { type AnyTensor, checkTensor, denseStrides, type DType, dtypeOf, isGpuTensor, kindOf } from "./tensor.ts";

/** How the rows of a cache are laid out. */
export interface CacheLayout {
  /** L, the width of a latent. */
  readonly kvLoraRank: number;
  /** R, the width of the rotated key part that follows it. */
  readonly qkRopeHeadDim: number;
  /** How elements are stored. */
  readonly dtype: "f32" | "f16";
  /** Tokens of a page, a power of two; 0 for a tensor `[batch, keyLength, L + R]` without pages. */
  readonly pageSize: number;
  /** Pages that there are; without pages, 0. */
  readonly pages: number;
  /** Tokens of a batch item of a tensor without pages; 0 with pages. */
  readonly keyLength: number;
}

/** The tensors of a call, but for the cache itself. */
export interface DecodeTensors<Query extends AnyTensor = AnyTensor> {
  /** Queries: see {@link DecodeProblem}. */
  readonly query: Query;
  /** Key expansion weights, `[kvLoraRank, kvHeads, qkNopeHeadDim]`. */
  readonly wKc?: AnyTensor;
  /** Value expansion weights, `[kvLoraRank, kvHeads, vHeadDim]`. */
  readonly wVc?: AnyTensor;
  /** Page numbers of each sequence, `[sequences, maxPages]`. */
  readonly blockTable?: AnyIndexTensor;
  /** Keys of each sequence. */
  readonly seqLens?: SeqLens;
  /** Offsets `[sequences + 1]` of the queries of sequences packed along the sequence axis of batch 1. */
  readonly cuSeqlens?: Int32Array | Uint32Array | readonly number[];
}

/** The options that change the result. */
export interface DecodeMathOptions {
  /**
   * Factor on the scores; `1/√(qkNopeHeadDim + qkRopeHeadDim)` when absent. It must be given with an absorbed query, whose
   * width does not tell the one before.
   */
  readonly softmaxScale?: number;
  /** Whether a query sees only keys up to its own position, its last token standing on the last key. Default `true`. */
  readonly causal?: boolean;
  /** Bounds the scaled scores smoothly: `cap · tanh(score / cap)`, cap above 0. */
  readonly logitsSoftCap?: number;
  /** How far a query sees from its own position: `w` keys to either side, or `[left, right]`. */
  readonly slidingWindow?: number | readonly [left: number, right: number];
  /** Sinks, as for `mlaAttention`. */
  readonly softmaxAux?: AnyTensor;
  /** Width of the latents, where neither the cache nor the weights tell it. */
  readonly kvLoraRank?: number;
  /**
   * Keys of one split. Each sequence is then computed the same way, to the bit, whatever else is in the batch; a power of
   * two from 64. When absent, splits depend on the batch.
   */
  readonly splitKeys?: number;
}

/** One call's dimensions and options after validation. */
export interface DecodeProblem {
  /** How many sequences attend. */
  readonly sequences: number;
  /** The first two axes of the query: batch items, and tokens of each. */
  readonly batch: number;
  /** Sq: tokens of a batch item; all tokens where sequences are packed. */
  readonly queryLength: number;
  /** First token of each sequence, counted through both axes, and behind it the number of tokens. */
  readonly tokenStarts: readonly number[];
  /** H. */
  readonly queryHeads: number;
  /** Hkv; equal to H with an absorbed query. */
  readonly kvHeads: number;
  /** L. */
  readonly kvLoraRank: number;
  /** P; null with an absorbed query. */
  readonly qkNopeHeadDim: number | null;
  /** R. */
  readonly qkRopeHeadDim: number;
  /** Width of the result's heads: V, or L with an absorbed query. */
  readonly vHeadDim: number;
  /** Whether the causal mask applies. */
  readonly causal: boolean;
  /** The factor on the scores. */
  readonly softmaxScale: number;
  /** The soft cap on the scaled scores, or null. */
  readonly logitsSoftCap: number | null;
  /** Keys that a query sees before and after its own position, or null. */
  readonly slidingWindow: readonly [left: number, right: number] | null;
  /** Sink logits of each head; 0 without. */
  readonly sinks: number;
  /** The cache. */
  readonly cache: CacheLayout;
  /** Columns of the block table; 0 without one. */
  readonly maxPages: number;
  /** Keys of each sequence; null where they are on a GPU. */
  readonly seqLens: readonly number[] | null;
  /** The most keys that a sequence may have. */
  readonly capacity: number;
  /** Keys of one split, or null. */
  readonly splitKeys: number | null;
  /** Element types of the query and of the weights. */
  readonly dtype: { readonly query: DType; readonly wKc?: DType; readonly wVc?: DType };
}

function fail(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot decode: ${why}`);
}

/**
 * Validates one call and names its dimensions. Page numbers are checked by `checkPages`.
 *
 * @param tensors The tensors of the call.
 * @param cache The layout of the cache; of a tensor without pages when `kvLoraRank` is still to be found.
 * @param options The options that change the result.
 * @throws {FlashMLAError} With code `invalid-input`, naming the argument, what was expected and what came.
 */
export function decodeProblem(
  tensors: DecodeTensors,
  cache: Omit<CacheLayout, "kvLoraRank" | "qkRopeHeadDim"> & {
    readonly width: number;
    readonly kvLoraRank: number | null;
  },
  options: DecodeMathOptions = {},
): DecodeProblem {
  const { query, wKc, wVc, blockTable, seqLens } = tensors;
  checkAxes("query", query, ["batch", "queryLength", "queryHeads", "headDim"]);
  const [batch, queryLength, queryHeads, queryWidth] = query.shape;
  if (queryHeads < 1) fail("queryHeads must be at least 1, got 0");
  if ((wKc === undefined) !== (wVc === undefined)) {
    fail(
      `${
        wKc === undefined ? "wVc is given without wKc" : "wKc is given without wVc"
      }; pass both, or neither with a query ` +
        "that was multiplied by wKc before",
    );
  }
  const weights = wKc === undefined ? null : weightsOf(wKc, wVc!, queryHeads);
  const kvLoraRank = latentWidth(weights?.kvLoraRank ?? null, cache, options.kvLoraRank);
  const qkRopeHeadDim = cache.width - kvLoraRank;
  const qkNopeHeadDim = weights?.qkNopeHeadDim ?? null;
  const expected = (qkNopeHeadDim ?? kvLoraRank) + qkRopeHeadDim;
  if (queryWidth !== expected) {
    fail(
      qkNopeHeadDim === null
        ? `query has head dimension ${queryWidth}, expected ${expected} (${kvLoraRank} of the latents plus ${qkRopeHeadDim} ` +
          "rotated) without weights; pass wKc and wVc with a query of qkNopeHeadDim + qkRopeHeadDim"
        : `query has head dimension ${queryWidth}, expected ${expected} (${qkNopeHeadDim} of wKc plus ${qkRopeHeadDim} of the ` +
          "cache)",
    );
  }

  const sequences = tensors.cuSeqlens === undefined ? batch : tensors.cuSeqlens.length - 1;
  const tokenStarts = tensors.cuSeqlens === undefined
    ? Array.from({ length: batch + 1 }, (_, i) => i * queryLength)
    : checkOffsets(tensors.cuSeqlens, batch, queryLength, "query", fail);
  const paged = cache.pageSize > 0;
  const maxPages = paged ? tableColumns(blockTable, sequences, fail) : 0;
  if (!paged && blockTable !== undefined) {
    fail("blockTable is given with a cache tensor that has no pages; pass a LatentCache");
  }
  const capacity = paged ? maxPages * cache.pageSize : cache.keyLength;
  const lens = seqLens === undefined && !paged
    ? Array.from({ length: sequences }, () => cache.keyLength)
    : checkSeqLens(
      seqLens,
      sequences,
      capacity,
      paged ? `${maxPages} pages of ${cache.pageSize} tokens` : "the cache tensor",
      fail,
    );

  if (lens === null && tensors.cuSeqlens !== undefined) {
    fail("cuSeqlens packs queries of different numbers, which needs seqLens on the host; they lie on a GPU");
  }
  const { causal = true, softmaxAux } = options;
  if (typeof causal !== "boolean") fail(`causal must be true or false, got ${kindOf(causal)}`);
  return {
    sequences,
    batch,
    queryLength,
    tokenStarts,
    queryHeads,
    kvHeads: weights?.kvHeads ?? queryHeads,
    kvLoraRank,
    qkNopeHeadDim,
    qkRopeHeadDim,
    vHeadDim: weights?.vHeadDim ?? kvLoraRank,
    causal,
    softmaxScale: scaleOf(options.softmaxScale, qkNopeHeadDim, qkRopeHeadDim),
    logitsSoftCap: checkSoftCap(options.logitsSoftCap),
    slidingWindow: checkWindow(options.slidingWindow),
    sinks: softmaxAux === undefined ? 0 : checkSinks(softmaxAux, queryHeads, fail),
    cache: {
      kvLoraRank,
      qkRopeHeadDim,
      dtype: cache.dtype,
      pageSize: cache.pageSize,
      pages: cache.pages,
      keyLength: cache.keyLength,
    },
    maxPages,
    seqLens: lens,
    capacity,
    splitKeys: checkSplitKeys(options.splitKeys),
    dtype: {
      query: dtypeOf(query),
      ...(wKc && { wKc: dtypeOf(wKc) }),
      ...(wVc && { wVc: dtypeOf(wVc) }),
    },
  };
}

/** The shape of the result, `[batch, queryLength, queryHeads, vHeadDim]`. */
export function decodedShape({ batch, queryLength, queryHeads, vHeadDim }: DecodeProblem): number[] {
  return [batch, queryLength, queryHeads, vHeadDim];
}

/** The shape of the log-sum-exp, `[batch, queryHeads, queryLength]`. */
export function decodedLseShape({ batch, queryLength, queryHeads }: DecodeProblem): number[] {
  return [batch, queryHeads, queryLength];
}

/** What {@link decodeProblem} takes for the layout of a tensor without pages, `[sequences, keyLength, width]`. */
export function tensorLayout(
  cache: AnyTensor,
  { query, cuSeqlens }: Pick<DecodeTensors, "query" | "cuSeqlens">,
): Parameters<typeof decodeProblem>[1] {
  checkAxes("cache", cache, ["sequences", "keyLength", "kvLoraRank + qkRopeHeadDim"]);
  const [items, keyLength, width] = cache.shape;
  const sequences = cuSeqlens === undefined ? query?.shape?.[0] : cuSeqlens.length - 1;
  if (sequences !== undefined && sequences !== items) {
    fail(`cache has ${items} sequences, ${cuSeqlens === undefined ? `query has batch` : "cuSeqlens has"} ${sequences}`);
  }
  return { dtype: dtypeOf(cache) === "f16" ? "f16" : "f32", pageSize: 0, pages: 0, keyLength, width, kvLoraRank: null };
}

function checkAxes(name: string, value: AnyTensor, axes: readonly string[]): void {
  if (value === undefined) fail(`${name} is missing; expected a tensor [${axes.join(", ")}]`);
  checkTensor(name, value);
  if (value.shape.length !== axes.length) {
    fail(`${name} must have ${axes.length} axes [${axes.join(", ")}], got shape [${value.shape.join(", ")}]`);
  }
}

function weightsOf(wKc: AnyTensor, wVc: AnyTensor, queryHeads: number) {
  checkAxes("wKc", wKc, ["kvLoraRank", "kvHeads", "qkNopeHeadDim"]);
  checkAxes("wVc", wVc, ["kvLoraRank", "kvHeads", "vHeadDim"]);
  for (const [name, weight] of [["wKc", wKc], ["wVc", wVc]] as const) {
    const dense = denseStrides(weight.shape);
    if (isGpuTensor(weight) && weight.strides?.some((stride, i) => stride !== dense[i] && weight.shape[i] > 1)) {
      fail(`${name} has strides [${weight.strides}], weights must be dense: [${dense}]`);
    }
  }
  const [kvLoraRank, kvHeads, qkNopeHeadDim] = wKc.shape;
  const vHeadDim = wVc.shape[2];
  if (wVc.shape[0] !== kvLoraRank) fail(`wVc has kvLoraRank ${wVc.shape[0]}, wKc has ${kvLoraRank}`);
  if (wVc.shape[1] !== kvHeads) fail(`wVc has ${wVc.shape[1]} KV heads, wKc has ${kvHeads}`);
  for (const [name, value] of Object.entries({ kvLoraRank, kvHeads, qkNopeHeadDim, vHeadDim })) {
    if (value < 1) fail(`${name} must be at least 1, got ${value}`);
  }
  if (queryHeads % kvHeads !== 0) {
    fail(`query has ${queryHeads} heads, not a multiple of the ${kvHeads} KV heads of wKc`);
  }
  return { kvLoraRank, kvHeads, qkNopeHeadDim, vHeadDim };
}

/** L: of the weights, of the cache, or as it was said; they must agree. */
function latentWidth(
  ofWeights: number | null,
  cache: { readonly kvLoraRank: number | null; readonly width: number },
  said: number | undefined,
): number {
  const known = Object.entries({ wKc: ofWeights, cache: cache.kvLoraRank, "options.kvLoraRank": said ?? null })
    .filter((entry): entry is [string, number] => entry[1] !== null);
  if (known.length === 0) {
    fail("kvLoraRank is not known: give options.kvLoraRank, a LatentCache, or wKc and wVc");
  }
  const [first, value] = known[0];
  for (const [name, other] of known) {
    if (!Number.isSafeInteger(other) || other < 1) {
      fail(`kvLoraRank of ${name} must be a whole number from 1, got ${kindOf(other)}`);
    }
    if (other !== value) fail(`${name} has kvLoraRank ${other}, ${first} has ${value}`);
  }
  if (value > cache.width) {
    fail(`cache has rows of ${cache.width} elements, fewer than the kvLoraRank ${value} of ${first}`);
  }
  return value;
}

function scaleOf(scale: number | undefined, qkNopeHeadDim: number | null, qkRopeHeadDim: number): number {
  if (scale === undefined) {
    if (qkNopeHeadDim !== null) return 1 / Math.sqrt(qkNopeHeadDim + qkRopeHeadDim);
    fail(
      "softmaxScale must be given with an absorbed query: it comes from the width of the heads before absorption, " +
        "1/√(qkNopeHeadDim + qkRopeHeadDim)",
    );
  }
  if (typeof scale === "number" && scale > 0 && Number.isFinite(Math.fround(scale * Math.LOG2E))) return scale;
  return fail(`softmaxScale must be a finite float32 number above 0, got ${kindOf(scale)}`);
}

function checkSplitKeys(splitKeys: number | undefined): number | null {
  if (splitKeys === undefined) return null;
  const isPower = Number.isSafeInteger(splitKeys) && Math.log2(splitKeys) % 1 === 0;
  if (isPower && splitKeys >= 64) return splitKeys;
  return fail(`splitKeys must be a power of two from 64, got ${kindOf(splitKeys)}`);
}
