// A checkpoint of one small attention layer with random weights, as Hugging Face has them: config.json and model.safetensors.

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { Random } from "../train/random.ts";
import { toSafetensors } from "../train/safetensors.ts";

/** DeepSeek-V3's layer, made small: YaRN, a low rank for queries, 8 heads. */
const config = {
  model_type: "deepseek_v3",
  hidden_size: 256,
  num_attention_heads: 8,
  q_lora_rank: 96,
  kv_lora_rank: 64,
  qk_nope_head_dim: 32,
  qk_rope_head_dim: 16,
  v_head_dim: 32,
  rms_norm_eps: 1e-6,
  attention_bias: false,
  max_position_embeddings: 4096,
  rope_theta: 10000,
  rope_scaling: {
    type: "yarn",
    factor: 4,
    original_max_position_embeddings: 1024,
    beta_fast: 32,
    beta_slow: 1,
    mscale: 1,
    mscale_all_dim: 1,
  },
};

/**
 * Writes it into a folder.
 *
 * @param folder The folder, which is there.
 * @param seed Decides the weights.
 */
export function writeSmallCheckpoint(folder: string, seed: number): void {
  const random = new Random(seed);
  const { hidden_size, num_attention_heads: heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim, v_head_dim } = config;
  const headDim = qk_nope_head_dim + config.qk_rope_head_dim;
  const matrix = (rows: number, columns: number) => ({
    data: Float32Array.from({ length: rows * columns }, () => random.normal() / Math.sqrt(columns)),
    shape: [rows, columns],
  });
  const norm = (width: number) => ({
    data: Float32Array.from({ length: width }, () => 1 + random.normal() / 10),
    shape: [width],
  });
  const layer = {
    "q_a_proj.weight": matrix(q_lora_rank, hidden_size),
    "q_a_layernorm.weight": norm(q_lora_rank),
    "q_b_proj.weight": matrix(heads * headDim, q_lora_rank),
    "kv_a_proj_with_mqa.weight": matrix(kv_lora_rank + config.qk_rope_head_dim, hidden_size),
    "kv_a_layernorm.weight": norm(kv_lora_rank),
    "kv_b_proj.weight": matrix(heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank),
    "o_proj.weight": matrix(hidden_size, heads * v_head_dim),
  };
  const tensors = new Map(Object.entries(layer).map(([name, tensor]) => [`model.layers.0.self_attn.${name}`, tensor]));
  writeFileSync(join(folder, "config.json"), JSON.stringify(config, null, 2));
  writeFileSync(join(folder, "model.safetensors"), toSafetensors({ metadata: { format: "pt" }, tensors }));
}
