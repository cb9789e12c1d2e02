// The option `precision`: leave to round what is multiplied to halves, which matrix units alone take. On devices without
// units they are emulated.

import { describe, test } from "node:test";
import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "@std/assert";
import fc from "fast-check";
import {
  flashMLA,
  type FlashMLAConfig,
  FlashMLAError,
  type HostInputs,
  type HostTensor,
  mlaAttention,
  mlaAttentionVjp,
  type MlaCall,
  MlaInvocation,
  toFloats,
  toHalves,
  Tuner,
} from "../mod.ts";
import { candidateConfigs } from "../src/gpu/attention_configs.ts";
import type { Capabilities } from "../src/gpu/capabilities.ts";
import type { GpuContext } from "../src/gpu/device.ts";
import type { PipelineCache } from "../src/gpu/pipelines.ts";
import { webgpuTarget } from "../src/gpu/webgpu_implementation.ts";
import { mapTensors, mlaProblem } from "../src/op/mla_problem.ts";
import type { AnyTensor, Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionWithLse } from "../src/reference/mla_attention.ts";
import { rounded, type Stored, stored } from "./support/dtype_attention.ts";
import { skip as skipGpu, skipEmulation as skip, smallConfig } from "./support/gpu.ts";
import { bounds, checkCall, drawn, matrixConfig, matrixContext } from "./support/matrix_units.ts";
import { assertClose } from "./support/metrics.ts";
import { normals, randomTensor } from "./support/random_problem.ts";

/** A call on one open device, whose candidates are the emulated units' and the plain kernels'. */
function invocationOn(context: GpuContext, { inputs, options = {} }: MlaCall): MlaInvocation {
  const target = webgpuTarget(context);
  const problem = mlaProblem(inputs, options);
  const candidates = [matrixConfig, smallConfig];
  return new MlaInvocation(
    {
      ...{ opId: flashMLA.opId, version: flashMLA.version, call: { inputs, options } },
      ...{ device: target.fingerprint, signature: null, bucket: "" },
    },
    inputs,
    problem,
    {
      ...{ platform: "webgpu", description: target.description, fingerprint: target.fingerprint },
      whyInvalid: (problem, cfg) => target.whyInvalid(problem, cfg),
      heuristicCfg: () => candidates[0],
      candidateCfgs: () => candidates,
      run: (...call) => target.run(...call),
      runWithLse: (...call) => target.runWithLse(...call),
      backward: (...call) => target.backward(...call),
      trial: (...call) => target.trial(...call),
      probe: () => target.probe(),
    },
  );
}

/** The elements as halves keep them: nearest, and finite where they are. */
function inHalves(inputs: HostInputs): HostInputs {
  return rounded(
    mapTensors<Tensor, Tensor>(inputs, ({ data, shape }) => ({
      data: data.map((x) => Number.isNaN(x) ? x : Math.min(65504, Math.max(-65504, x))),
      shape,
    })),
    "f16",
  );
}

const causal = { causal: true, precision: "f16" } as const;

/** A causal call's tensors, of the widths of `drawn("in_query", false)`, so that one set of kernels serves them all. */
function causalInputs(queryLength = 41, keyLength = 67, seed = 5): HostInputs {
  const random = normals(seed);
  return {
    query: randomTensor([2, queryLength, 4, 20], random),
    keyValue: randomTensor([2, keyLength, 24], random),
    wKc: randomTensor([24, 2, 12], random),
    wVc: randomTensor([24, 2, 20], random),
    bK: randomTensor([2, keyLength, 8], random),
  };
}

/** A call on matrix units against the oracle on its tensors rounded to halves. */
async function checkForward(inputs: HostInputs, options: MlaCall["options"], dtype: Stored = "f32"): Promise<void> {
  const given = mapTensors<Tensor, AnyTensor>(inputs, (tensor) => stored(tensor, dtype));
  const exact = inHalves(rounded(inputs, dtype));
  const invocation = invocationOn(await matrixContext(), { inputs: given, options });
  const { output, lse } = await flashMLA.runWithLse(invocation, matrixConfig);
  assertEquals(output.dtype ?? "f32", "f32");
  const expected = referenceMlaAttentionWithLse(exact, invocation.problem);
  assertClose(output, expected.output, bounds, "output");
  assertClose(lse, expected.lse, { relL2: 1e-3 }, "log-sum-exp");
}

describe('precision "f16" on matrix units', { skip }, () => {
  test("gives the oracle's answer on tensors rounded to halves, whatever their lengths and element type", async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.integer({ min: 1, max: 70 }),
        fc.integer({ min: 1, max: 70 }),
        fc.constantFrom("f32" as const, "bf16" as const),
        fc.nat(1e6),
        (queries, keys, dtype, seed) => checkForward(causalInputs(queries, keys, seed), causal, dtype),
      ),
      { numRuns: 12 },
    );
  });

  for (const dtype of ["f32", "bf16"] as const) {
    test(`gives the oracle's gradients on tensors rounded to halves, ${dtype}`, async () => {
      await checkCall(await matrixContext(), drawn("in_query", false), { stored: dtype });
    });
  }

  test("gives the oracle's gradients of packed sequences, and small ones", async () => {
    await checkCall(await matrixContext(), drawn("shared", true), { stored: "f32", gradScale: 2 ** -13 });
  });

  test("takes tensors of several element types", async () => {
    const inputs = causalInputs();
    const mixed = { ...inputs, query: toHalves(inputs.query), keyValue: stored(inputs.keyValue, "bf16") };
    const exact = inHalves(mapTensors<HostTensor, Tensor>(mixed, toFloats));
    const invocation = invocationOn(await matrixContext(), { inputs: mixed, options: causal });
    const output = await flashMLA.run(invocation, matrixConfig);
    assertEquals(output.dtype, "f16");
    assertClose(output, referenceMlaAttentionWithLse(exact, invocation.problem).output, bounds);
  });

  test("keeps finite what passes the range of halves: it becomes ±65,504", async () => {
    const inputs = causalInputs();
    const huge = [7e4, -1e6, 3e38, -3.4e38];
    // Latents of the second half of their columns are huge, and go to values alone: one to each column, unchanged.
    const keyValue = inputs.keyValue.data.map((x, i) => i % 24 < 12 ? x : huge[i % 7 % 4]);
    const wKc = inputs.wKc.data.map((x, i) => i < 12 * 24 ? x : 0);
    const wVc = inputs.wVc.data.map((_, i) => Math.floor(i / 40) === 12 + i % 20 % 12 ? 1 : 0);
    // Queries are huge in one column, whose scores the scale makes ordinary again.
    const query = inputs.query.data.map((x, i) => i % 20 === 3 ? huge[i % 4] : x);
    const given = {
      ...inputs,
      ...{ keyValue: { data: keyValue, shape: inputs.keyValue.shape }, wKc: { data: wKc, shape: inputs.wKc.shape } },
      ...{ wVc: { data: wVc, shape: inputs.wVc.shape }, query: { data: query, shape: inputs.query.shape } },
    };
    await checkForward(given, { ...causal, softmaxScale: 2 ** -17 });
  });

  test("lets NaN reach the rows that see it, and no other", async () => {
    const inputs = causalInputs();
    const withNan = (tensor: Tensor, row: number, width: number) => ({
      data: tensor.data.map((x, i) => Math.floor(i / width) % 67 === row ? NaN : x),
      shape: tensor.shape,
    });
    // Key 60 is seen from row 34 on, and masked for the two rows before in the same tile of 32.
    const given = { ...inputs, keyValue: withNan(inputs.keyValue, 60, 24), bK: withNan(inputs.bK!, 60, 8) };
    await checkForward(given, causal);
    const { output } = referenceMlaAttentionWithLse(given, mlaProblem(given, causal));
    assertEquals([33, 34].map((row) => Number.isNaN(output.data[row * 80])), [false, true]);
  });
});

describe("precision", { skip: skipGpu }, () => {
  test('"f16" changes nothing on plain kernels, forward and backward', async () => {
    const inputs = causalInputs(9, 13);
    const platform = { platform: "webgpu", cfg: smallConfig } as const;
    const exact = await mlaAttentionVjp(inputs, { causal: true, ...platform });
    const free = await mlaAttentionVjp(inputs, { ...causal, ...platform });
    assertEquals(free.output.data, exact.output.data);
    const [got, expected] = [await free.vjp(exact.output), await exact.vjp(exact.output)];
    for (const name of ["query", "keyValue", "wKc", "wVc", "bK"] as const) {
      assertEquals(got[name]!.data, expected[name]!.data, name);
    }
  });
});

describe("precision and the reference", () => {
  test("have nothing to do with each other", async () => {
    const inputs = causalInputs(9, 13);
    const exact = await mlaAttention(inputs, { causal: true, platform: "reference" });
    assertEquals((await mlaAttention(inputs, { ...causal, platform: "reference" })).data, exact.data);
  });

  test("of another kind is refused by name", async () => {
    const error = await assertRejects(
      () => mlaAttention(causalInputs(1, 1), { precision: "half" as "f16", platform: "reference" }),
      FlashMLAError,
      'precision must be "f32" or "f16", got "half"',
    );
    assertEquals(error.code, "invalid-input");
  });
});

describe("matrix units are chosen", { skip }, () => {
  /** A card with matrix units. */
  async function card(): Promise<Capabilities> {
    const { capabilities } = await matrixContext({
      ...{ maxComputeWorkgroupStorageSize: 49152, maxComputeInvocationsPerWorkgroup: 1024 },
    });
    return { ...capabilities, software: false, matrixUnits: "template" };
  }

  for (const dtype of ["f32", "bf16"] as const) {
    test(`for ${dtype} with precision "f16" alone`, async () => {
      const inputs = mapTensors<Tensor, HostTensor>(causalInputs(), (tensor) => stored(tensor, dtype));
      const capabilities = await card();
      const chosen = (precision?: "f32" | "f16") =>
        candidateConfigs(mlaProblem(inputs, { precision }), capabilities).map(({ matrixUnits }) => matrixUnits);
      for (const precision of [undefined, "f32"] as const) assert(!chosen(precision).includes(true));
      assertEquals(chosen("f16")[0], true);
      assert(chosen("f16").includes(false));
    });
  }

  test("for halves beside a bias of float32 without leave, which is not rounded", async () => {
    const halves = mapTensors<Tensor, HostTensor>(causalInputs(), toHalves);
    const bias = randomTensor([1, 1, 41, 67], normals(1));
    const capabilities = await card();
    assertEquals(candidateConfigs(mlaProblem({ ...halves, bias }), capabilities)[0].matrixUnits, true);
    const mixed = { ...halves, wVc: toFloats(halves.wVc) };
    assertEquals(candidateConfigs(mlaProblem(mixed), capabilities)[0].matrixUnits, false);
    assertEquals(candidateConfigs(mlaProblem(mixed, { precision: "f16" }), capabilities)[0].matrixUnits, true);
  });

  test("for float32 by an explicit configuration only with leave, and the refusal says how to give it", async () => {
    const inputs = causalInputs();
    const context = await matrixContext();
    for (const precision of [undefined, "f32"] as const) {
      const invocation = invocationOn(context, { inputs, options: { causal: true, precision } });
      const error = assertThrows(() => flashMLA.checkCfg(invocation, matrixConfig), FlashMLAError);
      assertEquals(error.code, "invalid-config");
      assertMatch(error.message, /query is not of dtype "f16"; the option precision: "f16" lets it be rounded$/);
    }
    flashMLA.checkCfg(invocationOn(context, { inputs, options: causal }), matrixConfig);
  });
});

describe("the tuner, with leave to round", { skip }, () => {
  /** How the configurations fare; nothing is timed for long. */
  async function reasons(context: GpuContext): Promise<Map<FlashMLAConfig, string | null>> {
    const invocation = invocationOn(context, { inputs: causalInputs(), options: causal });
    const tuner = new Tuner({ warmup: 0, iters: 1, totalBudgetMs: 6e5 });
    const candidates = flashMLA.candidateCfgs(invocation);
    const record = await tuner.tune(flashMLA, invocation, candidates, undefined, { validateBackward: false });
    return new Map(record.timings.map(({ cfg, rejected }) => [cfg, rejected]));
  }

  test("accepts what rounding costs", async () => {
    const found = await reasons(await matrixContext());
    assertEquals([found.get(matrixConfig), found.get(smallConfig)], [null, null]);
  });

  test("rejects matrix units that compute wrong, though they are the heuristic's, and says so", async () => {
    const context = await matrixContext();
    let broken = 0;
    // Values past a quarter are lost on their way to the units.
    const pipelines = {
      get(label: string, code: string) {
        const changed = code.replaceAll("65504.0", "0.25");
        if (changed !== code) broken++;
        return context.pipelines.get(label, changed);
      },
    } as PipelineCache;
    const found = await reasons({ ...context, pipelines });
    assert(broken > 0);
    assertMatch(`${found.get(matrixConfig)}`, /^wrong output: relL2 \d\.\d+e[-+]\d against the best known output$/);
    assertEquals(found.get(smallConfig), null);
  });
});
