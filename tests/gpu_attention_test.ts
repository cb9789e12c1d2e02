import { describe, test } from "node:test";
import { assertEquals } from "@std/assert";
import fc from "fast-check";
import { whyInvalid } from "../src/gpu/kernels/attend.ts";
import { mlaProblem } from "../src/op/mla_problem.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { agreesWith, attentionProperties } from "./support/attention_properties.ts";
import { goldenCases } from "./support/golden.ts";
import { attentionUnder, skip, smallConfig, testContext } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { problems, randomCall } from "./support/random_problem.ts";

const oracle = (...[inputs, options]: Parameters<ReturnType<typeof attentionUnder>>) =>
  referenceMlaAttention(inputs, mlaProblem(inputs, options));

/** Two widths of values need two register tiles: keep both among the random problems. */
const limits = { kvLoraRank: 24, qkNopeHeadDim: 20, qkRopeHeadDim: 12, vHeadDim: 40 };

/** Why the small tile's rows cannot be reduced by shuffles here, or null. */
const shuffles = skip === false
  ? whyInvalid({ ...smallConfig, subgroups: true }, { vHeadDim: 40 }, (await testContext()).capabilities)
  : skip;

describe("mlaAttention() on the GPU", { skip }, () => {
  const attention = attentionUnder(smallConfig);

  describe("agrees with ejkernel", () => {
    for (const { name, inputs, options, expected } of goldenCases()) {
      test(name, async () => {
        await testContext();
        assertClose(await attention(inputs, options), expected, { relL2: 3e-5 }, name);
      });
    }
  });

  test("agrees with the oracle on random problems", async () => {
    await testContext();
    await agreesWith(oracle)(attention, { runs: 150, tolerance: 1e-5, absolute: 1e-6, limits });
  });

  test("agrees with the oracle on sequences longer than its tiles", async () => {
    await testContext();
    await agreesWith(oracle)(attention, {
      runs: 40,
      tolerance: 1e-5,
      absolute: 1e-6,
      limits: { ...limits, batch: 2, length: 150, kvHeads: 2, headsPerKvHead: 2 },
    });
  });

  describe("keeps what is true of attention", () => {
    for (const { name, check } of attentionProperties) {
      test(name, async () => {
        await testContext();
        await check(attention, { runs: 25, tolerance: 2e-5, absolute: 2e-6, limits });
      });
    }
  });

  test("agrees with the oracle with row reductions by subgroup shuffles", {
    skip: shuffles === null ? false : shuffles,
  }, async () => {
    await testContext();
    const shuffling = attentionUnder({ ...smallConfig, subgroups: true });
    await agreesWith(oracle)(shuffling, { runs: 60, tolerance: 1e-5, absolute: 1e-6, limits });
    for (const { check } of attentionProperties.filter(({ name }) => /NaN|without|means/.test(name))) {
      await check(shuffling, { runs: 15, tolerance: 2e-5, absolute: 2e-6, limits });
    }
  });

  test("survives logits up to ±1e4", async () => {
    await testContext();
    await fc.assert(
      fc.asyncProperty(problems({ ...limits, values: ["plain"] }), async (shape) => {
        const { inputs, options } = randomCall(shape);
        const large = { ...options, softmaxScale: 1e3 };
        // Scores near 1e4 carry float32 rounding of 1e-3, which the exponential turns into as much relative error.
        assertClose(await attention(inputs, large), oracle(inputs, large), { relL2: 2e-2, absolute: 1e-3 });
      }),
      { numRuns: 40, seed: 4 },
    );
  });

  test("does not touch its inputs", async () => {
    await testContext();
    const { inputs, options } = goldenCases().find(({ name }) => name === "rope_shared")!;
    const tensors = Object.values(inputs).filter((value) => value?.data !== undefined);
    const before = tensors.map((tensor) => ({ ...tensor, data: tensor.data.slice() }));
    await attention(inputs, options);
    tensors.forEach((tensor, i) => assertEquals(tensor, before[i]));
  });
});
