// What a model's attention costs per token, in numbers and in words.

import { cannotRun } from "../op/errors.ts";
import { flopsOf } from "../op/formulation.ts";
import { kindOf } from "../op/tensor.ts";
import type { MlaModelConfig } from "./attention_config.ts";

/** Bytes, by how elements are stored. */
export interface CacheBytes {
  /** With 2 bytes for an element. */
  readonly f16: number;
  /** With 4 bytes for an element. */
  readonly f32: number;
}

/** How far to look. */
export interface DescribeOptions {
  /** Keys that the token sees. Default: the model's longest sequence. */
  readonly contextLength?: number;
  /** Layers to add up. Default 1. */
  readonly layers?: number;
}

/** What attention costs per token. */
export interface MlaDescription {
  /** Keys that the token sees. */
  readonly contextLength: number;
  /** Layers that are added up. */
  readonly layers: number;
  /** What a token adds to the cache: a latent and the rotated key, L + R elements. */
  readonly cacheBytesPerToken: CacheBytes;
  /** What it would add with plain multi-head attention of the same heads: keys and values, H · (P + R + V) elements. */
  readonly plainCacheBytesPerToken: CacheBytes;
  /** How many times smaller the cache is. */
  readonly cacheReduction: number;
  /** FLOPs of attention for one decoded token; projections outside of attention are not counted. */
  readonly flopsPerToken: {
    /** On the latents alone. */
    readonly absorbed: number;
    /** With keys and values rebuilt from all latents. */
    readonly expanded: number;
  };
  /** The same for people, several lines. */
  readonly text: string;
  /** {@link MlaDescription.text}. */
  toString(): string;
}

/**
 * Says what a model's attention costs per token: the cache, against plain multi-head attention, and the FLOPs of decoding.
 *
 * FLOPs are those of `2 · H · L · (P + V) + 2 · n · H · (2L + R)` for n keys where the weights are absorbed, and of
 * `2 · n · H · L · (P + V) + 2 · n · H · (P + R + V)` where keys and values are rebuilt.
 *
 * @param config The layer, of `mlaModelConfig`.
 * @param options The context and the number of layers.
 * @returns The numbers, and a text.
 * @throws {FlashMLAError} With code `invalid-input`, when an option is not a whole number from 1.
 *
 * @example
 * ```ts
 * import { describe, mlaModelConfig, presets } from "@flash-mla/webgpu";
 *
 * const { cacheBytesPerToken, cacheReduction } = describe(mlaModelConfig(presets.deepseekV3.config));
 * console.log(cacheBytesPerToken.f16, cacheReduction.toFixed(1)); // 1152 71.1
 * ```
 */
export function describe(config: MlaModelConfig, options: DescribeOptions = {}): MlaDescription {
  const { contextLength = config.maxPositionEmbeddings, layers = 1 } = options;
  for (const [name, value] of Object.entries({ contextLength, layers })) {
    if (!Number.isSafeInteger(value) || value < 1) {
      cannotRun(`${name} must be a whole number from 1, got ${kindOf(value)}`);
    }
  }
  const { queryHeads: H, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = config;
  const [latent, plain] = [layers * (L + R), layers * H * (P + R + V)];
  const widths = { ...config, kvHeads: H };
  const numbers = {
    contextLength,
    layers,
    cacheBytesPerToken: { f16: 2 * latent, f32: 4 * latent },
    plainCacheBytesPerToken: { f16: 2 * plain, f32: 4 * plain },
    cacheReduction: plain / latent,
    flopsPerToken: {
      absorbed: layers * flopsOf("absorbed", widths, 1, contextLength, contextLength),
      expanded: layers * flopsOf("expanded", widths, 1, contextLength, contextLength),
    },
  };
  const text = textOf(config, numbers);
  return { ...numbers, text, toString: () => text };
}

function textOf(config: MlaModelConfig, numbers: Omit<MlaDescription, "text" | "toString">): string {
  const { contextLength, layers, cacheBytesPerToken, plainCacheBytesPerToken, cacheReduction, flopsPerToken } = numbers;
  const { rope } = config;
  const rotation = rope === null
    ? "unrotated"
    : `rope ${rope.type}, θ ${rope.theta}, ${rope.layout}${rope.factor === 1 ? "" : `, ${rope.factor} × longer`}`;
  return [
    `${config.modelType}: ${config.queryHeads} heads of ${config.qkNopeHeadDim} + ${config.qkRopeHeadDim} and ` +
    `${config.vHeadDim}, latents of ${config.kvLoraRank}, softmax scale ${Number(config.softmaxScale.toPrecision(6))}`,
    `  ${rotation}; made for ${config.maxPositionEmbeddings} tokens`,
    `  cache per token${layers === 1 ? "" : ` of ${layers} layers`}: ${cacheBytesPerToken.f16} bytes in f16, ` +
    `${cacheBytesPerToken.f32} in f32`,
    `  plain multi-head attention: ${plainCacheBytesPerToken.f16} and ${plainCacheBytesPerToken.f32}, ` +
    `${cacheReduction.toFixed(1)} × as much`,
    `  FLOPs of a token that sees ${contextLength}: ${short(flopsPerToken.absorbed)} absorbed, ` +
    `${short(flopsPerToken.expanded)} expanded`,
  ].join("\n");
}

/** A count with three digits and a unit. */
function short(count: number): string {
  const units = ["", "k", "M", "G", "T", "P"];
  const unit = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(count) / 3)));
  return `${Number((count / 1000 ** unit).toPrecision(3))}${unit === 0 ? "" : " "}${units[unit]}`;
}
