import { describe, test } from "node:test";
import { assert, assertEquals, assertMatch, assertRejects, assertStrictEquals, assertThrows } from "@std/assert";
import {
  type AnyTensor,
  type CacheRecord,
  ConfigSelectorChain,
  detectPlatform,
  Executor,
  FlashMLA,
  flashMLA,
  type FlashMLAConfig,
  FlashMLAError,
  type GpuTensor,
  type HostInputs,
  kernelRegistry,
  mlaAttention,
  type MlaCall,
  overlayCache,
  type SelectionEvent,
  type Tensor,
  Tuner,
} from "../mod.ts";
import { tuningGradOutput } from "../src/op/tuning_grad_output.ts";
import { skip, smallConfig } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { type ProblemShape, randomCall } from "./support/random_problem.ts";

const shape: ProblemShape = {
  batch: 1,
  queryLength: 40,
  keyLength: 40,
  kvHeads: 2,
  headsPerKvHead: 2,
  kvLoraRank: 16,
  qkNopeHeadDim: 8,
  qkRopeHeadDim: 4,
  vHeadDim: 12,
  rope: "in_query",
  causal: true,
  softmaxScale: null,
  cuSeqlens: null,
  values: "plain",
  seed: 11,
};
const { inputs, options } = randomCall(shape);
const call = (more: MlaCall["options"] = {}): MlaCall => ({ inputs, options: { ...options, ...more } });

type Chain = ConfigSelectorChain<MlaCall, FlashMLAConfig, AnyTensor>;

function chainWith(
  more: ConstructorParameters<typeof ConfigSelectorChain<MlaCall, FlashMLAConfig, AnyTensor>>[0] = {},
) {
  const events: SelectionEvent<FlashMLAConfig>[] = [];
  const chain: Chain = new ConfigSelectorChain({ onEvent: (event) => events.push(event), ...more });
  return { executor: new Executor(chain), events, types: () => events.map(({ type }) => type) };
}

describe("mlaAttention()", () => {
  test("gives [batch, queryLength, queryHeads, vHeadDim]", async () => {
    const { shape } = await mlaAttention(inputs, { ...options, platform: "reference" });
    assertEquals(shape, [1, 40, 4, 12]);
  });

  test("runs the reference under the name xla", async () => {
    const reference = await mlaAttention(inputs, { ...options, platform: "reference" });
    assertEquals(await mlaAttention(inputs, { ...options, platform: "xla" }), reference);
  });

  for (const platform of ["triton", "pallas", "cuda", "tpu", ""]) {
    test(`refuses platform "${platform}" and lists what is registered`, async () => {
      const error = await assertRejects(
        () => mlaAttention(inputs, { platform: platform as "webgpu" }),
        FlashMLAError,
        `platform "${platform}": registered are webgpu (gpu), reference = xla (any)`,
      );
      assertEquals(error.code, "unsupported-platform");
    });
  }

  test("rejects malformed input, whatever the platform", async () => {
    for (const platform of ["auto", "reference", "webgpu"] as const) {
      const wrong = { ...inputs, wVc: { data: new Float32Array(6), shape: [1, 2, 3] } };
      const error = await assertRejects(() => mlaAttention(wrong, { platform }), FlashMLAError, "wVc has kvLoraRank 1");
      assertEquals(error.code, "invalid-input");
    }
  });

  test("rejects a cfg for another platform", async () => {
    const error = await assertRejects(
      () => mlaAttention(inputs, { platform: "reference", cfg: smallConfig }),
      FlashMLAError,
      'it is for platform "webgpu", the call runs on "reference"',
    );
    assertEquals(error.code, "invalid-config");
  });

  test("rejects a cfg that is none", async () => {
    for (const cfg of [null, 5, "fast"]) {
      await assertRejects(
        () => mlaAttention(inputs, { platform: "reference", cfg: cfg as unknown as FlashMLAConfig }),
        FlashMLAError,
        "cfg",
      );
    }
  });

  test("empty batches and lengths give empty or zero results", async () => {
    for (const platform of skip === false ? ["reference", "webgpu"] as const : ["reference"] as const) {
      for (const [batch, queryLength, keyLength] of [[0, 3, 4], [2, 0, 4], [2, 3, 0], [0, 0, 0]]) {
        const empty = randomCall({ ...shape, batch, queryLength, keyLength });
        const { executor } = chainWith();
        const result = await mlaAttention(empty.inputs, { ...empty.options, platform, executor });
        assertEquals(result.shape, [batch, queryLength, 4, 12]);
        assertEquals(result.data, new Float32Array(batch * queryLength * 48));
      }
    }
  });
});

describe("mlaAttention() on the GPU", { skip }, () => {
  test("names the limit that a cfg passes", async () => {
    const cfg = { ...smallConfig, blockK: 64, blockDepth: 64, numStages: 2, probKeys: 8, blockQ: 2048, numWarps: 128 };
    const error = await assertRejects(
      () => mlaAttention(inputs, { platform: "webgpu", cfg }),
      FlashMLAError,
      "maxComputeInvocationsPerWorkgroup = ",
    );
    assertEquals(error.code, "invalid-config");
  });

  test("tunes once, then remembers", async () => {
    const records = new Map<string, CacheRecord<FlashMLAConfig>>();
    const persistent = {
      get: (key: object) => Promise.resolve(records.get(JSON.stringify(key))),
      put: (key: object, record: CacheRecord<FlashMLAConfig>) => {
        records.set(JSON.stringify(key), record);
        return Promise.resolve();
      },
    };
    const tuner = new Tuner({ warmup: 1, iters: 3, budgetMs: 50, totalBudgetMs: 500 });
    const expected = await mlaAttention(inputs, { ...options, platform: "reference" });
    const first = chainWith({ tuner, persistent });
    for (const source of ["autotune", "memory"]) {
      const { executor } = first;
      assertEquals((await executor.choose(flashMLA, call({ platform: "webgpu" }))).source, source);
      assertClose(await mlaAttention(inputs, { ...options, platform: "webgpu", executor }), expected, { relL2: 1e-5 });
    }
    assert(first.types().includes("autotune_finish"));
    assertEquals(records.size, 1);
    const [record] = records.values();
    assert(record.timings.some(({ ms }) => ms !== null && ms > 0));

    const second = chainWith({ tuner, persistent });
    const choice = await second.executor.choose(flashMLA, call({ platform: "webgpu" }));
    assertEquals(choice, { cfg: record.cfg, source: "persistent" });
    // 33 … 64 tokens share their configuration.
    const longer = randomCall({ ...shape, queryLength: 64, keyLength: 64 });
    const cousin = await second.executor.choose(flashMLA, {
      inputs: longer.inputs,
      options: { causal: true, platform: "webgpu" },
    });
    assertEquals(cousin.source, "memory");
  });

  test("an explicit cfg is used for its call only", async () => {
    const { executor, types } = chainWith({ policy: { cacheMissFallback: "heuristics" } });
    await mlaAttention(inputs, { ...options, platform: "webgpu", executor, cfg: smallConfig });
    await mlaAttention(inputs, { ...options, platform: "webgpu", executor });
    assertEquals(types().filter((type) => ["override", "heuristic", "memory_hit"].includes(type)), [
      "override",
      "heuristic",
    ]);
  });

  test("overlayCache() decides for the calls in its scope", async () => {
    const { executor, events } = chainWith({ policy: { cacheMissFallback: "heuristics" } });
    await overlayCache(smallConfig, () => mlaAttention(inputs, { ...options, platform: "webgpu", executor }));
    const [hit] = events.filter(({ type }) => type === "overlay_hit");
    assert(hit.type === "overlay_hit");
    assertEquals(hit.cfg, smallConfig);
  });

  test("compile() runs later calls under the configuration of the first", async () => {
    const { executor, events } = chainWith({ policy: { cacheMissFallback: "heuristics" } });
    const compiled = await executor.compile(flashMLA, call({ platform: "webgpu" }), { cfg: smallConfig });
    const before = events.length;
    const other = randomCall({ ...shape, queryLength: 9, seed: 5 });
    const expected = await mlaAttention(other.inputs, { ...other.options, platform: "reference" });
    assertClose(await compiled({ inputs: other.inputs, options: { ...other.options, platform: "webgpu" } }), expected, {
      relL2: 1e-5,
    });
    assertEquals(events.length, before);
  });
});

describe("FlashMLA", () => {
  test("has ejkernel's name and a version", () => {
    assertEquals(new FlashMLA().opId, "flash_mla");
    assertMatch(new FlashMLA().version, /^\d+$/);
  });

  test("prepare() keys calls by shapes and options, never by values", async () => {
    const key = async (changed: Partial<ProblemShape>, more: MlaCall["options"] = {}) => {
      const drawn = randomCall({ ...shape, ...changed });
      const prepared = await flashMLA.prepare({
        inputs: drawn.inputs,
        options: { ...drawn.options, platform: "reference", ...more },
      });
      return await prepared.callKey();
    };
    const base = await key({});
    assertMatch(base, /^[0-9a-f]{16}$/);
    assertEquals(await key({ seed: 99, values: "small" }), base);
    const others = await Promise.all([
      key({ queryLength: 41 }),
      key({ keyLength: 41 }),
      key({ kvLoraRank: 17 }),
      key({ causal: false }),
      key({ rope: "shared" }),
      key({ headsPerKvHead: 1 }),
      key({}, { softmaxScale: 0.5 }),
      key({ cuSeqlens: [0, 40] }),
      key({}, { dropout: { rate: 0.1, seed: 1 } }),
      key({}, { logitsSoftCap: 30 }),
      key({}, { precision: "f16" }),
      key({}, { slidingWindow: 8 }),
      key({}, { slidingWindow: [8, 0] }),
      key({}, { bias: { data: new Float32Array(1600), shape: [1, 1, 40, 40] } }),
      key({}, { attentionMask: { data: new Uint8Array(1600), shape: [1, 1, 40, 40] } }),
      key({}, { softmaxAux: { data: new Float32Array(4), shape: [4] } }),
      key({}, { softmaxAux: { data: new Float32Array(8), shape: [4, 2] } }),
    ]);
    assertEquals(new Set([base, ...others]).size, others.length + 1);
    // What a dropout drops and where sequences lie are values.
    const dropped = await key({}, { dropout: { rate: 0.1, seed: 1 } });
    assertEquals(await key({}, { dropout: { rate: 0.2, seed: 99 } }), dropped);
    assertEquals(await key({}, { dropout: { rate: 0, seed: 1 } }), base);
    assertEquals(await key({ cuSeqlens: [0, 12, 40] }), await key({ cuSeqlens: [0, 30, 40] }));
  });

  test("prepare() buckets by the options that change the kernel", async () => {
    const bucket = async (more: MlaCall["options"]) =>
      (await flashMLA.prepare(call({ platform: "reference", ...more }))).bucket;
    const base = await bucket({});
    assertEquals(base, "f32 B1 Sq64 Sk64, Hq4 Hkv2 L16 P8 R4 V12, rope in_query, causal");
    const bias = { data: new Float32Array(1600), shape: [1, 1, 40, 40] };
    const everything = { slidingWindow: 9, logitsSoftCap: 30, softmaxAux: { data: new Float32Array(2), shape: [2] } };
    assertEquals(
      await bucket({ ...everything, bias, dropout: { rate: 0.1, seed: 7 }, precision: "f16" }),
      `${base}, window 16 0, soft cap, bias, 2 sinks, dropout, precision f16`,
    );
    assertEquals(await bucket({ precision: "f32" }), base);
    const mask = { data: new Uint8Array(1600), shape: [1, 1, 40, 40] };
    assertEquals(await bucket({ attentionMask: mask, causal: false }), `${base.replace("causal", "full")}, mask`);
    // Windows share a bucket up to the next power of two; past the keys all are the same.
    const window = (slidingWindow: number | [number, number]) => bucket({ slidingWindow, causal: false });
    assertEquals(await window(9), await window([16, 12]));
    assertEquals(await window(2 ** 40), await window(64));
    assertEquals(new Set(await Promise.all([window(8), window(9), window([8, 16]), window([0, 8])])).size, 4);
  });

  test("prepare() takes the tensors among the options along with the inputs, as they were", async () => {
    const bias = { data: new Float32Array(1600), shape: [1, 1, 40, 40] };
    const mask = { data: new Uint8Array(1600), shape: [1, 1, 40, 40] };
    const softmaxAux = { data: new Float32Array(4), shape: [4] };
    const { inputs } = await flashMLA.prepare(call({ platform: "reference", bias, softmaxAux }));
    bias.shape.reverse();
    assertEquals(inputs.bias?.shape, [1, 1, 40, 40]);
    assertStrictEquals((inputs.softmaxAux as Tensor).data, softmaxAux.data);
    const masked = await flashMLA.prepare(call({ platform: "reference", attentionMask: mask }));
    assertEquals(masked.inputs.attentionMask?.shape, [1, 1, 40, 40]);
  });

  test("takes tensors on a GPU among the options for a call on the GPU", async () => {
    const device = { createBuffer() {} } as unknown as GPUDevice;
    const onGpu = (shape: number[], on?: GPUDevice): GpuTensor => ({
      buffer: { size: 1 << 16, usage: 0x80 } as GPUBuffer,
      shape,
      dtype: "f32",
      device: on,
    });
    const other = { createBuffer() {} } as unknown as GPUDevice;
    const bias = onGpu([1, 1, 40, 40], other);
    await assertRejects(
      () => flashMLA.prepare(call({ bias, device })),
      FlashMLAError,
      "bias lies on another device than options.device",
    );
    await assertRejects(
      () => flashMLA.prepare(call({ bias, softmaxAux: onGpu([4], device) })),
      FlashMLAError,
      "softmaxAux lies on another device than bias",
    );
    const attentionMask = { ...onGpu([1, 1, 40, 40], other), dtype: "u8" as const };
    await assertRejects(
      () => flashMLA.prepare(call({ attentionMask, device })),
      FlashMLAError,
      "attentionMask lies on another device than options.device",
    );
  });

  test("trial() runs backward on request, for the same output gradient every time", async () => {
    const invocation = await flashMLA.prepare(call({ platform: "reference" }));
    const cfg = flashMLA.heuristicCfg(invocation);
    const trial = await flashMLA.trial(invocation, cfg, { backward: true });
    const { residuals } = await flashMLA.fwdWithResiduals(invocation, cfg);
    const expected = await flashMLA.vjp(invocation, cfg, residuals, tuningGradOutput(invocation.problem));
    assertEquals<unknown>(await trial.gradients!(), expected);
    assertEquals(flashMLA.compareGradients(invocation, expected, await trial.gradients!()).ok, true);
    assert(await trial.time(1) > 0);
    assertEquals((await flashMLA.trial(invocation, cfg)).gradients, undefined);
  });

  test("getImpl() gives what is registered for the configuration", () => {
    assertEquals(new FlashMLA().getImpl(smallConfig).platform, "webgpu");
    assertStrictEquals(
      new FlashMLA().getImpl({ platform: "xla", backend: "any" }),
      new FlashMLA().getImpl({ platform: "reference", backend: "cpu" }),
    );
    assertThrows(() => new FlashMLA().getImpl({ platform: "webgpu", backend: "cpu" }), FlashMLAError, "registered are");
  });

  test("candidateCfgs() starts with heuristicCfg()", async () => {
    for (const platform of skip === false ? ["reference", "webgpu"] as const : ["reference"] as const) {
      const invocation = await flashMLA.prepare(call({ platform }));
      const candidates = flashMLA.candidateCfgs(invocation);
      assertEquals(candidates[0], flashMLA.heuristicCfg(invocation));
      for (const cfg of candidates) flashMLA.checkCfg(invocation, cfg);
    }
  });

  test("compare() accepts rounding and refuses errors and stray NaN", () => {
    const best = { data: Float32Array.of(1, 2, NaN, 4), shape: [4] };
    const check = (...data: number[]) => flashMLA.compare({ data: Float32Array.from(data), shape: [4] }, best).ok;
    assertEquals(check(1, 2, NaN, 4.00001), true);
    assertEquals(check(1, 2, NaN, 4.1), false);
    assertEquals(check(1, 2, 3, 4), false);
    assertEquals(check(1, NaN, NaN, 4), false);
  });

  test("refuses an invocation that it did not make", async () => {
    const { Invocation } = await import("../mod.ts");
    const stranger = new Invocation<MlaCall>({
      opId: "flash_mla",
      version: "2",
      call: call(),
      device: "",
      signature: null,
      bucket: "",
    });
    assertThrows(() => flashMLA.heuristicCfg(stranger), FlashMLAError, "FlashMLA.prepare");
  });
});

describe("detectPlatform()", () => {
  test("prefers the GPU where there is one", async () => {
    assertEquals(await detectPlatform("flash_mla"), skip === false ? "webgpu" : "reference");
  });

  test("takes a registered platform at its word", async () => {
    assertEquals(await detectPlatform("flash_mla", "xla"), "reference");
  });

  test("refuses an algorithm that nobody registered", async () => {
    await assertRejects(() => detectPlatform("flash_attention"), FlashMLAError, "no such algorithm");
  });
});

describe("kernelRegistry", () => {
  test("lists the library's implementations", () => {
    assertEquals(kernelRegistry.listAlgorithms(), ["flash_mla"]);
    assertEquals(kernelRegistry.listImplementations("flash_mla").map(({ platform }) => platform), [
      "webgpu",
      "reference",
      "xla",
    ]);
  });
});

describe("mlaAttention() and its caller", () => {
  test("refuses options that do not exist, and names those that do", async () => {
    const error = await assertRejects(
      () => mlaAttention(inputs, { casual: true } as object),
      FlashMLAError,
      'unknown option "casual"; known are softmaxScale, causal',
    );
    assertEquals(error.code, "invalid-input");
  });

  for (const [name, value] of [["device", {}], ["device", null], ["cfg", null], ["executor", 5]] as const) {
    test(`refuses ${name}: ${JSON.stringify(value)} by name`, async () => {
      const error = await assertRejects(() => mlaAttention(inputs, { [name]: value } as object), FlashMLAError, name);
      assertEquals(error.code, "invalid-input");
    });
  }

  test("is not confused by shapes and fields that change after the call", async () => {
    for (const platform of skip === false ? ["reference", "webgpu"] as const : ["reference"] as const) {
      const drawn = randomCall(shape);
      const cfg = platform === "webgpu" ? { cfg: smallConfig } : {};
      const expected = await mlaAttention(drawn.inputs, { ...drawn.options, platform, ...cfg });
      const changing = structuredClone(drawn.inputs) as { -readonly [K in keyof HostInputs]: HostInputs[K] };
      const result = mlaAttention(changing, { ...drawn.options, platform, ...cfg });
      (changing.wKc.shape as number[]).reverse();
      changing.wVc = changing.wKc;
      assertEquals(await result, expected);
    }
  });
});
