// What a Hugging Face config.json says about a model's MLA layers. Facts are those of Hugging Face transformers' modeling
// files (5.x) of each model_type, and of the models' own files where those came first:
//
//   softmax scale   1/√(P + R), times mscale² where rope is stretched and mscale_all_dim is set. All model types but
//                   kimi_linear; deepseek_v2 and mistral4 only since transformers' pull request 47435. vLLM and SGLang leave
//                   mscale² out where the rope fields have apply_yarn_scaling false, as Mistral's own files say it.
//   heads           keys and values have all heads, whatever num_key_value_heads says: small models' files have their class's
//                   128 there.
//   norms           q_a_layernorm and kv_a_layernorm are made without an epsilon, so they have the class's 1e-6, whatever
//                   rms_norm_eps says.
//   biases          attention_bias adds one to q_a_proj, kv_a_proj_with_mqa and o_proj, never to q_proj, q_b_proj, kv_b_proj.
//   rotated pairs   interleaved but for minicpm3; rope_interleave may say otherwise where the model's code reads it.
//   longcat_flash   queries times √(hidden / q_lora_rank), normed latents times √(hidden / kv_lora_rank).
//   mistral4        queries times 1 + β·ln(1 + ⌊position / original length⌋), as in Llama 4; YaRN where the file has no rope.
//   kimi_linear     never rotates; the R columns are still shared by all heads.

import { kindOf } from "../op/tensor.ts";
import {
  cannotRead,
  flagOr,
  flagOrNull,
  integerField,
  integerOr,
  isAbsent,
  isFields,
  type ModelConfigFile,
  positiveField,
  positiveOr,
} from "./config_fields.ts";
import {
  originalLength,
  type RopeConfig,
  ropeConfig,
  ropeFactor,
  ropeFields,
  ropeTypeOf,
  yarnMscale,
} from "./rope_config.ts";

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
  /** Epsilon of the norms around the layer, `rms_norm_eps`; the layer itself does not use it. */
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

/** What a model type's code and its configuration class add to the file. */
interface ModelCode {
  /** Where it is not read from `rope_interleave`. */
  readonly layout?: "interleaved" | "half" | "unrotated";
  /** `rope_theta`, where it is not 10,000. */
  readonly theta?: number;
  /** `rope_parameters`. */
  readonly rope?: ModelConfigFile;
  /** `rms_norm_eps`. */
  readonly rmsNormEps: number;
  /** `max_position_embeddings`. */
  readonly maxPositionEmbeddings: number;
}

const mistralRope: ModelConfigFile = {
  type: "yarn",
  rope_theta: 10_000,
  factor: 128,
  original_max_position_embeddings: 8192,
  beta_fast: 32,
  beta_slow: 1,
  mscale: 1,
  mscale_all_dim: 1,
  llama_4_scaling_beta: 0.1,
};

const modelTypes: Readonly<Record<MlaModelType, ModelCode>> = {
  deepseek_v2: { layout: "interleaved", rmsNormEps: 1e-6, maxPositionEmbeddings: 2048 },
  deepseek_v3: { rmsNormEps: 1e-6, maxPositionEmbeddings: 4096 },
  // transformers reads these with DeepSeek-V3's class.
  kimi_k2: { rmsNormEps: 1e-6, maxPositionEmbeddings: 4096 },
  glm4_moe_lite: { rmsNormEps: 1e-5, maxPositionEmbeddings: 202_752 },
  minicpm3: { layout: "half", rmsNormEps: 1e-5, maxPositionEmbeddings: 32_768 },
  mistral4: { rope: mistralRope, rmsNormEps: 1e-6, maxPositionEmbeddings: 1_048_576 },
  youtu: { rmsNormEps: 1e-6, maxPositionEmbeddings: 131_072 },
  longcat_flash: { layout: "interleaved", theta: 1e7, rmsNormEps: 1e-5, maxPositionEmbeddings: 131_072 },
  kimi_linear: { layout: "unrotated", rmsNormEps: 1e-5, maxPositionEmbeddings: 1_048_576 },
};

/**
 * Reads what a model's `config.json` says about its MLA layers.
 *
 * `model_type` decides what the fields mean; a file that wraps a language model's in `text_config` is read there. Both forms
 * of the rotary embedding are read: `rope_theta` with `rope_scaling`, and `rope_parameters`. Widths must be there; of the
 * rest, what is missing is what Hugging Face transformers' configuration class of the `model_type` assumes.
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
  if (!isKnown(config.model_type) && isFields(inner)) {
    if (isKnown(inner.model_type)) return mlaModelConfig(inner);
    // Kimi-K2.5's class takes a language model without a type for DeepSeek-V3's.
    if (config.model_type === "kimi_k25" && isAbsent(inner, "model_type")) {
      return mlaModelConfig({ ...inner, model_type: "deepseek_v3" });
    }
  }
  const modelType = modelTypeOf(config);
  const code = modelTypes[modelType];
  if (modelType === "kimi_linear") checkKimiLinear(config);

  const hiddenSize = integerField(config, "hidden_size");
  const queryHeads = integerField(config, "num_attention_heads");
  const qLoraRank = config.q_lora_rank === null ? null : integerField(config, "q_lora_rank");
  const kvLoraRank = integerField(config, "kv_lora_rank");
  const qkNopeHeadDim = integerField(config, "qk_nope_head_dim");
  const qkRopeHeadDim = integerField(config, "qk_rope_head_dim", 0);
  if (qkRopeHeadDim % 2 !== 0) cannotRead(`qk_rope_head_dim must be even, got ${qkRopeHeadDim}`);
  const maxPositionEmbeddings = integerOr(config, "max_position_embeddings", null) ??
    (modelType === "kimi_linear" ? integerOr(config, "model_max_length", null) : null) ?? code.maxPositionEmbeddings;
  const { theta = 10_000, rope: fields } = code;
  const rope = code.layout === "unrotated" ? {} : ropeFields(config, { maxPositionEmbeddings, theta, fields });
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
    rmsNormEps: positiveOr(config, "rms_norm_eps", code.rmsNormEps),
    attentionBias: flagOr(config, "attention_bias", false),
    softmaxScale: softmaxScale(rope, qkNopeHeadDim + qkRopeHeadDim, maxPositionEmbeddings),
    rope: rotation(config, rope, modelType, qkRopeHeadDim, maxPositionEmbeddings),
    queryScale: longCat && flagOr(config, "mla_scale_q_lora", true) ? Math.sqrt(hiddenSize / qLoraRank!) : 1,
    latentScale: longCat && flagOr(config, "mla_scale_kv_lora", true) ? Math.sqrt(hiddenSize / kvLoraRank) : 1,
    queryTemperature: modelType === "mistral4" ? temperature(rope) : null,
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

function softmaxScale(rope: ModelConfigFile, width: number, maxLength: number): number {
  const scale = 1 / Math.sqrt(width);
  const weight = rope.mscale_all_dim;
  if (ropeTypeOf(rope) === "default" || typeof weight !== "number") return scale;
  if (!flagOr(rope, "apply_yarn_scaling", true)) return scale;
  return scale * (weight === 0 ? 1 : yarnMscale(ropeFactor(rope, maxLength), weight) ** 2);
}

function rotation(
  config: ModelConfigFile,
  rope: ModelConfigFile,
  modelType: MlaModelType,
  dim: number,
  maxLength: number,
): RopeConfig | null {
  const { layout: fixed } = modelTypes[modelType];
  if (dim === 0 || fixed === "unrotated") return null;
  const part = rope.partial_rotary_factor ?? config.partial_rotary_factor ?? 1;
  if (part !== 1 && readsRotatedPart(rope, modelType)) {
    cannotRead(`partial_rotary_factor must be 1, got ${kindOf(part)}`);
  }
  const layout = fixed ?? (flagOrNull(config, "rope_interleave", true) ? "interleaved" : "half");
  return ropeConfig(rope, dim, layout, maxLength);
}

/**
 * Whether a `partial_rotary_factor` would leave some of the R columns unrotated, for which the models' code has no use. Mistral's
 * is R / (P + R), since its head_dim is P + R; and where nothing is stretched, only GLM's code looks at it.
 */
function readsRotatedPart(rope: ModelConfigFile, modelType: MlaModelType): boolean {
  if (modelType === "mistral4") return false;
  return modelType === "glm4_moe_lite" || ropeTypeOf(rope) !== "default";
}

function temperature(rope: ModelConfigFile): QueryTemperature | null {
  if (isAbsent(rope, "llama_4_scaling_beta") || rope.llama_4_scaling_beta === 0) return null;
  return { beta: positiveField(rope, "llama_4_scaling_beta", "rope "), length: originalLength(rope) };
}
