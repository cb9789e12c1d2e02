// Masks, biases, sinks, soft caps, windows, dropout and the log-sum-exp on the GPU. Each combination of options is a kernel
// of its own, for which a software adapter needs seconds: few problems, drawn with many options each.

import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { type AnyMask, type AnyTensor, mlaAttentionWithLse, type MlaEvent, toGpu, toHost } from "../mod.ts";
import { webgpuTarget } from "../src/gpu/webgpu_implementation.ts";
import { mapTensors, mlaProblem } from "../src/op/mla_problem.ts";
import { toFloats } from "../src/op/half.ts";
import type { GpuTensor, HostTensor, Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionWithLse } from "../src/reference/mla_attention.ts";
import { rounded, type Side, type Stored, stored } from "./support/dtype_attention.ts";
import { goldenCases } from "./support/golden.ts";
import { openTestDevice, skip, smallConfig, testContext } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { attendsLike, type AttentionWithLse, lseProperties, optionProperties } from "./support/option_properties.ts";
import { everyFeature, type MlaCall, normals, randomTensor } from "./support/random_problem.ts";

const oracle: AttentionWithLse = (inputs, options) => referenceMlaAttentionWithLse(inputs, mlaProblem(inputs, options));

/** The public function on the GPU, its tensors of one element type on one side. */
function attentionOn(side: Side, dtype: Stored, device?: GPUDevice): AttentionWithLse {
  return async (inputs, options) => {
    const made: { dispose(): void }[] = [];
    const place = async (tensor: Tensor) => {
      const half = stored(tensor, dtype);
      if (side === "host") return half;
      const placed = await toGpu(half, device);
      made.push(placed);
      return placed;
    };
    try {
      const placed = new Map<string, AnyTensor>();
      const tensors: [string, Tensor][] = [];
      mapTensors(inputs, (tensor, name) => (tensors.push([name, tensor]), tensor));
      for (const [name, tensor] of tensors) placed.set(name, await place(tensor));
      let attentionMask: AnyMask | undefined = inputs.attentionMask;
      if (side === "gpu" && attentionMask !== undefined) {
        const mask = await toGpu(attentionMask as { data: Uint8Array; shape: number[] }, device);
        made.push(mask);
        attentionMask = mask;
      }
      const call = { ...mapTensors<AnyTensor, AnyTensor>(inputs, (_, name) => placed.get(name)!), attentionMask };
      const result = await mlaAttentionWithLse(call, {
        ...options,
        platform: "webgpu",
        cfg: smallConfig,
        device,
        onEvent: () => {},
      });
      const { output, lse } = result as { output: AnyTensor; lse: AnyTensor };
      if (side === "host") return { output: toFloats(output as HostTensor), lse: lse as Tensor };
      made.push(output as never, lse as never);
      return {
        output: toFloats(await toHost(output as GpuTensor)),
        lse: await toHost(lse as GpuTensor) as Tensor,
      };
    } finally {
      made.forEach((tensor) => tensor.dispose());
    }
  };
}

// One width of register tile, so that what differs are the options.
const limits = { kvLoraRank: 12, qkNopeHeadDim: 8, qkRopeHeadDim: 8, vHeadDim: 16, length: 45, batch: 2 };
const goldens = goldenCases(everyFeature).filter(({ needs }) => needs.length > 0);

/** A call with everything at once: 8 storage buffers, as many as the least device has. */
function fullCall(batch = 2, queryLength = 37, keyLength = 41, kvHeads = 2, heads = 4): MlaCall {
  const random = normals(5);
  const draw = (...shape: number[]) => randomTensor(shape, random);
  return {
    inputs: {
      query: draw(batch, queryLength, heads, 8),
      keyValue: draw(batch, keyLength, 12),
      wKc: draw(12, kvHeads, 8),
      wVc: draw(12, kvHeads, 12),
      bQ: draw(batch, queryLength, 4),
      bK: draw(batch, keyLength, 4),
      bias: draw(batch, heads, queryLength, keyLength),
      softmaxAux: draw(heads, 2),
    },
    options: { logitsSoftCap: 3, slidingWindow: [20, 4], dropout: { rate: 0.25, seed: 2 ** 40 + 3 } },
  };
}

describe("options on the GPU", { skip }, () => {
  const attention = attentionOn("host", "f32");

  describe("agree with ejkernel", () => {
    for (const { name, inputs, options, expected } of goldens) {
      test(name, async () => {
        await testContext();
        const { output, lse } = await attention(inputs, options);
        assertClose(output, expected, { relL2: 1e-5 }, name);
        assertClose(lse!, (await oracle(inputs, options)).lse!, { relL2: 1e-5 }, `${name}, log-sum-exp`);
      });
    }
  });

  test("agree with the oracle on random problems", async () => {
    await testContext();
    await attendsLike(oracle)(attention, { runs: 14, tolerance: 1e-5, absolute: 2e-6, limits });
  });

  test("agree with the oracle on random problems in halves", async () => {
    await testContext();
    const exact: AttentionWithLse = (inputs, options) => oracle(rounded(inputs, "f16"), options);
    // A hundred-thousandth of log-sum-exps near zero is less than their scores are rounded by.
    await attendsLike(exact)(attentionOn("host", "f16"), { runs: 5, tolerance: 3e-3, absolute: 1e-4, limits, seed: 3 });
  });

  const costly = /NaN|nothing visible|packed|decides every pair|split keys|lowest/;
  describe("keep what is true of them", () => {
    for (const { name, check } of [...optionProperties, ...lseProperties].filter(({ name }) => costly.test(name))) {
      test(name, async () => {
        await testContext();
        await check(attention, { runs: 2, tolerance: 2e-5, absolute: 4e-6, limits });
      });
    }
  });

  for (const [side, dtype] of [["gpu", "f32"], ["gpu", "f16"], ["host", "f16"], ["host", "bf16"]] as const) {
    test(`take ${dtype} on the ${side}, all of them in one call`, async () => {
      await testContext();
      const { inputs, options } = fullCall();
      const exact = rounded(inputs, dtype);
      const got = await attentionOn(side, dtype)(inputs, options);
      const expected = await oracle(exact, options);
      const half = dtype === "f16";
      assertClose(got.output, expected.output, half ? { cosDiff: 5e-6, relL2: 3e-3 } : { relL2: 1e-5 });
      assertClose(got.lse!, expected.lse!, { relL2: half ? 1e-4 : 1e-5 });
    });
  }

  test("take masks of halves and of bytes on a GPU, shared or not", async () => {
    await testContext();
    const { inputs: { bias: _, ...inputs }, options } = fullCall();
    for (const [batch, heads] of [[1, 1], [2, 4]]) {
      const shape = [batch, heads, 37, 41];
      const data = Uint8Array.from({ length: batch * heads * 37 * 41 }, (_, i) => i * 2654435761 % 7 < 3 ? 0 : i % 255);
      const call = { ...inputs, attentionMask: { data, shape } };
      const got = await attentionOn("gpu", "f32")(call, options);
      const expected = await oracle(call, options);
      assertClose(got.output, expected.output, { relL2: 1e-5 });
      assertClose(got.lse!, expected.lse!, { relL2: 1e-5 });
    }
  });

  test("fit the least that WebGPU allows", async () => {
    const device = await openTestDevice();
    try {
      const { inputs, options } = fullCall();
      const got = await attentionOn("gpu", "f32", device)(inputs, options);
      const expected = await oracle(inputs, options);
      assertClose(got.output, expected.output, { relL2: 1e-5 });
      assertClose(got.lse!, expected.lse!, { relL2: 1e-5 });
    } finally {
      device.destroy();
    }
  });

  test("fit bindings far smaller than a bias: ranges of queries, runs of heads, pieces of the batch", async () => {
    const context = await testContext();
    const { inputs, options } = fullCall();
    const packed = { ...fullCall(1, 41).inputs, cuSeqlens: [0, 12, 12, 30, 41] };
    for (const call of [inputs, packed]) {
      const problem = mlaProblem(call, options);
      const expected = await oracle(call, options);
      for (const maxStorageBufferBindingSize of [4096, 8192]) {
        const limits = { ...context.capabilities.limits, maxStorageBufferBindingSize };
        const target = webgpuTarget({ ...context, capabilities: { ...context.capabilities, limits } });
        const { output, lse } = await target.runWithLse(problem, call, smallConfig);
        assertClose(output, expected.output, { relL2: 1e-5 });
        assertClose(lse, expected.lse!, { relL2: 1e-5 });
      }
    }
  });

  test("hide a key whose bias is the lowest float32, and a row where all are", async () => {
    await testContext();
    const { inputs, options } = fullCall();
    const bias = { ...inputs.bias!, data: inputs.bias!.data.slice() };
    for (let i = 0; i < bias.data.length; i++) if (i % 3 === 0 || i < 41) bias.data[i] = -3.4028234663852886e38;
    const call = { ...inputs, bias };
    const got = await attention(call, options);
    assertEquals(got.lse!.data[0], -Infinity);
    assert(got.output.data.subarray(0, 12).every((x) => x === 0));
    assertClose(got.output, (await oracle(call, options)).output, { relL2: 1e-5 });
  });

  test("ignore the mask beside a bias, and say so each time", async () => {
    await testContext();
    const { inputs, options } = fullCall();
    const events: MlaEvent[] = [];
    const attentionMask = { data: new Uint8Array(37 * 41), shape: [1, 1, 37, 41] };
    const call = {
      ...options,
      platform: "webgpu",
      cfg: smallConfig,
      onEvent: (e: MlaEvent) => events.push(e),
    } as const;
    const alone = await mlaAttentionWithLse(inputs, call);
    assertEquals(events, []);
    const both = await mlaAttentionWithLse(inputs, { ...call, attentionMask });
    assertEquals(events.map(({ code }) => code), ["mask-ignored"]);
    assertEquals(both, alone);
  });
});
