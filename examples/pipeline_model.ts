// The model that pipeline.ts runs: its sizes, and random weights. A layer is
//
//   x = rmsNorm(hidden)   q = x·wQ   [c | k] = x·wKvA   hidden += attention(q, c, k)·wO
//
// with [c | k], L + R columns, in the layer's KV cache. What a real model has beside: rotations, a norm of c, an MLP.

import type { Tensor } from "../mod.ts"; // in your project: "@flash-mla/webgpu"
import { randomTensors } from "./v2_lite_inputs.ts";

export interface Sizes {
  readonly layers: number;
  readonly hidden: number;
  readonly heads: number;
  /** L. */
  readonly kvLoraRank: number;
  /** P. */
  readonly qkNopeHeadDim: number;
  /** R. */
  readonly qkRopeHeadDim: number;
  /** V. */
  readonly vHeadDim: number;
  readonly promptTokens: number;
  /** Tokens that are decoded one by one after the prompt. */
  readonly steps: number;
}

/** Small enough for a software adapter. */
export const small: Sizes = {
  layers: 4,
  hidden: 64,
  heads: 4,
  kvLoraRank: 32,
  qkNopeHeadDim: 16,
  qkRopeHeadDim: 8,
  vHeadDim: 16,
  promptTokens: 20,
  steps: 8,
};

/** DeepSeek-V2-Lite's sizes, with four of its 27 layers. */
export const large: Sizes = {
  layers: 4,
  hidden: 2048,
  heads: 16,
  kvLoraRank: 512,
  qkNopeHeadDim: 128,
  qkRopeHeadDim: 64,
  vHeadDim: 128,
  promptTokens: 128,
  steps: 16,
};

export interface LayerWeights<T = Tensor> {
  /** `[hidden]`, factors of the norm. */
  readonly gain: T;
  /** `[hidden, heads · (P + R)]`. */
  readonly wQ: T;
  /** `[hidden, L + R]`. */
  readonly wKvA: T;
  /** `[L, heads, P]`. */
  readonly wKc: T;
  /** `[L, heads, V]`. */
  readonly wVc: T;
  /** `[heads · V, hidden]`. */
  readonly wO: T;
}

export interface Model {
  readonly sizes: Sizes;
  readonly layers: readonly LayerWeights[];
  /** `[hidden]`, factors of the norm behind the last layer. */
  readonly gain: Tensor;
  /** The prompt's hidden states, `[promptTokens, hidden]`. */
  readonly prompt: Tensor;
}

export function randomModel(sizes: Sizes): Model {
  const { layers, hidden, heads, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V, promptTokens } = sizes;
  const tensor = randomTensors(2);
  // Scaled as trained projections are: what comes out is of the size of what goes in.
  const projection = (inner: number, ...outer: number[]) => tensor(inner ** -0.5, inner, ...outer);
  return {
    sizes,
    layers: Array.from({ length: layers }, () => ({
      gain: tensor(1, hidden),
      wQ: projection(hidden, heads * (P + R)),
      wKvA: projection(hidden, L + R),
      wKc: projection(L, heads, P),
      wVc: projection(L, heads, V),
      wO: projection(heads * V, hidden),
    })),
    gain: tensor(1, hidden),
    prompt: tensor(1, promptTokens, hidden),
  };
}
