// The reference layer against Hugging Face transformers, against the layer written out once more, and against itself in
// chunks and token by token.

import { describe, test } from "node:test";
import { assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import fc from "fast-check";
import { FlashMLAError } from "../src/op/errors.ts";
import type { Tensor } from "../src/op/tensor.ts";
import { type MlaModelConfig, mlaModelConfig } from "../src/model/attention_config.ts";
import { expansionWeights } from "../src/model/expansion_weights.ts";
import { type MlaLayerCall, referenceMlaLayer } from "../src/reference/mla_layer.ts";
import { layerGoldens } from "./support/layer_golden.ts";
import { assertClose } from "./support/metrics.ts";
import { plainLayer, randomWeights, smallConfigs } from "./support/random_layer.ts";
import { normals } from "./support/random_problem.ts";

/** Tokens `from` to `to` of each sequence. */
function tokens({ data, shape: [batch, length, width] }: Tensor, from: number, to: number): Tensor {
  const part = new Float32Array(batch * (to - from) * width);
  for (let item = 0; item < batch; item++) {
    const at = item * length * width;
    part.set(data.subarray(at + from * width, at + to * width), item * (to - from) * width);
  }
  return { data: part, shape: [batch, to - from, width] };
}

/** The layer run on chunks that end at `ends`, each with the rows that the ones before left. */
function inChunks(call: MlaLayerCall, config: MlaModelConfig, ends: readonly number[]): Tensor {
  const { hiddenStates } = call;
  const [batch, length, width] = hiddenStates.shape;
  const output = new Float32Array(batch * length * width);
  let cached: Tensor | undefined;
  let start = 0;
  for (const end of ends) {
    const step = referenceMlaLayer({ ...call, hiddenStates: tokens(hiddenStates, start, end), cached }, config);
    for (let item = 0; item < batch; item++) {
      const rows = step.output.data.subarray(item * (end - start) * width, (item + 1) * (end - start) * width);
      output.set(rows, (item * length + start) * width);
    }
    [cached, start] = [step.cached, end];
  }
  return { data: output, shape: [batch, length, width] };
}

const upTo = (from: number, to: number) => Array.from({ length: to - from }, (_, i) => from + i + 1);

describe("referenceMlaLayer() agrees with Hugging Face transformers", () => {
  for (const { name, config, weights, hiddenStates, expected, prefill, scaling } of layerGoldens()) {
    const layer = mlaModelConfig(config);
    const length = hiddenStates.shape[1];
    for (const formulation of ["expanded", "absorbed"] as const) {
      test(`${name}, prefill at once and then step by step, ${formulation}`, () => {
        const output = inChunks({ hiddenStates, weights, formulation }, layer, [prefill, ...upTo(prefill, length)]);
        // transformers' float32 sums are off by 6e-7.
        assertClose(output, expected, { relL2: 2e-6 }, name);
      });
    }
    test(`${name}, with its softmax scale`, () => assertAlmostEquals(layer.softmaxScale, scaling, 1e-15));
  }

  test("of three models", () => assertEquals(layerGoldens().length, 3));
});

describe("referenceMlaLayer() of each model type", () => {
  for (const [name, file] of Object.entries(smallConfigs)) {
    test(`${name}: agrees with the layer written out, at once, in chunks and token by token`, () => {
      const config = mlaModelConfig(file);
      fc.assert(
        fc.property(
          fc.record({
            batch: fc.integer({ min: 1, max: 2 }),
            ends: fc.array(fc.integer({ min: 1, max: 4 }), { minLength: 1, maxLength: 4 }),
            formulation: fc.constantFrom("expanded" as const, "absorbed" as const),
            seed: fc.integer({ min: 0, max: 1e6 }),
          }),
          ({ batch, ends, formulation, seed }) => {
            const weights = randomWeights(config, seed);
            const length = ends.reduce((a, b) => a + b);
            const random = normals(seed + 1);
            const data = Float32Array.from({ length: batch * length * config.hiddenSize }, random);
            const hiddenStates = { data, shape: [batch, length, config.hiddenSize] };
            const call = { hiddenStates, weights, formulation };
            const written = Array.from({ length: batch }, (_, item) => {
              const rows = Array.from({ length }, (_, i) => {
                const at = (item * length + i) * config.hiddenSize;
                return [...data.subarray(at, at + config.hiddenSize)];
              });
              return plainLayer(rows, weights, config);
            });
            const expected = { data: Float32Array.from(written.flat(2)), shape: hiddenStates.shape };
            let end = 0;
            for (const chunks of [[length], ends.map((size) => end += size), upTo(0, length)]) {
              assertClose(inChunks(call, config, chunks), expected, { relL2: 2e-5 }, `${name} in chunks to ${chunks}`);
            }
          },
        ),
        { numRuns: 12 },
      );
    });
  }
});

describe("referenceMlaLayer()", () => {
  const config = mlaModelConfig(smallConfigs.youtu);
  const weights = randomWeights(config, 1);
  const hiddenStates = { data: Float32Array.from({ length: 5 * 24 }, normals(2)), shape: [1, 5, 24] };

  test("depends on the distance of positions only", () => {
    const here = referenceMlaLayer({ hiddenStates, weights }, config).output;
    const there = referenceMlaLayer({ hiddenStates, weights, positions: [70, 71, 72, 73, 74] }, config).output;
    assertClose(there, here, { relL2: 1e-5 });
    const apart = referenceMlaLayer({ hiddenStates, weights, positions: [0, 2, 4, 6, 8] }, config).output;
    assertThrows(() => assertClose(apart, here, { relL2: 1e-3 }));
  });

  test("refuses tensors that do not fit, by name", () => {
    const { "o_proj.weight": _, ...without } = weights;
    const refusals: [MlaLayerCall, string][] = [
      [{ hiddenStates, weights: without }, "the weight o_proj.weight is missing"],
      [
        { hiddenStates, weights: { ...weights, "q_a_proj.weight": weights["q_b_proj.weight"] } },
        "q_a_proj.weight has shape [30,10], expected [10,24]",
      ],
      [
        { hiddenStates, weights: { ...weights, "kv_b_proj.weight": weights["q_b_proj.weight"] } },
        "kv_b_proj.weight has shape [30,10], expected [33,12]",
      ],
      [
        { hiddenStates: { data: hiddenStates.data, shape: [5, 24] }, weights },
        "hiddenStates has shape [5,24], expected [batch, tokens, 24]",
      ],
      [{ hiddenStates, weights, positions: [0] }, "positions has 1 entries, hiddenStates 5 tokens"],
      [{ hiddenStates, weights, cached: hiddenStates }, "cached has shape [1,5,24], expected [1, keys, 16]"],
    ];
    for (const [call, message] of refusals) assertThrows(() => referenceMlaLayer(call, config), FlashMLAError, message);
  });

  test("expansionWeights() takes keys before values of each head", () => {
    const small = mlaModelConfig({
      ...smallConfigs.youtu,
      num_attention_heads: 2,
      kv_lora_rank: 2,
      qk_nope_head_dim: 1,
      v_head_dim: 2,
    });
    const kvBProj = { data: Float32Array.from({ length: 12 }, (_, i) => i), shape: [6, 2] };
    const { wKc, wVc } = expansionWeights(kvBProj, small);
    assertEquals([wKc.shape, [...wKc.data]], [[2, 2, 1], [0, 6, 1, 7]]);
    assertEquals([wVc.shape, [...wVc.data]], [[2, 2, 2], [2, 4, 8, 10, 3, 5, 9, 11]]);
  });
});
