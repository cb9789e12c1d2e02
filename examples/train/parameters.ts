// All weights of the model in one array, and their gradients in another, so that the optimizer and the checkpoint see two
// arrays. The names and shapes are DeepSeek-V2's.

import type { Weight } from "./layer.ts";
import type { ModelSizes } from "./model_sizes.ts";
import type { Random } from "./random.ts";

/** One weight within the arrays. */
export interface Parameter extends Weight {
  readonly name: string;
  readonly shape: readonly number[];
  /** Where it begins in the arrays. */
  readonly offset: number;
  /** Whether weight decay pulls it to zero: matrices, not gains. */
  readonly decays: boolean;
}

/** The weights of the two halves of a layer. */
export interface LayerParameters {
  /** Gain of the norm before attention, `[width]`. */
  readonly attentionNorm: Parameter;
  /** From hidden states to queries, `[width, heads · (P + R)]`. */
  readonly wQ: Parameter;
  /** From hidden states to latents, `[width, L]`. */
  readonly wDkv: Parameter;
  /** From hidden states to the rotary key, `[width, R]`. */
  readonly wKr: Parameter;
  /** Gain of the norm of the latents, `[L]`. */
  readonly latentNorm: Parameter;
  /** From latents to keys, `[L, heads, P]`. */
  readonly wKc: Parameter;
  /** From latents to values, `[L, heads, V]`. */
  readonly wVc: Parameter;
  /** From attended values to hidden states, `[heads · V, width]`. */
  readonly wO: Parameter;
  /** Gain of the norm before the MLP, `[width]`. */
  readonly mlpNorm: Parameter;
  /** `[width, mlpWidth]`. */
  readonly wGate: Parameter;
  /** `[width, mlpWidth]`. */
  readonly wUp: Parameter;
  /** `[mlpWidth, width]`. */
  readonly wDown: Parameter;
}

/** A model's weights. */
export interface Parameters {
  /** Every weight, one behind the other. */
  readonly values: Float32Array<ArrayBuffer>;
  /** Their gradients. */
  readonly grads: Float32Array<ArrayBuffer>;
  /** The weights in that order. */
  readonly all: readonly Parameter[];
  /** The table of characters, `[kinds, width]`. */
  readonly embedding: Parameter;
  readonly layers: readonly LayerParameters[];
  /** Gain of the last norm, `[width]`. */
  readonly finalNorm: Parameter;
}

/**
 * Lays out a model's weights, and draws them.
 *
 * @param sizes The model's sizes.
 * @param kinds How many tokens there are.
 * @param random Where the weights come from; zeros when absent.
 */
export function parametersOf(sizes: ModelSizes, kinds: number, random?: Random): Parameters {
  const { width, heads, kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim, mlpWidth, layers } = sizes;
  const plan: { name: string; shape: readonly number[]; deviation: number }[] = [];
  const matrix = (name: string, shape: readonly number[], deviation = shape[0] ** -0.5) => {
    plan.push({ name, shape, deviation });
  };
  const gain = (name: string, length: number) => plan.push({ name, shape: [length], deviation: 0 });
  // What is added to the residual stream starts smaller the more often that happens, as in GPT-2.
  const residual = (inputs: number) => (2 * layers * inputs) ** -0.5;

  matrix("embedding", [kinds, width], 0.02);
  for (let layer = 0; layer < layers; layer++) {
    gain(`layers.${layer}.attentionNorm`, width);
    matrix(`layers.${layer}.wQ`, [width, heads * (qkNopeHeadDim + qkRopeHeadDim)]);
    matrix(`layers.${layer}.wDkv`, [width, kvLoraRank]);
    matrix(`layers.${layer}.wKr`, [width, qkRopeHeadDim]);
    gain(`layers.${layer}.latentNorm`, kvLoraRank);
    matrix(`layers.${layer}.wKc`, [kvLoraRank, heads, qkNopeHeadDim]);
    matrix(`layers.${layer}.wVc`, [kvLoraRank, heads, vHeadDim]);
    matrix(`layers.${layer}.wO`, [heads * vHeadDim, width], residual(heads * vHeadDim));
    gain(`layers.${layer}.mlpNorm`, width);
    matrix(`layers.${layer}.wGate`, [width, mlpWidth]);
    matrix(`layers.${layer}.wUp`, [width, mlpWidth]);
    matrix(`layers.${layer}.wDown`, [mlpWidth, width], residual(mlpWidth));
  }
  gain("finalNorm", width);

  const lengthOf = (shape: readonly number[]) => shape.reduce((product, axis) => product * axis, 1);
  const total = plan.reduce((sum, { shape }) => sum + lengthOf(shape), 0);
  const [values, grads] = [new Float32Array(total), new Float32Array(total)];
  let offset = 0;
  const all = plan.map(({ name, shape, deviation }): Parameter => {
    const end = offset + lengthOf(shape);
    const value = values.subarray(offset, end);
    if (random !== undefined) {
      for (let i = 0; i < value.length; i++) value[i] = deviation === 0 ? 1 : deviation * random.normal();
    }
    const parameter = { name, shape, offset, decays: deviation > 0, value, grad: grads.subarray(offset, end) };
    offset = end;
    return parameter;
  });

  const byName = Object.fromEntries(all.map((parameter) => [parameter.name, parameter]));
  const layerOf = (layer: number) =>
    Object.fromEntries(
      all.filter(({ name }) => name.startsWith(`layers.${layer}.`)).map((one) => [one.name.split(".")[2], one]),
    ) as unknown as LayerParameters;
  return {
    values,
    grads,
    all,
    embedding: byName.embedding,
    layers: Array.from({ length: layers }, (_, layer) => layerOf(layer)),
    finalNorm: byName.finalNorm,
  };
}
