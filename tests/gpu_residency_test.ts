import process from "node:process";
import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import fc from "fast-check";
import {
  emptyOnGpu,
  encodeMlaAttention,
  FlashMLAError,
  type GpuTensor,
  mlaAttention,
  type MlaInputs,
  type OwnedGpuTensor,
  tensor,
  toGpu,
  toHost,
  viewOnGpu,
} from "../mod.ts";
import { type GpuContext, gpuContext } from "../src/gpu/device.ts";
import { mostKeyRows } from "../src/gpu/key_rows.ts";
import { webgpuTarget } from "../src/gpu/webgpu_implementation.ts";
import { halfBits, toFloats, toHalves } from "../src/op/half.ts";
import { type HostInputs, mapTensors, mlaProblem, outputShape } from "../src/op/mla_problem.ts";
import { elementBytes, elementCount, type Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { attentionProperties } from "./support/attention_properties.ts";
import { attentionOn, rounded, stored } from "./support/dtype_attention.ts";
import { goldenCases } from "./support/golden.ts";
import { openTestDevice, skip, smallConfig, testContext } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { mulberry32, problems, type ProblemShape, randomCall } from "./support/random_problem.ts";

const cfg = smallConfig;
const limits = { kvLoraRank: 24, qkNopeHeadDim: 20, qkRopeHeadDim: 12, vHeadDim: 40 };
const shape: ProblemShape = {
  batch: 3,
  queryLength: 21,
  keyLength: 34,
  kvHeads: 2,
  headsPerKvHead: 2,
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
};
const { inputs, options } = randomCall(shape);
const oracle = (inputs: HostInputs, math = options) => referenceMlaAttention(inputs, mlaProblem(inputs, math));
const expected = skip === false ? oracle(inputs) : null!;
const onGpu = { ...options, platform: "webgpu", cfg } as const;

/** Every tensor of a call on the GPU, and a function that gives all of them back. */
async function upload(inputs: HostInputs, device?: GPUDevice): Promise<[MlaInputs<OwnedGpuTensor>, () => void]> {
  const made: OwnedGpuTensor[] = [];
  for (const name of ["query", "keyValue", "wKc", "wVc", "bQ", "bK"] as const) {
    if (inputs[name]) made.push(await toGpu(inputs[name], device));
  }
  const next = made.values();
  return [mapTensors(inputs, () => next.next().value!), () => made.forEach((tensor) => tensor.dispose())];
}

async function floats(tensor: GpuTensor): Promise<Tensor> {
  return toFloats(await toHost(tensor));
}

/** A view with gaps before, between and behind its rows, full of NaN, in a buffer of the test's own. */
function scattered(
  { device }: GpuContext,
  tensor: Tensor,
  dtype: "f32" | "f16",
  random: () => number,
): GpuTensor & { read(): Promise<Float32Array> } {
  const gap = () => Math.floor(random() * 4) * (random() < 0.5 ? 4 : 1);
  const strides = [1];
  for (let axis = tensor.shape.length - 1, span = tensor.shape[axis]; axis > 0; axis--) {
    strides.unshift(span + gap());
    span = strides[0] * tensor.shape[axis - 1];
  }
  const start = gap() + Math.floor(random() * 2) * 70;
  const length = Math.ceil((start + strides[0] * tensor.shape[0] + 4) / 2) * 2;
  const all = { data: new Float32Array(length).fill(NaN), shape: [length] };
  eachElement(tensor.shape, (i, index) => {
    all.data[start + index.reduce((at, n, axis) => at + n * strides[axis], 0)] = tensor.data[i];
  });
  const source = dtype === "f16" ? halfBits(toHalves(all).data) : all.data;
  const buffer = device.createBuffer({ size: source.byteLength, usage: 0x80 | 0x4 | 0x8 });
  device.queue.writeBuffer(buffer, 0, source as Float32Array<ArrayBuffer>);
  const view: GpuTensor = { buffer, shape: tensor.shape, dtype, offset: start * elementBytes(dtype), strides, device };
  return { ...view, read: async () => (await floats({ buffer, shape: [length], dtype, device })).data };
}

function eachElement(shape: readonly number[], visit: (i: number, index: readonly number[]) => void): void {
  for (let i = 0; i < elementCount(shape); i++) {
    const index: number[] = [];
    for (let axis = shape.length - 1, rest = i; axis >= 0; axis--) {
      index.unshift(rest % shape[axis]);
      rest = Math.floor(rest / shape[axis]);
    }
    visit(i, index);
  }
}

describe("toGpu() and toHost()", { skip }, () => {
  test("give back what they were given, of any length", async () => {
    await testContext();
    for (const length of [0, 1, 2, 3, 257]) {
      const data = Float32Array.from({ length }, (_, i) => i - 1.5);
      for (const dtype of ["f32", "f16"] as const) {
        const there = await toGpu(stored({ data, shape: [length] }, dtype));
        assertEquals([there.dtype, there.shape], [dtype, [length]]);
        assertEquals(toFloats(await toHost(there)).data, data);
        there.dispose();
      }
    }
  });

  test("read views", async () => {
    const context = await testContext();
    const random = mulberry32(1);
    for (const dtype of ["f32", "f16"] as const) {
      for (let i = 0; i < 20; i++) {
        const rows = { data: Float32Array.from({ length: 60 }, (_, i) => i), shape: [3, 4, 5] };
        assertEquals((await floats(scattered(context, rows, dtype, random))).data, rows.data);
      }
    }
  });

  test("refuse what lies on the other side already", async () => {
    const there = await toGpu(inputs.query);
    await assertRejects(() => toGpu(there as never), FlashMLAError, "it lies on a GPU already");
    await assertRejects(() => toHost(inputs.query as never), FlashMLAError, "a tensor on the host");
    there.dispose();
    there.dispose();
    await assertRejects(() => toHost(there), FlashMLAError, "disposed");
  });
});

describe("emptyOnGpu() and viewOnGpu()", { skip }, () => {
  test("give room, and parts of it in elements of its type", async () => {
    await testContext();
    for (const dtype of ["f32", "f16"] as const) {
      const rows = { data: Float32Array.from({ length: 60 }, (_, i) => i), shape: [3, 4, 5] };
      const there = await toGpu(stored(rows, dtype));
      const part = viewOnGpu(there, { shape: [3, 2, 4], offset: 6, strides: [20, 5, 1] });
      assertEquals([...(await floats(part)).data.slice(0, 9)], [6, 7, 8, 9, 11, 12, 13, 14, 26]);
      assertEquals((await floats(viewOnGpu(part, { shape: [2], offset: 1 }))).data, new Float32Array([7, 8]));
      assertEquals(part.disposed, false);
      there.dispose();
      assertEquals(part.disposed, true);
      await assertRejects(() => toHost(part), FlashMLAError, "disposed");
      const room = await emptyOnGpu([2, 3], { dtype });
      assertEquals([room.shape, room.dtype], [[2, 3], dtype]);
      assertThrows(() => viewOnGpu(room, { shape: [65536] }), FlashMLAError, "needs a buffer of");
      room.dispose();
    }
  });

  test("refuse shapes and types that are none", async () => {
    await assertRejects(() => emptyOnGpu([1.5]), FlashMLAError, "must hold non-negative integers, got 1.5");
    await assertRejects(() => emptyOnGpu(7 as never), FlashMLAError, "shape must be an array of axis lengths, got 7");
    await assertRejects(() => emptyOnGpu([1], { dtype: "bf16" as "f16" }), FlashMLAError, 'got "bf16"');
  });
});

describe("tensors on the GPU", { skip }, () => {
  const attention = attentionOn("gpu", "f32", { cfg });

  describe("agree with ejkernel", () => {
    for (const { name, inputs, options, expected } of goldenCases()) {
      test(name, async () => {
        await testContext();
        assertClose(await attention(inputs, options), expected, { relL2: 3e-5 }, name);
      });
    }
  });

  describe("keep what is true of attention", () => {
    for (const { name, check } of attentionProperties) {
      test(name, async () => {
        await testContext();
        await check(attention, { runs: 8, tolerance: 2e-5, absolute: 2e-6, limits });
      });
    }
  });

  test("may be views of larger buffers, and so may the result", async () => {
    const context = await testContext();
    const { f16 } = context.capabilities;
    await fc.assert(
      fc.asyncProperty(
        problems(limits),
        fc.integer(),
        fc.constantFrom("f32", f16 ? "f16" : "f32"),
        async (drawn, seed, dtype) => {
          const random = mulberry32(seed);
          const { inputs, options } = randomCall(drawn);
          const problem = mlaProblem(inputs, options);
          const views = mapTensors<Tensor, GpuTensor>(
            inputs,
            (tensor, name) =>
              name === "wKc" || name === "wVc"
                ? dense(context, tensor, dtype)
                : scattered(context, tensor, dtype, random),
          );
          const shape = outputShape(problem);
          const guard = { data: new Float32Array(elementCount(shape)).fill(NaN), shape };
          const out = scattered(context, guard, dtype, random);
          assertEquals(await mlaAttention(views, { ...options, cfg, out }), out);
          assertClose(
            await floats(out),
            referenceMlaAttention(rounded(inputs, dtype), problem),
            dtype === "f16" ? { relL2: 3e-3, absolute: 1e-3 } : { relL2: 1e-5, absolute: 1e-6 },
          );
          const written = (await out.read()).filter((x) => !Number.isNaN(x)).length;
          assertEquals(written, elementCount(shape), "elements outside of the view were written");
        },
      ),
      { numRuns: 50, seed: 11 },
    );
  });

  test("may be parts of one KV cache with room for more", async () => {
    await testContext();
    const { batch, keyLength, kvLoraRank: L, qkRopeHeadDim: R } = shape;
    const room = 50;
    const rows = new Float32Array(batch * room * (L + R)).fill(NaN);
    for (let b = 0; b < batch; b++) {
      for (let j = 0; j < keyLength; j++) {
        const at = (b * room + j) * (L + R);
        const from = b * keyLength + j;
        rows.set(inputs.keyValue.data.subarray(from * L, (from + 1) * L), at);
        rows.set(inputs.bK!.data.subarray(from * R, (from + 1) * R), at + L);
      }
    }
    const cache = await toGpu(tensor(rows, [batch, room, L + R]));
    const strides = [room * (L + R), L + R, 1];
    const keyValue: GpuTensor = { ...cache, shape: [batch, keyLength, L], strides };
    const bK: GpuTensor = { ...cache, shape: [batch, keyLength, R], strides, offset: L * 4 };
    assertClose(await mlaAttention({ ...inputs, keyValue, bK }, onGpu), expected, { relL2: 1e-5 });
    cache.dispose();
  });

  test("give a tensor on the GPU, without reading back", async () => {
    const context = await testContext();
    const [there, giveBack] = await upload(inputs);
    const acquire = context.buffers.acquire.bind(context.buffers);
    const usages: string[] = [];
    context.buffers.acquire = (usage, size) => (usages.push(usage), acquire(usage, size));
    const result = await mlaAttention(there, onGpu);
    context.buffers.acquire = acquire;
    assert(!usages.includes("readback"), usages.join());
    assertEquals([result.shape, result.dtype, result.device], [outputShape(mlaProblem(inputs)), "f32", context.device]);
    assertClose(await floats(result), expected, { relL2: 1e-5 });
    result.dispose();
    giveBack();
  });

  test("mix with tensors on the host; the result is where the query is", async () => {
    await testContext();
    const [there, giveBack] = await upload(inputs);
    const host = await mlaAttention({ ...there, query: inputs.query }, onGpu);
    assertClose(host, expected, { relL2: 1e-5 });
    const onDevice = await mlaAttention({ ...inputs, query: there.query }, onGpu);
    assertClose(await floats(onDevice), expected, { relL2: 1e-5 });
    onDevice.dispose();
    giveBack();
  });

  test("can be weights, uploaded once for many calls", async () => {
    await testContext();
    const [{ wKc, wVc }, giveBack] = await upload(inputs);
    for (let seed = 0; seed < 3; seed++) {
      const call = randomCall({ ...shape, seed });
      const result = await mlaAttention({ ...call.inputs, wKc, wVc }, onGpu);
      const same = { ...call.inputs, wKc: inputs.wKc, wVc: inputs.wVc };
      assertClose(result, oracle(same), { relL2: 1e-5 });
    }
    assertEquals(wVc.disposed, false);
    giveBack();
  });

  test("are tuned without a look at the result", async () => {
    const [there, giveBack] = await upload(inputs);
    const guard = await toGpu({ data: new Float32Array(elementCount(expected.shape)).fill(7), shape: expected.shape });
    const out = await mlaAttention(there, { ...options, out: guard });
    assertEquals(out, guard);
    assertClose(await floats(out), expected, { relL2: 1e-5 });
    guard.dispose();
    giveBack();
  });

  test("without any key give rows of zeros, views included", async () => {
    const context = await testContext();
    const none = randomCall({ ...shape, keyLength: 0 });
    const [there, giveBack] = await upload(none.inputs);
    const out = scattered(
      context,
      { data: expected.data.slice().fill(NaN), shape: expected.shape },
      "f32",
      mulberry32(5),
    );
    await mlaAttention(there, { ...onGpu, out });
    assert((await floats(out)).data.every((x) => x === 0));
    giveBack();
  });
});

/** A dense tensor in a buffer of the test's own. */
function dense({ device }: GpuContext, tensor: Tensor, dtype: "f32" | "f16"): GpuTensor {
  const host = stored(tensor, dtype);
  const bytes = new Uint8Array(Math.ceil(elementCount(tensor.shape) * elementBytes(dtype) / 4) * 4 || 4);
  bytes.set(new Uint8Array(host.data.buffer, host.data.byteOffset, host.data.byteLength));
  const buffer = device.createBuffer({ size: bytes.length, usage: 0x80 | 0x4 | 0x8 });
  device.queue.writeBuffer(buffer, 0, bytes);
  return { buffer, shape: tensor.shape, dtype, device };
}

describe("options.out", { skip }, () => {
  test("is written in place, on either side", async () => {
    await testContext();
    const host = { data: new Float32Array(expected.data.length).fill(NaN), shape: expected.shape };
    assertEquals(await mlaAttention(inputs, { ...onGpu, out: host }), host);
    assertClose(host, expected, { relL2: 1e-5 });
    const half = toHalves({ data: new Float32Array(expected.data.length).fill(NaN), shape: expected.shape });
    assertEquals(await mlaAttention(inputs, { ...onGpu, out: half }), half);
    assertClose(half, expected, { relL2: 3e-3 });
    const there = await toGpu(host);
    assertEquals(await mlaAttention(inputs, { ...onGpu, out: there }), there);
    assertClose(await floats(there), expected, { relL2: 1e-5 });
    there.dispose();
    const reference = { data: new Float32Array(expected.data.length).fill(NaN), shape: expected.shape };
    assertEquals(await mlaAttention(inputs, { ...options, platform: "reference", out: reference }), reference);
    assertClose(reference, expected, { relL2: 1e-5 });
  });

  test("of another shape, type or place is refused", async () => {
    const [own, giveBack] = await upload(inputs);
    const arena = await toGpu(tensor(new Float32Array(8192), [8192]));
    const there = { ...own, keyValue: { ...arena, shape: inputs.keyValue.shape, offset: 20000 } };
    const wrong: [unknown, string][] = [
      [{ data: new Float32Array(4), shape: [1, 1, 1, 4] }, "out has shape [1,1,1,4], the result has [3,21,4,16]"],
      [{ ...stored(expected, "bf16") }, 'out has dtype "bf16"'],
      [{ ...arena, shape: expected.shape, strides: [0, 64, 16, 1] }, "give two elements one place"],
      [{ ...arena, shape: expected.shape }, "out lies in the buffer of keyValue"],
    ];
    for (const [out, message] of wrong) {
      const error = await assertRejects(
        () => mlaAttention(there, { ...onGpu, out: out as GpuTensor }),
        FlashMLAError,
        message,
      );
      assertEquals(error.code, "invalid-input");
    }
    arena.dispose();
    giveBack();
  });
});

describe("encodeMlaAttention()", { skip }, () => {
  test("records calls one after another into one submission", async () => {
    const { device, buffers } = await testContext();
    const lent = buffers.lent;
    const [there, giveBack] = await upload(inputs);
    // The second call's queries are the first one's output: 16 columns, of which 4 are taken for rotary ones.
    const next = randomCall({ ...shape, qkNopeHeadDim: 12, seed: 9 });
    const encoder = device.createCommandEncoder();
    const first = await encodeMlaAttention(encoder, there, { ...options, cfg });
    const second = await encodeMlaAttention(encoder, { ...next.inputs, query: first.output }, { ...options, cfg });
    device.queue.submit([encoder.finish()]);
    const result = await floats(second.output);
    const between = { ...next.inputs, query: expected };
    assertClose(result, oracle(between), { relL2: 1e-5 });
    for (const { output, dispose } of [first, second]) {
      dispose();
      dispose();
      output.dispose();
    }
    giveBack();
    assertEquals(buffers.lent, lent);
  });

  test("shares scratch among the calls of one encoder", async () => {
    const { device, buffers } = await testContext();
    const [there, giveBack] = await upload(inputs);
    const encoder = device.createCommandEncoder();
    const lent = buffers.lent;
    const calls = [await encodeMlaAttention(encoder, there, { ...options, cfg })];
    const forOne = buffers.lent - lent;
    for (let i = 0; i < 3; i++) calls.push(await encodeMlaAttention(encoder, there, { ...options, cfg }));
    // One buffer for keys and values of the first call, and an output for each.
    assertEquals([forOne, buffers.lent - lent], [2, 5]);
    calls[0].dispose();
    device.queue.submit([encoder.finish()]);
    for (const call of calls) {
      assertClose(await floats(call.output), expected, { relL2: 1e-5 });
      call.dispose();
      call.output.dispose();
    }
    giveBack();
    assertEquals(buffers.lent, lent - 5);
  });

  test("writes to a caller's tensor, and stays within it when other calls come before the submission", async () => {
    const { device } = await testContext();
    const [there, giveBack] = await upload(inputs);
    const out = await toGpu({ data: expected.data.slice().fill(NaN), shape: expected.shape });
    const encoder = device.createCommandEncoder();
    const call = await encodeMlaAttention(encoder, { ...there, keyValue: inputs.keyValue }, { ...options, cfg, out });
    assertEquals(call.output, out);
    for (let seed = 0; seed < 3; seed++) {
      const other = randomCall({ ...shape, seed });
      assertClose(await mlaAttention(other.inputs, onGpu), oracle(other.inputs), { relL2: 1e-5 });
    }
    device.queue.submit([encoder.finish()]);
    call.dispose();
    assertClose(await floats(out), expected, { relL2: 1e-5 });
    out.dispose();
    giveBack();
  });

  test("refuses what is no encoder, a host tensor for the result, and a platform that records nothing", async () => {
    const { device } = await testContext();
    const encoder = device.createCommandEncoder();
    const wrong: [() => Promise<unknown>, string][] = [
      [
        () => encodeMlaAttention({} as GPUCommandEncoder, inputs, { ...options, cfg }),
        "encoder must be a GPUCommandEncoder",
      ],
      [
        () => encodeMlaAttention(encoder, inputs, { ...options, cfg, out: expected as never }),
        "out must lie on the GPU",
      ],
      [() => encodeMlaAttention(encoder, inputs, { ...options, platform: "reference" }), "has nothing to record"],
    ];
    for (const [call, message] of wrong) await assertRejects(call, FlashMLAError, message);
  });

  test("into an encoder of another device fails at its end, by our kernel's name, and harms nothing", async () => {
    const { buffers } = await testContext();
    const other = await openTestDevice();
    const lent = buffers.lent;
    const encoder = other.createCommandEncoder();
    const call = await encodeMlaAttention(encoder, inputs, { ...options, cfg });
    other.pushErrorScope("validation");
    encoder.finish();
    const error = await other.popErrorScope();
    assert(error !== null && /flash-mla expandKeys/.test(error.message), error?.message);
    call.dispose();
    call.output.dispose();
    assertEquals(buffers.lent, lent);
    assertClose(await mlaAttention(inputs, onGpu), expected, { relL2: 1e-5 });
    other.destroy();
  });
});

describe("faults", { skip }, () => {
  const rejected = async (call: Partial<MlaInputs>, message: string, more = {}) => {
    const { buffers } = await testContext();
    const lent = buffers.lent;
    const error = await assertRejects(
      () => mlaAttention({ ...inputs, ...call } as HostInputs, { ...onGpu, ...more }),
      FlashMLAError,
      message,
    );
    assertEquals(error.code, "invalid-input");
    assertEquals(buffers.lent, lent);
    assertClose(await mlaAttention(inputs, onGpu), expected, { relL2: 1e-5 });
  };
  const raw = async (size: number, usage = 0x80 | 0x4 | 0x8) =>
    (await testContext()).device.createBuffer({ size, usage });
  const queryShape = [...inputs.query.shape];
  const queryBytes = inputs.query.data.byteLength;

  test("a buffer without usage STORAGE", async () => {
    const buffer = await raw(queryBytes, 0x4 | 0x8);
    await rejected(
      { query: { buffer, shape: queryShape, dtype: "f32" } },
      "buffer must have usage STORAGE, got usage 0xc",
    );
  });

  test("a buffer that is too small", async () => {
    const buffer = await raw(queryBytes);
    await rejected(
      { query: { buffer, shape: queryShape, dtype: "f32", offset: 4 } },
      `needs a buffer of ${queryBytes + 4} bytes, got ${queryBytes}`,
    );
  });

  test("halves of odd length in a buffer that is not padded to a word", async () => {
    // No engine makes such buffers mappable, but all of them make them.
    const buffer = await raw(34 * 3 * 3 * 2);
    await rejected(
      { bK: { buffer, shape: [3, 34, 3], dtype: "f16", offset: 2 } },
      "needs a buffer of 616 bytes (614 rounded up to 4), got 612",
    );
  });

  test("an offset between elements", async () => {
    const buffer = await raw(queryBytes + 4);
    await rejected(
      { query: { buffer, shape: queryShape, dtype: "f32", offset: 2 } },
      "offset must be a multiple of 4 bytes",
    );
  });

  test("columns that lie apart", async () => {
    const buffer = await raw(queryBytes * 4);
    const strides = [3000, 100, 24, 2];
    await rejected(
      { query: { buffer, shape: queryShape, dtype: "f32", strides } },
      "strides [3000,100,24,2] must end with 1",
    );
  });

  test("weights with gaps", async () => {
    const buffer = await raw(65536);
    await rejected(
      { wKc: { buffer, shape: [12, 2, 8], dtype: "f32", strides: [32, 16, 1] } },
      "wKc has strides [32,16,1], weights must be dense",
    );
  });

  test("an unknown element type on the GPU", async () => {
    const buffer = await raw(queryBytes);
    await rejected(
      { query: { buffer, shape: queryShape, dtype: "bf16" as "f16" } },
      'dtype must be "f32" or "f16" on the GPU',
    );
  });

  test("a tensor that was disposed of", async () => {
    const query = await toGpu(inputs.query);
    query.dispose();
    await rejected({ query }, "query as a tensor: it was disposed of");
  });

  test("tensors of two devices", async () => {
    const device = await openTestDevice();
    const keyValue = await toGpu(inputs.keyValue, device);
    const query = await toGpu(inputs.query);
    await rejected({ query, keyValue }, "keyValue lies on another device than query");
    query.dispose();
    device.destroy();
  });

  test("a buffer of a device that nobody named", async () => {
    const device = await openTestDevice();
    const { device: _, ...keyValue } = dense({ device } as GpuContext, inputs.keyValue, "f32");
    await rejected({ keyValue }, "not of the device that runs the call");
    device.destroy();
  });

  test("a buffer that its owner destroyed", async () => {
    const context = await testContext();
    const keyValue = dense(context, inputs.keyValue, "f32");
    keyValue.buffer.destroy();
    const error = await assertRejects(() => mlaAttention({ ...inputs, keyValue }, onGpu), FlashMLAError, "destroyed");
    assert(error.code === "device" || error.code === "invalid-input");
    assertClose(await mlaAttention(inputs, onGpu), expected, { relL2: 1e-5 });
  });

  test("a device that is lost while tensors lie on it", async () => {
    const device = await openTestDevice();
    const [there] = await upload(inputs, device);
    device.destroy();
    await device.lost;
    const error = await assertRejects(() => mlaAttention(there, onGpu), FlashMLAError, "lost");
    assertEquals(error.code, "device");
    await assertRejects(() => toHost(there.query), FlashMLAError, "lost");
    assertClose(await mlaAttention(inputs, onGpu), expected, { relL2: 1e-5 });
  });

  test("a device that runs out of memory", async () => {
    const device = await openTestDevice();
    const { buffers } = await gpuContext(device);
    const [there, giveBack] = await upload(inputs, device);
    // Kept, so that the next call has to ask for memory.
    const result = await mlaAttention(there, onGpu);
    const [lent, idle] = [buffers.lent, buffers.idleBytes];
    assert(idle > 0);
    const popErrorScope = device.popErrorScope;
    class GPUOutOfMemoryError extends Error {}
    const denied = new GPUOutOfMemoryError("Not enough memory left");
    // As engines do it: the scope for memory has caught an error, the others have not.
    let pops = 0;
    device.popErrorScope = () => popErrorScope.call(device).then((caught) => caught ?? (pops++ === 2 ? denied : null));
    const error = await assertRejects(() => mlaAttention(there, onGpu), FlashMLAError, "out of memory");
    assertEquals(error.code, "device");
    device.popErrorScope = popErrorScope;
    assertEquals([buffers.lent, buffers.idleBytes], [lent, 0]);
    const again = await mlaAttention(there, onGpu);
    assertClose(await floats(again), expected, { relL2: 1e-5 });
    again.dispose();
    result.dispose();
    giveBack();
    device.destroy();
  });

  test("200 calls leave as many buffers as they found", async () => {
    const device = await openTestDevice();
    const live = new Set<GPUBuffer>();
    const createBuffer = device.createBuffer;
    device.createBuffer = (descriptor) => {
      const buffer = createBuffer.call(device, descriptor);
      const destroy = buffer.destroy;
      live.add(buffer);
      buffer.destroy = () => (live.delete(buffer), destroy.call(buffer));
      return buffer;
    };
    const [there, giveBack] = await upload(inputs, device);
    const call = async (i: number) => {
      const changed = i % 3 === 0 ? { ...there, query: inputs.query } : there;
      const result = await mlaAttention<GpuTensor | Tensor>(changed, { ...onGpu, device });
      if ("dispose" in result) (result as OwnedGpuTensor).dispose();
      const wrong = { ...there, wKc: inputs.wVc };
      if (i % 10 === 0) await mlaAttention(wrong, { ...onGpu, device }).catch(() => {});
    };
    for (let i = 0; i < 20; i++) await call(i);
    const [before, { buffers }] = [live.size, await gpuContext(device)];
    const lent = buffers.lent;
    for (let i = 0; i < 200; i++) await call(i);
    assertEquals([live.size, buffers.lent], [before, lent]);
    giveBack();
    device.destroy();
  });
});

describe("calls whose surroundings change under way", { skip }, () => {
  test("a result whose memory was transferred is refused, and the next call runs", async () => {
    const { buffers } = await testContext();
    const lent = buffers.lent;
    const out = { data: new Float32Array(expected.data.length), shape: expected.shape };
    const call = mlaAttention(inputs, { ...onGpu, out });
    structuredClone(out.data.buffer, { transfer: [out.data.buffer] });
    const error = await assertRejects(() => call, FlashMLAError, "out needs 4032 elements");
    assertEquals(error.code, "invalid-input");
    assertEquals(buffers.lent, lent);
    for (let i = 0; i < 3; i++) assertClose(await mlaAttention(inputs, onGpu), expected, { relL2: 1e-5 });
  });

  test("a result object that is filled anew meanwhile keeps what the call began with", async () => {
    await testContext();
    const data = new Float32Array(expected.data.length);
    const out = { data, shape: expected.shape };
    const call = mlaAttention(inputs, { ...onGpu, out });
    out.data = new Float32Array(1);
    assertEquals(await call, out);
    assertClose({ data, shape: expected.shape }, expected, { relL2: 1e-5 });
  });

  for (const name of ["keyValue", "out"] as const) {
    test(`${name} that is disposed of before the submission is refused, and other tensors stay whole`, async () => {
      await testContext();
      const [there, giveBack] = await upload(inputs);
      const out = await toGpu({ data: expected.data.slice(), shape: expected.shape });
      const call = mlaAttention(there, { ...onGpu, out });
      call.catch(() => {});
      (name === "out" ? out : there.keyValue).dispose();
      const stranger = await toGpu({ data: expected.data.map(() => 5), shape: expected.shape });
      const outcome = await call.then(() => null, (error) => error);
      // It may have been submitted already: then the result is right.
      if (outcome !== null) {
        assert(
          outcome instanceof FlashMLAError && outcome.message.includes(`${name} was disposed of`),
          String(outcome),
        );
        assert((await floats(stranger)).data.every((x) => x === 5));
      }
      stranger.dispose();
      out.dispose();
      giveBack();
    });
  }

  test("a device that is lost leaves no promise unheard", async () => {
    const unheard: unknown[] = [];
    const hear = (reason: unknown) => void unheard.push(reason);
    process.on("unhandledRejection", hear);
    try {
      for (let i = 0; i < 6; i++) {
        const device = await openTestDevice();
        const call = mlaAttention(inputs, { ...onGpu, device });
        const heard = call.catch((error) => error);
        for (let turn = 0; turn < i; turn++) await Promise.resolve();
        device.destroy();
        const outcome = await heard;
        if (outcome instanceof Error) {
          assert(outcome instanceof FlashMLAError && outcome.code === "device", String(outcome));
        }
      }
      await new Promise((resolve) => setTimeout(resolve, 100));
      assertEquals(unheard, []);
    } finally {
      process.off("unhandledRejection", hear);
    }
  });
});

describe("calls that are cut into pieces", { skip }, () => {
  const limitedTo = async (bytes: number) => {
    const context = await testContext();
    const { capabilities } = context;
    const limits = { ...capabilities.limits, maxStorageBufferBindingSize: bytes };
    return { ...context, capabilities: { ...capabilities, limits } };
  };

  test("may write to memory that their inputs lie in", async () => {
    const target = webgpuTarget(await limitedTo(8192));
    const problem = mlaProblem(inputs, options);
    const item = inputs.query.data.length / shape.batch;
    const memory = new Float32Array(expected.data.length + item);
    memory.set(inputs.query.data);
    const query = { data: memory.subarray(0, inputs.query.data.length), shape: inputs.query.shape };
    const out = { data: memory.subarray(item), shape: expected.shape };
    assertClose(await target.run(problem, { ...inputs, query }, cfg, out), expected, { relL2: 1e-5 });
  });

  test("are cut by what their windows cover, offsets and strides included", () => {
    const limit = 4096;
    const rows = (keyValue: Partial<GpuTensor>, batch = 3) => {
      const view = { buffer: {} as GPUBuffer, shape: [batch, 34, 12], dtype: "f32" as const, ...keyValue };
      const { batch: _, ...problem } = mlaProblem(inputs, options);
      return mostKeyRows({ ...problem, batch, vHeadDim: 4 }, { ...inputs, keyValue: view, bK: undefined }, limit);
    };
    // 34 rows of 48 bytes are 1,632 bytes: two items fit in 4,096.
    assertEquals(rows({}), 68);
    // Time-major: items lie inside each other's rows.
    assertEquals(rows({ strides: [12, 36, 1] }), 34);
    assertEquals(rows({ strides: [12, 24, 1] }, 2), 68);
    // Items lie 2,900 bytes apart.
    assertEquals(rows({ strides: [725, 12, 1] }), 34);
    assertEquals(rows({ shape: [2, 34, 12], strides: [600, 12, 1], offset: 128 }, 2), 34);
    assertEquals(rows({ shape: [2, 34, 12], strides: [600, 12, 1], offset: 0 }, 2), 68);
  });
});
