import process from "node:process";
import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects, assertStrictEquals } from "@std/assert";
import { type DeviceOptions, FlashMLAError, mlaAttention, openDevice } from "../mod.ts";
import { currentRuntime, readEnvironment } from "../src/environment.ts";
import { deviceFingerprint } from "../src/gpu/capabilities.ts";
import { gpuContext } from "../src/gpu/device.ts";
import { browserName, engineOf, findGpu } from "../src/gpu/engine.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { mlaProblem } from "../src/op/mla_problem.ts";
import { skip, smallConfig } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { problems, randomCall } from "./support/random_problem.ts";
import fc from "fast-check";

const runtime = currentRuntime();
const [drawn] = fc.sample(problems({ length: 12 }), { numRuns: 1, seed: 4 });
const { inputs, options } = randomCall(drawn);

/** Sets a variable while `work` runs. */
async function withVariable<Result>(name: string, value: string, work: () => Promise<Result>): Promise<Result> {
  const { default: { env } } = await import("node:process");
  const before = env[name];
  env[name] = value;
  try {
    return await work();
  } finally {
    if (before === undefined) delete env[name];
    else env[name] = before;
  }
}

async function runsOn(device: GPUDevice): Promise<void> {
  const output = await mlaAttention(inputs, { ...options, device, cfg: smallConfig });
  assertClose(output, referenceMlaAttention(inputs, mlaProblem(inputs, options)), { relL2: 1e-5, absolute: 1e-6 });
}

describe("openDevice()", { skip }, () => {
  test("gives a device of the caller's own each time, with the adapter's limits", async () => {
    const [first, second] = await Promise.all([openDevice(), openDevice()]);
    const shared = await gpuContext();
    assert(first !== second);
    assert(first !== shared.device);
    assertEquals((await gpuContext(first)).capabilities, shared.capabilities);
    await runsOn(first);
    first.destroy();
    await runsOn(second);
    second.destroy();
    assertEquals(shared.lost(), null);
  });

  test("takes a GPU of the caller's", async () => {
    const device = await openDevice({ engine: await findGpu(), powerPreference: "low-power" });
    await runsOn(device);
    device.destroy();
  });

  test(
    "runs native and Dawn devices side by side",
    { skip: runtime.name !== "Deno" && "needs two engines" },
    async () => {
      const [native, dawn] = await Promise.all([openDevice({ engine: "native" }), openDevice({ engine: "dawn" })]);
      assertEquals((await engineOf(native)).name, `wgpu (Deno ${runtime.version})`);
      assertEquals((await engineOf(dawn)).name, `Dawn (webgpu 0.6.2, Deno ${runtime.version})`);
      assertEquals([native, dawn].map((device) => device instanceof GPUDevice), [true, false]);
      await Promise.all([runsOn(native), runsOn(dawn)]);
      const fingerprints = await Promise.all(
        [native, dawn].map(async (device) => deviceFingerprint((await gpuContext(device)).capabilities)),
      );
      assert(fingerprints[0] !== fingerprints[1]);
      native.destroy();
      dawn.destroy();
    },
  );

  test("keeps Dawn's entry points alive, one for all devices of a kind", async () => {
    const kept = () => (globalThis as { [key: symbol]: unknown })[Symbol.for("flash-mla.dawn")] as Map<string, GPU>;
    (await openDevice({ engine: "dawn" })).destroy();
    const { size } = kept();
    assert(size > 0);
    (await openDevice({ engine: "dawn" })).destroy();
    assertEquals(kept().size, size);
  });

  test("refuses a feature that the adapter lacks, by name", async () => {
    const error = await assertRejects(
      () => openDevice({ features: ["shader-f16", "time-travel"] }),
      FlashMLAError,
      'has no "time-travel"',
    );
    assertEquals(error.code, "unsupported-platform");
  });

  const wrong: [string, DeviceOptions, string][] = [
    ["an engine's name", { engine: "vulkan" as "dawn" }, 'engine must be "native", "dawn" or a GPU, got "vulkan"'],
    ["an engine without adapters", { engine: {} as GPU }, "got an object"],
    ["a power preference", { powerPreference: "fast" as "low-power" }, "powerPreference must be"],
    ["features", { features: "shader-f16" as unknown as string[] }, "features must be an array"],
    ["an unknown option", { adapter: 0 } as DeviceOptions, 'unknown option "adapter"'],
    ["no options", null as unknown as DeviceOptions, "options must be an object, got null"],
  ];
  for (const [name, given, message] of wrong) {
    test(`throws when given a wrong value: ${name}`, async () => {
      const error = await assertRejects(() => openDevice(given), FlashMLAError, message);
      assertEquals(error.code, "invalid-input");
    });
  }

  test("says what to do where there is no adapter", async () => {
    const none = { requestAdapter: () => Promise.resolve(null) } as unknown as GPU;
    const error = await assertRejects(() => openDevice({ engine: none }), FlashMLAError, "no adapter was found");
    assertEquals(error.code, "unsupported-platform");
    assert(error.message.includes("lavapipe"), error.message);
  });
});

describe("the process's own device", { skip }, () => {
  test("is opened once for concurrent first calls", async () => {
    const before = await gpuContext();
    before.device.destroy();
    await before.device.lost;
    const contexts = await Promise.all([gpuContext(), gpuContext(), gpuContext()]);
    assert(contexts[0] !== before);
    for (const context of contexts) assertStrictEquals(context, contexts[0]);
  });

  test("is of the engine that FLASH_MLA_ENGINE names", async () => {
    const named = readEnvironment("FLASH_MLA_ENGINE");
    const { capabilities } = await gpuContext();
    const dawn = named === "dawn" || (!named && runtime.name !== "Deno");
    assert(capabilities.engine.startsWith(dawn ? "Dawn (webgpu 0.6.2, " : "wgpu (Deno "), capabilities.engine);
  });
});

describe("a caller's device", { skip }, () => {
  test("is probed once for concurrent first calls", async () => {
    const device = await (await (await findGpu()).requestAdapter())!.requestDevice();
    const [first, second] = await Promise.all([gpuContext(device), gpuContext(device)]);
    assertStrictEquals(first, second);
    device.destroy();
  });

  test("that is lost while it is probed is refused as lost", async () => {
    const device = await (await (await findGpu()).requestAdapter())!.requestDevice();
    const context = gpuContext(device);
    device.destroy();
    const error = await assertRejects(() => context, FlashMLAError, "was lost");
    assertEquals(error.code, "device");
  });

  test("is refused when it is none", async () => {
    const error = await assertRejects(() => gpuContext({} as GPUDevice), FlashMLAError, "expected a GPUDevice");
    assertEquals(error.code, "invalid-input");
  });

  test("is refused when it computes nothing, and is left alive", async () => {
    const module = await importDawn();
    const gpu = module.create(["backend=null"]);
    kept.push(gpu);
    const device = await (await gpu.requestAdapter())!.requestDevice();
    const error = await assertRejects(() => gpuContext(device), FlashMLAError, "wrong numbers");
    assertEquals(error.code, "unsupported-platform");
    assert(error.message.includes("null-backend") && error.message.includes("driver"), error.message);
    await device.queue.onSubmittedWorkDone();
    device.destroy();
  });

  test("of ours that computes nothing is destroyed", async () => {
    const module = await importDawn();
    const gpu = module.create(["backend=null"]);
    kept.push(gpu);
    const opened: GPUDevice[] = [];
    const watched = {
      async requestAdapter() {
        const adapter = await gpu.requestAdapter();
        const requestDevice = adapter!.requestDevice.bind(adapter);
        adapter!.requestDevice = async (descriptor) => {
          const device = await requestDevice(descriptor);
          opened.push(device);
          return device;
        };
        return adapter;
      },
    } as GPU;
    await assertRejects(() => openDevice({ engine: watched }), FlashMLAError, "wrong numbers");
    assertEquals((await opened[0].lost).reason, "destroyed");
  });
});

describe("the environment", { skip }, () => {
  test("throws when FLASH_MLA_ENGINE names no engine", async () => {
    const error = await withVariable(
      "FLASH_MLA_ENGINE",
      "vulkan",
      () => assertRejects(() => openDevice(), FlashMLAError, "Cannot use FLASH_MLA_ENGINE=vulkan"),
    );
    assertEquals(error.code, "invalid-input");
  });

  test("throws when FLASH_MLA_WEBGPU_MODULE leads nowhere, saying what to install", async () => {
    const error = await withVariable(
      "FLASH_MLA_WEBGPU_MODULE",
      "/nowhere/at all#1",
      () => assertRejects(() => openDevice({ engine: "dawn" }), FlashMLAError, "Cannot load WebGPU from"),
    );
    assertEquals(error.code, "unsupported-platform");
    assert(error.message.includes("file:///nowhere/at%20all%231/index.js"), error.message);
  });

  test("names the runtime's own engine where there is none", { skip: runtime.name === "Deno" }, async () => {
    await assertRejects(() => openDevice({ engine: "native" }), FlashMLAError, "webgpu` and use engine");
  });
});

describe("browserName()", () => {
  const agents = {
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0 Safari/537.36":
      "Chromium 156",
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0 Safari/537.36 Edg/156.0.0.0":
      "Chromium 156",
    "Mozilla/5.0 (X11; Linux x86_64; rv:150.0) Gecko/20100101 Firefox/150.0": "Firefox 150",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/26.2 Safari/605.1.15":
      "Safari 26.2",
    "Ladybird/1.0": "Ladybird/1.0",
    "": "unknown engine",
  };
  for (const [agent, name] of Object.entries(agents)) {
    test(`reads ${name} from "${agent.slice(-40)}"`, () => assertEquals(browserName(agent), name));
  }
});

/** Dawn with flags of the test's own; its GPU objects stay alive, or the process crashes. */
const kept: GPU[] = [];
async function importDawn(): Promise<{ create(flags: string[]): GPU }> {
  const named = process.env.FLASH_MLA_WEBGPU_MODULE;
  return await import(named ?? (runtime.name === "Deno" ? "npm:webgpu@0.6.2" : "webgpu"));
}
