// What a config.json says about the rotary embedding, in its old form (rope_theta beside rope_scaling) and in its new one
// (rope_parameters), with every default filled in.

import { kindOf } from "../op/tensor.ts";
import {
  cannotRead,
  fieldsOrNull,
  flagOrNull,
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

/** What a model's code assumes of the rotary embedding where the file is silent. */
export interface RopeDefaults {
  /** The longest sequence of the model. */
  readonly maxPositionEmbeddings: number;
  /** The base. */
  readonly theta: number;
  /** All of it, where the file has no rope fields; default none, which is an embedding of type `default`. */
  readonly fields?: ModelConfigFile;
}

/**
 * What the file says about the rotary embedding: `rope_scaling` where there is one, or else `rope_parameters`; with what stands
 * beside them.
 *
 * The longest sequence of pretraining is taken from beside the fields first, as Phi-3 has it there; only `yarn` and `longrope`
 * have one unless the fields say so.
 *
 * @param config The file.
 * @param defaults What the model's code assumes.
 * @returns The fields, with `rope_theta` and, where the type needs it, `original_max_position_embeddings`.
 */
export function ropeFields(config: ModelConfigFile, defaults: RopeDefaults): ModelConfigFile {
  const fields = fieldsOrNull(config, "rope_scaling") ?? fieldsOrNull(config, "rope_parameters") ?? defaults.fields ??
    {};
  const type = ropeTypeOf(fields);
  const theta = positiveOr(fields, "rope_theta", null, "rope ") ?? positiveOr(config, "rope_theta", defaults.theta);
  if (type !== "yarn" && type !== "longrope") return { ...fields, rope_theta: theta };
  const length = "original_max_position_embeddings";
  return {
    ...fields,
    rope_theta: theta,
    [length]: positiveOr(config, length, null) ?? positiveOr(fields, length, defaults.maxPositionEmbeddings, "rope "),
  };
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

/**
 * How many times longer sequences may be than in pretraining.
 *
 * @param fields What {@link ropeFields} gives.
 * @param maxPositionEmbeddings The model's longest sequence.
 */
export function ropeFactor(fields: ModelConfigFile, maxPositionEmbeddings: number): number {
  switch (ropeTypeOf(fields)) {
    case "default":
      return 1;
    case "linear":
    case "dynamic":
      return positiveField(fields, "factor", "rope ");
    default:
      return positiveOr(fields, "factor", null, "rope ") ?? maxPositionEmbeddings / originalLength(fields);
  }
}

/**
 * Reads the rotary embedding of a config.
 *
 * @param fields What {@link ropeFields} gives.
 * @param dim R.
 * @param layout Which columns are a pair.
 * @param maxPositionEmbeddings The model's longest sequence.
 */
export function ropeConfig(
  fields: ModelConfigFile,
  dim: number,
  layout: RopeLayout,
  maxPositionEmbeddings: number,
): RopeConfig {
  const type = ropeTypeOf(fields);
  const factor = ropeFactor(fields, maxPositionEmbeddings);
  return {
    type,
    dim,
    theta: positiveField(fields, "rope_theta", "rope "),
    layout,
    attentionFactor: attentionFactorOf(type, fields, factor),
    factor,
    maxPositionEmbeddings,
    originalMaxPositionEmbeddings: positiveOr(
      fields,
      "original_max_position_embeddings",
      maxPositionEmbeddings,
      "rope ",
    ),
    betaFast: turnsField(fields, "beta_fast", 32),
    betaSlow: turnsField(fields, "beta_slow", 1),
    truncate: flagOrNull(fields, "truncate", true),
    shortFactor: type === "longrope" ? factorsField(fields, "short_factor", dim) : [],
    longFactor: type === "longrope" ? factorsField(fields, "long_factor", dim) : [],
  };
}

/** The longest sequence of pretraining, of fields that have one. */
export function originalLength(fields: ModelConfigFile): number {
  return positiveField(fields, "original_max_position_embeddings", "rope ");
}

/** One of YaRN's bounds; 0 stands for the default. */
function turnsField(fields: ModelConfigFile, name: string, otherwise: number): number {
  return fields[name] === 0 ? otherwise : positiveOr(fields, name, otherwise, "rope ");
}

function attentionFactorOf(type: RopeType, fields: ModelConfigFile, factor: number): number {
  if (type !== "yarn" && type !== "longrope") return 1;
  const given = positiveOr(fields, "attention_factor", null, "rope ");
  if (given !== null) return given;
  if (type === "longrope") {
    return factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(originalLength(fields)));
  }
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
