import { describe, test } from "node:test";
import { assertEquals } from "@std/assert";
import { mlaProblem } from "../src/op/mla_problem.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { goldenCases } from "./support/golden.ts";
import { assertClose } from "./support/metrics.ts";

const cases = goldenCases();

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
});
