// What each kernel of a layer has to move and to compute at least, by its name.

import type { MlaModelConfig } from "../src/model/attention_config.ts";
import { type Formulation, visiblePairs } from "../src/op/formulation.ts";

/** The least that a kernel can do. */
export interface Cost {
  /** Bytes that have to be read and written. */
  readonly bytes: number;
  /** FLOPs of the operation; masked pairs and padding are not counted. */
  readonly flops: number;
}

/** A call. */
export interface LayerWork {
  readonly config: MlaModelConfig;
  /** Sequences. */
  readonly batch: number;
  /** New tokens of each. */
  readonly tokens: number;
  /** Keys of each, the new ones among them. */
  readonly keys: number;
  /** Bytes of an element of weights, cache and what passes between the steps. */
  readonly elementBytes: number;
  /** How attention runs. */
  readonly formulation: Formulation;
}

/** The costs of the kernels by name; of some that are small, copies and padding, nothing is said. */
export function layerCosts(
  { config, batch, tokens, keys, elementBytes: e, formulation }: LayerWork,
): Readonly<Record<string, Cost>> {
  const { hiddenSize, queryHeads: H, qLoraRank, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } =
    config;
  const rows = batch * tokens;
  const pairs = batch * visiblePairs(tokens, keys, { causal: true, slidingWindow: null }) * H;
  const queryWidth = H * (P + R);
  const down = (qLoraRank ?? queryWidth) + L + R;
  const linear = (inputs: number, outputs: number, inBytes: number, outBytes: number): Cost => ({
    bytes: inputs * outputs * e + rows * (inputs * inBytes + outputs * outBytes),
    flops: 2 * rows * inputs * outputs,
  });
  const moved = (bytes: number): Cost => ({ bytes, flops: 0 });
  const expansion = (to: number): Cost => ({
    bytes: (L * H * to + batch * keys * (L + H * to)) * e,
    flops: 2 * batch * keys * H * L * to,
  });
  return {
    "down projections": linear(hiddenSize, down, e, 4),
    "rms norm": moved(2 * rows * ((qLoraRank ?? 0) + L) * 4),
    "q_b_proj": linear(qLoraRank ?? 0, queryWidth, 4, e),
    "rotate queries": moved(rows * queryWidth * (qLoraRank === null ? 4 + e : 2 * e)),
    "rotate keys": moved(rows * (L + R) * (4 + e)),
    "append latents": moved(2 * rows * (L + R) * e),
    "gather latents": moved(2 * batch * keys * (L + R) * e),
    "expandKeys": expansion(P),
    "expandValues": expansion(V),
    "attend": formulation === "expanded"
      ? { bytes: (rows + batch * keys) * H * (P + R + V) * e, flops: 2 * pairs * (P + R + V) }
      : { bytes: (batch * keys * (L + R) + rows * H * (2 * L + R)) * e, flops: 2 * pairs * (2 * L + R) },
    "absorb query": { bytes: L * H * P * e + rows * H * (P + L + 2 * R) * e, flops: 2 * rows * H * L * P },
    "project output": { bytes: L * H * V * e + rows * H * (L + V) * e, flops: 2 * rows * H * L * V },
    "o_proj": linear(H * V, hiddenSize, e, e),
  };
}
