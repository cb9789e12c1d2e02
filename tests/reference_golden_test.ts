import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { mlaProblem, tensorNames } from "../src/op/mla_problem.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { referenceMlaAttentionBackward } from "../src/reference/mla_attention_backward.ts";
import { goldenCases } from "./support/golden.ts";
import { assertClose } from "./support/metrics.ts";
import { everyFeature } from "./support/random_problem.ts";

const cases = goldenCases(everyFeature);

describe("referenceMlaAttention() agrees with ejkernel", () => {
  for (const { name, inputs, options, expected } of cases) {
    test(name, () => {
      const actual = referenceMlaAttention(inputs, mlaProblem(inputs, options));
      // ejkernel's float32 sums are off by 5e-7 at the real head dimensions; ours are double.
      assertClose(actual, expected, { relL2: 2e-6, cosDiff: 2e-12 }, name);
    });
  }

  test("in every rope mode, causal and not, at real head dimensions", () => {
    const problems = cases.map(({ inputs, options }) => mlaProblem(inputs, options));
    assertEquals([...new Set(problems.map(({ rope }) => rope))].sort(), ["in_query", "none", "shared"]);
    assertEquals(new Set(problems.map(({ causal }) => causal)).size, 2);
    assertEquals(problems.filter(({ kvLoraRank: L, qkNopeHeadDim: P }) => L === 512 && P === 128).length, 1);
  });

  test("with every feature that ejkernel's cases have", () => {
    const needed = new Set(cases.flatMap(({ needs }) => needs));
    assertEquals([...needed].sort(), everyFeature.filter((feature) => feature !== "dropout").sort());
    assertEquals(goldenCases().length, cases.filter(({ needs }) => needs.length === 0).length);
  });
});

describe("referenceMlaAttentionBackward() agrees with ejkernel", () => {
  const withGradients = cases.filter(({ gradOutput }) => gradOutput !== undefined);

  for (const { name, inputs, options, gradOutput, expectedGradients } of withGradients) {
    test(name, () => {
      const actual = referenceMlaAttentionBackward(inputs, mlaProblem(inputs, options), gradOutput!);
      for (const tensor of tensorNames) {
        const expected = expectedGradients[tensor];
        if (expected === undefined) continue;
        // jax.grad's float32 sums are off by 7e-7.
        assertClose(actual[tensor]!, expected, { relL2: 2e-6, cosDiff: 2e-12 }, `${name}: gradient of ${tensor}`);
      }
    });
  }

  test("in every tensor but biases and sinks", () => {
    assertEquals(withGradients.length, 7);
    for (const { inputs, expectedGradients } of withGradients) {
      for (const tensor of tensorNames) {
        const recorded = inputs[tensor] !== undefined && tensor !== "bias" && tensor !== "softmaxAux";
        assert((expectedGradients[tensor] !== undefined) === recorded, `the gradient of ${tensor}`);
      }
    }
  });
});
