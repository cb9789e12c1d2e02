// A small random layer of each model type, and the layer written out once more: with keys and values of every head, whole
// score matrices, and rotated columns reordered as the models' code does it.

import type { MlaModelConfig } from "../../src/model/attention_config.ts";
import { inverseFrequencies } from "../../src/model/rotary.ts";
import { elementCount, type Tensor } from "../../src/op/tensor.ts";
import { normals } from "./random_problem.ts";

/** What is common to the small configs. */
const common = {
  hidden_size: 24,
  num_attention_heads: 3,
  q_lora_rank: 10,
  kv_lora_rank: 12,
  qk_nope_head_dim: 6,
  qk_rope_head_dim: 4,
  v_head_dim: 5,
  rms_norm_eps: 1e-3,
  max_position_embeddings: 64,
};

/** YaRN that stretches the second pair and not the first. */
const yarn = { type: "yarn", factor: 8, original_max_position_embeddings: 16, mscale: 0.7, mscale_all_dim: 1.2 };

/** Small configs that between them have everything that a layer can have. */
export const smallConfigs: Readonly<Record<string, Readonly<Record<string, unknown>>>> = {
  "deepseek_v2, one projection, biases": {
    ...common,
    model_type: "deepseek_v2",
    q_lora_rank: null,
    attention_bias: true,
  },
  "deepseek_v2, yarn": { ...common, model_type: "deepseek_v2", rope_scaling: yarn },
  "deepseek_v3, halves, biases": { ...common, model_type: "deepseek_v3", rope_interleave: false, attention_bias: true },
  "deepseek_v3, linear": { ...common, model_type: "deepseek_v3", rope_scaling: { rope_type: "linear", factor: 3 } },
  "deepseek_v3, no rotated part": { ...common, model_type: "deepseek_v3", qk_rope_head_dim: 0 },
  kimi_k2: { ...common, model_type: "kimi_k2", rope_theta: 50000, rope_scaling: { ...yarn, beta_fast: 1 } },
  glm4_moe_lite: { ...common, model_type: "glm4_moe_lite", rope_parameters: { rope_type: "default", rope_theta: 100 } },
  minicpm3: {
    ...common,
    model_type: "minicpm3",
    v_head_dim: undefined,
    rope_scaling: {
      type: "longrope",
      factor: 4,
      original_max_position_embeddings: 64,
      short_factor: [1.1, 2.5],
      long_factor: [9, 9],
    },
  },
  mistral4: {
    ...common,
    model_type: "mistral4",
    rope_parameters: { ...yarn, original_max_position_embeddings: 3, llama_4_scaling_beta: 0.5 },
  },
  youtu: { ...common, model_type: "youtu", rope_parameters: { rope_type: "default", rope_theta: 500 } },
  longcat_flash: { ...common, model_type: "longcat_flash" },
  kimi_linear: { ...common, model_type: "kimi_linear", q_lora_rank: null, attention_bias: true },
};

/** Random weights of a layer, by the names of a checkpoint. */
export function randomWeights(config: MlaModelConfig, seed: number): Record<string, Tensor> {
  const { hiddenSize, queryHeads: H, qLoraRank, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } =
    config;
  const random = normals(seed);
  const drawn = (...shape: number[]) => {
    const scale = shape.length === 2 ? 1 / Math.sqrt(shape[1]) : 1;
    return { data: Float32Array.from({ length: elementCount(shape) }, () => random() * scale), shape };
  };
  const weights: Record<string, Tensor> = qLoraRank === null ? { "q_proj.weight": drawn(H * (P + R), hiddenSize) } : {
    "q_a_proj.weight": drawn(qLoraRank, hiddenSize),
    "q_a_layernorm.weight": drawn(qLoraRank),
    "q_b_proj.weight": drawn(H * (P + R), qLoraRank),
  };
  weights["kv_a_proj_with_mqa.weight"] = drawn(L + R, hiddenSize);
  weights["kv_a_layernorm.weight"] = drawn(L);
  weights["kv_b_proj.weight"] = drawn(H * (P + V), L);
  weights["o_proj.weight"] = drawn(hiddenSize, H * V);
  if (config.attentionBias) {
    if (qLoraRank !== null) weights["q_a_proj.bias"] = drawn(qLoraRank);
    weights["kv_a_proj_with_mqa.bias"] = drawn(L + R);
    weights["o_proj.bias"] = drawn(hiddenSize);
  }
  return weights;
}

/** The layer over one sequence from position 0 on, `[tokens, hiddenSize]`, in double precision but for the angles. */
export function plainLayer(x: number[][], weights: Record<string, Tensor>, config: MlaModelConfig): number[][] {
  const { queryHeads: H, qLoraRank, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = config;
  const times = (row: number[], name: string) => {
    const { data, shape: [to, from] } = weights[`${name}.weight`];
    const bias = weights[`${name}.bias`]?.data;
    return Array.from(
      { length: to },
      (_, o) => row.reduce((sum, value, i) => sum + value * data[o * from + i], bias?.[o] ?? 0),
    );
  };
  const norm = (row: number[], name: string) => {
    const mean = row.reduce((sum, value) => sum + value * value, 0) / row.length;
    return row.map((value, i) => value / Math.sqrt(mean + 1e-6) * weights[`${name}.weight`].data[i]);
  };
  const frequencies = config.rope === null ? null : inverseFrequencies(config.rope, x.length);
  const turn = (row: number[], position: number) => {
    if (frequencies === null || config.rope === null) return row;
    const { layout, attentionFactor } = config.rope;
    const even = row.filter((_, i) => layout === "half" ? i < R / 2 : i % 2 === 0);
    const odd = row.filter((_, i) => layout === "half" ? i >= R / 2 : i % 2 === 1);
    // As models round it.
    const angle = (i: number) => Math.fround(position * frequencies[i]);
    return [
      ...even.map((value, i) => attentionFactor * (value * Math.cos(angle(i)) - odd[i] * Math.sin(angle(i)))),
      ...odd.map((value, i) => attentionFactor * (value * Math.cos(angle(i)) + even[i] * Math.sin(angle(i)))),
    ];
  };
  const queries = x.map((row, position) => {
    const all = qLoraRank === null
      ? times(row, "q_proj")
      : times(norm(times(row, "q_a_proj"), "q_a_layernorm"), "q_b_proj");
    const { beta, length } = config.queryTemperature ?? { beta: 0, length: 1 };
    const factor = config.queryScale * (1 + beta * Math.log(1 + Math.floor(position / length)));
    return Array.from({ length: H }, (_, h) => {
      const head = all.slice(h * (P + R), (h + 1) * (P + R)).map((value) => value * factor);
      return [...head.slice(0, P), ...turn(head.slice(P), position)];
    });
  });
  const keys = x.map((row, position) => {
    const all = times(row, "kv_a_proj_with_mqa");
    const latent = norm(all.slice(0, L), "kv_a_layernorm").map((value) => value * config.latentScale);
    const expanded = times(latent, "kv_b_proj");
    const shared = turn(all.slice(L), position);
    return Array.from({ length: H }, (_, h) => {
      const head = expanded.slice(h * (P + V), (h + 1) * (P + V));
      return { key: [...head.slice(0, P), ...shared], value: head.slice(P) };
    });
  });
  return queries.map((heads, i) => {
    const attended = heads.flatMap((query, h) => {
      const seen = keys.slice(0, i + 1).map((row) => row[h]);
      const scores = seen.map(({ key }) =>
        config.softmaxScale * query.reduce((sum, value, d) => sum + value * key[d], 0)
      );
      const most = Math.max(...scores);
      const exponentials = scores.map((score) => Math.exp(score - most));
      const sum = exponentials.reduce((a, b) => a + b);
      return Array.from(
        { length: V },
        (_, v) => seen.reduce((all, { value }, j) => all + exponentials[j] / sum * value[v], 0),
      );
    });
    return times(attended, "o_proj");
  });
}
