// One forward call of a layer, validated: which tokens belong to which sequence, where they stand, and how each sequence is
// computed.

import type { MlaModelConfig } from "../model/attention_config.ts";
import { FlashMLAError } from "../op/errors.ts";
import { fewerFlops, type Formulation, visiblePairs } from "../op/formulation.ts";
import { checkOffsets } from "../op/sequence_places.ts";
import { type AnyTensor, checkTensor, kindOf } from "../op/tensor.ts";
import { layerCacheInside, MlaLayerCache } from "./layer_cache.ts";

/** Positions of tokens: of each one, or of each token of an item, the same in all of them. */
export type MlaPositions = ArrayLike<number> | readonly ArrayLike<number>[] | {
  /** The positions, last axis fastest. */
  readonly data: ArrayLike<number>;
  /** `[length]` or `[batch, length]`. */
  readonly shape: readonly number[];
};

/** What of a call is validated here. */
export interface LayerCallOptions {
  /** What earlier calls left, and where this one's tokens go. */
  readonly cache?: MlaLayerCache;
  /** Positions of the tokens. */
  readonly positions?: MlaPositions;
  /** Offsets of packed sequences. */
  readonly cuSeqlens?: Int32Array | Uint32Array | readonly number[];
  /** Whether a token sees those behind it, too. */
  readonly causal?: boolean;
  /** How to compute. */
  readonly formulation?: Formulation | "auto";
}

/** A validated call. */
export interface LayerCall {
  /** First axis of the hidden states. */
  readonly batch: number;
  /** Second axis. */
  readonly length: number;
  /** First token of each sequence, counted through both axes, and behind it the number of tokens. */
  readonly tokenStarts: readonly number[];
  /** Offsets, where sequences are packed. */
  readonly cuSeqlens: readonly number[] | undefined;
  /** Keys that each sequence has before. */
  readonly before: readonly number[];
  /** Position of each token. */
  readonly positions: Float64Array;
  /** Whether the causal mask applies. */
  readonly causal: boolean;
  /** How each sequence is computed. */
  readonly formulations: readonly Formulation[];
}

function fail(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot run the layer: ${why}`);
}

/**
 * Validates a call. Nothing is changed.
 *
 * @param hiddenStates The input.
 * @param options The options.
 * @param config The layer.
 * @param owner The layer whose tokens the cache must hold.
 * @throws {FlashMLAError} With code `invalid-input`, naming the argument, what was expected and what came.
 */
export function layerCall(
  hiddenStates: AnyTensor,
  options: LayerCallOptions,
  config: MlaModelConfig,
  owner: object,
): LayerCall {
  const { cache, causal = true, formulation = "auto" } = options;
  if (hiddenStates === undefined) {
    fail(`hiddenStates is missing; expected a tensor [batch, length, ${config.hiddenSize}]`);
  }
  checkTensor("hiddenStates", hiddenStates);
  const { shape } = hiddenStates;
  if (shape.length !== 3 || shape[2] !== config.hiddenSize) {
    fail(`hiddenStates has shape [${shape}], expected [batch, length, ${config.hiddenSize}], the config's hidden_size`);
  }
  if (typeof causal !== "boolean") fail(`causal must be true or false, got ${kindOf(causal)}`);
  if (!["auto", "absorbed", "expanded"].includes(formulation)) {
    fail(`formulation must be "auto", "absorbed" or "expanded", got ${kindOf(formulation)}`);
  }
  const [batch, length] = shape;
  const cuSeqlens = options.cuSeqlens === undefined
    ? undefined
    : checkOffsets(options.cuSeqlens, batch, length, "hiddenStates", fail);
  const tokenStarts = cuSeqlens ?? Array.from({ length: batch + 1 }, (_, i) => i * length);
  const added = tokenStarts.slice(1).map((end, s) => end - tokenStarts[s]);
  const before = cache === undefined ? added.map(() => 0) : keysBefore(cache, added, owner, cuSeqlens !== undefined);
  const positions = options.positions === undefined
    ? Float64Array.from(added.flatMap((tokens, s) => Array.from({ length: tokens }, (_, i) => before[s] + i)))
    : positionsOf(options.positions, batch, length, cache);
  const formulations = added.map((queries, s) =>
    formulation === "auto" ? cheaper(config, queries, before[s] + queries, causal) : formulation
  );
  return { batch, length, tokenStarts, cuSeqlens, before, positions, causal, formulations };
}

/** The options as they are now: a call on a cache may wait for others, and lists may be written to meanwhile. */
export function heldOptions({ cache, positions, cuSeqlens, causal, formulation }: LayerCallOptions): LayerCallOptions {
  return {
    ...{ cache, causal, formulation },
    positions: positions === undefined ? undefined : flat(positions),
    cuSeqlens: cuSeqlens === undefined || typeof cuSeqlens !== "object" ? cuSeqlens : Array.from(cuSeqlens),
  };
}

function keysBefore(cache: MlaLayerCache, added: readonly number[], owner: object, packed: boolean): number[] {
  if (!(cache instanceof MlaLayerCache)) fail(`cache must be one that createCache() made, got ${kindOf(cache)}`);
  const inside = layerCacheInside(cache);
  if (inside.owner !== owner) fail("cache was made by another layer; each layer has rows of its own to remember");
  const { lengths } = inside;
  if (added.length !== cache.batch) {
    fail(
      `${packed ? "cuSeqlens packs" : "hiddenStates has"} ${added.length} sequences, the cache holds ${cache.batch}`,
    );
  }
  added.forEach((tokens, s) => {
    if (lengths[s] + tokens <= cache.length) return;
    fail(`sequence ${s} has ${lengths[s]} tokens and would get ${tokens}, the cache has room for ${cache.length}`);
  });
  return Array.from(lengths);
}

function positionsOf(given: MlaPositions, batch: number, length: number, cache?: MlaLayerCache): Float64Array {
  const list = flat(given);
  if (list.length !== length && list.length !== batch * length) {
    const each = batch === 1 ? "" : ` or [${batch}, ${length}]`;
    fail(`positions has ${list.length} entries, expected one for each token: [${length}]${each}`);
  }
  const positions = Float64Array.from({ length: batch * length }, (_, i) => list[i % list.length]);
  positions.forEach((position, i) => {
    if (!Number.isSafeInteger(position) || position < 0) {
      fail(`positions must hold whole numbers from 0, got ${kindOf(list[i % list.length])} at index ${i}`);
    }
    if (cache === undefined || position < cache.length) return;
    fail(`positions holds ${position} at index ${i}, the cache has room for positions 0 to ${cache.length - 1}`);
  });
  return positions;
}

/** All entries in order. */
function flat(given: MlaPositions): readonly number[] {
  if (typeof given === "object" && given !== null && "data" in given && "shape" in given) return flat(given.data);
  if (!Array.isArray(given) && !ArrayBuffer.isView(given)) {
    fail(`positions must be numbers, or rows of them, got ${kindOf(given)}`);
  }
  const list = Array.from(given as ArrayLike<unknown>);
  return list.flatMap((entry) =>
    typeof entry === "object" && entry !== null ? Array.from(entry as number[]) : [entry]
  ) as readonly number[];
}

function cheaper(config: MlaModelConfig, queries: number, keys: number, causal: boolean): Formulation {
  const pairs = visiblePairs(queries, keys, { causal, slidingWindow: null });
  return fewerFlops({ ...config, kvHeads: config.queryHeads }, queries, keys, pairs);
}
