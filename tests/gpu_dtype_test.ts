import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { mlaAttention, type MlaEvent, tensor, toGpu, toHost } from "../mod.ts";
import { gpuContext } from "../src/gpu/device.ts";
import { halfBits, toFloats, toHalves } from "../src/op/half.ts";
import { mlaProblem } from "../src/op/mla_problem.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { agreesWith, type Attention, attentionProperties } from "./support/attention_properties.ts";
import { attentionOn, rounded, stored } from "./support/dtype_attention.ts";
import { goldenCases } from "./support/golden.ts";
import { openTestDevice, skip, smallConfig, testContext } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { randomCall } from "./support/random_problem.ts";

const cfg = smallConfig;
const hasHalves = skip === false && (await testContext()).capabilities.f16;
/** Bounds of halves against the oracle on the same rounded inputs. */
const half = { relL2: 3e-3, cosDiff: 5e-6 };
const limits = { kvLoraRank: 24, qkNopeHeadDim: 20, qkRopeHeadDim: 12, vHeadDim: 40 };

const oracle: Attention = (inputs, options) => referenceMlaAttention(inputs, mlaProblem(inputs, options));
const oracleOnHalves: Attention = (inputs, options) => oracle(rounded(inputs, "f16"), options);

describe("halves", { skip: skip || !hasHalves && "the device has no half precision" }, () => {
  for (const side of ["host", "gpu"] as const) {
    const attention = attentionOn(side, "f16", { cfg });

    describe(`on the ${side} agree with the oracle on the same rounded inputs`, () => {
      for (const { name, inputs, options } of goldenCases()) {
        test(name, async () => {
          await testContext();
          assertClose(await attention(inputs, options), await oracleOnHalves(inputs, options), half, name);
        });
      }

      test("random problems", async () => {
        await testContext();
        await agreesWith(oracleOnHalves)(attention, { runs: 60, tolerance: 3e-3, absolute: 1e-3, limits });
      });
    });
  }

  describe("keep what is true of attention", () => {
    const attention = attentionOn("host", "f16", { cfg });
    for (const { name, check } of attentionProperties) {
      test(name, async () => {
        await testContext();
        // Some properties compare with values of the inputs before they were rounded: sums over the rank of products.
        await check(attention, { runs: 12, tolerance: 4e-3, absolute: 1e-2, limits });
      });
    }
  });

  test("may pass the largest half between the steps", async () => {
    const fill = (value: number, ...shape: number[]) =>
      toHalves({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(value), shape });
    const call = {
      query: fill(1 / 1024, 1, 3, 1, 8),
      keyValue: fill(1024, 1, 5, 16),
      wKc: fill(8, 16, 1, 8), // keys of 131,072
      wVc: fill(1, 16, 1, 8),
    };
    const result = await mlaAttention(call, { platform: "webgpu", cfg });
    assert(toFloats(result).data.every((x) => x === 16384), String(toFloats(result).data[0]));
  });

  test("give halves for halves, of any odd length", async () => {
    const { inputs, options } = randomCall({ ...shape, kvLoraRank: 3, qkNopeHeadDim: 5, vHeadDim: 7, queryLength: 3 });
    const halves = { ...inputs, query: toHalves(inputs.query), keyValue: toHalves(inputs.keyValue) };
    const result = await mlaAttention(halves, { ...options, platform: "webgpu", cfg });
    assertEquals(result.dtype, "f16");
    assertEquals(result.shape, [1, 3, 3, 7]);
    assertEquals(halfBits(result.data).length, 63);
    const expected = await oracle({ ...inputs, ...mapHalves(inputs, ["query", "keyValue"]) }, options);
    assertClose(result, expected, half);
  });
});

const shape = {
  batch: 1,
  queryLength: 21,
  keyLength: 34,
  kvHeads: 3,
  headsPerKvHead: 1,
  kvLoraRank: 12,
  qkNopeHeadDim: 8,
  qkRopeHeadDim: 4,
  vHeadDim: 16,
  rope: "in_query",
  causal: true,
  softmaxScale: null,
  cuSeqlens: null,
  values: "plain",
  seed: 3,
} as const;

function mapHalves(inputs: ReturnType<typeof randomCall>["inputs"], names: readonly ("query" | "keyValue" | "bK")[]) {
  return Object.fromEntries(names.map((name) => [name, rounded(inputs, "f16")[name]!]));
}

describe("element types in one call", { skip }, () => {
  const { inputs, options } = randomCall(shape);
  const onGpu = { ...options, platform: "webgpu", cfg } as const;

  test("bfloat16 is computed with as float32, exactly", async () => {
    const exact = rounded(inputs, "bf16");
    const result = await mlaAttention(
      { ...inputs, query: stored(inputs.query, "bf16"), keyValue: stored(inputs.keyValue, "bf16") },
      onGpu,
    );
    assertEquals(result.dtype ?? "f32", "f32");
    const expected = await oracle({ ...inputs, query: exact.query, keyValue: exact.keyValue }, options);
    assertClose(result, expected, { relL2: 1e-5 });
  });

  test("bfloat16 becomes float32 on the GPU", async () => {
    const there = await toGpu(stored(inputs.keyValue, "bf16"));
    assertEquals(there.dtype, "f32");
    assertEquals((await toHost(there)).data, rounded(inputs, "bf16").keyValue.data);
    there.dispose();
  });

  for (const names of [["query"], ["keyValue"], ["bK"], ["query", "bK"]] as const) {
    test(`halves for ${names.join(" and ")}, float32 for the rest`, async () => {
      const halves = Object.fromEntries(names.map((name) => [name, toHalves(inputs[name]!)]));
      const result = await mlaAttention({ ...inputs, ...halves }, onGpu);
      const expected = await oracle({ ...inputs, ...mapHalves(inputs, names) }, options);
      // Only a result stored in halves is rounded to them.
      const isHalf = (names as readonly string[]).includes("query");
      assertEquals(result.dtype ?? "f32", isHalf ? "f16" : "f32");
      assertClose(result, expected, isHalf ? half : { relL2: 1e-5 });
    });
  }

  test("the reference takes halves and gives halves", async () => {
    const result = await mlaAttention({ ...inputs, query: toHalves(inputs.query) }, {
      ...options,
      platform: "reference",
    });
    assertEquals(result.dtype, "f16");
    const expected = await oracle({ ...inputs, ...mapHalves(inputs, ["query"]) }, options);
    assertEquals(halfBits(result.data), halfBits(toHalves(expected).data));
  });
});

describe("halves on a device without half precision", { skip }, () => {
  const { inputs, options } = randomCall(shape);

  test("give the same results, and one event", async () => {
    const device = await openTestDevice();
    assertEquals((await gpuContext(device)).capabilities.f16, false);
    const events: MlaEvent[] = [];
    const expected = await oracleOnHalves(inputs, options);
    for (const side of ["host", "gpu"] as const) {
      const attention = attentionOn(side, "f16", { cfg, device });
      const listening: Attention = (inputs, math) =>
        attention(inputs, { ...math, onEvent: (event: MlaEvent) => void events.push(event) } as typeof math);
      assertClose(await listening(inputs, options), expected, half, side);
      assertClose(await listening(inputs, options), expected, half, side);
    }
    assertEquals(events.map(({ code }) => code), ["f16-converted"]);
    assert(events[0].message.includes("shader-f16"), events[0].message);
    assertEquals((await gpuContext(device)).buffers.lent, 0);
    device.destroy();
  });

  test("agree with the oracle on random problems, wherever their rows lie", async () => {
    const device = await openTestDevice();
    const attention = attentionOn("gpu", "f16", { cfg, device });
    const quiet: Attention = (inputs, math) => attention(inputs, { ...math, onEvent() {} } as typeof math);
    await agreesWith(oracleOnHalves)(quiet, { runs: 30, tolerance: 3e-3, absolute: 1e-3, limits });
    device.destroy();
  });

  test("are written to views at odd offsets without touching their neighbours", async () => {
    const device = await openTestDevice();
    const elements = mlaProblem(inputs, options);
    const count = elements.queryLength * elements.queryHeads * elements.vHeadDim;
    const around = await toGpu(tensor(new Uint16Array(count + 4).fill(0x1234), [count + 4], { dtype: "f16" }), device);
    const out = { ...around, offset: 2, shape: [1, elements.queryLength, elements.queryHeads, elements.vHeadDim] };
    await mlaAttention(inputs, { ...options, platform: "webgpu", cfg, device, out, onEvent() {} });
    const bits = halfBits((await toHost(around)).data as Uint16Array);
    assertEquals([bits[0], ...bits.slice(-3)], [0x1234, 0x1234, 0x1234, 0x1234]);
    const inside = toFloats({ data: bits.slice(1, -3), shape: out.shape, dtype: "f16" });
    assertClose(inside, await oracle(inputs, options), half);
    device.destroy();
  });
});
