// The layer of each model type, on both platforms, against the layer written out once more; and against itself: at once, in
// chunks, token by token, packed, one by one, in either formulation, from the host and from the GPU.

import { describe, test } from "node:test";
import { assert, assertEquals, assertThrows } from "@std/assert";
import {
  type F16Tensor,
  MlaAttention,
  type MlaForwardOptions,
  mlaModelConfig,
  presets,
  type Tensor,
  toFloats,
  toGpu,
  toHalves,
  toHost,
  viewOnGpu,
} from "../mod.ts";
import { layerCall } from "../src/layer/layer_call.ts";
import { weightShapes } from "../src/layer/layer_weights.ts";
import { elementCount } from "../src/op/tensor.ts";
import { referenceMlaLayer } from "../src/reference/mla_layer.ts";
import { openTestDevice, skip, smallConfig, smallDecodeConfig, testContext } from "./support/gpu.ts";
import { inChunks, randomStates, tokensOf, upTo } from "./support/layer_runs.ts";
import { assertClose } from "./support/metrics.ts";
import { plainLayer, randomWeights, smallConfigs } from "./support/random_layer.ts";

const bounds = { relL2: 2e-5 };

/** Configurations that software adapters compile in seconds. */
const small = { cfg: smallConfig, decodeCfg: smallDecodeConfig };

/** Rows of hidden states through the layer written out, from position 0 on. */
function written(
  hiddenStates: Tensor,
  weights: Record<string, Tensor>,
  file: Readonly<Record<string, unknown>>,
): Tensor {
  const config = mlaModelConfig(file);
  const { data, shape: [batch, length, width] } = hiddenStates;
  const rows = Array.from({ length: batch }, (_, item) => {
    const tokens = Array.from({ length }, (_, i) => {
      const at = (item * length + i) * width;
      return [...data.subarray(at, at + width)];
    });
    return plainLayer(tokens, weights, config);
  });
  return { data: Float32Array.from(rows.flat(2)), shape: hiddenStates.shape };
}

/** Sequences of different lengths, packed into one. */
function packed(sequences: readonly Tensor[]): { readonly hiddenStates: Tensor; readonly cuSeqlens: number[] } {
  const width = sequences[0].shape[2];
  const cuSeqlens = [0];
  for (const { shape } of sequences) cuSeqlens.push(cuSeqlens.at(-1)! + shape[1]);
  const data = new Float32Array(cuSeqlens.at(-1)! * width);
  sequences.forEach((sequence, s) => data.set(sequence.data, cuSeqlens[s] * width));
  return { hiddenStates: { data, shape: [1, cuSeqlens.at(-1)!, width] }, cuSeqlens };
}

test("each sequence is computed in the way that needs fewer FLOPs, unless one is asked for", () => {
  const config = mlaModelConfig(presets.deepseekV2Lite.config);
  const states = (length: number) => randomStates(1, 1, length, config.hiddenSize);
  const formulations = (cuSeqlens: readonly number[], options: MlaForwardOptions = {}) =>
    layerCall(states(cuSeqlens.at(-1)!), { cuSeqlens, ...options }, config, {}).formulations;
  // Without a prefix there are as many queries as keys.
  assertEquals(formulations([0, 1, 1, 9]), ["expanded", "absorbed", "expanded"]);
  assertEquals(formulations([0, 1, 9], { formulation: "absorbed" }), ["absorbed", "absorbed"]);
});

test("with long prefixes one token is absorbed, and a long chunk rebuilds keys", async () => {
  const config = mlaModelConfig(smallConfigs.youtu);
  const layer = await MlaAttention.load(config, randomWeights(config, 1), { platform: "reference" });
  using cache = await layer.createCache({ batch: 2, length: 200 });
  const chunk = randomStates(1, 1, 160, config.hiddenSize);
  await layer.forward(chunk, { cache, cuSeqlens: [0, 40, 160] });
  const next = randomStates(2, 1, 41, config.hiddenSize);
  const { formulations, before } = layerCall(next, { cache, cuSeqlens: [0, 40, 41] }, config, layer);
  assertEquals([formulations, before], [["expanded", "absorbed"], [40, 120]]);
});

for (const platform of ["reference", "webgpu"] as const) {
  describe(`MlaAttention on ${platform}`, { skip: platform === "webgpu" && skip }, () => {
    const tuning = platform === "webgpu" ? small : {};
    const load = async (file: Readonly<Record<string, unknown>>, seed = 1, dtype: "f32" | "f16" = "f32") => {
      if (platform === "webgpu") await testContext();
      const config = mlaModelConfig(file);
      const weights = randomWeights(config, seed);
      return { config, weights, layer: await MlaAttention.load(file, weights, { platform, dtype }) };
    };

    for (const [name, file] of Object.entries(smallConfigs)) {
      test(`${name}: at once, in chunks and token by token give what the layer written out gives`, async () => {
        const { config, weights, layer } = await load(file);
        const hiddenStates = randomStates(2, 2, 9, config.hiddenSize);
        const expected = written(hiddenStates, weights, file);
        for (const formulation of ["absorbed", "expanded"] as const) {
          for (const ends of [[9], [4, 5, 9], upTo(0, 9)]) {
            using cache = await layer.createCache({ batch: 2, length: 9, pageSize: 4 });
            const output = await inChunks(layer, hiddenStates, ends, { ...tuning, cache, formulation });
            assertClose(output, expected, bounds, `${name}, ${formulation}, in chunks to ${ends}`);
          }
          const alone = await layer.forward(hiddenStates, { ...tuning, formulation });
          assertClose(alone, expected, bounds, `${name}, ${formulation}, without a cache`);
        }
        layer.dispose();
      });
    }

    test("sequences of different lengths, packed, give what each gives by itself", async () => {
      const { config, layer } = await load(smallConfigs["deepseek_v2, yarn"]);
      const prompts = [5, 0, 1, 7].map((length, i) => randomStates(10 + i, 1, length, config.hiddenSize));
      const steps = [1, 3, 0, 2].map((length, i) => randomStates(20 + i, 1, length, config.hiddenSize));
      const both: Tensor[][] = [];
      for (const [s, prompt] of prompts.entries()) {
        using cache = await layer.createCache({ batch: 1, length: 9, pageSize: 4 });
        both.push([
          await layer.forward(prompt, { ...tuning, cache }),
          await layer.forward(steps[s], { ...tuning, cache }),
        ]);
      }
      for (const formulation of ["auto", "absorbed", "expanded"] as const) {
        using cache = await layer.createCache({ batch: 4, length: 9, pageSize: 4 });
        for (const [turn, sequences] of [prompts, steps].entries()) {
          const { hiddenStates, cuSeqlens } = packed(sequences);
          const output = await layer.forward(hiddenStates, { ...tuning, cache, cuSeqlens, formulation });
          const expected = packed(both.map((outputs) => outputs[turn])).hiddenStates;
          assertClose(output, expected, bounds, `${formulation}, turn ${turn}`);
        }
        assertEquals([...cache.lengths], [6, 3, 1, 9]);
        const { hiddenStates, cuSeqlens } = packed(prompts);
        const alone = await layer.forward(hiddenStates, { ...tuning, cuSeqlens, formulation });
        const expected = packed(both.map(([prompt]) => prompt)).hiddenStates;
        assertClose(alone, expected, bounds, `${formulation}, without a cache`);
      }
      layer.dispose();
    });

    test("a batch whose sequences have different lengths goes on in one call", async () => {
      const { config, layer } = await load(smallConfigs.youtu);
      const states = [4, 6].map((length, i) => randomStates(30 + i, 1, length, config.hiddenSize));
      const next = randomStates(40, 2, 2, config.hiddenSize);
      const expected = await Promise.all(states.map(async (prompt, s) => {
        using cache = await layer.createCache({ batch: 1, length: 8, pageSize: 4 });
        await layer.forward(prompt, { ...tuning, cache });
        const own = { data: next.data.slice(s * 2 * config.hiddenSize, (s + 1) * 2 * config.hiddenSize) };
        return await layer.forward({ ...own, shape: [1, 2, config.hiddenSize] }, { ...tuning, cache });
      }));
      for (const formulation of ["absorbed", "expanded"] as const) {
        using cache = await layer.createCache({ batch: 2, length: 8, pageSize: 4 });
        await layer.forward(packed(states).hiddenStates, { ...tuning, cache, cuSeqlens: packed(states).cuSeqlens });
        const { data } = await layer.forward(next, { ...tuning, cache, formulation });
        const { hiddenStates } = packed(expected);
        assertClose({ data, shape: hiddenStates.shape }, hiddenStates, bounds, formulation);
      }
      layer.dispose();
    });

    test("positions turn queries and keys, in every form that they may be given in", async () => {
      const { config, weights, layer } = await load(smallConfigs.mistral4);
      const hiddenStates = randomStates(3, 2, 4, config.hiddenSize);
      const rows = [[0, 2, 3, 9], [5, 6, 7, 8]];
      const expected = referenceMlaLayer({ hiddenStates, weights, positions: rows.flat() }, config).output;
      const forms: MlaForwardOptions["positions"][] = [
        rows,
        rows.flat(),
        Int32Array.from(rows.flat()),
        { data: Int32Array.from(rows.flat()), shape: [2, 4] },
      ];
      for (const positions of forms) {
        assertClose(await layer.forward(hiddenStates, { ...tuning, positions }), expected, bounds);
      }
      const one = await layer.forward(hiddenStates, { ...tuning, positions: rows[0] });
      assertClose(one, referenceMlaLayer({ hiddenStates, weights, positions: rows[0] }, config).output, bounds);
      assertThrows(() => assertClose(one, expected, { relL2: 1e-3 }));
      using cache = await layer.createCache({ batch: 2, length: 12, pageSize: 4 });
      assertClose(
        await layer.forward(hiddenStates, { ...tuning, cache, positions: rows }),
        expected,
        bounds,
        "with a cache",
      );
      layer.dispose();
    });

    test("dynamic angles follow the length of each sequence", async () => {
      const file = {
        ...smallConfigs.youtu,
        max_position_embeddings: 6,
        rope_parameters: { rope_type: "dynamic", factor: 4, rope_theta: 100 },
      };
      const { config, weights, layer } = await load(file);
      const states = [4, 9].map((length, i) => randomStates(50 + i, 1, length, config.hiddenSize));
      const { hiddenStates, cuSeqlens } = packed(states);
      const expected = packed(states.map((each) => written(each, weights, file))).hiddenStates;
      assertClose(await layer.forward(hiddenStates, { ...tuning, cuSeqlens }), expected, bounds);
      layer.dispose();
    });

    test("longrope takes its long divisors past the length of pretraining", async () => {
      const { rope_scaling } = smallConfigs.minicpm3 as { rope_scaling: Record<string, unknown> };
      const file = { ...smallConfigs.minicpm3, rope_scaling: { ...rope_scaling, original_max_position_embeddings: 5 } };
      const { config, weights, layer } = await load(file);
      const short = randomStates(4, 1, 5, config.hiddenSize);
      const long = randomStates(5, 1, 6, config.hiddenSize);
      for (const states of [short, long]) {
        assertClose(await layer.forward(states, tuning), written(states, weights, file), bounds);
      }
      const { data } = await layer.forward(long, { ...tuning, positions: [0, 1, 2, 3, 4, 4] });
      const shortened = { data, shape: long.shape };
      assertThrows(() => assertClose(shortened, written(long, weights, file), { relL2: 1e-3 }));
      layer.dispose();
    });

    test("without the causal mask every token sees all of its sequence", async () => {
      const { config, weights, layer } = await load(smallConfigs["deepseek_v3, halves, biases"]);
      const hiddenStates = randomStates(6, 2, 5, config.hiddenSize);
      const expected = referenceMlaLayer({ hiddenStates, weights, causal: false }, config).output;
      for (const formulation of ["absorbed", "expanded"] as const) {
        assertClose(
          await layer.forward(hiddenStates, { ...tuning, causal: false, formulation }),
          expected,
          bounds,
          formulation,
        );
      }
      assertThrows(() =>
        assertClose(referenceMlaLayer({ hiddenStates, weights }, config).output, expected, { relL2: 1e-3 })
      );
      layer.dispose();
    });

    test("halves stay within what halves allow, and come out as halves", async () => {
      for (const name of ["deepseek_v3, linear", "deepseek_v2, one projection, biases"]) {
        const file = smallConfigs[name];
        const { config, weights, layer } = await load(file, 3, "f16");
        const rounded = Object.fromEntries(
          Object.entries(weights).map(([key, weight]) => [
            key,
            weight.shape.length === 2 ? toFloats(toHalves(weight)) : weight,
          ]),
        );
        const halves = toHalves(randomStates(7, 2, 9, config.hiddenSize));
        const states = toFloats(halves);
        const expected = referenceMlaLayer({ hiddenStates: states, weights: rounded }, config).output;
        for (const formulation of ["absorbed", "expanded"] as const) {
          using cache = await layer.createCache({ batch: 2, length: 9, pageSize: 4 });
          assertEquals(cache.dtype, "f16");
          const output = await inChunks(layer, states, [4, 8, 9], { ...tuning, cache, formulation });
          assertClose(output, expected, { relL2: 3e-3, cosDiff: 5e-6 }, `${name}, ${formulation}`);
        }
        const output: F16Tensor = await layer.forward(halves, tuning);
        assertEquals(output.dtype, "f16");
        assertClose(output, expected, { relL2: 3e-3, cosDiff: 5e-6 }, `${name}, halves in and out`);
        layer.dispose();
      }
    });

    test("odd widths everywhere, in float32 and in halves", async () => {
      const file = {
        ...smallConfigs["deepseek_v3, halves, biases"],
        ...{
          hidden_size: 25,
          q_lora_rank: 7,
          kv_lora_rank: 9,
          qk_nope_head_dim: 5,
          qk_rope_head_dim: 6,
          v_head_dim: 7,
        },
      };
      for (const dtype of ["f32", "f16"] as const) {
        const { config, weights, layer } = await load(file, 4, dtype);
        const hiddenStates = toFloats(toHalves(randomStates(11, 1, 19, config.hiddenSize)));
        const expected = written(hiddenStates, weights, file);
        const within = dtype === "f32" ? bounds : { relL2: 3e-3, cosDiff: 5e-6 };
        for (const formulation of ["absorbed", "expanded"] as const) {
          using cache = await layer.createCache({ batch: 1, length: 19, pageSize: 4 });
          const output = await inChunks(layer, hiddenStates, [17, 18, 19], { ...tuning, cache, formulation });
          assertClose(output, expected, within, `${dtype}, ${formulation}`);
        }
        if (dtype === "f16") {
          assertClose(await layer.forward(toHalves(hiddenStates), tuning), expected, within, "halves");
        }
        layer.dispose();
      }
    });

    test("a cache may be of halves while the layer is float32, and empty calls change nothing", async () => {
      const { config, weights, layer } = await load(smallConfigs.glm4_moe_lite);
      const hiddenStates = randomStates(8, 1, 6, config.hiddenSize);
      using cache = await layer.createCache({ batch: 1, length: 6, pageSize: 4, dtype: "f16" });
      const output = await inChunks(layer, hiddenStates, [3, 6], { ...tuning, cache });
      assertClose(output, written(hiddenStates, weights, smallConfigs.glm4_moe_lite), { relL2: 3e-3, cosDiff: 5e-6 });
      const nothing = await layer.forward(tokensOf(hiddenStates, 0, 0), { ...tuning, cache });
      assertEquals([nothing.shape, nothing.data.length], [[1, 0, config.hiddenSize], 0]);
      assertEquals([...cache.lengths], [6]);
      cache.reset();
      assertEquals([...cache.lengths], [0]);
      const again = await layer.forward(hiddenStates, { ...tuning, cache });
      assertClose(again, output, { relL2: 3e-3 });
      layer.dispose();
    });

    test("calls on one cache run one after another", async () => {
      const { config, weights, layer } = await load(smallConfigs.kimi_k2);
      const hiddenStates = randomStates(9, 1, 6, config.hiddenSize);
      using cache = await layer.createCache({ batch: 1, length: 6, pageSize: 4 });
      const parts = upTo(0, 6).map((end) => layer.forward(tokensOf(hiddenStates, end - 1, end), { ...tuning, cache }));
      const output = packed(await Promise.all(parts)).hiddenStates;
      assertClose(output, written(hiddenStates, weights, smallConfigs.kimi_k2), bounds);
      layer.dispose();
    });
  });
}

describe("MlaAttention on the GPU", { skip }, () => {
  test("tensors that lie there stay there, whatever their strides", async () => {
    const context = await testContext();
    const file = smallConfigs.longcat_flash;
    const config = mlaModelConfig(file);
    const weights = randomWeights(config, 1);
    using layer = await MlaAttention.load(file, weights, { platform: "webgpu" });
    const width = config.hiddenSize;
    const hiddenStates = randomStates(2, 2, 5, width);
    const expected = written(hiddenStates, weights, file);
    using dense = await toGpu(hiddenStates);
    using output = await layer.forward(dense, small);
    assertClose(await toHost(output), expected, bounds, "dense");
    // Rows of 27 elements, seven rows to an item, beginning at the second element.
    const [row, item] = [27, 7 * 27];
    const spread = new Float32Array(2 * item).fill(NaN);
    for (let i = 0; i < 10; i++) {
      const at = 1 + Math.floor(i / 5) * item + i % 5 * row;
      spread.set(hiddenStates.data.subarray(i * width, (i + 1) * width), at);
    }
    using whole = await toGpu({ data: spread, shape: [2 * item] });
    const view = viewOnGpu(whole, { shape: [2, 5, width], offset: 1, strides: [item, row, 1] });
    using strided = await layer.forward(view, small);
    assertClose(await toHost(strided), expected, bounds, "strided");
    using cache = await layer.createCache({ batch: 2, length: 5, pageSize: 4 });
    for (const end of upTo(0, 5)) {
      const one = viewOnGpu(whole, { shape: [2, 1, width], offset: 1 + (end - 1) * row, strides: [item, row, 1] });
      using step = await layer.forward(one, { ...small, cache });
      assertClose(await toHost(step), tokensOf(expected, end - 1, end), bounds, `token ${end}`);
    }
    using halves = await toGpu(toHalves(hiddenStates));
    using rounded = await layer.forward(halves, small);
    assertEquals(rounded.dtype, "f16");
    assertClose(await toHost(rounded), expected, { relL2: 3e-3 }, "halves");
    assert(context.buffers.lent > 0);
  });

  test("a call is one submission, and gives back all memory but its result's", async () => {
    const { device, buffers } = await testContext();
    const file = smallConfigs["deepseek_v2, yarn"];
    const config = mlaModelConfig(file);
    using layer = await MlaAttention.load(file, randomWeights(config, 1), { platform: "webgpu" });
    using cache = await layer.createCache({ batch: 2, length: 64, pageSize: 4 });
    const { submit } = device.queue;
    let submissions = 0;
    device.queue.submit = function (commands) {
      submissions++;
      return submit.call(this, commands);
    };
    try {
      for (const length of [9, 1, 3]) {
        for (const formulation of ["absorbed", "expanded"] as const) {
          const lent = buffers.lent;
          submissions = 0;
          const states = randomStates(length, 2, length, config.hiddenSize);
          await layer.forward(states, { cache, formulation });
          assertEquals([submissions, buffers.lent - lent], [1, 0], `${length} tokens, ${formulation}`);
        }
      }
    } finally {
      delete (device.queue as { submit?: unknown }).submit;
    }
  });

  test("weights larger than a binding lie in several buffers", async () => {
    const device = await openTestDevice({ requiredLimits: { maxStorageBufferBindingSize: 134_217_728 } });
    const file = {
      ...smallConfigs["deepseek_v3, halves, biases"],
      ...{ hidden_size: 2_900, num_attention_heads: 48, q_lora_rank: null, kv_lora_rank: 8, v_head_dim: 8 },
      ...{ qk_nope_head_dim: 240, qk_rope_head_dim: 8 },
    };
    const config = mlaModelConfig(file);
    assert(config.hiddenSize * 48 * 248 * 4 > device.limits.maxStorageBufferBindingSize);
    // Drawn anew each of 35 million would take longer than all the rest.
    const drawn = randomStates(1, 1, 1, 65_521).data;
    const weights = Object.fromEntries(
      Object.entries(weightShapes(config)).map(([name, shape]): [string, Tensor] => {
        const scale = shape.length === 2 ? 1 / Math.sqrt(shape[1]) : 1;
        const data = Float32Array.from({ length: elementCount(shape) }, (_, i) => drawn[i % 65_521] * scale);
        return [name, { data, shape }];
      }),
    );
    const hiddenStates = randomStates(2, 1, 3, config.hiddenSize);
    using oracle = await MlaAttention.load(file, weights, { platform: "reference" });
    using layer = await MlaAttention.load(file, weights, { device });
    const options = { ...small, formulation: "absorbed" } as const;
    assertClose(await layer.forward(hiddenStates, options), await oracle.forward(hiddenStates, options), bounds);
    device.destroy();
  });

  test("a device with default limits and no features computes the same, from halves and to halves", async () => {
    const device = await openTestDevice();
    const file = smallConfigs["deepseek_v2, one projection, biases"];
    const config = mlaModelConfig(file);
    const weights = randomWeights(config, 1);
    const hiddenStates = randomStates(2, 1, 5, config.hiddenSize);
    const expected = written(hiddenStates, weights, file);
    using layer = await MlaAttention.load(file, weights, { device, dtype: "f16" });
    assertEquals([layer.platform, layer.device], ["webgpu", device]);
    using cache = await layer.createCache({ batch: 1, length: 5, pageSize: 4 });
    const quiet = { ...small, onEvent: () => {} };
    using states = await toGpu(toHalves(hiddenStates), device);
    using output = await layer.forward(states, { ...quiet, cache });
    assertEquals(output.dtype, "f16");
    assertClose(await toHost(output), expected, { relL2: 3e-3, cosDiff: 5e-6 }, "on the GPU");
    const host = await layer.forward(toHalves(hiddenStates), quiet);
    assertClose(host, expected, { relL2: 3e-3, cosDiff: 5e-6 }, "on the host");
    device.destroy();
  });
});
