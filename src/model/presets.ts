// Known models: what their config.json says about attention, as `mlaModelConfig` takes it.
//
// Each fragment holds the fields that decide how the layer computes; `source` is where the model's own file lies. The numbers
// come from copies of these files (DeepSeek, Kimi-K2), from Hugging Face transformers' configuration classes, whose defaults are
// the checkpoint's (MiniCPM3, GLM, LongCat, Youtu, Kimi-Linear, Mistral), and from NVIDIA's Megatron Bridge (Moonlight).

import type { ModelConfigFile } from "./config_fields.ts";

/** A known model. */
export interface ModelPreset {
  /** Its name. */
  readonly name: string;
  /** Address of its `config.json`. */
  readonly source: string;
  /** What that file says about attention. */
  readonly config: ModelConfigFile;
}

/** Names of {@link presets}. */
export type PresetName =
  | "deepseekV2"
  | "deepseekV2Lite"
  | "deepseekV3"
  | "kimiK2"
  | "moonlight"
  | "miniCpm3"
  | "glm47Flash"
  | "longCatFlash"
  | "youtuLlm"
  | "kimiLinear"
  | "mistralSmall4";

/** The heads of DeepSeek-V2, which most of the others have. */
const deepseekHeads = { kv_lora_rank: 512, qk_nope_head_dim: 128, qk_rope_head_dim: 64, v_head_dim: 128 };

/** YaRN as DeepSeek has it, from 4,096 tokens on. */
function yarn(factor: number, mscale: number, betaFast: number): ModelConfigFile {
  return {
    type: "yarn",
    factor,
    original_max_position_embeddings: 4096,
    beta_fast: betaFast,
    beta_slow: 1,
    mscale,
    mscale_all_dim: mscale,
  };
}

/** MiniCPM3's file has the same divisors for short and for long sequences. */
const miniCpmFactors = [
  1.0591234137867171,
  1.1241891283591912,
  1.2596935748670968,
  1.5380380402321725,
  2.093982484148734,
  3.1446935121267696,
  4.937952647693647,
  7.524541999994549,
  10.475458000005451,
  13.062047352306353,
  14.85530648787323,
  15.906017515851266,
  16.461961959767827,
  16.740306425132907,
  16.87581087164081,
  16.940876586213285,
];

/**
 * Known models, as fragments of their `config.json`.
 *
 * DeepSeek-R1 has the attention of DeepSeek-V3.
 *
 * @example
 * ```ts
 * import { mlaModelConfig, presets } from "@flash-mla/webgpu";
 *
 * const { queryHeads, kvLoraRank, qLoraRank } = mlaModelConfig(presets.deepseekV2Lite.config);
 * console.log(queryHeads, kvLoraRank, qLoraRank); // 16 512 null
 * ```
 */
export const presets: Readonly<Record<PresetName, ModelPreset>> = {
  deepseekV2: {
    name: "DeepSeek-V2",
    source: "https://huggingface.co/deepseek-ai/DeepSeek-V2/blob/main/config.json",
    config: {
      model_type: "deepseek_v2",
      hidden_size: 5120,
      num_attention_heads: 128,
      q_lora_rank: 1536,
      ...deepseekHeads,
      rms_norm_eps: 1e-6,
      attention_bias: false,
      max_position_embeddings: 163840,
      rope_theta: 10000,
      rope_scaling: yarn(40, 0.707, 32),
    },
  },
  deepseekV2Lite: {
    name: "DeepSeek-V2-Lite",
    source: "https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite/blob/main/config.json",
    config: {
      model_type: "deepseek_v2",
      hidden_size: 2048,
      num_attention_heads: 16,
      q_lora_rank: null,
      ...deepseekHeads,
      rms_norm_eps: 1e-6,
      attention_bias: false,
      max_position_embeddings: 163840,
      rope_theta: 10000,
      rope_scaling: yarn(40, 0.707, 32),
    },
  },
  deepseekV3: {
    name: "DeepSeek-V3",
    source: "https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json",
    config: {
      model_type: "deepseek_v3",
      hidden_size: 7168,
      num_attention_heads: 128,
      q_lora_rank: 1536,
      ...deepseekHeads,
      rms_norm_eps: 1e-6,
      attention_bias: false,
      max_position_embeddings: 163840,
      rope_theta: 10000,
      rope_scaling: yarn(40, 1, 32),
    },
  },
  kimiK2: {
    name: "Kimi-K2-Instruct",
    source: "https://huggingface.co/moonshotai/Kimi-K2-Instruct/blob/main/config.json",
    config: {
      model_type: "kimi_k2",
      hidden_size: 7168,
      num_attention_heads: 64,
      q_lora_rank: 1536,
      ...deepseekHeads,
      rms_norm_eps: 1e-6,
      attention_bias: false,
      max_position_embeddings: 131072,
      rope_theta: 50000,
      rope_scaling: yarn(32, 1, 1),
    },
  },
  moonlight: {
    name: "Moonlight-16B-A3B",
    source: "https://huggingface.co/moonshotai/Moonlight-16B-A3B/blob/main/config.json",
    config: {
      model_type: "deepseek_v3",
      hidden_size: 2048,
      num_attention_heads: 16,
      q_lora_rank: null,
      ...deepseekHeads,
      rms_norm_eps: 1e-5,
      max_position_embeddings: 8192,
      rope_theta: 50000,
      rope_scaling: null,
    },
  },
  miniCpm3: {
    name: "MiniCPM3-4B",
    source: "https://huggingface.co/openbmb/MiniCPM3-4B/blob/main/config.json",
    config: {
      model_type: "minicpm3",
      hidden_size: 2560,
      num_attention_heads: 40,
      q_lora_rank: 768,
      kv_lora_rank: 256,
      qk_nope_head_dim: 64,
      qk_rope_head_dim: 32,
      rms_norm_eps: 1e-5,
      attention_bias: false,
      max_position_embeddings: 32768,
      rope_scaling: {
        type: "longrope",
        original_max_position_embeddings: 32768,
        short_factor: miniCpmFactors,
        long_factor: miniCpmFactors,
      },
    },
  },
  glm47Flash: {
    name: "GLM-4.7-Flash",
    source: "https://huggingface.co/zai-org/GLM-4.7-Flash/blob/main/config.json",
    config: {
      model_type: "glm4_moe_lite",
      hidden_size: 2048,
      num_attention_heads: 20,
      q_lora_rank: 768,
      kv_lora_rank: 512,
      qk_nope_head_dim: 192,
      qk_rope_head_dim: 64,
      v_head_dim: 256,
      rms_norm_eps: 1e-5,
      attention_bias: false,
      max_position_embeddings: 202752,
      rope_theta: 1000000,
      rope_scaling: null,
      partial_rotary_factor: 1,
    },
  },
  longCatFlash: {
    name: "LongCat-Flash-Chat",
    source: "https://huggingface.co/meituan-longcat/LongCat-Flash-Chat/blob/main/config.json",
    config: {
      model_type: "longcat_flash",
      hidden_size: 6144,
      num_attention_heads: 64,
      q_lora_rank: 1536,
      ...deepseekHeads,
      rms_norm_eps: 1e-5,
      attention_bias: false,
      max_position_embeddings: 131072,
      rope_theta: 10000000,
      mla_scale_q_lora: true,
      mla_scale_kv_lora: true,
    },
  },
  youtuLlm: {
    name: "Youtu-LLM-2B",
    source: "https://huggingface.co/tencent/Youtu-LLM-2B/blob/main/config.json",
    config: {
      model_type: "youtu",
      hidden_size: 2048,
      num_attention_heads: 16,
      q_lora_rank: 1536,
      ...deepseekHeads,
      rms_norm_eps: 1e-6,
      attention_bias: false,
      max_position_embeddings: 131072,
      rope_interleave: true,
      rope_parameters: { rope_type: "default", rope_theta: 1600000 },
    },
  },
  kimiLinear: {
    name: "Kimi-Linear-48B-A3B",
    source: "https://huggingface.co/moonshotai/Kimi-Linear-48B-A3B-Instruct/blob/main/config.json",
    config: {
      model_type: "kimi_linear",
      hidden_size: 2304,
      num_attention_heads: 32,
      q_lora_rank: null,
      ...deepseekHeads,
      mla_use_nope: true,
      rms_norm_eps: 1e-5,
      model_max_length: 1048576,
    },
  },
  // mscale_all_dim makes transformers, since its pull request 47435, multiply the softmax scale by 2.2. SGLang (pull request
  // 26203) found that wrong for this checkpoint, whose params.json has apply_scale false; `apply_yarn_scaling: false` among
  // the rope_parameters says so here too.
  mistralSmall4: {
    name: "Mistral-Small-4-119B",
    source: "https://huggingface.co/mistralai/Mistral-Small-4-119B-2603/blob/main/config.json",
    config: {
      model_type: "mistral4",
      hidden_size: 4096,
      num_attention_heads: 32,
      q_lora_rank: 1024,
      kv_lora_rank: 256,
      qk_nope_head_dim: 64,
      qk_rope_head_dim: 64,
      v_head_dim: 128,
      rms_norm_eps: 1e-6,
      attention_bias: false,
      max_position_embeddings: 1048576,
      rope_interleave: true,
      rope_parameters: {
        type: "yarn",
        rope_theta: 10000,
        factor: 128,
        original_max_position_embeddings: 8192,
        beta_fast: 32,
        beta_slow: 1,
        mscale: 1,
        mscale_all_dim: 1,
        llama_4_scaling_beta: 0.1,
        partial_rotary_factor: 0.5,
      },
    },
  },
};
