import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects } from "@std/assert";
import fc from "fast-check";
import {
  type AnyTensor,
  type AttentionState,
  type GpuTensor,
  type HostTensor,
  mergeAttentionStates,
  mlaAttentionWithLse,
  type OwnedGpuTensor,
  type Tensor,
  tensor,
  toFloats,
  toGpu,
  toHalves,
  toHost,
} from "../mod.ts";
import { FlashMLAError } from "../src/op/errors.ts";
import { elementCount } from "../src/op/tensor.ts";
import { skip } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { normals, randomTensor } from "./support/random_problem.ts";

const [B, Sq, Hq, Hkv, L, P, V] = [2, 3, 4, 2, 5, 4, 3];

/** Where the states of the checks lie. */
interface Side {
  readonly name: string;
  readonly skip: string | false;
  place(tensor: HostTensor): Promise<AnyTensor>;
  fetch(tensor: AnyTensor): Promise<HostTensor>;
}

const host: Side = {
  name: "the host",
  skip: false,
  place: (tensor) => Promise.resolve(tensor),
  fetch: (tensor) => Promise.resolve(tensor as HostTensor),
};

/** Entries `start` to `end` of an axis. */
function cut({ data, shape }: Tensor, axis: number, start: number, end: number): Tensor {
  const inner = elementCount(shape.slice(axis + 1));
  const outer = elementCount(shape.slice(0, axis));
  const width = (end - start) * inner;
  const part = new Float32Array(outer * width);
  for (let i = 0; i < outer; i++) {
    const from = (i * shape[axis] + start) * inner;
    part.set(data.subarray(from, from + width), i * width);
  }
  return { data: part, shape: shape.map((n, i) => i === axis ? end - start : n) };
}

/** Attention over keys `start` to `end`, some of which a bias hides. */
function call(keys: number, seed: number) {
  const random = normals(seed);
  const draw = (...shape: number[]) => randomTensor(shape, random);
  const query = draw(B, Sq, Hq, P);
  const keyValue = draw(B, keys, L);
  const [wKc, wVc] = [draw(L, Hkv, P), draw(L, Hkv, V)];
  const bias = draw(B, 1, Sq, keys);
  for (let i = 0; i < bias.data.length; i++) if (random() > 0.3) bias.data[i] = -Infinity;
  return (start: number, end: number, softmaxAux?: Tensor) =>
    mlaAttentionWithLse({ query, keyValue: cut(keyValue, 1, start, end), wKc, wVc }, {
      bias: cut(bias, 3, start, end),
      softmaxAux,
      platform: "reference",
    });
}

/** A state of made-up rows, one head and one query. */
function row(lse: number, ...values: number[]): AttentionState<Tensor, Tensor> {
  return {
    output: tensor(Float32Array.from(values), [1, 1, 1, values.length]),
    lse: tensor(Float32Array.of(lse), [1, 1, 1]),
  };
}

function checks({ name, skip, place, fetch }: Side): void {
  const merge = async (
    a: AttentionState<HostTensor>,
    b: AttentionState<HostTensor>,
    softmaxAux?: Tensor,
  ): Promise<{ output: HostTensor; lse: HostTensor }> => {
    const put = async ({ output, lse }: AttentionState) => ({
      output: await place(output as HostTensor),
      lse: await place(lse as HostTensor),
    });
    const { output, lse } = await mergeAttentionStates(await put(a), await put(b), {
      softmaxAux: softmaxAux && await place(softmaxAux),
    });
    return { output: await fetch(output), lse: await fetch(lse) };
  };

  describe(`mergeAttentionStates() on ${name}`, { skip }, () => {
    test("gives what all keys together give, however they are split", async () => {
      await fc.assert(
        fc.asyncProperty(
          fc.array(fc.nat(5), { minLength: 2, maxLength: 5 }),
          fc.constantFrom("none", "[Hq]", "[n]", "[Hq, n]", "[1, n]"),
          fc.boolean(),
          fc.integer(),
          async (lengths, form, halves, seed) => {
            const ends = lengths.map((_, i) => lengths.slice(0, i + 1).reduce((a, b) => a + b));
            const keys = ends[ends.length - 1];
            const over = call(keys, seed);
            const shape = { none: null, "[Hq]": [Hq], "[n]": [2], "[Hq, n]": [Hq, 2], "[1, n]": [1, 3] }[form];
            const sinks = shape === null ? undefined : randomTensor(shape, normals(seed + 1));
            const parts = await Promise.all(ends.map((end, i) => over(ends[i - 1] ?? 0, end)));
            const stored: AttentionState<HostTensor>[] = halves
              ? parts.map(({ output, lse }) => ({ output: toHalves(output), lse }))
              : parts;
            let merged = stored[0];
            // The sinks join at the end, or they would count once for each part.
            for (let i = 1; i < stored.length; i++) {
              merged = await merge(merged, stored[i], i === stored.length - 1 ? sinks : undefined);
            }
            const expected = await over(0, keys, sinks);
            const bounds = halves ? { relL2: 3e-3, absolute: 1e-5 } : { relL2: 2e-6, absolute: 1e-6 };
            assertClose(toFloats(merged.output as HostTensor), expected.output, bounds);
            assertClose(merged.lse as Tensor, expected.lse, { relL2: 2e-6, absolute: 1e-6 });
          },
        ),
        { numRuns: 60, seed: 4 },
      );
    });

    test("takes no part of a part that saw no key, whatever stands in its row", async () => {
      const full = row(0.5, 1, 2, 3);
      const empty = row(-Infinity, NaN, Infinity, -Infinity);
      for (const [a, b] of [[full, empty], [empty, full]]) {
        const { output, lse } = await merge(a, b);
        assertEquals([...toFloats(output).data], [1, 2, 3]);
        assertEquals(toFloats(lse).data[0], 0.5);
      }
    });

    test("gives a zero row and minus infinity where no part saw a key, with sinks too", async () => {
      for (const sinks of [undefined, tensor(Float32Array.of(2, 3), [2]), tensor(Float32Array.of(2), [1])]) {
        const { output, lse } = await merge(row(-Infinity, NaN, 7), row(-Infinity, 8, NaN), sinks);
        assertEquals([...toFloats(output).data], [0, 0]);
        assertEquals(toFloats(lse).data[0], -Infinity);
      }
    });

    test("weighs by the exponents of the log-sum-exps, however large they are", async () => {
      for (const at of [0, 80, -80, 1e4, -1e4, 3e38, -3e38]) {
        const equal = await merge(row(at, 1, 5), row(at, 3, 1));
        assertEquals([...toFloats(equal.output).data], [2, 3]);
        const apart = await merge(row(at, 1, 5), row(at - 1e3 - Math.abs(at), 3, 1));
        assertEquals([...toFloats(apart.output).data], [1, 5]);
        assertEquals(toFloats(apart.lse).data[0], Math.fround(at));
      }
      const { lse } = await merge(row(1, 0), row(1, 0));
      assertClose(lse, tensor(Float32Array.of(1 + Math.LN2), [1, 1, 1]), { relL2: 1e-7 });
    });

    test("counts sinks once, in the denominator alone", async () => {
      const sinks = tensor(Float32Array.of(Math.log(2)), [1]);
      const { output, lse } = await merge(row(0, 4, 8), row(0, 4, 0), sinks);
      assertClose(output, tensor(Float32Array.of(2, 2), [1, 1, 1, 2]), { relL2: 1e-6 });
      assertClose(lse, tensor(Float32Array.of(Math.log(4)), [1, 1, 1]), { relL2: 1e-6 });
      const hidden = tensor(Float32Array.of(-Infinity), [1]);
      assertEquals(await merge(row(0, 4, 8), row(0, 4, 0), hidden), await merge(row(0, 4, 8), row(0, 4, 0)));
    });

    test("is like a, and leaves both as they are", async () => {
      const [a, b] = [row(0, 1, 2), row(1, 3, 4)];
      const half = { output: toHalves(a.output), lse: a.lse };
      assertEquals((await merge(half, b)).output.dtype, "f16");
      assertEquals((await merge(b, half)).output.dtype ?? "f32", "f32");
      const { output, lse } = await merge(a, b);
      toFloats(output).data.fill(9);
      toFloats(lse).data.fill(9);
      assertEquals([a, b], [row(0, 1, 2), row(1, 3, 4)]);
      const swapped = await merge(b, a);
      assertClose(swapped.output, toFloats((await merge(a, b)).output), { relL2: 1e-7 });
    });

    test("takes states without rows", async () => {
      const none = { output: tensor(new Float32Array(0), [1, 0, 2, 3]), lse: tensor(new Float32Array(0), [1, 2, 0]) };
      const { output, lse } = await merge(none, none);
      assertEquals([output.shape, lse.shape], [[1, 0, 2, 3], [1, 2, 0]]);
    });
  });
}

checks(host);
checks({
  name: "a GPU",
  skip,
  place: (tensor) => toGpu(tensor),
  async fetch(tensor) {
    const read = await toHost(tensor as GpuTensor);
    (tensor as OwnedGpuTensor).dispose();
    return read;
  },
});

describe("mergeAttentionStates() refuses", () => {
  const state = (): AttentionState<Tensor, Tensor> => ({
    output: tensor(new Float32Array(2 * 3 * 4 * 5), [2, 3, 4, 5]),
    lse: tensor(new Float32Array(2 * 4 * 3), [2, 4, 3]),
  });
  const zeros = (...shape: number[]) => tensor(new Float32Array(elementCount(shape)), shape);
  const onGpu = (shape: readonly number[]): GpuTensor => ({
    buffer: { size: 1 << 20, usage: 0x80 } as GPUBuffer,
    shape,
    dtype: "f32",
  });
  const good = state();
  const gpuState = { output: onGpu(good.output.shape), lse: onGpu(good.lse.shape) };
  const refusals: [title: string, a: unknown, b: unknown, options: unknown, message: string][] = [
    ["no state", undefined, good, {}, "merge attention states: a must be { output, lse }, got undefined"],
    ["a null state", good, null, {}, "b must be { output, lse }, got null"],
    ["a bare tensor", good, good.output, {}, "Cannot use b.output as a tensor: expected { data, shape } or"],
    ["a state without lse", { output: good.output }, good, {}, "Cannot use a.lse as a tensor"],
    [
      "an output of rank 3",
      { ...good, output: zeros(2, 3, 4) },
      good,
      {},
      "a.output must have 4 axes [batch, queryLen",
    ],
    [
      "unlike outputs",
      good,
      { ...good, output: zeros(2, 3, 4, 6) },
      {},
      "b.output has shape [2, 3, 4, 6], a.output has",
    ],
    [
      "lse by row",
      { ...good, lse: zeros(2, 3, 4) },
      good,
      {},
      "a.lse has shape [2, 3, 4], the outputs go with [2, 4, 3",
    ],
    ["lse of another shape", good, { ...good, lse: zeros(2, 4) }, {}, "b.lse has shape [2, 4], the outputs go with"],
    ["lse in halves", good, { ...good, lse: toHalves(good.lse) }, {}, 'b.lse has dtype "f16", expected "f32"'],
    [
      "sinks of other heads",
      good,
      good,
      { softmaxAux: zeros(3, 2) },
      "merge attention states: softmaxAux has shape [3, 2",
    ],
    ["null options", good, good, null, "options must be an object, got null"],
    ["an unknown option", good, good, { sinks: zeros(4) }, 'unknown option "sinks"; known is softmaxAux'],
    ["sides that differ", good, gpuState, {}, "b.output lies on a GPU, a.output on the host"],
    ["an lse on another side", { ...good, lse: gpuState.lse }, good, {}, "a.lse lies on a GPU, a.output on the host"],
    ["sinks on another side", good, good, { softmaxAux: onGpu([4]) }, "softmaxAux lies on a GPU, a.output on the host"],
  ];
  for (const [title, a, b, options, message] of refusals) {
    test(title, async () => {
      const error = await assertRejects(
        () => mergeAttentionStates(a as AttentionState, b as AttentionState, options as object),
        FlashMLAError,
        message,
      );
      assertEquals(error.code, "invalid-input");
      assert(!error.message.includes("Cannot run MLA"));
    });
  }
});
