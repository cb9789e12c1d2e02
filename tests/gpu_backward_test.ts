import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects } from "@std/assert";
import fc from "fast-check";
import {
  type AnyTensor,
  FlashMLAError,
  type HostTensor,
  mlaAttentionVjp,
  toFloats,
  toGpu,
  toHalves,
  toHost,
} from "../mod.ts";
import type { GpuLimits } from "../src/gpu/capabilities.ts";
import { type GpuContext, gpuContext } from "../src/gpu/device.ts";
import { webgpuTarget } from "../src/gpu/webgpu_implementation.ts";
import {
  allInputs,
  type HostInputs,
  mapTensors,
  type MlaInputs,
  type MlaMathOptions,
  mlaProblem,
  type TensorName,
  tensorNames,
} from "../src/op/mla_problem.ts";
import type { GpuTensor, OwnedGpuTensor, Tensor } from "../src/op/tensor.ts";
import { tuningGradOutput } from "../src/op/tuning_grad_output.ts";
import { referenceMlaAttentionWithLse } from "../src/reference/mla_attention.ts";
import { referenceMlaAttentionBackward } from "../src/reference/mla_attention_backward.ts";
import { rounded, stored } from "./support/dtype_attention.ts";
import { goldenCases } from "./support/golden.ts";
import { openTestDevice, skip, smallConfig, testContext } from "./support/gpu.ts";
import {
  type AttentionGradients,
  differentiatesLike,
  gradientProperties,
  type Gradients,
  gradOutputOf,
} from "./support/gradient_properties.ts";
import { kernelKinds, narrowedTo } from "./support/kernel_kinds.ts";
import { assertClose } from "./support/metrics.ts";
import { everyFeature, problems, type ProblemShape, randomCall } from "./support/random_problem.ts";

const { plain, biased, masked, odd, oddBiased } = kernelKinds;
const allKinds = Object.values(kernelKinds);
/** One width of register tile for all. */
const limits = { kvLoraRank: 24, qkNopeHeadDim: 20, qkRopeHeadDim: 12, vHeadDim: 32 };
const long = { ...limits, batch: 2, length: 80, kvHeads: 2, headsPerKvHead: 2 };
/**
 * Where one key takes nearly all, ∂P − D cancels: of numbers near 30, known to 2^-24 of them, which keys or queries near 5
 * multiply again.
 */
const bounds = { relL2: 1e-5, absolute: 2e-5 };
const tolerances = { tolerance: bounds.relL2, absolute: bounds.absolute };
const hasHalves = skip === false && (await testContext()).capabilities.f16;

const oracle: AttentionGradients = (inputs, options, gradOutput) =>
  referenceMlaAttentionBackward(inputs, mlaProblem(inputs, options), gradOutput);

/** The backward pass alone, from the oracle's output and log-sum-exp. */
function backwardOn(context: GpuContext, cfg = smallConfig): AttentionGradients {
  const target = webgpuTarget(context);
  return async (inputs, options, gradOutput) => {
    const problem = mlaProblem(inputs, options);
    const all = allInputs(inputs, options) as HostInputs;
    const saved = referenceMlaAttentionWithLse(all, problem);
    const gradients = await target.backward(problem, all, cfg, saved, gradOutput);
    assertEquals(context.buffers.lent, 0);
    return gradients as Gradients;
  };
}

/** The test device with limits that it claims and we have to keep. */
async function limited(limits: Partial<GpuLimits>): Promise<GpuContext> {
  const context = await testContext();
  const { capabilities } = context;
  return { ...context, capabilities: { ...capabilities, limits: { ...capabilities.limits, ...limits } } };
}

describe("gradients on the GPU", { skip }, () => {
  const gradients: AttentionGradients = async (...call) => await backwardOn(await testContext())(...call);

  describe("agree with ejkernel", () => {
    for (const { name, inputs, options, gradOutput, expectedGradients } of goldenCases(everyFeature)) {
      if (gradOutput === undefined) continue;
      test(name, async () => {
        await testContext();
        // Software adapters compile the tile for wide heads in a third of the time.
        const cfg = name === "v2_lite_dims" ? { ...smallConfig, gradBlock: 256 } : smallConfig;
        const { vjp, dispose } = await mlaAttentionVjp(inputs, { ...options, platform: "webgpu", cfg });
        const result = await vjp(gradOutput) as Gradients;
        dispose();
        for (const [tensor, expected] of Object.entries(expectedGradients)) {
          assertClose(result[tensor as TensorName]!, expected, { relL2: 3e-5 }, `${name}: ${tensor}`);
        }
      });
    }
  });

  test("agree with the oracle on random problems with every option", async () => {
    const narrow = narrowedTo(...allKinds);
    await differentiatesLike(oracle)(gradients, { runs: 150, ...tolerances, limits, narrow });
  });

  test("agree with the oracle on sequences longer than the tiles", async () => {
    const narrow = narrowedTo(...allKinds);
    await differentiatesLike(oracle)(gradients, {
      ...{ runs: 40, ...tolerances, limits: long, narrow, seed: 2 },
    });
  });

  test("agree with the oracle on random problems in halves", {
    skip: hasHalves ? false : "the device has no half precision",
  }, async () => {
    const target = webgpuTarget(await testContext());
    const halves: AttentionGradients = async (inputs, options, gradOutput) => {
      const placed = mapTensors<Tensor, HostTensor>(inputs, (tensor) => stored(tensor, "f16"));
      const problem = mlaProblem(placed, options);
      const { output, lse } = referenceMlaAttentionWithLse(rounded(inputs, "f16"), problem);
      const saved = { output: stored(output, "f16"), lse };
      const made = await target.backward(problem, placed, smallConfig, saved, gradOutput);
      return Object.fromEntries(
        Object.entries(made).map(([name, gradient]) => [name, toFloats(gradient as HostTensor)]),
      ) as Gradients;
    };
    const exact: AttentionGradients = (inputs, ...rest) => oracle(rounded(inputs, "f16"), ...rest);
    await differentiatesLike(exact)(halves, {
      // D comes from an output in halves: where gradients cancel, 5e-4 of the terms is left, times queries or keys near 5.
      ...{ runs: 30, tolerance: 3e-3, absolute: 1e-2, limits, seed: 4 },
      narrow: narrowedTo(plain, biased),
    });
  });

  describe("keep what is true of gradients", () => {
    const kindsOf: Readonly<Record<string, readonly (typeof allKinds)[number][]>> = {
      "a broadcast bias or sink gathers what it is given to": [biased, oddBiased],
      "sinks of any size leave no gradient or all of it": [plain, oddBiased],
      "batch items give their own gradients": [plain, odd, oddBiased],
      "packed sequences give the gradients of separate calls": [plain, odd, oddBiased],
      "hiding is hiding, by whatever option": [oddBiased],
      "gradients of a row's logits sum to zero": [biased, oddBiased],
      "shared rope gathers the gradients of all heads": [masked],
    };
    for (const { name, check } of gradientProperties) {
      test(name, async () => {
        const narrow = narrowedTo(...kindsOf[name] ?? allKinds);
        // Sums of all logits' gradients cancel to zero.
        const absolute = (name.includes("sum to zero") ? 10 : 2) * bounds.absolute;
        await check(gradients, { runs: 12, tolerance: 2 * bounds.relL2, absolute, limits, narrow });
      });
    }
  });

  for (const gradBlock of [64, 128]) {
    test(`agree with the oracle under the tile ${gradBlock}`, async () => {
      const tiled = backwardOn(await testContext(), { ...smallConfig, gradBlock });
      await differentiatesLike(oracle)(tiled, {
        ...{ runs: 6, ...tolerances, limits: { ...long, length: 150 }, narrow: narrowedTo(plain) },
      });
    });
  }

  test("agree with the oracle for heads too wide for the other tiles", async () => {
    const wide: ProblemShape = {
      ...{ batch: 1, queryLength: 19, keyLength: 23, kvHeads: 1, headsPerKvHead: 2, kvLoraRank: 8 },
      ...{ qkNopeHeadDim: 240, qkRopeHeadDim: 16, vHeadDim: 160, rope: "in_query", causal: true, softmaxScale: null },
      ...{ cuSeqlens: null, values: "small", seed: 5 },
    };
    const { inputs, options } = randomCall(wide);
    const context = await testContext();
    const error = await assertRejects(
      async () => await backwardOn(context)(inputs, options, gradOutputOf(wide)),
      FlashMLAError,
      "gradBlock 32 needs",
    );
    assertEquals(error.code, "invalid-config");
    const result = await backwardOn(context, { ...smallConfig, gradBlock: 256 })(inputs, options, gradOutputOf(wide));
    const expected = await oracle(inputs, options, gradOutputOf(wide));
    for (const name of tensorNames) {
      if (expected[name]) assertClose(result[name]!, expected[name], { relL2: 1e-5 }, name);
    }
  });
});

describe("gradients within a device's limits", { skip }, () => {
  test("run with WebGPU's default limits", async () => {
    const device = await openTestDevice();
    const context = await gpuContext(device);
    context.buffers.poison = true;
    const narrow = narrowedTo(plain);
    await differentiatesLike(oracle)(backwardOn(context), { runs: 5, ...tolerances, limits, narrow });
    device.destroy();
  });

  test("are summed over ranges of queries, groups of heads and pieces of the batch", async () => {
    let computed = 0;
    // Narrow heads, several of which fit a binding, over rows that do not all.
    const narrow = {
      kvLoraRank: 12,
      qkNopeHeadDim: 8,
      qkRopeHeadDim: 4,
      vHeadDim: 8,
      batch: 3,
      length: 40,
      kvHeads: 3,
    };
    for (const bytes of [2048, 4096, 8192]) {
      const context = await limited({ maxStorageBufferBindingSize: bytes, maxComputeWorkgroupsPerDimension: 12 });
      const gradients = backwardOn(context);
      const shapes = problems({ ...narrow, features: everyFeature }).map(narrowedTo(plain, biased, masked));
      await fc.assert(
        fc.asyncProperty(shapes, async (shape) => {
          const { inputs, options } = randomCall(shape);
          const gradOutput = gradOutputOf(shape);
          const expected = await oracle(inputs, options, gradOutput);
          let result: Gradients;
          try {
            result = await gradients(inputs, options, gradOutput);
          } catch (error) {
            if (error instanceof FlashMLAError && error.code === "limit") return;
            throw error;
          }
          computed++;
          for (const name of tensorNames) {
            if (expected[name] === undefined) continue;
            assertClose(result[name]!, expected[name], bounds, name);
          }
        }),
        { numRuns: 40, seed: 11 },
      );
    }
    assert(computed > 40, `${computed} calls fitted`);
  });
});

describe("gradients of other types and places", { skip }, () => {
  const shape: ProblemShape = {
    ...{ batch: 2, queryLength: 21, keyLength: 34, kvHeads: 1, headsPerKvHead: 3, kvLoraRank: 12 },
    ...{ qkNopeHeadDim: 8, qkRopeHeadDim: 4, vHeadDim: 16, rope: "in_query", causal: true, softmaxScale: null },
    ...{ cuSeqlens: null, values: "plain", seed: 3 },
  };
  const { inputs, options } = randomCall(shape);
  const half = { relL2: 3e-3, cosDiff: 5e-6 };

  /** The gradients through the public function, with the tensors stored and placed as they are. */
  async function throughVjp(placed: MlaInputs, gradOutput: AnyTensor): Promise<Gradients> {
    const { vjp, output, lse, dispose } = await mlaAttentionVjp(placed, {
      ...options,
      platform: "webgpu",
      cfg: smallConfig,
    });
    const result = await vjp(gradOutput);
    dispose();
    const floats: Partial<Record<TensorName, Tensor>> = {};
    for (const [name, gradient] of Object.entries(result) as [TensorName, AnyTensor][]) {
      assertEquals(gradient.dtype ?? "f32", placed[name]!.dtype === "f16" ? "f16" : "f32", name);
      assertEquals("buffer" in gradient, "buffer" in placed[name]!, name);
      floats[name] = toFloats("buffer" in gradient ? await toHost(gradient as GpuTensor) : gradient as HostTensor);
      if ("buffer" in gradient) (gradient as OwnedGpuTensor).dispose();
    }
    for (const kept of [output, lse] as AnyTensor[]) if ("buffer" in kept) (kept as OwnedGpuTensor).dispose();
    return floats;
  }

  async function agrees(
    result: Gradients,
    exact: { readonly inputs: HostInputs; readonly options: MlaMathOptions; readonly gradOutput: Tensor },
    bounds: { readonly relL2: number },
  ) {
    const expected = await oracle(exact.inputs, exact.options, exact.gradOutput);
    for (const name of tensorNames) {
      if (expected[name] !== undefined) assertClose(result[name]!, expected[name], bounds, name);
    }
  }

  test("are tensors on the GPU for tensors on the GPU", async () => {
    const context = await testContext();
    const gradOutput = gradOutputOf(shape);
    const there: OwnedGpuTensor[] = [];
    const bring = async (tensor: Tensor) => {
      there.push(await toGpu(tensor));
      return there[there.length - 1];
    };
    const placed = new Map<string, OwnedGpuTensor>();
    for (const name of tensorNames) if (inputs[name]) placed.set(name, await bring(inputs[name]));
    const result = await throughVjp(
      mapTensors<AnyTensor, AnyTensor>(inputs, (_, name) => placed.get(name)!),
      await bring(gradOutput),
    );
    await agrees(result, { inputs, options, gradOutput }, { relL2: 1e-5 });
    for (const tensor of there) tensor.dispose();
    assertEquals(context.buffers.lent, 0);
  });

  test(
    "are halves for halves, on either side",
    { skip: !hasHalves && "the device has no half precision" },
    async () => {
      const exact = { inputs: rounded(inputs, "f16"), options, gradOutput: toFloats(toHalves(gradOutputOf(shape))) };
      const host = mapTensors<Tensor, HostTensor>(inputs, (tensor) => toHalves(tensor));
      await agrees(await throughVjp(host, toHalves(gradOutputOf(shape))), exact, half);
      const placed = new Map<string, OwnedGpuTensor>();
      for (const name of tensorNames) if (host[name]) placed.set(name, await toGpu(host[name]!));
      const gradOutput = await toGpu(toHalves(gradOutputOf(shape)));
      const gpu = mapTensors<AnyTensor, AnyTensor>(host, (_, name) => placed.get(name)!);
      await agrees(await throughVjp(gpu, gradOutput), exact, half);
      for (const tensor of [...placed.values(), gradOutput]) tensor.dispose();
    },
  );

  test("are float32 for bfloat16", async () => {
    const exact = { inputs: { ...inputs, wKc: rounded(inputs, "bf16").wKc }, options, gradOutput: gradOutputOf(shape) };
    await agrees(await throughVjp({ ...inputs, wKc: stored(inputs.wKc, "bf16") }, exact.gradOutput), exact, {
      relL2: 1e-5,
    });
  });

  test("are zero where no query meets a key", async () => {
    for (const changes of [{ keyLength: 0 }, { queryLength: 0 }, { batch: 0 }]) {
      const empty = { ...shape, ...changes };
      const call = randomCall(empty);
      const result = await backwardOn(await testContext())(call.inputs, call.options, gradOutputOf(empty));
      for (const name of tensorNames) {
        if (call.inputs[name] === undefined) continue;
        assertEquals(result[name]!.shape, [...call.inputs[name].shape]);
        assert(result[name]!.data.every((x) => x === 0), name);
      }
    }
  });

  test("a trial runs backward and gives the gradients", async () => {
    const context = await testContext();
    const problem = mlaProblem(inputs, options);
    const trial = await webgpuTarget(context).trial(problem, inputs, smallConfig, { backward: true });
    await agrees(
      await trial.gradients!() as Gradients,
      { inputs, options, gradOutput: tuningGradOutput(problem) },
      { relL2: 1e-5 },
    );
    assert(await trial.time(2) > 0);
    trial.dispose();
    // What trials share is given back when its promise has been heard.
    await new Promise((resolve) => setTimeout(resolve, 0));
    assertEquals(context.buffers.lent, 0);
  });
});
