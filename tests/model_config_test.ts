// What config.json files become, preset by preset, and what is refused.

import { describe as suite, test } from "node:test";
import { assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import { describe, FlashMLAError, mlaModelConfig, type PresetName, presets } from "../mod.ts";

const v3 = presets.deepseekV3.config;

suite("presets", () => {
  // H, q_lora_rank, L, P, R, V.
  const widths: Readonly<Record<PresetName, readonly (number | null)[]>> = {
    deepseekV2: [128, 1536, 512, 128, 64, 128],
    deepseekV2Lite: [16, null, 512, 128, 64, 128],
    deepseekV3: [128, 1536, 512, 128, 64, 128],
    kimiK2: [64, 1536, 512, 128, 64, 128],
    moonlight: [16, null, 512, 128, 64, 128],
    miniCpm3: [40, 768, 256, 64, 32, 64],
    glm47Flash: [20, 768, 512, 192, 64, 256],
    longCatFlash: [64, 1536, 512, 128, 64, 128],
    youtuLlm: [16, 1536, 512, 128, 64, 128],
    kimiLinear: [32, null, 512, 128, 64, 128],
    mistralSmall4: [32, 1024, 256, 64, 64, 128],
  };
  for (const [name, expected] of Object.entries(widths) as [PresetName, (number | null)[]][]) {
    test(`${name} parses`, () => {
      const config = mlaModelConfig(presets[name].config);
      const { queryHeads, qLoraRank, kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim } = config;
      assertEquals([queryHeads, qLoraRank, kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim], expected);
      assertEquals([config.latentNormEps, config.attentionBias], [1e-6, false]);
      assertEquals(presets[name].source.endsWith("/config.json"), true);
    });
  }

  test("are all of them", () => assertEquals(Object.keys(presets).sort(), Object.keys(widths).sort()));

  test("have the softmax scales of the models' code", () => {
    const scale = (name: PresetName) => mlaModelConfig(presets[name].config).softmaxScale;
    const mscale = (factor: number, weight: number) => (0.1 * weight * Math.log(factor) + 1) ** 2;
    assertAlmostEquals(scale("deepseekV3"), 0.1352337788608801, 1e-15);
    assertAlmostEquals(scale("deepseekV2"), mscale(40, 0.707) / Math.sqrt(192), 1e-15);
    assertAlmostEquals(scale("kimiK2"), mscale(32, 1) / Math.sqrt(192), 1e-15);
    assertAlmostEquals(scale("mistralSmall4"), 0.194969494733, 1e-12);
    for (const name of ["moonlight", "longCatFlash", "youtuLlm", "kimiLinear"] as const) {
      assertAlmostEquals(scale(name), 1 / Math.sqrt(192), 1e-15);
    }
    assertAlmostEquals(scale("miniCpm3"), 1 / Math.sqrt(96), 1e-15);
    assertAlmostEquals(scale("glm47Flash"), 1 / 16, 1e-15);
  });

  test("have the layouts and factors of the models' code", () => {
    const layout = (name: PresetName) => mlaModelConfig(presets[name].config).rope?.layout;
    assertEquals([layout("deepseekV2"), layout("deepseekV3"), layout("longCatFlash")], Array(3).fill("interleaved"));
    assertEquals([layout("miniCpm3"), layout("kimiLinear")], ["half", undefined]);
    const { queryScale, latentScale } = mlaModelConfig(presets.longCatFlash.config);
    assertAlmostEquals(queryScale, 2, 1e-15);
    assertAlmostEquals(latentScale, Math.sqrt(12), 1e-15);
    assertEquals(mlaModelConfig(v3).queryScale, 1);
    assertEquals(mlaModelConfig(presets.mistralSmall4.config).queryTemperature, { beta: 0.1, length: 8192 });
    assertEquals(mlaModelConfig(presets.kimiLinear.config).maxPositionEmbeddings, 1048576);
    assertEquals(mlaModelConfig(presets.miniCpm3.config).rope?.attentionFactor, 1);
  });
});

suite("mlaModelConfig()", () => {
  test("reads the old and the new form of the rotary embedding alike", () => {
    const { rope_scaling, rope_theta, ...rest } = v3;
    const { type, ...fields } = rope_scaling as Record<string, unknown>;
    const expected = mlaModelConfig(v3);
    assertEquals(mlaModelConfig({ ...rest, rope_parameters: { ...fields, rope_type: type, rope_theta } }), expected);
    assertEquals(mlaModelConfig({ ...rest, rope_theta, rope_parameters: { ...fields, type } }), expected);
  });

  test("reads what is wrapped in text_config", () => {
    assertEquals(mlaModelConfig({ model_type: "kimi_k25", text_config: v3 }), mlaModelConfig(v3));
  });

  test("assumes what the models' code assumes", () => {
    const { rope_scaling: _, rope_theta: __, attention_bias: ___, ...bare } = v3;
    const { rope, attentionBias, softmaxScale } = mlaModelConfig(bare);
    assertEquals([rope?.type, rope?.theta, rope?.layout, attentionBias], ["default", 10000, "interleaved", false]);
    assertAlmostEquals(softmaxScale, 1 / Math.sqrt(192), 1e-15);
    assertEquals(mlaModelConfig({ ...v3, model_type: "longcat_flash", rope_theta: undefined }).rope?.theta, 1e7);
    assertEquals(mlaModelConfig({ ...v3, rope_interleave: false }).rope?.layout, "half");
    assertEquals(
      mlaModelConfig({ ...v3, model_type: "deepseek_v2", rope_interleave: false }).rope?.layout,
      "interleaved",
    );
    const kimi = mlaModelConfig({ ...presets.kimiLinear.config, rope_scaling: v3.rope_scaling });
    assertEquals([kimi.rope, kimi.attentionBias, kimi.softmaxScale], [null, false, 1 / Math.sqrt(192)]);
  });

  test("leaves mscale out of the softmax where the file says so", () => {
    const mistral = presets.mistralSmall4.config;
    const fields = { ...(mistral.rope_parameters as Record<string, unknown>), apply_yarn_scaling: false };
    assertEquals(mlaModelConfig({ ...mistral, rope_parameters: fields }).softmaxScale, 1 / Math.sqrt(128));
  });

  test("rotates nothing where there is nothing to rotate", () => {
    const { rope, qkRopeHeadDim, softmaxScale } = mlaModelConfig({ ...v3, qk_rope_head_dim: 0, rope_scaling: null });
    assertEquals([rope, qkRopeHeadDim, softmaxScale], [null, 0, 1 / Math.sqrt(128)]);
  });

  const refused: Readonly<Record<string, [Record<string, unknown>, string]>> = {
    "another model": [
      { ...v3, model_type: "llama" },
      'model_type "llama" is not known; supported: deepseek_v2, deepseek_v3, kimi_k2, glm4_moe_lite, minicpm3, mistral4, ' +
      'youtu, longcat_flash, kimi_linear. If its attention is DeepSeek-V3\'s, pass model_type "deepseek_v3"; assumed are then',
    ],
    "no model_type": [{ ...v3, model_type: undefined }, "model_type is missing; supported: deepseek_v2, "],
    "a missing width": [{ ...v3, kv_lora_rank: undefined }, "kv_lora_rank is missing; expected a whole number from 1"],
    "a missing rank of the query": [{ ...v3, q_lora_rank: undefined }, "q_lora_rank is missing"],
    "a width of 0": [{ ...v3, v_head_dim: 0 }, "v_head_dim must be a whole number from 1, got 0"],
    "half a head": [{ ...v3, num_attention_heads: 1.5 }, "num_attention_heads must be a whole number from 1, got 1.5"],
    "a negative rotated width": [
      { ...v3, qk_rope_head_dim: -2 },
      "qk_rope_head_dim must be a whole number from 0, got -2",
    ],
    "an odd rotated width": [{ ...v3, qk_rope_head_dim: 3 }, "qk_rope_head_dim must be even, got 3"],
    "an epsilon in words": [{ ...v3, rms_norm_eps: "1e-6" }, 'rms_norm_eps must be a number above 0, got "1e-6"'],
    "a bias in words": [{ ...v3, attention_bias: "no" }, 'attention_bias must be true or false, got "no"'],
    "another rope type": [
      { ...v3, rope_scaling: { type: "llama3" } },
      'rope type "llama3" is not known; supported: default, linear, dynamic, yarn, longrope',
    ],
    "rope that is no object": [{ ...v3, rope_scaling: 4 }, "rope_scaling must be an object, got 4"],
    "linear without a factor": [
      { ...v3, rope_scaling: { type: "linear" } },
      "rope factor is missing; expected a number above 0",
    ],
    "too few divisors": [
      { ...v3, rope_scaling: { type: "longrope", short_factor: [1], long_factor: [1] } },
      "rope short_factor must be an array of 32 numbers, one for each rotated pair, got an array of 1",
    ],
    "a base of 0": [{ ...v3, rope_theta: 0 }, "rope_theta must be a number above 0, got 0"],
    "a part of the rotated columns that are stretched": [
      { ...v3, partial_rotary_factor: 0.5 },
      "partial_rotary_factor must be 1, got 0.5",
    ],
    "a part of GLM's rotated columns": [
      { ...presets.glm47Flash.config, rope_parameters: { partial_rotary_factor: 0.5 } },
      "partial_rotary_factor must be 1, got 0.5",
    ],
    "another model within Kimi-K2.5": [
      { model_type: "kimi_k25", text_config: { ...v3, model_type: "llama" } },
      'model_type "kimi_k25" is not known',
    ],
    "a model without a type within another than Kimi-K2.5": [
      { model_type: "mistral3", text_config: { ...v3, model_type: undefined } },
      'model_type "mistral3" is not known',
    ],
    "a length that is none": [
      { ...v3, max_position_embeddings: 0.5 },
      "max_position_embeddings must be a whole number from 1, got 0.5",
    ],
    "a length of pretraining beside the fields that is none": [
      { ...v3, original_max_position_embeddings: -1 },
      "original_max_position_embeddings must be a number above 0, got -1",
    ],
    "LongCat without a query latent": [
      { ...presets.longCatFlash.config, q_lora_rank: null },
      "q_lora_rank must be a whole number for longcat_flash, got null",
    ],
    "Kimi-Linear with rotation": [{ ...presets.kimiLinear.config, mla_use_nope: false }, "mla_use_nope must be true"],
    "Kimi-Linear with a gate": [
      { ...presets.kimiLinear.config, mla_use_output_gate: true },
      "mla_use_output_gate is true, which is not supported",
    ],
  };
  for (const [what, [config, message]] of Object.entries(refused)) {
    test(`refuses ${what}`, () => {
      const error = assertThrows(() => mlaModelConfig(config), FlashMLAError, `Cannot read model config: ${message}`);
      assertEquals(error.code, "invalid-input");
    });
  }

  test("refuses what is no config", () => {
    const message = "Cannot read model config: expected a parsed config.json, got null";
    assertThrows(() => mlaModelConfig(JSON.parse("null")), FlashMLAError, message);
  });
});

suite("describe()", () => {
  test("DeepSeek-V3 by hand", () => {
    const described = describe(mlaModelConfig(v3), { contextLength: 4096 });
    assertEquals(described.cacheBytesPerToken, { f16: 1152, f32: 2304 }); // 512 + 64 elements
    assertEquals(described.plainCacheBytesPerToken, { f16: 81920, f32: 163840 }); // 128 · (128 + 64 + 128)
    assertAlmostEquals(described.cacheReduction, 40960 / 576, 1e-12);
    assertEquals(described.flopsPerToken, {
      absorbed: 2 * 128 * 512 * 256 + 2 * 4096 * 128 * 1088, // 1,174,405,120
      expanded: 2 * 4096 * 128 * 512 * 256 + 2 * 4096 * 128 * 320, // 137,774,497,792
    });
    assertEquals(
      described.text,
      [
        "deepseek_v3: 128 heads of 128 + 64 and 128, latents of 512, softmax scale 0.135234",
        "  rope yarn, θ 10000, interleaved, 40 × longer; made for 163840 tokens",
        "  cache per token: 1152 bytes in f16, 2304 in f32",
        "  plain multi-head attention: 81920 and 163840, 71.1 × as much",
        "  FLOPs of a token that sees 4096: 1.17 G absorbed, 138 G expanded",
      ].join("\n"),
    );
    assertEquals(`${described}`, described.text);
  });

  test("DeepSeek-V2-Lite by hand, all 27 layers", () => {
    const described = describe(mlaModelConfig(presets.deepseekV2Lite.config), { contextLength: 1000, layers: 27 });
    assertEquals(described.cacheBytesPerToken, { f16: 31104, f32: 62208 });
    assertEquals(described.plainCacheBytesPerToken, { f16: 276480, f32: 552960 }); // 27 · 16 · 320 elements
    assertEquals(described.flopsPerToken, { absorbed: 27 * 39010304, expanded: 27 * 4204544000 });
    assertEquals(described.text.includes("cache per token of 27 layers: 31104 bytes in f16"), true);
  });

  test("looks as far as the model does unless it is told", () => {
    const described = describe(mlaModelConfig(presets.kimiLinear.config));
    assertEquals([described.contextLength, described.layers], [1048576, 1]);
    assertEquals(described.text.includes("  unrotated; made for 1048576 tokens"), true);
  });

  test("refuses a context that is no length", () => {
    const message = "Cannot run MLA: contextLength must be a whole number from 1, got 0";
    assertThrows(() => describe(mlaModelConfig(v3), { contextLength: 0 }), FlashMLAError, message);
  });
});
