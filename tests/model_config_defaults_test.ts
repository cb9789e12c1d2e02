// What config.json files leave out or write in odd ways, read as Hugging Face transformers' configuration classes and modeling
// code (5.18) read it.

import { describe, test } from "node:test";
import { assertAlmostEquals, assertEquals } from "@std/assert";
import { mlaModelConfig, presets } from "../mod.ts";

type Fields = Readonly<Record<string, unknown>>;

const v3 = presets.deepseekV3.config;
const mistral = presets.mistralSmall4.config;
const mistralRope = mistral.rope_parameters as Fields;
const yarn: Fields = { rope_type: "yarn", rope_theta: 10000, factor: 40, original_max_position_embeddings: 4096 };
/** The rotary embedding of DeepSeek-V3 with other fields. */
const ropeOf = (rope_scaling: unknown, fields: Fields = {}) => mlaModelConfig({ ...v3, rope_scaling, ...fields }).rope!;

describe("mlaModelConfig() without a field takes the class's", () => {
  const expected: Readonly<Record<string, [epsilon: number, length: number]>> = {
    deepseek_v2: [1e-6, 2048],
    deepseek_v3: [1e-6, 4096],
    kimi_k2: [1e-6, 4096],
    glm4_moe_lite: [1e-5, 202752],
    minicpm3: [1e-5, 32768],
    mistral4: [1e-6, 1048576],
    youtu: [1e-6, 131072],
    longcat_flash: [1e-5, 131072],
    kimi_linear: [1e-5, 1048576],
  };
  for (const [model_type, [epsilon, length]] of Object.entries(expected)) {
    test(`rms_norm_eps and max_position_embeddings of ${model_type}`, () => {
      for (const absent of [undefined, null]) {
        const file = { ...v3, model_type, rms_norm_eps: absent, max_position_embeddings: absent, rope_scaling: null };
        const { rmsNormEps, maxPositionEmbeddings, rope, latentNormEps } = mlaModelConfig(file);
        assertEquals([rmsNormEps, maxPositionEmbeddings, latentNormEps], [epsilon, length, 1e-6]);
        assertEquals(rope?.maxPositionEmbeddings, model_type === "kimi_linear" ? undefined : length);
      }
    });
  }

  test("all rope fields of mistral4: YaRN from 8,192 tokens on", () => {
    const expected = mlaModelConfig(mistral);
    for (const rope_parameters of [undefined, null, {}]) {
      assertEquals(mlaModelConfig({ ...mistral, rope_parameters }), expected);
      assertEquals(mlaModelConfig({ ...mistral, rope_parameters, rope_scaling: null, rope_theta: 5 }), expected);
    }
    const bare = mlaModelConfig({ ...mistral, rope_parameters: undefined, rope_scaling: { type: "default" } });
    assertEquals([bare.rope?.type, bare.queryTemperature], ["default", null]);
  });

  test("the length of pretraining is that of the model, in mistral4's query temperature too", () => {
    const { original_max_position_embeddings: _, ...rope_parameters } = mistralRope;
    const { rope, queryTemperature } = mlaModelConfig({ ...mistral, rope_parameters, max_position_embeddings: 500 });
    assertEquals([rope?.originalMaxPositionEmbeddings, queryTemperature], [500, { beta: 0.1, length: 500 }]);
  });

  test("kimi_linear may call its length model_max_length", () => {
    const file = { ...presets.kimiLinear.config, model_max_length: 512 };
    assertEquals(mlaModelConfig(file).maxPositionEmbeddings, 512);
    assertEquals(mlaModelConfig({ ...file, max_position_embeddings: 256 }).maxPositionEmbeddings, 256);
    assertEquals(mlaModelConfig({ ...v3, model_max_length: 512 }).maxPositionEmbeddings, 163840);
  });

  test("the type of Kimi-K2.5's language model is DeepSeek-V3's", () => {
    for (const model_type of [undefined, null]) {
      const file = { model_type: "kimi_k25", text_config: { ...v3, model_type } };
      assertEquals(mlaModelConfig(file), mlaModelConfig(v3));
    }
  });
});

describe("mlaModelConfig() reads as the models' code does", () => {
  test("num_key_value_heads is not read: keys have all heads", () => {
    for (const num_key_value_heads of [1, 8, 128, 999, null, "none"]) {
      assertEquals(mlaModelConfig({ ...v3, num_key_value_heads }), mlaModelConfig(v3));
    }
  });

  test("rope_interleave null is false", () => {
    const layout = (rope_interleave: unknown) => mlaModelConfig({ ...v3, rope_interleave }).rope?.layout;
    assertEquals([undefined, null, false, true].map(layout), ["interleaved", "half", "half", "interleaved"]);
    const fixed = mlaModelConfig({ ...v3, model_type: "deepseek_v2", rope_interleave: null });
    assertEquals(fixed.rope?.layout, "interleaved");
  });

  test("the length of pretraining beside the fields goes before theirs", () => {
    const beside = { original_max_position_embeddings: 1000 };
    assertEquals(ropeOf(yarn, beside).originalMaxPositionEmbeddings, 1000);
    assertEquals(ropeOf(yarn, { original_max_position_embeddings: null }).originalMaxPositionEmbeddings, 4096);
    const { factor: _, ...stretched } = yarn;
    assertEquals(ropeOf(stretched, beside).factor, 163.84);
    const divisors = Array(32).fill(2);
    const longrope = { ...yarn, rope_type: "longrope", short_factor: divisors, long_factor: divisors };
    assertEquals(ropeOf(longrope, beside).originalMaxPositionEmbeddings, 1000);
    assertAlmostEquals(
      ropeOf(longrope, beside).attentionFactor,
      Math.sqrt(1 + Math.log(40) / Math.log(1000)),
      1e-15,
    );
    assertEquals(mlaModelConfig({ ...mistral, ...beside }).queryTemperature?.length, 1000);
  });

  test("empty rope_scaling is as none", () => {
    for (const rope_scaling of [{}, null, undefined]) {
      assertEquals(ropeOf(rope_scaling, { rope_parameters: yarn }), ropeOf(yarn));
      assertEquals(ropeOf(rope_scaling, { rope_parameters: {} }), ropeOf({ rope_type: "default" }));
    }
    assertEquals(ropeOf(yarn, { rope_parameters: { rope_type: "linear", factor: 2 } }).type, "yarn");
  });

  test("kimi_linear has the biases that attention_bias says", () => {
    const biased = (attention_bias?: unknown) =>
      mlaModelConfig({ ...presets.kimiLinear.config, attention_bias }).attentionBias;
    assertEquals([biased(), biased(false), biased(true)], [false, false, true]);
  });

  test("partial_rotary_factor is not read where nothing is stretched, but for GLM", () => {
    for (const model_type of ["deepseek_v2", "deepseek_v3", "kimi_k2", "youtu", "minicpm3", "longcat_flash"]) {
      const file = { ...v3, model_type, rope_scaling: null };
      const expected = mlaModelConfig(file);
      assertEquals(mlaModelConfig({ ...file, partial_rotary_factor: 0.5 }), expected);
      const rope_parameters = { rope_type: "default", rope_theta: 10000, partial_rotary_factor: 0.25 };
      assertEquals(mlaModelConfig({ ...file, rope_parameters }), expected);
    }
  });

  test("YaRN's bounds of 0 or null are the paper's, and truncate null is false", () => {
    for (const none of [0, null, undefined]) {
      const { betaFast, betaSlow } = ropeOf({ ...yarn, beta_fast: none, beta_slow: none });
      assertEquals([betaFast, betaSlow], [32, 1]);
    }
    const truncate = (value?: unknown) => ropeOf({ ...yarn, truncate: value }).truncate;
    assertEquals([truncate(), truncate(null), truncate(false), truncate(true)], [true, false, false, true]);
  });
});
