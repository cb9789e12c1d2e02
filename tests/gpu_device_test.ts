import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects, assertStrictEquals } from "@std/assert";
import {
  type AnyTensor,
  ConfigSelectorChain,
  defaultExecutor,
  Executor,
  type FlashMLAConfig,
  FlashMLAError,
  mlaAttention,
  type MlaCall,
  policyOverride,
  Tuner,
} from "../mod.ts";
import type { GpuLimits } from "../src/gpu/capabilities.ts";
import { type GpuContext, gpuContext } from "../src/gpu/device.ts";
import { findGpu } from "../src/gpu/engine.ts";
import { webgpuTarget } from "../src/gpu/webgpu_implementation.ts";
import { mlaProblem } from "../src/op/mla_problem.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { skip, smallConfig, testContext } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { problems, type ProblemShape, randomCall } from "./support/random_problem.ts";
import fc from "fast-check";

const shape: ProblemShape = {
  batch: 3,
  queryLength: 21,
  keyLength: 34,
  kvHeads: 4,
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
};
const { inputs, options } = randomCall(shape);
const problem = mlaProblem(inputs, options);
const expected = skip === false ? referenceMlaAttention(inputs, problem) : null!;
const onGpu = { ...options, platform: "webgpu", cfg: smallConfig } as const;

async function openDevice(descriptor: GPUDeviceDescriptor = {}): Promise<GPUDevice> {
  const adapter = await (await findGpu()).requestAdapter();
  return await adapter!.requestDevice(descriptor);
}

/** The test device with limits that it claims and we have to keep. */
async function limited(limits: Partial<GpuLimits>): Promise<GpuContext> {
  const context = await testContext();
  const { capabilities } = context;
  return { ...context, capabilities: { ...capabilities, limits: { ...capabilities.limits, ...limits } } };
}

describe("the process's own device", { skip }, () => {
  test("is opened once", async () => {
    assertStrictEquals(await gpuContext(), await gpuContext());
  });

  test("is opened anew after it was lost", async () => {
    const first = await gpuContext();
    first.device.destroy();
    await first.device.lost;
    const second = await gpuContext();
    assert(second !== first);
    assertClose(await mlaAttention(inputs, onGpu), expected, { relL2: 1e-5 });
  });

  test("rejects the calls that lose it, and serves the next", async () => {
    const { device } = await gpuContext();
    const calls = [mlaAttention(inputs, onGpu), mlaAttention(inputs, onGpu)];
    // Attached at once: the losses arrive while we look elsewhere.
    const outcomes = Promise.allSettled(calls);
    await Promise.resolve();
    device.destroy();
    for (const outcome of await outcomes) {
      if (outcome.status === "fulfilled") continue; // it had finished, or began after the loss was known
      assert(outcome.reason instanceof FlashMLAError, String(outcome.reason));
      assertEquals(outcome.reason.code, "device");
      assert(outcome.reason.message.includes("lost"), outcome.reason.message);
    }
    assertClose(await mlaAttention(inputs, onGpu), expected, { relL2: 1e-5 });
  });

  test("gets all its memory back", async () => {
    const { buffers } = await gpuContext();
    const lent = buffers.lent;
    for (let i = 0; i < 20; i++) await mlaAttention(inputs, onGpu);
    const idle = buffers.idleBytes;
    for (let i = 0; i < 20; i++) await mlaAttention(inputs, onGpu);
    assertEquals(buffers.lent, lent);
    assertEquals(buffers.idleBytes, idle);
  });
});

describe("options.device", { skip }, () => {
  test("runs with WebGPU's default limits", async () => {
    const device = await openDevice();
    const context = await gpuContext(device);
    assertEquals(context.capabilities.limits.maxComputeWorkgroupStorageSize, 16384);
    assertClose(await mlaAttention(inputs, { ...onGpu, device }), expected, { relL2: 1e-5 });
    assertEquals(context.buffers.lent, 0);
  });

  test("is refused once it is lost", async () => {
    const device = await openDevice();
    device.destroy();
    await device.lost;
    const error = await assertRejects(() => mlaAttention(inputs, { ...onGpu, device }), FlashMLAError, "lost");
    assertEquals(error.code, "device");
  });

  test("is not destroyed by us", async () => {
    const device = await openDevice();
    await mlaAttention(inputs, { ...onGpu, device });
    const buffer = device.createBuffer({ size: 16, usage: 9 });
    await buffer.mapAsync(1);
    buffer.destroy();
    device.destroy();
  });
});

describe("limits of the device", { skip }, () => {
  const cases = {
    "bindings of 4 KiB": { maxStorageBufferBindingSize: 4096 },
    "bindings of 8 KiB": { maxStorageBufferBindingSize: 8192 },
    "two workgroups along an axis": { maxComputeWorkgroupsPerDimension: 2 },
    "both": { maxStorageBufferBindingSize: 8192, maxComputeWorkgroupsPerDimension: 3 },
  };
  for (const [name, limits] of Object.entries(cases)) {
    test(`${name}: the call is cut into pieces`, async () => {
      const context = await limited(limits);
      const result = await webgpuTarget(context).run(problem, inputs, smallConfig);
      assertClose(result, expected, { relL2: 1e-5 });
      assertEquals(context.buffers.lent, 0);
    });
  }

  test("bindings of 4 KiB: any call that fits gives the oracle's answer", async () => {
    const target = webgpuTarget(
      await limited({ maxStorageBufferBindingSize: 4096, maxComputeWorkgroupsPerDimension: 5 }),
    );
    await fc.assert(
      fc.asyncProperty(problems({ length: 60, vHeadDim: 20 }), async (drawn) => {
        const call = randomCall(drawn);
        const dimensions = mlaProblem(call.inputs, call.options);
        try {
          assertClose(
            await target.run(dimensions, call.inputs, smallConfig),
            referenceMlaAttention(call.inputs, dimensions),
            { relL2: 1e-5, absolute: 1e-6 },
          );
        } catch (error) {
          if (!(error instanceof FlashMLAError) || error.code !== "limit") throw error;
        }
      }),
      { numRuns: 60, seed: 5 },
    );
  });

  test("a sequence that cannot be cut is refused before any work", async () => {
    const context = await limited({ maxStorageBufferBindingSize: 1024 });
    const error = await assertRejects(
      () => webgpuTarget(context).run(problem, inputs, smallConfig),
      FlashMLAError,
      "maxStorageBufferBindingSize is 1024",
    );
    assertEquals(error.code, "limit");
    assertEquals(context.buffers.lent, 0);
  });

  test("a buffer that the device cannot hold is refused by name", async () => {
    const { buffers, capabilities } = await testContext();
    try {
      buffers.acquire("storage", capabilities.limits.maxBufferSize + 1);
      assert(false, "it was lent");
    } catch (error) {
      assert(error instanceof FlashMLAError && error.message.includes("maxBufferSize"));
    }
  });
});

describe("PipelineCache", { skip }, () => {
  test("reports what does not compile, with the line, and forgets it", async () => {
    const { pipelines } = await gpuContext();
    const size = pipelines.size;
    const compile = () => pipelines.get("broken", "@compute @workgroup_size(1)\nfn main() { let x: u32 = 1.5; }");
    const error = await assertRejects(compile, FlashMLAError, 'Cannot compile kernel "broken"');
    assertEquals(error.code, "device");
    assertEquals(pipelines.size, size);
  });

  test("compiles a source once", async () => {
    const { pipelines } = await gpuContext();
    const code = "@compute @workgroup_size(1) fn main() {}";
    assertStrictEquals(await pipelines.get("a", code), await pipelines.get("b", code));
  });
});

describe("calls that are out of the ordinary", { skip }, () => {
  const agrees = async (changes: Partial<ProblemShape>, more: Parameters<typeof mlaAttention>[1] = {}) => {
    const drawn = randomCall({ ...shape, batch: 1, ...changes });
    const oracle = await mlaAttention(drawn.inputs, { ...drawn.options, platform: "reference" });
    const result = await mlaAttention(drawn.inputs, { ...drawn.options, platform: "webgpu", ...more });
    assertClose(result, oracle, { relL2: 1e-5 });
  };

  test("value heads wider than the ordinary tiles hold", async () => {
    await policyOverride(defaultExecutor().chain, { cacheMissFallback: "heuristics" }, () => agrees({ vHeadDim: 512 }));
  });

  test("value heads wider than any tile are refused by the limit's name", async () => {
    await policyOverride(defaultExecutor().chain, { cacheMissFallback: "heuristics" }, async () => {
      const error = await assertRejects(() => agrees({ vHeadDim: 16384 }), FlashMLAError, "vHeadDim 16384");
      assert(error.message.includes("maxComputeWorkgroupStorageSize"));
    });
  });

  test("a piece of nothing but empty sequences", async () => {
    const target = webgpuTarget(await limited({ maxStorageBufferBindingSize: 6144 }));
    const drawn = randomCall({ ...shape, batch: 1, queryLength: 60, keyLength: 60, cuSeqlens: [0, 0, 60], kvHeads: 1 });
    const dimensions = mlaProblem(drawn.inputs, drawn.options);
    assertClose(
      await target.run(dimensions, drawn.inputs, smallConfig),
      referenceMlaAttention(drawn.inputs, dimensions),
      { relL2: 1e-5 },
    );
  });

  test("data in shared memory", async () => {
    const data = new Float32Array(new SharedArrayBuffer(inputs.query.data.byteLength));
    data.set(inputs.query.data);
    assertClose(await mlaAttention({ ...inputs, query: { ...inputs.query, data } }, onGpu), expected, { relL2: 1e-5 });
  });

  test("one call's tensors tuned on two devices at once", async () => {
    const tuned = () =>
      new Executor<MlaCall, FlashMLAConfig, AnyTensor>(
        new ConfigSelectorChain({ tuner: new Tuner({ totalBudgetMs: 200 }) }),
      );
    const device = await openDevice();
    const results = await Promise.all([
      mlaAttention(inputs, { ...options, platform: "webgpu", executor: tuned() }),
      mlaAttention(inputs, { ...options, device, executor: tuned() }),
    ]);
    for (const result of results) assertClose(result, expected, { relL2: 1e-5 });
    device.destroy();
  });
});
