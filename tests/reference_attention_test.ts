import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { type HostInputs, type MlaMathOptions, mlaProblem } from "../src/op/mla_problem.ts";
import { elementCount, type Tensor, tensor } from "../src/op/tensor.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { agreesWith, attentionProperties } from "./support/attention_properties.ts";
import { denseAttentionWithLse } from "./support/dense_attention.ts";
import { assertClose } from "./support/metrics.ts";
import { normals, randomTensor } from "./support/random_problem.ts";

function reference(inputs: HostInputs, options: MlaMathOptions = {}): Tensor {
  return referenceMlaAttention(inputs, mlaProblem(inputs, options));
}

const dense: typeof reference = (inputs, options = {}) => denseAttentionWithLse(inputs, options).output;

describe("referenceMlaAttention()", () => {
  test("agrees with a dense formula on random problems", () =>
    agreesWith(dense)(reference, { runs: 400, tolerance: 1e-6 }));

  for (const { name, check } of attentionProperties) {
    test(`holds: ${name}`, () => check(reference, { runs: 200, tolerance: 1e-6 }));
  }
});

/** One head, widths of 1, weights of 1: the score of (i, j) is `queries[i] · latents[j]`, and V is the latent. */
function scalarCall(queries: number[], latents: number[]): HostInputs {
  const one = tensor(Float32Array.of(1), [1, 1, 1]);
  return {
    query: tensor(Float32Array.from(queries), [1, queries.length, 1, 1]),
    keyValue: tensor(Float32Array.from(latents), [1, latents.length, 1]),
    wKc: one,
    wVc: one,
  };
}

describe("referenceMlaAttention() on worked examples", () => {
  test("one key gives its value", () => {
    assertEquals([...reference(scalarCall([3, -2], [5])).data], [5, 5]);
  });

  test("equal scores average", () => {
    assertEquals([...reference(scalarCall([0], [1, 2, 6])).data], [3]);
  });

  test("scores of ln 2 and 0 weigh 2 to 1", () => {
    const { data } = reference(scalarCall([Math.log(2)], [1, 0]));
    assert(Math.abs(data[0] - 2 / 3) < 1e-7, `${data[0]}`);
  });

  test("scores of ±1e4 and ±1e30 pick the largest, whichever comes first", () => {
    for (const q of [1e4, 1e30]) {
      assertEquals([...reference(scalarCall([q, -q], [-1, 1, 0])).data], [1, -1]);
      assertEquals([...reference(scalarCall([q, -q], [1, 0, -1])).data], [1, -1]);
    }
  });

  test("equal scores of 1e4 average", () => {
    assertEquals([...reference(scalarCall([1e4, -1e4], [1, 1, 1])).data], [1, 1]);
  });

  test("a score of −∞ has no weight, wherever it stands", () => {
    const rope = (...data: number[]) => tensor(Float32Array.from(data), [1, data.length, 1]);
    const inputs = { ...scalarCall([0], [7, 1, 3]), bQ: rope(1) };
    assertEquals([...reference({ ...inputs, bK: rope(-Infinity, 0, 0) }).data], [2]);
    assertEquals([...reference({ ...inputs, bK: rope(0, 0, -Infinity) }).data], [4]);
  });

  test("no keys give zero rows, no queries and no batch give none", () => {
    assertEquals([...reference(scalarCall([1, 2], [])).data], [0, 0]);
    assertEquals(reference(scalarCall([], [1, 2])).shape, [1, 0, 1, 1]);
    const empty = { query: [0, 3, 2, 4], keyValue: [0, 3, 5], wKc: [5, 1, 4], wVc: [5, 1, 6] };
    const zeros = (shape: number[]) => tensor(new Float32Array(elementCount(shape)), shape);
    const { query, keyValue, wKc, wVc } = empty;
    const nothing = reference({ query: zeros(query), keyValue: zeros(keyValue), wKc: zeros(wKc), wVc: zeros(wVc) });
    assertEquals(nothing, { data: new Float32Array(0), shape: [0, 3, 2, 6] });
  });

  test("causal queries before the first key have zero rows, even over NaN", () => {
    const { data } = reference(scalarCall([NaN, NaN, 0], [4]), { causal: true });
    assertEquals([...data], [0, 0, 4]);
  });

  test("offsets [0, S] mean one sequence", () => {
    const random = normals(7);
    const inputs = {
      query: randomTensor([1, 9, 4, 5], random),
      keyValue: randomTensor([1, 9, 6], random),
      wKc: randomTensor([6, 2, 5], random),
      wVc: randomTensor([6, 2, 3], random),
    };
    const packed = reference({ ...inputs, cuSeqlens: [0, 9] }, { causal: true });
    assertEquals(packed, reference(inputs, { causal: true }));
  });

  test("inputs stay as they were", () => {
    const inputs = scalarCall([1, 2], [3, 4]);
    reference(inputs, { causal: true });
    assertEquals(inputs, scalarCall([1, 2], [3, 4]));
  });

  test("sequences longer than any unrolling agree with the dense formula", () => {
    const random = normals(3);
    const inputs = {
      query: randomTensor([1, 3, 2, 40 + 17], random, "small"),
      keyValue: randomTensor([1, 301, 33], random, "small"),
      wKc: randomTensor([33, 1, 40], random),
      wVc: randomTensor([33, 1, 41], random),
      bK: randomTensor([1, 301, 17], random),
    };
    assertClose(reference(inputs, { causal: true }), dense(inputs, { causal: true }), { relL2: 1e-6 });
  });
});
