import { describe, test } from "node:test";
import { assert, assertEquals, assertLess, assertRejects, assertStrictEquals } from "@std/assert";
import {
  type AttentionState,
  flashMLA,
  FlashMLAError,
  type GpuTensor,
  mlaAttention,
  mlaAttentionVjp,
  mlaAttentionWithLse,
  toFloats,
  toHalves,
} from "../mod.ts";
import {
  type HostInputs,
  mapTensors,
  type MlaMathOptions,
  mlaProblem,
  type TensorName,
  tensorNames,
} from "../src/op/mla_problem.ts";
import { type AnyTensor, elementCount, type Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionBackward } from "../src/reference/mla_attention_backward.ts";
import { stored } from "./support/dtype_attention.ts";
import { smallConfig } from "./support/gpu.ts";
import { guessing } from "./support/guessing.ts";
import { assertClose } from "./support/metrics.ts";
import { normals, type ProblemShape, randomCall, randomTensor } from "./support/random_problem.ts";

const shape: ProblemShape = {
  batch: 2,
  queryLength: 5,
  keyLength: 7,
  kvHeads: 2,
  headsPerKvHead: 2,
  kvLoraRank: 6,
  qkNopeHeadDim: 4,
  qkRopeHeadDim: 3,
  vHeadDim: 5,
  rope: "in_query",
  causal: true,
  softmaxScale: null,
  cuSeqlens: null,
  values: "plain",
  seed: 3,
};
const outputAxes = [2, 5, 4, 5];
const random = normals(23);
const bias = randomTensor([2, 1, 5, 7], random);
const softmaxAux = randomTensor([4, 2], random);
const gradOutput = randomTensor(outputAxes, random);
const attentionMask = { data: Uint8Array.from({ length: 35 }, (_, i) => i % 3), shape: [1, 1, 5, 7] };
const zeros = (...shape: number[]): Tensor => ({ data: new Float32Array(elementCount(shape)), shape });

const variants: [title: string, shape: Partial<ProblemShape>, options: MlaMathOptions][] = [
  ["nothing else", {}, {}],
  ["bias, sinks and a soft cap", { causal: false }, { bias, softmaxAux, logitsSoftCap: 2 }],
  ["a mask and a window", {}, { attentionMask, slidingWindow: 2 }],
  ["dropout and a shared sink", {}, { dropout: { rate: 0.25, seed: 5 }, softmaxAux: randomTensor([3], random) }],
  ["packed sequences", { batch: 1, queryLength: 9, keyLength: 9, cuSeqlens: [0, 4, 4, 9] }, { slidingWindow: [3, 1] }],
];

/** A call with the tensors of its options among its inputs, as the oracle takes them. */
function inOne(inputs: HostInputs, { bias, softmaxAux, attentionMask }: MlaMathOptions): HostInputs {
  return {
    ...inputs,
    ...(bias && { bias: bias as Tensor }),
    ...(softmaxAux && { softmaxAux: softmaxAux as Tensor }),
    ...(attentionMask && { attentionMask }),
  };
}

function assertGradients(
  actual: Partial<Record<TensorName, AnyTensor>>,
  expected: Partial<Record<TensorName, Tensor>>,
  relL2: number,
): void {
  assertEquals(Object.keys(actual).sort(), Object.keys(expected).sort());
  for (const name of tensorNames) {
    if (expected[name] !== undefined) assertClose(actual[name]!, expected[name], { relL2, absolute: 1e-6 }, name);
  }
}

function checks(platform: "reference" | "webgpu", skip: string | false, relL2: number): void {
  describe(`mlaAttentionVjp() on ${platform}`, { skip }, () => {
    const { executor } = guessing();
    const here = { platform, executor, ...(platform === "webgpu" && { cfg: smallConfig }) } as const;

    for (const rope of ["none", "in_query", "shared"] as const) {
      for (const [title, changes, more] of variants) {
        test(`gives the gradients of the formulas with ${title}, rope ${rope}`, async () => {
          const call = randomCall({ ...shape, ...changes, rope, qkRopeHeadDim: rope === "none" ? 0 : 3 });
          const options = { ...call.options, ...more };
          const { output, lse, vjp } = await mlaAttentionVjp(call.inputs, { ...options, ...here });
          assertEquals(
            { output, lse },
            await mlaAttentionWithLse(call.inputs, { ...options, ...here }) as AttentionState<Tensor, Tensor>,
          );
          const problem = mlaProblem(call.inputs, options);
          const grad = randomTensor(output.shape, normals(4));
          const expected = referenceMlaAttentionBackward(inOne(call.inputs, options), problem, grad);
          assertGradients(await vjp(grad), expected, relL2);
        });
      }
    }

    test("gives the slope of the result in every direction", async () => {
      const call = randomCall(shape);
      const options = { ...call.options, logitsSoftCap: 3, slidingWindow: 3, dropout: { rate: 0.2, seed: 8 }, ...here };
      const inputs = { ...call.inputs, bias, softmaxAux };
      const { vjp } = await mlaAttentionVjp(inputs, options);
      const gradients = await vjp(gradOutput);
      const draw = normals(31);
      for (const name of ["query", "keyValue", "wKc", "wVc", "bK", "bias", "softmaxAux"] as const) {
        const direction = randomTensor(inputs[name]!.shape, draw);
        const step = 1 / 64;
        const loss = async (sign: number) => {
          const moved = mapTensors<Tensor, Tensor>(inputs, (tensor, other) => {
            if (other !== name) return tensor;
            return { ...tensor, data: tensor.data.map((x, i) => x + sign * step * direction.data[i]) };
          });
          const { data } = await mlaAttention(moved, options);
          return data.reduce((sum, x, i) => sum + x * gradOutput.data[i], 0);
        };
        const slope = (await loss(1) - await loss(-1)) / (2 * step);
        const expected = gradients[name]!.data.reduce((sum, x, i) => sum + x * direction.data[i], 0);
        // The third derivative's part and the float32 of the outputs: 1/64² and 1e-6 · 64.
        assertLess(
          Math.abs(slope - expected),
          2e-3 * Math.max(1, Math.abs(expected)),
          `${name}: ${slope}, ${expected}`,
        );
      }
    });

    test("can be asked any number of times, also at the same time, with the same bits", async () => {
      const { inputs, options } = randomCall(shape);
      const { vjp } = await mlaAttentionVjp(inputs, { ...options, ...here });
      const [first, second, zero] = await Promise.all([vjp(gradOutput), vjp(gradOutput), vjp(zeros(...outputAxes))]);
      assertEquals(first, second);
      assertEquals(await vjp(gradOutput), first);
      for (const name of ["query", "keyValue", "wKc", "wVc", "bK"] as const) {
        assertEquals(zero[name]!.data.every((x) => x === 0), true, name);
      }
    });

    test("does not mind what becomes of output, lse and gradients on the host", async () => {
      const { inputs, options } = randomCall(shape);
      const given = { ...options, ...here, softmaxAux };
      const expected = await (await mlaAttentionVjp(inputs, given)).vjp(gradOutput);
      const { output, lse, vjp } = await mlaAttentionVjp(inputs, given);
      output.data.fill(NaN);
      lse.data.fill(NaN);
      const first = await vjp(gradOutput);
      assertEquals(first, expected);
      for (const name of ["query", "keyValue", "wKc", "wVc"] as const) first[name].data.fill(NaN);
      assertEquals(await vjp(gradOutput), expected);
    });

    test("writes to `out`, which may change afterwards", async () => {
      const { inputs, options } = randomCall(shape);
      const out = zeros(...outputAxes);
      const { output, vjp } = await mlaAttentionVjp(inputs, { ...options, ...here, out });
      assertStrictEquals(output, out);
      const expected = await vjp(gradOutput);
      out.data.fill(NaN);
      assertEquals(await vjp(gradOutput), expected);
    });

    test("gives gradients like their tensors, whatever the type of gradOutput", async () => {
      const { inputs, options } = randomCall(shape);
      const exact = mapTensors(inputs, (tensor) => toFloats(toHalves(tensor)));
      const mixed = {
        ...inputs,
        query: toHalves(inputs.query),
        keyValue: stored(inputs.keyValue, "bf16"),
        wVc: toHalves(inputs.wVc),
      };
      const { output, vjp } = await mlaAttentionVjp(mixed, { ...options, ...here });
      assertEquals(output.dtype, "f16");
      const gradients = await vjp(toHalves(gradOutput));
      const dtypes = [gradients.query, gradients.keyValue, gradients.wKc, gradients.wVc].map(({ dtype = "f32" }) =>
        dtype
      );
      assertEquals(dtypes, ["f16", "f32", "f32", "f16"]);
      assertEquals(await vjp(toFloats(toHalves(gradOutput))), gradients);
      const halves = await mlaAttentionVjp(mapTensors(inputs, toHalves), { ...options, ...here });
      const problem = mlaProblem(exact, options);
      const expected = referenceMlaAttentionBackward(exact, problem, toFloats(toHalves(gradOutput)));
      assertGradients(await halves.vjp(toHalves(gradOutput)), expected, 3e-3);
    });

    test("names gradients of bias and sinks where they are given, and of the rotary parts", async () => {
      const { inputs, options } = randomCall({ ...shape, rope: "shared" });
      const names = async (more: MlaMathOptions) =>
        Object.keys(await (await mlaAttentionVjp(inputs, { ...options, ...here, ...more })).vjp(gradOutput)).sort();
      const always = ["bK", "bQ", "keyValue", "query", "wKc", "wVc"];
      assertEquals(await names({}), always);
      assertEquals(await names({ attentionMask }), always);
      assertEquals(await names({ bias, softmaxAux }), [...always, "bias", "softmaxAux"].sort());
    });

    test("keeps NaN in what is hidden out of every gradient", async () => {
      const { inputs, options } = randomCall({ ...shape, causal: false });
      // The last two keys are hidden from all queries; the first query sees nothing at all.
      const visible = (i: number, j: number) => i > 0 && j < 5;
      const each = (value: (i: number, j: number) => number) =>
        Array.from({ length: 35 }, (_, at) => value(Math.floor(at / 7), at % 7));
      const keyValue = { ...inputs.keyValue, data: inputs.keyValue.data.slice() };
      const bK = { ...inputs.bK!, data: inputs.bK!.data.slice() };
      for (const { data, shape: [, , width] } of [keyValue, bK]) {
        for (const b of [0, 1]) data.fill(NaN, (b * 7 + 5) * width, (b + 1) * 7 * width);
      }
      const dirty = { ...inputs, keyValue, bK };
      const term = { data: Float32Array.from(each((i, j) => visible(i, j) ? 0.5 : -Infinity)), shape: [1, 1, 5, 7] };
      const mask = { data: Uint8Array.from(each((i, j) => visible(i, j) ? 1 : 0)), shape: [1, 1, 5, 7] };
      for (const more of [{ attentionMask: mask }, { bias: term, softmaxAux }]) {
        const clean = await (await mlaAttentionVjp(inputs, { ...options, ...here, ...more })).vjp(gradOutput);
        const { output, vjp } = await mlaAttentionVjp(dirty, { ...options, ...here, ...more });
        assert(output.data.every(Number.isFinite));
        assertEquals(await vjp(gradOutput), clean);
      }
      // Outside the window and past the diagonal a bias is never read.
      const causal = { ...options, ...here, causal: true, slidingWindow: 2 };
      const stray = randomTensor([1, 1, 5, 7], normals(9));
      const poisoned = {
        ...stray,
        data: stray.data.map((x, at) => {
          const distance = Math.floor(at / 7) + 2 - at % 7;
          return distance < 0 || distance > 2 ? NaN : x;
        }),
      };
      const clean = await (await mlaAttentionVjp(inputs, { ...causal, bias: stray })).vjp(gradOutput);
      assertEquals(await (await mlaAttentionVjp(inputs, { ...causal, bias: poisoned })).vjp(gradOutput), clean);
    });

    test("takes empty batches and lengths", async () => {
      for (const [batch, queryLength, keyLength] of [[0, 3, 4], [2, 0, 4], [2, 3, 0], [0, 0, 0]]) {
        const { inputs, options } = randomCall({ ...shape, batch, queryLength, keyLength });
        const { output, vjp } = await mlaAttentionVjp(inputs, { ...options, ...here });
        const gradients = await vjp({ data: new Float32Array(output.data.length).fill(1), shape: output.shape });
        for (const name of ["query", "keyValue", "wKc", "wVc", "bK"] as const) {
          assertEquals(gradients[name], zeros(...inputs[name]!.shape), name);
        }
      }
    });

    test("asks the executor's chain for its configuration, once", async () => {
      const { inputs, options } = randomCall(shape);
      const { executor, events } = guessing();
      const { vjp } = await mlaAttentionVjp(inputs, { ...options, platform, executor });
      await vjp(gradOutput);
      await vjp(gradOutput);
      assertEquals(events.filter(({ type }) => type === "heuristic").length, 1);
      assertEquals(events.at(-1)?.type, "heuristic");
    });

    test("refuses gradients after dispose(), and says what to do", async () => {
      const { inputs, options } = randomCall(shape);
      const { output, vjp, dispose } = await mlaAttentionVjp(inputs, { ...options, ...here });
      const underWay = vjp(gradOutput);
      dispose();
      dispose();
      await underWay;
      for (let i = 0; i < 2; i++) {
        const error = await assertRejects(() => vjp(gradOutput), FlashMLAError, "dispose() has freed its residuals");
        assertEquals(error.code, "invalid-input");
      }
      assertEquals(output.shape, outputAxes);
      let escaped: (grad: AnyTensor) => Promise<unknown>;
      {
        using made = await mlaAttentionVjp(inputs, { ...options, ...here });
        escaped = made.vjp;
      }
      await assertRejects(() => escaped(gradOutput), FlashMLAError, "freed its residuals");
    });

    for (
      const [title, grad, message] of [
        ["nothing", undefined, "Cannot use gradOutput as a tensor: expected { data, shape }"],
        ["null", null, "Cannot use gradOutput as a tensor"],
        ["a bare array", gradOutput.data, "Cannot use gradOutput as a tensor"],
        ["too few data", { ...gradOutput, shape: [2, 5, 4, 6] }, "gradOutput as a tensor: shape [2,5,4,6] needs 240"],
        ["the query's shape", zeros(2, 5, 4, 7), "gradOutput has shape [2, 5, 4, 7], the output has [2, 5, 4, 5]"],
        ["a missing axis", zeros(10, 4, 5), "gradOutput has shape [10, 4, 5], the output has [2, 5, 4, 5]"],
        ["one number", zeros(), "gradOutput has shape [], the output has"],
        [
          "double precision",
          { data: new Float64Array(200), shape: outputAxes },
          "gradOutput as a tensor: data must be a",
        ],
      ] as const
    ) {
      test(`refuses ${title} as gradOutput by name`, async () => {
        const { inputs, options } = randomCall(shape);
        const { vjp } = await mlaAttentionVjp(inputs, { ...options, ...here });
        const error = await assertRejects(() => vjp(grad as unknown as Tensor), FlashMLAError, message);
        assertEquals(error.code, "invalid-input");
        await vjp(gradOutput);
      });
    }
  });
}

/** Something that looks like a tensor on a GPU. */
function onGpu(shape: readonly number[], more: Partial<GpuTensor> = {}): GpuTensor {
  return { buffer: { size: 1 << 20, usage: 0x80 } as GPUBuffer, shape, dtype: "f32", ...more };
}

checks("reference", false, 1e-7);

describe("mlaAttentionVjp()", () => {
  const { inputs, options } = randomCall({ ...shape, rope: "none", qkRopeHeadDim: 0, qkNopeHeadDim: 5 });

  test("refuses an `out` in memory that gradients are computed from", async () => {
    const refused = async (call: HostInputs, out: Tensor, name: string) => {
      const error = await assertRejects(
        () => mlaAttentionVjp(call, { ...options, platform: "reference", out }),
        FlashMLAError,
        `out lies in the memory of ${name}, which gradients are computed from`,
      );
      assertEquals(error.code, "invalid-input");
    };
    await refused(inputs, inputs.query, "query");
    // One buffer, views that meet in one element and views that only touch.
    const memory = new Float32Array(500);
    const query = { data: memory.subarray(0, 200), shape: [2, 5, 4, 5] };
    query.data.set(inputs.query.data);
    const before = query.data.slice();
    await refused({ ...inputs, query }, { data: memory.subarray(199, 399), shape: outputAxes }, "query");
    assertEquals(query.data, before);
    const apart = { data: memory.subarray(200, 400), shape: outputAxes };
    const { vjp } = await mlaAttentionVjp({ ...inputs, query }, { ...options, platform: "reference", out: apart });
    const expected = await (await mlaAttentionVjp(inputs, { ...options, platform: "reference" })).vjp(gradOutput);
    assertEquals(await vjp(gradOutput), expected);
    const bytes = new Uint8Array(memory.buffer, 900, 35);
    const masked = { ...inputs, attentionMask: { data: bytes, shape: [1, 1, 5, 7] } };
    await refused(masked, apart, "attentionMask");
  });

  test("refuses bad input like mlaAttention()", async () => {
    for (
      const [more, message] of [
        [{ logitsSoftCap: 0 }, "logitsSoftCap must be"],
        [{ slidingWindow: -1 }, "slidingWindow must be"],
        [{ dropout: { rate: 1, seed: 0 } }, "dropout.rate must be"],
        [{ bias: zeros(1, 3, 5, 7) }, "bias has shape [1, 3, 5, 7]"],
        [{ attentionMask: zeros(1, 1, 5, 7) }, "attentionMask as a mask"],
        [{ out: zeros(2, 5, 4, 6) }, "out has shape"],
        [{ out: stored(gradOutput, "bf16") }, 'out has dtype "bf16"'],
        [{ gradients: true }, 'unknown option "gradients"'],
        [{ executor: { run() {}, prepare() {} } }, "executor must be an Executor"],
      ] as const
    ) {
      const given = { platform: "reference", ...more } as object;
      const error = await assertRejects(() => mlaAttentionVjp(inputs, given), FlashMLAError, message);
      assertEquals(error.code, "invalid-input");
    }
    await assertRejects(
      () => mlaAttentionVjp(inputs, { platform: "cuda" as "webgpu" }),
      FlashMLAError,
      "registered are webgpu",
    );
  });

  test("is not confused by shapes and fields that change after the call", async () => {
    const changing = structuredClone(inputs) as { -readonly [K in keyof HostInputs]: HostInputs[K] };
    const running = mlaAttentionVjp(changing, { ...options, platform: "reference" });
    (changing.wKc.shape as number[]).reverse();
    changing.wVc = changing.wKc;
    const { vjp } = await running;
    const grad = structuredClone(gradOutput);
    const gradients = vjp(grad);
    (grad.shape as number[]).reverse();
    const expected = await mlaAttentionVjp(inputs, { ...options, platform: "reference" });
    assertEquals<unknown>(await gradients, await expected.vjp(gradOutput));
  });
});

describe("FlashMLA.vjp()", () => {
  test("names a tensor on a GPU that was disposed of", async () => {
    const { inputs, options } = randomCall(shape);
    const invocation = await flashMLA.prepare({ inputs, options: { ...options, platform: "reference" } });
    const cfg = flashMLA.heuristicCfg(invocation);
    const { residuals } = await flashMLA.fwdWithResiduals(invocation, cfg);
    const error = await assertRejects(
      () => flashMLA.vjp(invocation, cfg, { ...residuals, lse: onGpu([2, 4, 5], { disposed: true }) }, gradOutput),
      FlashMLAError,
      "Cannot compute gradients: lse was disposed of; dispose of it after the last gradients",
    );
    assertEquals(error.code, "invalid-input");
    await assertRejects(
      () => flashMLA.vjp(invocation, cfg, residuals, onGpu(outputAxes)),
      FlashMLAError,
      "gradOutput lies on a GPU, the reference computes on the host: pass await toHost(gradOutput)",
    );
    const elsewhere = [{}, {}].map((device) => onGpu(outputAxes, { device: device as GPUDevice }));
    await assertRejects(
      () => flashMLA.vjp(invocation, cfg, { ...residuals, output: elsewhere[0] }, elsewhere[1]),
      FlashMLAError,
      "gradOutput lies on another device than output",
    );
  });
});
