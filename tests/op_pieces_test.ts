import { describe, test } from "node:test";
import { assert } from "@std/assert";
import fc from "fast-check";
import { type HostInputs, mlaProblem } from "../src/op/mla_problem.ts";
import { type Piece, pieces } from "../src/op/pieces.ts";
import type { Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionWithLse } from "../src/reference/mla_attention.ts";
import { assertClose } from "./support/metrics.ts";
import { everyFeature, problems, type ProblemShape, randomCall } from "./support/random_problem.ts";
import { concatenate } from "./support/tensor_parts.ts";

const exact = { relL2: 0 };

/** The oracle's results over the pieces of a call, one behind the other. */
function joined(parts: readonly Piece[]): { readonly output: Tensor; readonly lse: Tensor } {
  const results = parts.map(({ problem, inputs }) => referenceMlaAttentionWithLse(inputs as HostInputs, problem));
  const packed = parts[0].problem.cuSeqlens !== null;
  return {
    output: concatenate(results.map(({ output }) => output), packed ? 1 : 0),
    lse: concatenate(results.map(({ lse }) => lse), packed ? 2 : 0),
  };
}

describe("pieces()", () => {
  test("give the rows of the whole under every option, dropout among them", () => {
    let cut = 0;
    fc.assert(
      fc.property(problems({ features: everyFeature }), fc.integer({ min: 1, max: 20 }), (shape, maxKeyRows) => {
        const { inputs, options } = randomCall(shape);
        const problem = mlaProblem(inputs, options);
        const parts = pieces(problem, inputs, maxKeyRows);
        if (parts.length > 1) cut++;
        if (parts.length === 0) return;
        const whole = referenceMlaAttentionWithLse(inputs, problem);
        const result = joined(parts);
        assertClose(result.output, whole.output, exact, "output");
        assertClose(result.lse, whole.lse, exact, "log-sum-exp");
      }),
      { numRuns: 400, seed: 3 },
    );
    assert(cut > 100, `${cut} of 400 problems were cut`);
  });

  test("drop what the whole drops", () => {
    const shape: ProblemShape = {
      batch: 4,
      queryLength: 9,
      keyLength: 9,
      kvHeads: 2,
      headsPerKvHead: 1,
      kvLoraRank: 5,
      qkNopeHeadDim: 4,
      qkRopeHeadDim: 0,
      vHeadDim: 6,
      rope: "none",
      causal: false,
      softmaxScale: null,
      cuSeqlens: null,
      values: "plain",
      seed: 5,
      features: { dropout: { rate: 0.5, seed: 9 } },
    };
    const packed = { ...shape, batch: 1, queryLength: 36, keyLength: 36, cuSeqlens: [0, 9, 9, 20, 36] };
    for (const one of [shape, packed]) {
      const { inputs, options } = randomCall(one);
      const problem = mlaProblem(inputs, options);
      const parts = pieces(problem, inputs, 9);
      assert(parts.length >= 3, `${parts.length} pieces`);
      assertClose(joined(parts).output, referenceMlaAttentionWithLse(inputs, problem).output, exact);
    }
  });
});
