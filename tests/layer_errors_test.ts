// What a layer refuses: by name, before any work starts, and with the cache as it was.

import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects, assertStringIncludes, assertThrows } from "@std/assert";
import {
  emptyOnGpu,
  FlashMLAError,
  type HostTensor,
  MlaAttention,
  type MlaAttentionOptions,
  type MlaForwardOptions,
  MlaLayerCache,
  mlaModelConfig,
  type MlaWeights,
  toGpu,
} from "../mod.ts";
import { gpuContext } from "../src/gpu/device.ts";
import { openTestDevice, skip, smallConfig, smallDecodeConfig, testContext } from "./support/gpu.ts";
import { randomStates, tokensOf, upTo } from "./support/layer_runs.ts";
import { assertClose } from "./support/metrics.ts";
import { randomWeights, smallConfigs } from "./support/random_layer.ts";

const file = smallConfigs.youtu;
const config = mlaModelConfig(file);
const weights: Readonly<Record<string, HostTensor>> = randomWeights(config, 1);
const width = config.hiddenSize;

/** The message of the refusal, which must be of that code. */
async function refusal(work: () => Promise<unknown>, code = "invalid-input"): Promise<string> {
  const error = await assertRejects(work, FlashMLAError) as FlashMLAError;
  assertEquals(error.code, code, error.message);
  return error.message;
}

describe("MlaAttention.load()", () => {
  const load = (given: MlaWeights, options: MlaAttentionOptions = {}) =>
    MlaAttention.load(file, given, { platform: "reference", ...options });
  const { "o_proj.weight": output, ...without } = weights;

  test("takes names with a prefix, without .weight, in a Map, and leaves other tensors alone", async () => {
    const states = randomStates(1, 1, 3, width);
    const expected = await (await load(weights)).forward(states);
    const named = (change: (name: string) => string) =>
      Object.fromEntries(Object.entries(weights).map(([name, tensor]) => [change(name), tensor]));
    for (
      const given of [
        named((name) => `model.layers.7.self_attn.${name}`),
        named((name) => name.replace(".weight", "")),
        named((name) => `self_attn.${name.replace(".weight", "")}`),
        new Map(Object.entries(weights)),
        { ...weights, "model.layers.0.mlp.gate_proj.weight": output, "input_layernorm.weight": output },
      ]
    ) {
      assertEquals((await (await load(given)).forward(states)).data, expected.data);
    }
  });

  test("takes what mlaModelConfig() made of the file", async () => {
    const layer = await MlaAttention.load(config, weights, { platform: "reference" });
    assertEquals(layer.config, config);
  });

  test("names a weight that is missing, with the shape that the config wants, and what was found", async () => {
    const message = await refusal(() => load(without));
    assertEquals(
      message,
      "Cannot load the layer: the weight o_proj.weight is missing; expected a tensor [24,15]. Found were q_a_proj.weight, " +
        "q_a_layernorm.weight, q_b_proj.weight, kv_a_proj_with_mqa.weight, kv_a_layernorm.weight, kv_b_proj.weight",
    );
    assertStringIncludes(await refusal(() => load({})), "Found were no tensors");
    // A name that merely ends alike is another one's.
    assertStringIncludes(
      await refusal(() => load({ ...without, "my_o_proj.weight": output })),
      "o_proj.weight is missing",
    );
  });

  const refused: [what: string, weights: unknown, message: string][] = [
    [
      "a weight of another shape",
      { ...without, "layer.o_proj.weight": weights["q_b_proj.weight"] },
      "layer.o_proj.weight has shape [30,10], expected [24,15] by the config",
    ],
    [
      "a weight that is there twice",
      { ...weights, "layers.1.o_proj.weight": output },
      "o_proj.weight is there 2 times: o_proj.weight, layers.1.o_proj.weight; pass the tensors of one layer",
    ],
    [
      "a bias that the config has not",
      { ...weights, "o_proj.bias": { data: new Float32Array(24), shape: [24] } },
      "found o_proj.bias, a bias that the config has not (attention_bias is false)",
    ],
    [
      "a weight that is no tensor",
      { ...without, "o_proj.weight": 7 },
      "o_proj.weight must be a tensor { data, shape }, got 7",
    ],
    [
      "a weight whose data do not fill its shape",
      { ...without, "o_proj.weight": { data: new Float32Array(3), shape: [24, 15] } },
      "Cannot use o_proj.weight as a tensor: shape [24,15] needs 360 elements, data has 3",
    ],
    ["weights that are no map", null, "weights must be a map from the names of a state dict to tensors, got null"],
  ];
  for (const [what, given, message] of refused) {
    test(`refuses ${what}`, async () => assertStringIncludes(await refusal(() => load(given as MlaWeights)), message));
  }

  test("refuses configs and options that are none", async () => {
    const unknown = await refusal(() => MlaAttention.load({ ...file, model_type: "llama" }, weights));
    for (const word of ['"llama"', "deepseek_v3", "glm4_moe_lite", "kimi_linear", "rope_interleave true"]) {
      assertStringIncludes(unknown, word);
    }
    const missing = await refusal(() => MlaAttention.load({ ...file, kv_lora_rank: undefined }, weights));
    assertStringIncludes(missing, "kv_lora_rank is missing");
    assertStringIncludes(
      await refusal(() => load(weights, { dtype: "bf16" as "f16" })),
      'dtype must be "f32" or "f16"',
    );
    assertStringIncludes(await refusal(() => load(weights, { dtpye: "f16" } as object)), 'unknown option "dtpye"');
    await refusal(() => load(weights, { platform: "cuda" as "reference" }), "unsupported-platform");
  });
});

for (const platform of ["reference", "webgpu"] as const) {
  describe(`MlaAttention on ${platform} refuses`, { skip: platform === "webgpu" && skip }, () => {
    const tuning = platform === "webgpu" ? { cfg: smallConfig, decodeCfg: smallDecodeConfig } : {};
    const made = async () => {
      if (platform === "webgpu") await testContext();
      const layer = await MlaAttention.load(file, weights, { platform });
      const cache = await layer.createCache({ batch: 2, length: 6, pageSize: 4 });
      await layer.forward(randomStates(1, 2, 3, width), { ...tuning, cache });
      return { layer, cache };
    };

    test("calls that do not fit, and leaves the cache as it was", async () => {
      const { layer, cache } = await made();
      const states = randomStates(2, 2, 2, width);
      const cases: [states: unknown, options: unknown, message: string][] = [
        [undefined, {}, `hiddenStates is missing; expected a tensor [batch, length, ${width}]`],
        [randomStates(2, 2, 2, 23), {}, "hiddenStates has shape [2,2,23], expected [batch, length, 24]"],
        [{ data: states.data, shape: [4, width] }, {}, "hiddenStates has shape [4,24], expected [batch, length, 24]"],
        [randomStates(2, 3, 2, width), { cache }, "hiddenStates has 3 sequences, the cache holds 2"],
        [
          randomStates(2, 2, 4, width),
          { cache },
          "sequence 0 has 3 tokens and would get 4, the cache has room for 6",
        ],
        [
          randomStates(2, 1, 5, width),
          { cache, cuSeqlens: [0, 1, 5] },
          "sequence 1 has 3 tokens and would get 4, the cache has room for 6",
        ],
        [randomStates(2, 1, 4, width), { cache, cuSeqlens: [0, 4] }, "cuSeqlens packs 1 sequences, the cache holds 2"],
        [randomStates(2, 1, 4, width), { cuSeqlens: [0, 3] }, "cuSeqlens must end at the sequence length 4, got 3"],
        [states, { cuSeqlens: [0, 2] }, "cuSeqlens packs sequences into batch 1, hiddenStates has batch 2"],
        [states, { cuSeqlens: 7 }, "cuSeqlens must be an Int32Array, a Uint32Array or an array of numbers, got 7"],
        [states, { cache, positions: [3] }, "positions has 1 entries, expected one for each token: [2] or [2, 2]"],
        [states, { cache, positions: [3, 6] }, "positions holds 6 at index 1, the cache has room for positions 0 to 5"],
        [states, { positions: [0, -1] }, "positions must hold whole numbers from 0, got -1 at index 1"],
        [states, { positions: [0, 0.5] }, "positions must hold whole numbers from 0, got 0.5 at index 1"],
        [states, { positions: "01" }, 'positions must be numbers, or rows of them, got "01"'],
        [states, { causal: 1 }, "causal must be true or false, got 1"],
        [states, { formulation: "best" }, 'formulation must be "auto", "absorbed" or "expanded", got "best"'],
        [states, { cache: {} }, "cache must be one that createCache() made, got an object"],
        [states, { cash: cache }, 'unknown option "cash"; known are cache, positions'],
        [states, 7, "options must be an object, got 7"],
      ];
      for (const [given, options, message] of cases) {
        const found = await refusal(() => layer.forward(given as HostTensor, options as MlaForwardOptions));
        assertStringIncludes(found, message);
        assertEquals([...cache.lengths], [3, 3], message);
      }
      const rest = tokensOf(randomStates(3, 2, 3, width), 0, 3);
      await layer.forward(rest, { ...tuning, cache });
      assertEquals([...cache.lengths], [6, 6]);
    });

    test("a cache of another layer, and one that nobody made", async () => {
      const { layer, cache } = await made();
      const other = await MlaAttention.load(file, weights, { platform });
      const states = randomStates(2, 2, 1, width);
      assertStringIncludes(await refusal(() => other.forward(states, { cache })), "cache was made by another layer");
      const nobodys = new MlaLayerCache(2, 6, "f32");
      assertStringIncludes(await refusal(() => layer.forward(states, { cache: nobodys })), "it was not made by");
    });

    test("a layer or cache that was disposed of", async () => {
      const { layer, cache } = await made();
      const states = randomStates(2, 2, 1, width);
      cache.dispose();
      cache.dispose();
      assertEquals([cache.disposed, [...cache.lengths]], [true, [3, 3]]);
      assertStringIncludes(await refusal(() => layer.forward(states, { cache })), "it was disposed of");
      assertThrows(() => cache.reset(), FlashMLAError, "it was disposed of");
      layer.dispose();
      layer.dispose();
      assert(layer.disposed);
      assertStringIncludes(await refusal(() => layer.forward(states)), "Cannot run the layer: it was disposed of");
      assertStringIncludes(await refusal(() => layer.createCache({ batch: 1, length: 1 })), "it was disposed of");
    });

    test("caches that are none, and resets of sequences that are none", async () => {
      const { layer, cache } = await made();
      const cases: [options: object, message: string][] = [
        [{ batch: 0, length: 4 }, "batch must be a whole number from 1, got 0"],
        [{ batch: 1, length: 1.5 }, "length must be a whole number from 1, got 1.5"],
        [{ batch: 1 }, "length must be a whole number from 1, got undefined"],
        [{ batch: 1, length: 4, pageSize: 3 }, "pageSize must be a power of two from 1 to 256, got 3"],
        [{ batch: 1, length: 4, dtype: "f8" }, 'dtype must be "f32" or "f16", got "f8"'],
        [{ batch: 1, length: 4, pages: 3 }, 'unknown option "pages"; known are batch, length, pageSize, dtype'],
      ];
      for (const [options, message] of cases) {
        assertStringIncludes(
          await refusal(() => layer.createCache(options as { batch: number; length: number })),
          message,
        );
      }
      for (const sequence of [-1, 2, 0.5]) {
        assertThrows(
          () => cache.reset(sequence),
          FlashMLAError,
          `sequence must be a whole number below 2, got ${sequence}`,
        );
      }
      const running = layer.forward(randomStates(2, 2, 1, width), { ...tuning, cache });
      assertThrows(() => cache.reset(), FlashMLAError, "a call is under way");
      await running;
      cache.reset(0);
      assertEquals([...cache.lengths], [0, 4]);
    });
  });
}

test("the reference refuses hidden states on a GPU", { skip }, async () => {
  const layer = await MlaAttention.load(file, weights, { platform: "reference" });
  using states = await toGpu(randomStates(1, 1, 2, width));
  assertStringIncludes(await refusal(() => layer.forward(states)), "pass await toHost(hiddenStates)");
});

describe("MlaAttention on the GPU", { skip }, () => {
  test("refuses weights and hidden states of the wrong place", async () => {
    using onGpu = await emptyOnGpu([24, 15]);
    const given = { ...weights, "o_proj.weight": onGpu as unknown as HostTensor };
    const message = await refusal(() => MlaAttention.load(file, given, { platform: "webgpu" }));
    assertStringIncludes(message, "o_proj.weight lies on a GPU; weights are taken from the host");
    using layer = await MlaAttention.load(file, weights, { platform: "webgpu" });
    const device = await openTestDevice();
    using foreign = await toGpu(randomStates(1, 1, 2, width), device);
    assertStringIncludes(
      await refusal(() => layer.forward(foreign)),
      "hiddenStates lies on another device than the layer",
    );
    device.destroy();
  });

  test("a call that fails on the way leaves lengths and pages as they were, and the next one is right", async () => {
    const context = await testContext();
    using layer = await MlaAttention.load(file, weights, { platform: "webgpu" });
    using cache = await layer.createCache({ batch: 1, length: 6, pageSize: 1 });
    const states = randomStates(5, 1, 6, width);
    const expected = await (await MlaAttention.load(file, weights, { platform: "reference" })).forward(states);
    await layer.forward(tokensOf(states, 0, 2), { cfg: smallConfig, decodeCfg: smallDecodeConfig, cache });
    const lent = context.buffers.lent;
    const ill = { ...smallDecodeConfig, blockK: -1 };
    const failing = { cache, formulation: "absorbed" as const, decodeCfg: ill };
    await refusal(() => layer.forward(tokensOf(states, 2, 6), failing), "invalid-config");
    assertEquals([[...cache.lengths], context.buffers.lent], [[2], lent]);
    const resident = await toGpu(tokensOf(states, 2, 3));
    const running = layer.forward(resident, { decodeCfg: smallDecodeConfig, cfg: smallConfig, cache });
    resident.dispose();
    assertStringIncludes(await refusal(() => running), "Cannot use hiddenStates as a tensor: it was disposed of");
    assertEquals([...cache.lengths], [2]);
    for (const end of upTo(2, 6)) {
      const options = { cache, decodeCfg: smallDecodeConfig, cfg: smallConfig };
      const output = await layer.forward(tokensOf(states, end - 1, end), options);
      assertClose(output, tokensOf(expected, end - 1, end), { relL2: 2e-5 }, `token ${end}`);
    }
  });

  test("a device that runs out of memory is said to have, wherever it does; idle memory is freed, and the next call is right", async () => {
    const device = await openTestDevice();
    const { buffers } = await gpuContext(device);
    using layer = await MlaAttention.load(file, weights, { device });
    const hiddenStates = randomStates(3, 1, 5, config.hiddenSize);
    const tuning = { cfg: smallConfig, decodeCfg: smallDecodeConfig };
    const expected = await layer.forward(hiddenStates, tuning);
    const { createBuffer, popErrorScope } = device;
    class GPUOutOfMemoryError extends Error {}
    const made: string[] = [];
    // Every buffer in turn is the one that is refused.
    for (let refused = 0;; refused++) {
      buffers.clear();
      using cache = await layer.createCache({ batch: 1, length: 8, pageSize: 4 });
      const [lent, before] = [buffers.lent, made.length];
      let [count, answer] = [0, false];
      device.createBuffer = (descriptor) => {
        made.push(descriptor.label ?? "");
        answer = count++ === refused;
        return createBuffer.call(device, descriptor);
      };
      device.popErrorScope = () => {
        const denied = answer ? new GPUOutOfMemoryError("Not enough memory left") : null;
        answer = false;
        return popErrorScope.call(device).then((caught) => caught ?? denied);
      };
      const outcome = await layer.forward(hiddenStates, { ...tuning, cache }).then(() => null, (error) => error);
      Object.assign(device, { createBuffer, popErrorScope });
      if (count <= refused) break;
      assert(outcome instanceof FlashMLAError, `nothing was said when ${made[before + refused]} was refused`);
      assertStringIncludes(outcome.message, "The GPU is out of memory");
      assertEquals([buffers.lent, [...cache.lengths]], [lent, [0]]);
      assertClose(await layer.forward(hiddenStates, { ...tuning, cache }), expected, { relL2: 1e-6 });
    }
    assert(made.length > 20, `${made.length} buffers were refused`);
    device.destroy();
  });

  test("a layer or hidden states that are disposed of under way are noticed", async () => {
    await testContext();
    const staying = await MlaAttention.load(file, weights, { platform: "webgpu" });
    const resident = await toGpu(randomStates(1, 1, 2, width));
    const first = staying.forward(resident, { cfg: smallConfig, formulation: "expanded" });
    resident.dispose();
    assertStringIncludes(
      await refusal(() => first),
      "Cannot run the layer: hiddenStates was disposed of while the call was under way; await it first",
    );
    const layer = await MlaAttention.load(file, weights, { platform: "webgpu" });
    const running = layer.forward(randomStates(1, 1, 2, width), { cfg: smallConfig, formulation: "expanded" });
    layer.dispose();
    assertStringIncludes(await refusal(() => running), "the layer was disposed of while the call was under way");
  });

  test("weights that no binding covers are refused by name, and nothing stays allocated", async () => {
    const small = await openTestDevice({ requiredLimits: { maxStorageBufferBindingSize: 134_217_728 } });
    const wide = {
      ...file,
      hidden_size: 4,
      num_attention_heads: 4096,
      v_head_dim: 4,
      kv_lora_rank: 1400,
      q_lora_rank: null,
    };
    const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
    const { qkNopeHeadDim: P, qkRopeHeadDim: R } = config;
    const given = {
      "q_proj.weight": ones(4096 * (P + R), 4),
      "kv_a_proj_with_mqa.weight": ones(1400 + R, 4),
      "kv_a_layernorm.weight": ones(1400),
      "kv_b_proj.weight": ones(4096 * (P + 4), 1400),
      "o_proj.weight": ones(4, 4096 * 4),
    };
    const message = await refusal(() => MlaAttention.load(wide, given, { device: small }), "limit");
    assertStringIncludes(message, "wKc needs");
    assertEquals((await gpuContext(small)).buffers.lent, 0);
    small.destroy();
  });
});
