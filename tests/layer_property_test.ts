// Whole layers of random widths through random series of calls, on the GPU and on the reference: packed or in a batch, with a
// cache or without, in either formulation, in float32 and in halves.

import { test } from "node:test";
import { assertEquals } from "@std/assert";
import fc from "fast-check";
import { MlaAttention, mlaModelConfig, type Tensor, toFloats, toHalves } from "../mod.ts";
import { skip, smallConfig, smallDecodeConfig, testContext } from "./support/gpu.ts";
import { randomStates } from "./support/layer_runs.ts";
import { assertClose } from "./support/metrics.ts";
import { randomWeights, smallConfigs } from "./support/random_layer.ts";

const width = (max: number) => fc.integer({ min: 1, max });

const cases = fc.record({
  // Its divisors are of two pairs, whatever the width.
  model: fc.constantFrom(...Object.keys(smallConfigs).filter((name) => name !== "minicpm3")),
  hidden_size: width(70),
  num_attention_heads: width(5),
  q_lora_rank: width(40),
  oneProjection: fc.boolean(),
  kv_lora_rank: width(70),
  qk_nope_head_dim: width(36),
  pairs: fc.integer({ min: 1, max: 8 }),
  v_head_dim: width(36),
  batch: fc.integer({ min: 1, max: 3 }),
  packed: fc.boolean(),
  cached: fc.boolean(),
  pageSize: fc.constantFrom(1, 4, 16),
  dtype: fc.constantFrom<"f32" | "f16">("f32", "f16"),
  causal: fc.boolean(),
  /** New tokens of each sequence, call by call; those of the first count for all where they are not packed. */
  calls: fc.array(
    fc.record({
      tokens: fc.array(fc.integer({ min: 0, max: 21 }), { minLength: 3, maxLength: 3 }),
      formulation: fc.constantFrom<"auto" | "absorbed" | "expanded">("auto", "absorbed", "expanded"),
      halves: fc.boolean(),
    }),
    { minLength: 1, maxLength: 3 },
  ),
  seed: fc.integer({ min: 0, max: 1e6 }),
});

test("random layers through random calls agree with the reference", { skip }, async () => {
  const { capabilities: { software } } = await testContext();
  await fc.assert(
    fc.asyncProperty(cases, async (given) => {
      const { model, pairs, batch, packed, cached, pageSize, dtype, causal, calls, seed, oneProjection, ...widths } =
        given;
      const file = smallConfigs[model];
      const config = mlaModelConfig({
        ...file,
        ...widths,
        // Their rows are normed to lengths of √rank: a rank of one leaves nothing but signs.
        kv_lora_rank: widths.kv_lora_rank + 3,
        q_lora_rank: oneProjection && file.model_type !== "longcat_flash" ? null : widths.q_lora_rank + 3,
        qk_rope_head_dim: file.qk_rope_head_dim === 0 ? 0 : 2 * pairs,
      });
      const weights = randomWeights(config, seed);
      const load = (platform: "reference" | "webgpu") => MlaAttention.load(config, weights, { platform, dtype });
      using layer = await load("webgpu");
      using oracle = await load("reference");
      const size = { batch, length: 63, pageSize };
      const caches = cached ? await Promise.all([layer.createCache(size), oracle.createCache(size)]) : [];
      for (const [i, { tokens, formulation, halves }] of calls.entries()) {
        const added = Array.from({ length: batch }, (_, s) => packed ? tokens[s] : tokens[0]);
        const cuSeqlens = added.reduce((offsets, count) => [...offsets, offsets.at(-1)! + count], [0]);
        const shape = packed ? [1, cuSeqlens[batch]] as const : [batch, tokens[0]] as const;
        const drawn = randomStates(seed + i, ...shape, config.hiddenSize);
        const hiddenStates: Tensor = dtype === "f16" || halves ? toFloats(toHalves(drawn)) : drawn;
        const options = { causal, formulation, ...(packed && { cuSeqlens }) };
        const input = halves ? toHalves(hiddenStates) : hiddenStates;
        const tuned = { ...options, cfg: smallConfig, decodeCfg: smallDecodeConfig };
        const output = await layer.forward(input, { ...tuned, cache: caches[0] });
        const expected = await oracle.forward(hiddenStates, { ...options, cache: caches[1] });
        const exact = dtype === "f32" && !halves;
        assertClose(
          toFloats(output),
          expected,
          exact ? { relL2: 2e-5 } : { relL2: 5e-3, cosDiff: 1e-5 },
          `call ${i} of ${config.modelType}`,
        );
      }
      if (cached) assertEquals(caches[0].lengths, caches[1].lengths);
      for (const cache of caches) cache.dispose();
    }),
    // Every drawing brings kernels of its own, which adapters on the CPU compile for seconds.
    { numRuns: software ? 5 : 60 },
  );
});
