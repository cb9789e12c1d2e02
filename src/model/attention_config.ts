// What a Hugging Face config.json says about a model's MLA layers. Facts are those of Hugging Face transformers' modeling
// files (5.x) of each model_type, and of the models' own files where those came first:
//
//   softmax scale   1/√(P + R), times mscale² where rope is stretched and mscale_all_dim is set. All model types but
//                   kimi_linear; deepseek_v2 and mistral4 only since transformers' pull request 47435. vLLM and SGLang leave
//                   mscale² out where the rope fields have apply_yarn_scaling false, as Mistral's own files say it.
//   norms           q_a_layernorm and kv_a_layernorm are made without an epsilon, so they have the class's 1e-6, whatever
//                   rms_norm_eps says.
//   biases          attention_bias adds one to q_a_proj, kv_a_proj_with_mqa and o_proj, never to q_proj, q_b_proj, kv_b_proj.
//   rotated pairs   interleaved but for minicpm3; rope_interleave may say otherwise where the model's code reads it.
//   longcat_flash   queries times √(hidden / q_lora_rank), normed latents times √(hidden / kv_lora_rank).
//   mistral4        queries times 1 + β·ln(1 + ⌊position / original length⌋), as in Llama 4.
//   kimi_linear     never rotates; the R columns are still shared by all heads.

import { kindOf } from "../op/tensor.ts";
import {
  cannotRead,
  flagOr,
  integerField,
  isAbsent,
  isFields,
  type ModelConfigFile,
  positiveField,
} from "./config_fields.ts";
import { type RopeConfig, ropeConfig, ropeFactor, ropeFields, ropeTypeOf, yarnMscale } from "./rope_config.ts";

/** A `model_type` whose MLA layers are known. */
export type MlaModelType =
  | "deepseek_v2"
  | "deepseek_v3"
  | "kimi_k2"
  | "glm4_moe_lite"
  | "minicpm3"
  | "mistral4"
  | "youtu"
  | "longcat_flash"
  | "kimi_linear";

/** A factor on queries that grows with their position: `1 + beta · ln(1 + ⌊position / length⌋)`. */
export interface QueryTemperature {
  /** How fast it grows. */
  readonly beta: number;
  /** Positions up to the first step. */
  readonly length: number;
}

/** An MLA layer as a model's code computes it. */
export interface MlaModelConfig {
  /** Whose code it is. */
  readonly modelType: MlaModelType;
  /** Width of the layer's input and output. */
  readonly hiddenSize: number;
  /** H, the heads; each has its own keys and values. */
  readonly queryHeads: number;
  /** Width of the query's own latent; null where one projection makes queries. */
  readonly qLoraRank: number | null;
  /** L, width of the latent that is cached. */
  readonly kvLoraRank: number;
  /** P, width of a head's unrotated part. */
  readonly qkNopeHeadDim: number;
  /** R, width of the part that is rotated and whose key is shared by all heads. */
  readonly qkRopeHeadDim: number;
  /** V, width of a head's values. */
  readonly vHeadDim: number;
  /** Epsilon of the norms inside of the layer, of the query's latent and of the cached one. Not `rms_norm_eps`. */
  readonly latentNormEps: number;
  /** Epsilon of the norms around the layer, `rms_norm_eps`. */
  readonly rmsNormEps: number;
  /** Whether q_a_proj, kv_a_proj_with_mqa and o_proj have a bias. */
  readonly attentionBias: boolean;
  /** Factor on the scores, with everything that stretched positions add to it. */
  readonly softmaxScale: number;
  /** The rotary embedding; null where nothing is rotated. */
  readonly rope: RopeConfig | null;
  /** Factor on queries; 1 but for LongCat. */
  readonly queryScale: number;
  /** Factor on the normed latents that are cached, not on the rotated key; 1 but for LongCat. */
  readonly latentScale: number;
  /** A factor on queries that grows with their position, or null. */
  readonly queryTemperature: QueryTemperature | null;
  /** The longest sequence that the model is made for. */
  readonly maxPositionEmbeddings: number;
}

/** What differs from DeepSeek-V3's code. */
interface Peculiarities {
  /** Where it is not read from `rope_interleave`. */
  readonly layout?: "interleaved" | "half" | "unrotated";
  /** The base where the file has none. */
  readonly defaultTheta?: number;
}

const modelTypes: Readonly<Record<MlaModelType, Peculiarities>> = {
  deepseek_v2: { layout: "interleaved" },
  deepseek_v3: {},
  kimi_k2: {},
  glm4_moe_lite: {},
  minicpm3: { layout: "half" },
  mistral4: {},
  youtu: {},
  longcat_flash: { layout: "interleaved", defaultTheta: 1e7 },
  kimi_linear: { layout: "unrotated" },
};

/**
 * Reads what a model's `config.json` says about its MLA layers.
 *
 * `model_type` decides what the fields mean; a file that wraps a language model's in `text_config` is read there. Both forms
 * of the rotary embedding are read: `rope_theta` with `rope_scaling`, and `rope_parameters`.
 *
 * @param config The parsed file. Fields that have nothing to do with attention may be absent.
 * @returns The layer's dimensions, factors and rotary embedding.
 * @throws {FlashMLAError} With code `invalid-input`, for a `model_type` or a rope type that is not known, and for a field
 * that is missing or makes no sense.
 *
 * @example
 * ```ts
 * import { mlaModelConfig } from "@flash-mla/webgpu";
 *
 * const layer = mlaModelConfig({
 *   model_type: "deepseek_v3",
 *   hidden_size: 7168,
 *   num_attention_heads: 128,
 *   q_lora_rank: 1536,
 *   kv_lora_rank: 512,
 *   qk_nope_head_dim: 128,
 *   qk_rope_head_dim: 64,
 *   v_head_dim: 128,
 *   rms_norm_eps: 1e-6,
 *   max_position_embeddings: 163840,
 *   rope_theta: 10000,
 *   rope_scaling: { type: "yarn", factor: 40, original_max_position_embeddings: 4096, mscale: 1, mscale_all_dim: 1 },
 * });
 * console.log(layer.softmaxScale.toFixed(6)); // 0.135234, which is 1.8739 / √192
 * ```
 */
export function mlaModelConfig(config: ModelConfigFile): MlaModelConfig {
  if (!isFields(config)) cannotRead(`expected a parsed config.json, got ${kindOf(config)}`);
  const inner = config.text_config;
  if (!isKnown(config.model_type) && isFields(inner) && isKnown(inner.model_type)) return mlaModelConfig(inner);
  const modelType = modelTypeOf(config);
  if (modelType === "kimi_linear") checkKimiLinear(config);

  const hiddenSize = integerField(config, "hidden_size");
  const queryHeads = integerField(config, "num_attention_heads");
  const kvHeads = isAbsent(config, "num_key_value_heads") ? queryHeads : integerField(config, "num_key_value_heads");
  if (kvHeads !== queryHeads) {
    cannotRead(`num_key_value_heads is ${kvHeads}, expected ${queryHeads} as num_attention_heads: MLA has as many`);
  }
  const qLoraRank = config.q_lora_rank === null ? null : integerField(config, "q_lora_rank");
  const kvLoraRank = integerField(config, "kv_lora_rank");
  const qkNopeHeadDim = integerField(config, "qk_nope_head_dim");
  const qkRopeHeadDim = integerField(config, "qk_rope_head_dim", 0);
  if (qkRopeHeadDim % 2 !== 0) cannotRead(`qk_rope_head_dim must be even, got ${qkRopeHeadDim}`);
  const maxPositionEmbeddings = integerField(
    config,
    modelType === "kimi_linear" && isAbsent(config, "max_position_embeddings")
      ? "model_max_length"
      : "max_position_embeddings",
  );
  const longCat = modelType === "longcat_flash";
  if (longCat && qLoraRank === null) cannotRead("q_lora_rank must be a whole number for longcat_flash, got null");
  return {
    modelType,
    hiddenSize,
    queryHeads,
    qLoraRank,
    kvLoraRank,
    qkNopeHeadDim,
    qkRopeHeadDim,
    vHeadDim: valueWidth(config, modelType, hiddenSize, queryHeads),
    latentNormEps: 1e-6,
    rmsNormEps: positiveField(config, "rms_norm_eps"),
    attentionBias: modelType !== "kimi_linear" && flagOr(config, "attention_bias", false),
    softmaxScale: softmaxScale(config, modelType, qkNopeHeadDim + qkRopeHeadDim, maxPositionEmbeddings),
    rope: rope(config, modelType, qkRopeHeadDim, maxPositionEmbeddings),
    queryScale: longCat && flagOr(config, "mla_scale_q_lora", true) ? Math.sqrt(hiddenSize / qLoraRank!) : 1,
    latentScale: longCat && flagOr(config, "mla_scale_kv_lora", true) ? Math.sqrt(hiddenSize / kvLoraRank) : 1,
    queryTemperature: modelType === "mistral4" ? temperature(config) : null,
    maxPositionEmbeddings,
  };
}

function isKnown(modelType: unknown): modelType is MlaModelType {
  return typeof modelType === "string" && Object.hasOwn(modelTypes, modelType);
}

function modelTypeOf({ model_type }: ModelConfigFile): MlaModelType {
  if (isKnown(model_type)) return model_type;
  const supported = Object.keys(modelTypes).join(", ");
  if (model_type === undefined) cannotRead(`model_type is missing; supported: ${supported}`);
  return cannotRead(
    `model_type ${kindOf(model_type)} is not known; supported: ${supported}. If its attention is DeepSeek-V3's, pass ` +
      'model_type "deepseek_v3"; assumed are then, unless the fields say otherwise, rope_interleave true, attention_bias ' +
      "false, rope_theta 10000 and rope_scaling null, and always an epsilon of 1e-6 in q_a_layernorm and kv_a_layernorm and a " +
      "softmax scale of mscale² / √(qk_nope_head_dim + qk_rope_head_dim)",
  );
}

/** Refuses what some files of this type have and this project does not compute. */
function checkKimiLinear(config: ModelConfigFile): void {
  if (!flagOr(config, "mla_use_nope", true)) {
    cannotRead("mla_use_nope must be true: kimi_linear's MLA layers do not rotate");
  }
  if (flagOr(config, "mla_use_output_gate", false)) cannotRead("mla_use_output_gate is true, which is not supported");
}

function valueWidth(config: ModelConfigFile, modelType: MlaModelType, hiddenSize: number, queryHeads: number): number {
  if (modelType !== "minicpm3" || !isAbsent(config, "v_head_dim")) return integerField(config, "v_head_dim");
  return Math.floor(hiddenSize / queryHeads);
}

function softmaxScale(config: ModelConfigFile, modelType: MlaModelType, width: number, maxLength: number): number {
  const scale = 1 / Math.sqrt(width);
  const fields = ropeFields(config);
  const weight = fields.mscale_all_dim;
  if (modelType === "kimi_linear" || ropeTypeOf(fields) === "default" || typeof weight !== "number") return scale;
  if (!flagOr(fields, "apply_yarn_scaling", true)) return scale;
  return scale * (weight === 0 ? 1 : yarnMscale(ropeFactor(config, fields, maxLength), weight) ** 2);
}

function rope(config: ModelConfigFile, modelType: MlaModelType, dim: number, maxLength: number): RopeConfig | null {
  const { layout: fixed, defaultTheta = 10_000 } = modelTypes[modelType];
  if (dim === 0 || fixed === "unrotated") return null;
  // Mistral's file has R / (P + R) here, as its head_dim is P + R; elsewhere it would leave some of the R columns unrotated.
  const part = ropeFields(config).partial_rotary_factor ?? config.partial_rotary_factor ?? 1;
  if (modelType !== "mistral4" && part !== 1) cannotRead(`partial_rotary_factor must be 1, got ${kindOf(part)}`);
  const layout = fixed ?? (flagOr(config, "rope_interleave", true) ? "interleaved" : "half");
  return ropeConfig(config, dim, layout, maxLength, defaultTheta);
}

function temperature(config: ModelConfigFile): QueryTemperature | null {
  const fields = ropeFields(config);
  if (isAbsent(fields, "llama_4_scaling_beta") || fields.llama_4_scaling_beta === 0) return null;
  return {
    beta: positiveField(fields, "llama_4_scaling_beta", "rope "),
    length: positiveField(fields, "original_max_position_embeddings", "rope "),
  };
}
