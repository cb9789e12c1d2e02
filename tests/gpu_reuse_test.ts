// What calls have in common is made once: bind groups, parameter blocks, rotary tables; and never taken for something else.

import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects, assertStrictEquals } from "@std/assert";
import { FlashMLAError, MlaAttention, mlaAttention, mlaModelConfig, toGpu, toHost } from "../mod.ts";
import { BindGroupCache } from "../src/gpu/bind_groups.ts";
import { gpuContext } from "../src/gpu/device.ts";
import { ParamBlocks } from "../src/gpu/param_blocks.ts";
import { rotaryTurns } from "../src/layer/rotary_turns.ts";
import { rotaryTable } from "../src/model/rotary.ts";
import { openTestDevice, skip, smallConfig, smallDecodeConfig, testContext } from "./support/gpu.ts";
import { randomStates } from "./support/layer_runs.ts";
import { assertClose } from "./support/metrics.ts";
import { randomWeights, smallConfigs } from "./support/random_layer.ts";

/** Counts the calls of some methods until it is ended. */
function counting(objects: readonly (readonly [object: object, names: readonly string[]])[]) {
  const counts: Record<string, number> = {};
  for (const [object, names] of objects) {
    const methods = object as Record<string, (...given: unknown[]) => unknown>;
    for (const name of names) {
      const method = methods[name];
      counts[name] = 0;
      methods[name] = function (...given) {
        counts[name]++;
        return method.apply(this, given);
      };
    }
  }
  const end = () => objects.forEach(([object, names]) => names.forEach((name) => delete (object as never)[name]));
  return { counts, end };
}

describe("a decoding step of a layer", { skip }, () => {
  test("asks the device for nothing that an earlier one asked for, and waits once", async () => {
    const { device, buffers } = await testContext();
    const config = mlaModelConfig(smallConfigs["deepseek_v2, yarn"]);
    using layer = await MlaAttention.load(config, randomWeights(config, 1), { platform: "webgpu" });
    using cache = await layer.createCache({ batch: 2, length: 40, pageSize: 16 });
    const options = { cache, cfg: smallConfig, decodeCfg: smallDecodeConfig };
    await layer.forward(randomStates(1, 2, 5, config.hiddenSize), options);
    using token = await toGpu(randomStates(2, 2, 1, config.hiddenSize));
    const step = async () => (await layer.forward(token, options)).dispose();
    for (let i = 0; i < 3; i++) await step();
    // Poison is written to every buffer that is lent.
    buffers.poison = false;
    const { counts, end } = counting([
      [device, [
        "createBindGroup",
        "createBuffer",
        "createComputePipelineAsync",
        "popErrorScope",
        "createCommandEncoder",
      ]],
      [device.queue, ["writeBuffer", "submit"]],
    ]);
    try {
      // Into the next page, too.
      for (let i = 0; i < 10; i++) await step();
    } finally {
      end();
      buffers.poison = true;
    }
    const { writeBuffer, ...others } = counts;
    assertEquals(others, {
      ...{ createBindGroup: 0, createBuffer: 0, createComputePipelineAsync: 0 },
      ...{ popErrorScope: 30, createCommandEncoder: 10, submit: 10 },
    });
    // Of each step angles, places, and the lengths, table and schedule of attention.
    assert(writeBuffer <= 60, `${writeBuffer} writes in 10 steps`);
  });

  test("gives what the reference gives when its memory has been another call's meanwhile", async () => {
    await testContext();
    const config = mlaModelConfig(smallConfigs.youtu);
    const weights = randomWeights(config, 3);
    using layer = await MlaAttention.load(config, weights, { platform: "webgpu" });
    using oracle = await MlaAttention.load(config, weights, { platform: "reference" });
    using cache = await layer.createCache({ batch: 1, length: 30 });
    using oracleCache = await oracle.createCache({ batch: 1, length: 30 });
    const options = { cfg: smallConfig, decodeCfg: smallDecodeConfig };
    for (let i = 0; i < 6; i++) {
      const states = randomStates(10 + i, 1, 1 + i % 3, config.hiddenSize);
      const output = await layer.forward(states, { ...options, cache });
      assertClose(output, await oracle.forward(states, { cache: oracleCache }), { relL2: 2e-5 }, `step ${i}`);
      // Another one, of the same shapes, between them.
      await layer.forward(randomStates(50 + i, 1, 1 + i % 3, config.hiddenSize), options);
    }
  });
});

describe("bind groups", { skip }, () => {
  test("are the same for the same buffers, and others for other parts of them and after a failure", async () => {
    const { device } = await testContext();
    const code = "@group(0) @binding(0) var<storage, read_write> x: array<f32>;\n" +
      "@group(0) @binding(1) var<storage, read> y: array<f32>;\n@compute @workgroup_size(1) fn main() { x[0] = y[0]; }";
    const module = device.createShaderModule({ code });
    const pipeline = device.createComputePipeline({ layout: "auto", compute: { module, entryPoint: "main" } });
    const buffers = [1, 2, 3].map(() => device.createBuffer({ size: 1024, usage: 0x80 }));
    const groups = new BindGroupCache(device);
    const entries = (first: number, second: number, offset = 0) => [
      { binding: 0, resource: { buffer: buffers[first], size: 256 } },
      { binding: 1, resource: { buffer: buffers[second], offset, size: 256 } },
    ];
    const made = groups.get(pipeline, "one", entries(0, 1));
    assertStrictEquals(groups.get(pipeline, "one", entries(0, 1)), made);
    assertStrictEquals(groups.find(pipeline, "one", entries(0, 1)), made);
    for (const other of [entries(1, 0), entries(0, 2), entries(0, 1, 256)]) {
      assertEquals(groups.find(pipeline, "one", other), undefined);
      assert(groups.get(pipeline, "one", other) !== made);
    }
    assertEquals(groups.find(pipeline, "another", entries(0, 1)), undefined);
    assertEquals(groups.size, 4);
    groups.clear();
    assertEquals([groups.find(pipeline, "one", entries(0, 1)), groups.size], [undefined, 0]);
    buffers.forEach((buffer) => buffer.destroy());
  });

  test("of a call that failed are not remembered", async () => {
    const { device } = await testContext();
    const foreign = await openTestDevice();
    const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
    const inputs = { query: ones(1, 2, 1, 8), wKc: ones(16, 1, 8), wVc: ones(16, 1, 4) };
    const strange = { ...await toGpu(ones(1, 2, 16), foreign), device: undefined };
    const options = { device, cfg: smallConfig };
    for (let i = 0; i < 2; i++) {
      const error = await assertRejects(
        () => mlaAttention({ ...inputs, keyValue: strange }, options),
        FlashMLAError,
        "Cannot run MLA: a tensor's buffer is not of the device",
      );
      assertEquals(error.code, "invalid-input");
    }
    const { data } = await mlaAttention({ ...inputs, keyValue: ones(1, 2, 16) }, options);
    assertEquals([...data], Array.from({ length: 8 }, () => 16));
    foreign.destroy();
  });
});

describe("parameter blocks", { skip }, () => {
  test("are one for one content, stay while they are used, and hold what was asked for after others took their place", async () => {
    const device = await openTestDevice();
    await gpuContext(device);
    const blocks = new ParamBlocks(device);
    const words = (value: number) => Uint16Array.of(value, 7, 0, 0, 0, 0, 0, 0);
    const created: GPUBuffer[] = [];
    const createBuffer = device.createBuffer;
    device.createBuffer = (descriptor) => {
      // To be read back below.
      const buffer = createBuffer.call(device, { ...descriptor, usage: descriptor.usage | 0x84 });
      created.push(buffer);
      return buffer;
    };
    const held = blocks.lend(words(1));
    assertStrictEquals(blocks.lend(words(1)), held);
    blocks.giveBack(held);
    const idle = blocks.lend(words(2));
    blocks.giveBack(idle);
    for (let value = 3; value < 1500; value++) blocks.giveBack(blocks.lend(words(value)));
    assertStrictEquals(blocks.lend(words(1)), held);
    const again = blocks.lend(words(2));
    assert(again !== idle, "the block used longest ago was kept among 1,500");
    blocks.discard(again);
    assert(blocks.lend(words(2)) !== again);
    assertEquals(created.length, 1501);
    delete (device as { createBuffer?: unknown }).createBuffer;
    for (const [buffer, value] of [[held, 1], [again, 2]] as const) {
      const read = await toHost({ buffer, dtype: "f16", shape: [2], device });
      assertEquals([...new Uint16Array(read.data.buffer, read.data.byteOffset, 2)], [value, 7]);
    }
    device.destroy();
  });
});

test("rotary tables are kept by what decides them, and each sequence has its own", () => {
  const { rope } = mlaModelConfig({ ...smallConfigs.youtu, rope_parameters: { rope_type: "dynamic", factor: 4 } });
  const positions = Float64Array.from([0, 1, 100, 101]);
  const packed = rotaryTurns(rope!, { tokenStarts: [0, 2, 4], positions });
  assertStrictEquals(rotaryTurns({ ...rope! }, { tokenStarts: [0, 2, 4], positions: positions.slice() }), packed);
  const whole = rotaryTurns(rope!, { tokenStarts: [0, 4], positions });
  assert(whole !== packed);
  const pairs = rope!.dim / 2;
  for (const [turns, starts] of [[packed, [0, 2, 4]], [whole, [0, 4]]] as const) {
    for (let s = 0; s + 1 < starts.length; s++) {
      const { cos, sin } = rotaryTable(rope!, positions.subarray(starts[s], starts[s + 1]));
      for (let i = 0; i < cos.length; i++) {
        const at = 2 * (starts[s] * pairs + i);
        assertEquals([turns[at], turns[at + 1]], [cos[i], sin[i]]);
      }
    }
  }
  // The first two tokens are far from the end of the longer sequence, whose angles are stretched.
  assert(packed[2 * (pairs + 1)] !== whole[2 * (pairs + 1)]);
  for (let i = 0; i < 8; i++) rotaryTurns(rope!, { tokenStarts: [0, 1], positions: Float64Array.of(i) });
  assert(rotaryTurns(rope!, { tokenStarts: [0, 4], positions }) !== whole, "tables are kept for ever");
});
