import { describe, test } from "node:test";
import { assertEquals, assertRejects, assertStrictEquals } from "@std/assert";
import {
  FlashMLAError,
  type GpuMaskTensor,
  mlaAttention,
  mlaAttentionWithLse,
  type MlaEvent,
  tensor,
  toFloats,
  toHalves,
} from "../mod.ts";
import { mlaProblem } from "../src/op/mla_problem.ts";
import { elementCount, type Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionWithLse } from "../src/reference/mla_attention.ts";
import { stored } from "./support/dtype_attention.ts";
import { skip, smallConfig } from "./support/gpu.ts";
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
const random = normals(17);
const bias = randomTensor([2, 1, 5, 7], random);
const softmaxAux = randomTensor([4, 2], random);
const attentionMask = { data: Uint8Array.from({ length: 35 }, (_, i) => i % 3), shape: [1, 1, 5, 7] };
const zeros = (...shape: number[]): Tensor => ({ data: new Float32Array(elementCount(shape)), shape });

function checks(platform: "reference" | "webgpu", skip: string | false, relL2: number): void {
  describe(`mlaAttentionWithLse() on ${platform}`, { skip }, () => {
    const { executor } = guessing();
    const here = { platform, executor, ...(platform === "webgpu" && { cfg: smallConfig }) } as const;

    for (const rope of ["none", "in_query", "shared"] as const) {
      test(`gives what the formulas give, with every option, rope ${rope}`, async () => {
        const { inputs, options } = randomCall({ ...shape, rope, qkRopeHeadDim: rope === "none" ? 0 : 3 });
        for (
          const more of [
            {},
            { bias, softmaxAux, logitsSoftCap: 2 },
            { attentionMask, slidingWindow: 2 },
            { dropout: { rate: 0.25, seed: 5 }, slidingWindow: [1, 0] as const },
          ]
        ) {
          const expected = referenceMlaAttentionWithLse(
            {
              ...inputs,
              ...("bias" in more && { bias, softmaxAux }),
              ...("attentionMask" in more && { attentionMask }),
            },
            mlaProblem(inputs, { ...options, ...more }),
          );
          const { output, lse } = await mlaAttentionWithLse(inputs, { ...options, ...more, ...here });
          assertEquals([output.shape, lse.shape], [[2, 5, 4, 5], [2, 4, 5]]);
          assertClose(output, expected.output, { relL2 });
          assertClose(lse, expected.lse, { relL2 });
        }
      });
    }

    test("of one key is its score; of equal scores their logarithm and that of their number", async () => {
      const { inputs } = randomCall({ ...shape, rope: "none", qkRopeHeadDim: 0, keyLength: 1, kvHeads: 1 });
      const one = await mlaAttentionWithLse(inputs, { ...here, softmaxScale: 0.5 });
      const { query, keyValue, wKc } = inputs;
      for (const [b, h, i] of [[0, 0, 0], [0, 1, 4], [1, 1, 2]]) {
        let score = 0;
        for (let p = 0; p < 4; p++) {
          let key = 0;
          for (let l = 0; l < 6; l++) key += keyValue.data[b * 6 + l] * wKc.data[l * 4 + p];
          score += 0.5 * query.data[((b * 5 + i) * 2 + h) * 4 + p] * key;
        }
        const at = (b * 2 + h) * 5 + i;
        assertClose(tensor(one.lse.data.slice(at, at + 1), [1]), tensor(Float32Array.of(score), [1]), { relL2: 1e-5 });
      }
      const seven = await mlaAttentionWithLse(
        { ...inputs, query: zeros(2, 5, 2, 4), keyValue: zeros(2, 7, 6) },
        { ...here, softmaxAux: tensor(Float32Array.of(0, 0, 0), [3]) },
      );
      const ten = tensor(new Float32Array(20).fill(Math.log(10)), [2, 2, 5]);
      assertClose(seven.lse, ten, { relL2: 1e-6 });
    });

    test("is minus infinity beside a zero row where nothing is visible, with sinks too", async () => {
      const { inputs, options } = randomCall(shape);
      const none = { data: new Uint8Array(35), shape: [1, 1, 5, 7] };
      const hidden = { data: new Float32Array(35).fill(-Infinity), shape: [1, 1, 5, 7] };
      for (const more of [{ attentionMask: none }, { bias: hidden }, { bias: hidden, softmaxAux }]) {
        const { output, lse } = await mlaAttentionWithLse(inputs, { ...options, ...more, ...here });
        assertEquals([output, lse.data], [zeros(2, 5, 4, 5), new Float32Array(40).fill(-Infinity)]);
      }
      const keyless = randomCall({ ...shape, keyLength: 0 });
      const { output, lse } = await mlaAttentionWithLse(keyless.inputs, { ...keyless.options, ...here });
      assertEquals([output, lse.data], [zeros(2, 5, 4, 5), new Float32Array(40).fill(-Infinity)]);
    });

    test("is float32 beside an output like the query, or in `out`", async () => {
      const { inputs, options } = randomCall(shape);
      const expected = await mlaAttentionWithLse(inputs, { ...options, ...here });
      const out = zeros(2, 5, 4, 5);
      const into = await mlaAttentionWithLse(inputs, { ...options, ...here, out });
      assertStrictEquals(into.output, out);
      assertEquals([into.output.data, into.lse], [expected.output.data, expected.lse]);
      const half = await mlaAttentionWithLse({ ...inputs, query: toHalves(inputs.query) }, { ...options, ...here });
      assertEquals([half.output.dtype, half.lse.dtype ?? "f32"], ["f16", "f32"]);
      assertClose(toFloats(half.output), expected.output, { relL2: 3e-3 });
      const brain = await mlaAttentionWithLse({ ...inputs, query: stored(inputs.query, "bf16") }, {
        ...options,
        ...here,
      });
      assertEquals([brain.output.dtype ?? "f32", brain.lse.dtype ?? "f32"], ["f32", "f32"]);
    });

    test("takes bias, mask and sinks among the inputs as among the options", async () => {
      const { inputs, options } = randomCall(shape);
      for (const more of [{ bias, softmaxAux }, { attentionMask, softmaxAux }]) {
        assertEquals(
          await mlaAttentionWithLse({ ...inputs, ...more }, { ...options, ...here }),
          await mlaAttentionWithLse(inputs, { ...options, ...here, ...more }),
        );
      }
    });

    test("gives the output that mlaAttention() gives", async () => {
      const { inputs, options } = randomCall(shape);
      const given = { ...options, bias, softmaxAux, logitsSoftCap: 3, ...here };
      const { output } = await mlaAttentionWithLse(inputs, given);
      assertClose(output, await mlaAttention(inputs, given), { relL2 });
    });

    test("lets a bias win over a mask, and says so", async () => {
      const { inputs, options } = randomCall(shape);
      const events: MlaEvent[] = [];
      const given = { ...options, ...here, bias, onEvent: (event: MlaEvent) => void events.push(event) };
      const alone = await mlaAttentionWithLse(inputs, given);
      assertEquals(events, []);
      assertEquals(await mlaAttentionWithLse(inputs, { ...given, attentionMask }), alone);
      assertEquals(events.map(({ code }) => code), ["mask-ignored"]);
      const throws = () => {
        throw new Error("a listener's own");
      };
      assertEquals(await mlaAttentionWithLse(inputs, { ...given, attentionMask, onEvent: throws }), alone);
      const wrong = { data: new Uint8Array(34), shape: [1, 1, 34, 1] };
      await assertRejects(
        () => mlaAttentionWithLse(inputs, { ...given, attentionMask: wrong }),
        FlashMLAError,
        "atten",
      );
    });

    test("asks the executor's chain for its configuration", async () => {
      const { inputs, options } = randomCall(shape);
      const { executor, events } = guessing();
      await mlaAttentionWithLse(inputs, { ...options, platform, executor });
      assertEquals(events.at(-1)?.type, "heuristic");
      const [cfg] = events.flatMap((event) => event.type === "heuristic" ? [event.cfg] : []);
      await mlaAttentionWithLse(inputs, { ...options, platform, executor, cfg });
      assertEquals(events.at(-1)?.type, "override");
    });
  });
}

checks("reference", false, 1e-7);
checks("webgpu", skip, 1e-5);

describe("mlaAttentionWithLse()", () => {
  const { inputs } = randomCall(shape);

  test("says on the console, once, that a mask is ignored when nobody listens", async () => {
    const { warn } = console;
    const said: string[] = [];
    console.warn = (message: string) => void said.push(message);
    try {
      for (let i = 0; i < 2; i++) await mlaAttentionWithLse(inputs, { bias, attentionMask, platform: "reference" });
    } finally {
      console.warn = warn;
    }
    assertEquals(said.length, 1);
    assertEquals(said[0].startsWith("Both bias and attentionMask are given: the bias holds"), true);
  });

  test("refuses a mask on a GPU where the reference runs", async () => {
    const mask: GpuMaskTensor = {
      buffer: { size: 64, usage: 0x80 } as GPUBuffer,
      shape: [1, 1, 5, 7],
      dtype: "u8",
    };
    const error = await assertRejects(
      () => mlaAttentionWithLse(inputs, { attentionMask: mask, platform: "reference" }),
      FlashMLAError,
      "attentionMask lies on a GPU, the reference computes on the host",
    );
    assertEquals(error.code, "invalid-input");
  });

  for (
    const [name, value] of [["sinks", 1], ["executor", { run() {}, prepare() {} }], ["cfg", 3], ["onEvent", 1]] as const
  ) {
    test(`refuses ${name}: ${JSON.stringify(value)} by name`, async () => {
      const error = await assertRejects(
        () => mlaAttentionWithLse(inputs, { platform: "reference", [name]: value } as object),
        FlashMLAError,
        name,
      );
      assertEquals(error.code, "invalid-input");
    });
  }
});
