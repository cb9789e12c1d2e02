import { describe, test } from "node:test";
import { assert, assertEquals, assertMatch } from "@std/assert";
import { gradientsAgree, outputsAgree } from "../src/op/agreement.ts";
import { toFloats, toHalves } from "../src/op/half.ts";
import type { HostGradients } from "../src/op/mla_gradients.ts";
import { mapTensors, mlaProblem } from "../src/op/mla_problem.ts";
import type { GpuTensor, Tensor } from "../src/op/tensor.ts";
import { tuningGradOutput } from "../src/op/tuning_grad_output.ts";
import { referenceMlaAttentionBackward } from "../src/reference/mla_attention_backward.ts";
import { normals, type ProblemShape, randomCall } from "./support/random_problem.ts";

const shape: ProblemShape = {
  batch: 1,
  queryLength: 24,
  keyLength: 24,
  kvHeads: 2,
  headsPerKvHead: 2,
  kvLoraRank: 8,
  qkNopeHeadDim: 6,
  qkRopeHeadDim: 4,
  vHeadDim: 5,
  rope: "in_query",
  causal: true,
  softmaxScale: null,
  cuSeqlens: null,
  values: "plain",
  seed: 3,
};

function gradientsOf(changes: Partial<ProblemShape> = {}) {
  const { inputs, options } = randomCall({ ...shape, ...changes });
  const problem = mlaProblem(inputs, options);
  const gradients = referenceMlaAttentionBackward(inputs, problem, tuningGradOutput(problem));
  const halves = mlaProblem(mapTensors(inputs, toHalves), options);
  return { problem, gradients, halves };
}

/** The gradients with one tensor's elements changed. */
function changed(
  gradients: HostGradients,
  name: keyof HostGradients,
  change: (x: number, i: number) => number,
): HostGradients {
  const { data, shape } = gradients[name]!;
  return { ...gradients, [name]: { data: data.map(change), shape } };
}

describe("outputsAgree()", () => {
  const best: Tensor = { data: Float32Array.of(1, 2, NaN, 4), shape: [4] };
  const check = (...data: number[]) => outputsAgree({ data: Float32Array.from(data), shape: [data.length] }, best);

  test("accepts rounding and refuses errors, stray NaN and other lengths, with the reason", () => {
    assertEquals(check(1, 2, NaN, 4.00001).ok, true);
    assertEquals(check(1, 2, NaN, 4.1).ok, false);
    assertMatch(check(1, 2, NaN, 4.1).detail, /^relL2 2\.\d+e-2 against the best known output$/);
    assertEquals(check(1, NaN, NaN, 4).detail, "element 1 is NaN where the best known output has 2");
    assertEquals(check(1, 2, 3, 4).detail, "element 2 is 3 where the best known output has NaN");
    assertEquals(check(1, 2).detail, "2 elements where the best known output has 4");
  });

  test("allows what halves cost where float32 may be rounded to them, and only of matrix units", () => {
    const candidate: Tensor = { data: Float32Array.of(1, 2, NaN, 4.004), shape: [4] };
    const agree = (precision: "f32" | "f16", onUnits?: boolean) =>
      outputsAgree(candidate, best, { dtype: "f32", precision }, onUnits).ok;
    assertEquals([agree("f16"), agree("f16", true), agree("f16", false)], [true, true, false]);
    assertEquals([agree("f32"), agree("f32", true)], [false, false]);
    const { problem, gradients } = gradientsOf();
    const off = changed(gradients, "wKc", (x) => x * 1.001);
    const near = (precision: "f32" | "f16", onUnits?: boolean) =>
      gradientsAgree({ ...problem, precision }, off, gradients, onUnits).ok;
    assertEquals([near("f16"), near("f16", false), near("f32")], [true, false, false]);
  });
});

describe("gradientsAgree()", () => {
  test("accepts equal and rounded gradients", () => {
    const { problem, gradients, halves } = gradientsOf();
    assert(gradientsAgree(problem, gradients, gradients).ok);
    const noise = normals(5);
    const noisy = mapGradients(gradients, (x) => x * (1 + 1e-4 * noise()));
    const { ok, detail } = gradientsAgree(problem, noisy, gradients);
    assert(ok, detail);
    assertMatch(detail, /^relL2 at most \d\.\d\de-[45] \(\w+\)$/);
    // What rounding to halves does is too much for float32, and all right where halves are stored.
    const rounded = mapGradients(
      gradients,
      (x) => toFloats(toHalves({ data: Float32Array.of(x), shape: [1] })).data[0],
    );
    const coarse = mapGradients(rounded, (x) => x * (1 + 1e-3 * noise()));
    assertEquals([problem, halves].map((dimensions) => gradientsAgree(dimensions, coarse, gradients).ok), [
      false,
      true,
    ]);
  });

  for (const name of ["query", "keyValue", "wKc", "wVc", "bK"] as const) {
    test(`refuses a wrong ${name} by name, in halves too`, () => {
      const { problem, gradients, halves } = gradientsOf();
      const { data } = gradients[name]!;
      const wrongs = [
        changed(gradients, name, (x, i) => i < data.length / 8 ? 0 : x),
        changed(gradients, name, (x) => 1.01 * x),
        changed(gradients, name, (x) => -x),
      ];
      for (const wrong of wrongs) {
        for (const dimensions of [problem, halves]) {
          const { ok, detail } = gradientsAgree(dimensions, wrong, gradients);
          assert(!ok);
          assertMatch(detail, new RegExp(`^${name}: relL2 \\d\\.\\d\\de[+-]\\d against the best known gradient$`));
        }
      }
      const stray = changed(gradients, name, (x, i) => i === 3 ? Infinity : x);
      assertMatch(
        gradientsAgree(problem, stray, gradients).detail,
        new RegExp(`^${name}: element 3 is Infinity where`),
      );
      const { [name]: _, ...missing } = gradients;
      assertEquals(gradientsAgree(problem, missing as HostGradients, gradients).detail, `${name} is missing`);
    });
  }

  test("does not take for errors what is left where everything cancels", () => {
    // One key: its probability is 1 whatever the scores are, and all gradients but those through the values are zero.
    const { problem, gradients } = gradientsOf({ keyLength: 1, causal: false });
    const noise = normals(8);
    const left = (size: number) => mapGradients(gradients, (x) => x === 0 ? size * noise() : x);
    assert(gradientsAgree(problem, left(1e-6), left(1e-6)).ok);
    assertEquals(gradientsAgree(problem, left(1e-2), left(1e-2)).ok, false);
  });

  test("says that gradients on a GPU are not compared", () => {
    const { problem, gradients } = gradientsOf();
    const query: GpuTensor = { buffer: {} as GPUBuffer, shape: [1], dtype: "f32" };
    const { ok, detail } = gradientsAgree(problem, { ...gradients, query } as unknown as HostGradients, gradients);
    assertEquals([ok, detail], [true, "not compared: query stayed on the GPU"]);
  });
});

describe("tuningGradOutput()", () => {
  const { inputs } = randomCall({ ...shape, queryLength: 4096 });
  const problem = mlaProblem(inputs);
  const { data, shape: axes } = tuningGradOutput(problem);

  test("is the same every time", () => {
    assertEquals(tuningGradOutput(problem).data, data);
    assertEquals(axes, [1, 4096, 4, 5]);
    // The first elements, so that no platform may come to another result.
    assertEquals([...data.subarray(0, 4)], [0.146484375, -0.525390625, -0.7890625, -0.40625]);
  });

  test("is exact in halves, and has neither a mean nor a trend", () => {
    assertEquals(toFloats(toHalves({ data, shape: axes })).data, data);
    const mean = (values: (i: number) => number) => data.reduce((sum, _, i) => sum + values(i), 0) / data.length;
    assert(data.every((x) => x >= -1 && x < 1));
    assert(Math.abs(mean((i) => data[i])) < 0.01);
    assert(Math.abs(mean((i) => data[i] ** 2) - 1 / 3) < 0.01);
    for (const lag of [1, 2, 5, 20, 64]) assert(Math.abs(mean((i) => data[i] * (data[i - lag] ?? 0))) < 0.01);
  });
});

function mapGradients(gradients: HostGradients, change: (x: number) => number): HostGradients {
  return Object.fromEntries(
    Object.entries(gradients).map(([name, { data, shape }]) => [name, { data: data.map(change), shape }]),
  ) as unknown as HostGradients;
}
