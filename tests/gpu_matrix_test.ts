// Calls whose products run on matrix units, planned and bound as any other: on devices without, the units are emulated.

import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { type HostTensor, toFloats, toHalves } from "../mod.ts";
import { candidateConfigs } from "../src/gpu/attention_configs.ts";
import { whyInvalid } from "../src/gpu/attention_plan.ts";
import type { GpuContext } from "../src/gpu/device.ts";
import { webgpuTarget } from "../src/gpu/webgpu_implementation.ts";
import { mapTensors, mlaProblem, type TensorName } from "../src/op/mla_problem.ts";
import type { Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionWithLse } from "../src/reference/mla_attention.ts";
import { rounded } from "./support/dtype_attention.ts";
import { skipEmulation as skip } from "./support/gpu.ts";
import { bounds, checkCall, drawn, matrixConfig, matrixContext } from "./support/matrix_units.ts";
import { assertClose } from "./support/metrics.ts";
import { type MlaCall, normals, randomTensor } from "./support/random_problem.ts";

/** A call of the kind `drawn("in_query", false)`, so that its kernels are there, with other elements. */
function withElements(
  element: Partial<Record<TensorName, (index: readonly number[]) => number>>,
  scale?: number,
): MlaCall {
  const { inputs, options } = drawn("in_query", false);
  const filled = mapTensors<Tensor, Tensor>(inputs, (tensor, name) => {
    const of = element[name];
    if (of === undefined) return tensor;
    const { shape } = tensor;
    const data = Float32Array.from(tensor.data, (_, i) => {
      const index: number[] = [];
      for (const axis of shape.toReversed()) {
        index.unshift(i % axis);
        i = Math.floor(i / axis);
      }
      return of(index);
    });
    return { data, shape };
  });
  return { inputs: filled, options: { ...options, ...(scale !== undefined && { softmaxScale: scale }) } };
}

/** Whole numbers from −4 to 4 that follow from an index. */
const whole = (index: readonly number[]) => index.reduce((sum, n, axis) => sum + n * (axis * 7 + 3), 5) % 9 - 4;

/** Columns of latents that are one head's columns of keys or values: what is rebuilt is exact in halves. */
const selecting = ([l, head, column]: readonly number[]) => l === (column + 3 * head) % 24 ? 1 : 0;

async function checkForward(context: GpuContext, { inputs, options }: MlaCall, absolute = 0): Promise<void> {
  const halves = mapTensors<Tensor, HostTensor>(inputs, toHalves);
  const problem = mlaProblem(halves, options);
  const expected = referenceMlaAttentionWithLse(rounded(inputs, "f16"), problem);
  const { output, lse } = await webgpuTarget(context).runWithLse(problem, halves, matrixConfig);
  assertClose(toFloats(output as HostTensor), expected.output, { relL2: 3e-3, absolute }, "output");
  assertClose(lse as Tensor, expected.lse, { relL2: 1e-3 }, "log-sum-exp");
}

describe("calls on matrix units, with values that are hard", { skip }, () => {
  test("rows whose maximum grows with every tile, and most in the last one", async () => {
    // Scores of key j are near j: within a tile of 32 they grow by more than what rescaling is put off for.
    const keyValue = ([, j, l]: readonly number[]) => l === 0 ? j : 0;
    const call = withElements({
      ...{ keyValue, wKc: selecting, wVc: ([l, head, v]) => whole([l, head, v]) / 4 },
      query: ([, , head, column]) => column === 0 && head < 2 ? 1 : 0.25 * whole([head, column]),
    }, 1);
    await checkForward(await matrixContext(), call);
  });

  test("logits of ±1e4", async () => {
    const call = withElements({ query: whole, keyValue: whole, bK: whole, wKc: selecting, wVc: selecting }, 64);
    await checkForward(await matrixContext(), call);
  });

  test("halves below their normal range", async () => {
    const tiny = (index: readonly number[]) => whole(index) * 2 ** -22;
    const call = withElements({ keyValue: tiny, bK: tiny, wKc: selecting, wVc: selecting });
    // Results have steps of 6e-8 there.
    await checkForward(await matrixContext(), call, 2 ** -25);
  });

  test("biases that hide as good as minus infinity does, in part and for whole rows", async () => {
    const { inputs, options } = drawn("in_query", false);
    const hiding = [-Infinity, -3.4028234663852886e38, -3e38, -1e4];
    const data = Float32Array.from({ length: 41 * 67 }, (_, i) => {
      const [row, key] = [Math.floor(i / 67), i % 67];
      if (row === 3) return -Infinity;
      return (row + key) % 3 === 0 ? hiding[(row * 5 + key) % 4] : 0;
    });
    const bias = { data, shape: [1, 1, 41, 67] };
    // A bias stays in float32, whose numbers halves do not have.
    const halves = mapTensors<Tensor, HostTensor>(inputs, toHalves);
    const call = { ...halves, bias };
    const problem = mlaProblem(call, options);
    const expected = referenceMlaAttentionWithLse({ ...rounded(inputs, "f16"), bias }, problem);
    const { output, lse } = await webgpuTarget(await matrixContext()).runWithLse(problem, call, matrixConfig);
    assertClose(toFloats(output as HostTensor), expected.output, bounds, "output");
    assertClose(lse as Tensor, expected.lse, { relL2: 1e-3 }, "log-sum-exp");
  });
});

describe("calls on matrix units", { skip }, () => {
  for (const [rope, packed] of [["in_query", false], ["shared", true]] as const) {
    test(`agree with the oracle, rope ${rope}, ${packed ? "packed" : "batched"}`, async () => {
      await checkCall(await matrixContext(), drawn(rope, packed));
    });
  }

  test("agree in head groups, query ranges and pieces, and with gradients of 1e-4", async () => {
    const context = await matrixContext({ maxStorageBufferBindingSize: 24576 });
    await checkCall(context, drawn("in_query", false), { gradScale: 2 ** -13 });
  });

  test("leave what the units cannot do to plain kernels: the gradient of a bias", async () => {
    const { inputs, options } = drawn("in_query", false);
    const bias = randomTensor([1, 4, 41, 67], normals(11));
    await checkCall(await matrixContext(), { inputs: { ...inputs, bias }, options });
  });

  test("are refused for other types than halves, and where there are no units", async () => {
    const { inputs, options } = drawn("in_query", false);
    const context = await matrixContext();
    const floats = mlaProblem(inputs, options);
    const why = whyInvalid(matrixConfig, floats, context.capabilities);
    assert(why?.includes('query is not of dtype "f16"; the option precision: "f16" lets it be rounded'), `${why}`);
    const halves = mlaProblem(mapTensors<Tensor, HostTensor>(inputs, toHalves), options);
    assertEquals(whyInvalid(matrixConfig, halves, context.capabilities), null);
    const without = { ...context.capabilities, matrixUnits: null };
    assert(whyInvalid(matrixConfig, halves, without)?.includes("the device has none"));
    assertEquals(candidateConfigs(halves, without).some(({ matrixUnits }) => matrixUnits), false);
    const large = { ...context.capabilities.limits, maxComputeWorkgroupStorageSize: 49152 };
    const able = {
      ...context.capabilities,
      software: false,
      matrixUnits: "template" as const,
      limits: { ...large, maxComputeInvocationsPerWorkgroup: 1024 },
    };
    assertEquals(candidateConfigs(halves, able)[0].matrixUnits, true);
    assertEquals(candidateConfigs(floats, able)[0].matrixUnits, false);
  });
});
