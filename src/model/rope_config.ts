// What a config.json says about the rotary embedding, in its old form (rope_theta beside rope_scaling) and in its new one
// (rope_parameters), with every default filled in.

import { kindOf } from "../op/tensor.ts";
import {
  cannotRead,
  flagOr,
  isAbsent,
  isFields,
  type ModelConfigFile,
  positiveField,
  positiveOr,
} from "./config_fields.ts";

/** How frequencies are stretched to reach past the length of pretraining. */
export type RopeType = "default" | "linear" | "dynamic" | "yarn" | "longrope";

/**
 * Which two columns are turned together, of R: `interleaved` turns 2i with 2i + 1, `half` turns i with i + R/2.
 */
export type RopeLayout = "interleaved" | "half";

/** A rotary embedding. */
export interface RopeConfig {
  /** How frequencies are stretched. */
  readonly type: RopeType;
  /** R, the columns that are turned; even. */
  readonly dim: number;
  /** Base of the frequencies: pair i turns by `theta^(−2i/R)` per position. */
  readonly theta: number;
  /** Which columns are a pair. */
  readonly layout: RopeLayout;
  /** Factor on cosines and sines, and so on rotated queries and keys; 1 but for `yarn` and `longrope`. */
  readonly attentionFactor: number;
  /** How much longer than in pretraining sequences may be; 1 for `default`. */
  readonly factor: number;
  /** The longest sequence of the model; `dynamic` stretches from there on. */
  readonly maxPositionEmbeddings: number;
  /** The longest sequence of pretraining; `yarn` and `longrope` stretch from there on. */
  readonly originalMaxPositionEmbeddings: number;
  /** Of `yarn`: pairs that turn more often than this in a sequence of pretraining keep their frequency. */
  readonly betaFast: number;
  /** Of `yarn`: pairs that turn less often than this are stretched by all of `factor`. */
  readonly betaSlow: number;
  /** Of `yarn`: whether the two bounds between pairs are rounded outwards to whole pairs. */
  readonly truncate: boolean;
  /** Of `longrope`: what divides each pair's frequency up to the length of pretraining, `[R/2]`. */
  readonly shortFactor: readonly number[];
  /** Of `longrope`: the same for longer sequences, `[R/2]`. */
  readonly longFactor: readonly number[];
}

const ropeTypes: readonly RopeType[] = ["default", "linear", "dynamic", "yarn", "longrope"];

/** What the file says about the rotary embedding: `rope_scaling` where there is one, or else `rope_parameters`. */
export function ropeFields(config: ModelConfigFile): ModelConfigFile {
  const name = isAbsent(config, "rope_scaling") ? "rope_parameters" : "rope_scaling";
  if (isAbsent(config, name)) return {};
  const fields = config[name];
  return isFields(fields) ? fields : cannotRead(`${name} must be an object, got ${kindOf(fields)}`);
}

/** The type that the fields name. */
export function ropeTypeOf(fields: ModelConfigFile): RopeType {
  const type = fields.rope_type ?? fields.type ?? "default";
  if ((ropeTypes as readonly unknown[]).includes(type)) return type as RopeType;
  return cannotRead(`rope type ${kindOf(type)} is not known; supported: ${ropeTypes.join(", ")}`);
}

/**
 * Growth of attention logits with the stretch of positions, `0.1 · weight · ln(factor) + 1` above a factor of 1 (YaRN, arXiv
 * 2309.00071 §3.4).
 */
export function yarnMscale(factor: number, weight = 1): number {
  return factor <= 1 ? 1 : 0.1 * weight * Math.log(factor) + 1;
}

/** How many times longer sequences may be than in pretraining. */
export function ropeFactor(config: ModelConfigFile, fields: ModelConfigFile, maxPositionEmbeddings: number): number {
  switch (ropeTypeOf(fields)) {
    case "default":
      return 1;
    case "linear":
    case "dynamic":
      return positiveField(fields, "factor", "rope ");
    default:
      return positiveOr(fields, "factor", null, "rope ") ??
        maxPositionEmbeddings / originalLength(config, fields, maxPositionEmbeddings);
  }
}

/**
 * Reads the rotary embedding of a config.
 *
 * @param config The file.
 * @param dim R.
 * @param layout Which columns are a pair.
 * @param maxPositionEmbeddings The model's longest sequence.
 * @param defaultTheta The base where the file has none.
 */
export function ropeConfig(
  config: ModelConfigFile,
  dim: number,
  layout: RopeLayout,
  maxPositionEmbeddings: number,
  defaultTheta: number,
): RopeConfig {
  const fields = ropeFields(config);
  const type = ropeTypeOf(fields);
  const factor = ropeFactor(config, fields, maxPositionEmbeddings);
  const originalMaxPositionEmbeddings = originalLength(config, fields, maxPositionEmbeddings);
  return {
    type,
    dim,
    theta: positiveOr(fields, "rope_theta", null, "rope ") ?? positiveOr(config, "rope_theta", defaultTheta),
    layout,
    attentionFactor: attentionFactorOf(type, fields, factor, originalMaxPositionEmbeddings),
    factor,
    maxPositionEmbeddings,
    originalMaxPositionEmbeddings,
    betaFast: positiveOr(fields, "beta_fast", 32, "rope "),
    betaSlow: positiveOr(fields, "beta_slow", 1, "rope "),
    truncate: flagOr(fields, "truncate", true),
    shortFactor: type === "longrope" ? factorsField(fields, "short_factor", dim) : [],
    longFactor: type === "longrope" ? factorsField(fields, "long_factor", dim) : [],
  };
}

function originalLength(config: ModelConfigFile, fields: ModelConfigFile, maxPositionEmbeddings: number): number {
  return positiveOr(fields, "original_max_position_embeddings", null, "rope ") ??
    positiveOr(config, "original_max_position_embeddings", maxPositionEmbeddings);
}

function attentionFactorOf(type: RopeType, fields: ModelConfigFile, factor: number, originalLength: number): number {
  if (type !== "yarn" && type !== "longrope") return 1;
  const given = positiveOr(fields, "attention_factor", null, "rope ");
  if (given !== null) return given;
  if (type === "longrope") return factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(originalLength));
  const [mscale, mscaleAllDim] = [fields.mscale, fields.mscale_all_dim];
  return typeof mscale === "number" && typeof mscaleAllDim === "number" && mscale !== 0 && mscaleAllDim !== 0
    ? yarnMscale(factor, mscale) / yarnMscale(factor, mscaleAllDim)
    : yarnMscale(factor);
}

function factorsField(fields: ModelConfigFile, name: string, dim: number): readonly number[] {
  const values = fields[name];
  if (!Array.isArray(values) || values.length !== dim / 2) {
    cannotRead(`rope ${name} must be an array of ${dim / 2} numbers, one for each rotated pair, got ${kindOf(values)}`);
  }
  for (const value of values) {
    if (typeof value !== "number" || !(value > 0)) {
      cannotRead(`rope ${name} must hold numbers above 0, got ${kindOf(value)}`);
    }
  }
  return values;
}
