// Prefill against cached prefixes, on both platforms: every formulation is what the forward oracle gives over all rows of a
// sequence, whatever was cached before and however the prefix is cut.

import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects } from "@std/assert";
import fc from "fast-check";
import {
  type AnyTensor,
  FlashMLAError,
  LatentCache,
  type MlaPrefillOptions,
  mlaPrefillWithCache,
  toFloats,
  toGpu,
  toHalves,
  toHost,
} from "../mod.ts";
import { fewerFlops, flopsOf, visiblePairs } from "../src/op/formulation.ts";
import { mlaProblem } from "../src/op/mla_problem.ts";
import type { GpuTensor, Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { skip, smallConfig, smallDecodeConfig, testContext } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { normals, randomTensor } from "./support/random_problem.ts";

const [H, kvHeads, P, R, L, V] = [4, 2, 8, 4, 12, 8];
const pageSize = 4;

/** One sequence: keys that are cached before, and new ones. */
interface Sequence {
  readonly before: number;
  readonly added: number;
}

interface Setting {
  readonly platform: "reference" | "webgpu";
  /** Whether tensors lie on the GPU. */
  readonly resident?: boolean;
  /** Whether sequences are packed; otherwise all have as many new tokens. */
  readonly packed?: boolean;
}

const offsets = (lengths: readonly number[]) =>
  lengths.reduce((sums, length) => [...sums, sums[sums.length - 1] + length], [0]);

/** Rows from `first` to `end` of a packed tensor. */
function cut({ data, shape }: Tensor, first: number, end: number): Tensor {
  const row = shape.slice(2).reduce((product, axis) => product * axis, 1);
  return { data: data.subarray(first * row, end * row), shape: [1, end - first, ...shape.slice(2)] };
}

/** Some columns of rows. */
function columns({ data, shape: [, count, width] }: Tensor, first: number, length: number): Tensor {
  const part = Float32Array.from({ length: count * length }, (_, i) => {
    return data[Math.floor(i / length) * width + first + i % length];
  });
  return { data: part, shape: [1, count, length] };
}

/** Runs a call and compares it with the oracle, sequence by sequence. */
async function check(
  sequences: readonly Sequence[],
  options: MlaPrefillOptions,
  { platform, resident = false, packed = true }: Setting,
  seed: number,
): Promise<void> {
  const random = normals(seed);
  const before = sequences.map((sequence) => sequence.before);
  const added = sequences.map((sequence) => sequence.added);
  const [starts, newStarts] = [offsets(before), offsets(added)];
  const total = newStarts[newStarts.length - 1];
  const cached = randomTensor([1, starts[starts.length - 1], L + R], random);
  const rows = randomTensor([1, total, L + R], random);
  const query = randomTensor([1, total, H, P + R], random);
  const weights = { wKc: randomTensor([L, kvHeads, P], random), wVc: randomTensor([L, kvHeads, V], random) };

  const most = Math.max(1, ...sequences.map((s) => Math.ceil((s.before + s.added) / pageSize)));
  const pages = Math.max(1, sequences.length * most);
  const made: { dispose(): void }[] = [];
  const place = async (tensor: Tensor): Promise<AnyTensor> => {
    if (!resident) return tensor;
    const placed = await toGpu(tensor);
    made.push(placed);
    return placed;
  };
  try {
    const cache = await LatentCache.create({ platform, pages, pageSize, kvLoraRank: L, qkRopeHeadDim: R });
    made.push(cache);
    const blockTable = {
      data: new Int32Array(sequences.length * most).fill(2147480000),
      shape: [sequences.length, most],
    };
    const seqLens = new Int32Array(sequences.length);
    cache.reserve({ blockTable, seqLens, newTokens: sequences.map((s) => s.before + s.added) });
    await cache.append(cached, { blockTable, seqLens, cuSeqlens: starts });

    const shaped = (tensor: Tensor): Tensor =>
      packed ? tensor : { ...tensor, shape: [sequences.length, added[0], ...tensor.shape.slice(2)] };
    const indices = resident ? await toGpu(blockTable) : blockTable;
    if (resident) made.push(indices as never);
    const result = await mlaPrefillWithCache({
      query: await place(shaped(query)),
      rows: await place(shaped(rows)),
      wKc: await place(weights.wKc),
      wVc: await place(weights.wVc),
      ...{ cache, blockTable: indices, seqLens: before },
      ...(packed && { cuSeqlens: newStarts }),
    }, { ...options, ...(platform === "webgpu" && { cfg: smallConfig, decodeCfg: smallDecodeConfig }) }) as AnyTensor;
    if (resident) made.push(result as never);
    const output = toFloats(resident ? await toHost(result as GpuTensor) : result as Tensor);
    assertEquals(output.shape, packed ? [1, total, H, V] : [sequences.length, added[0], H, V]);

    const expected = new Float32Array(output.data.length);
    const { causal = true, softmaxScale, logitsSoftCap, slidingWindow, softmaxAux } = options;
    sequences.forEach((sequence, s) => {
      const all = {
        data: Float32Array.of(
          ...cut(cached, starts[s], starts[s + 1]).data,
          ...cut(rows, newStarts[s], newStarts[s + 1]).data,
        ),
        shape: [1, sequence.before + sequence.added, L + R],
      };
      const inputs = {
        ...weights,
        query: cut(query, newStarts[s], newStarts[s + 1]),
        keyValue: columns(all, 0, L),
        bK: columns(all, L, R),
        ...(softmaxAux && { softmaxAux: softmaxAux as Tensor }),
      };
      const problem = mlaProblem(inputs, { causal, softmaxScale, logitsSoftCap, slidingWindow });
      expected.set(referenceMlaAttention(inputs, problem).data, newStarts[s] * H * V);
    });
    assertClose(output, { data: expected, shape: output.shape }, { relL2: 1e-5, absolute: 1e-6 });
  } finally {
    made.reverse().forEach((tensor) => tensor.dispose());
  }
}

const lengths = fc.record({
  before: fc.oneof(fc.constant(0), fc.nat(40)),
  added: fc.oneof(fc.constant(0), fc.constant(1), fc.integer({ min: 1, max: 24 })),
});

const settings = fc.record({
  sequences: fc.array(lengths, { minLength: 1, maxLength: 4 }),
  formulation: fc.constantFrom("auto", "absorbed", "expanded"),
  chunkKeys: fc.constantFrom(1, 7, 16, 8192),
  causal: fc.boolean(),
  window: fc.oneof(fc.constant(null), fc.tuple(fc.nat(30), fc.nat(5))),
  softCap: fc.constantFrom(null, 2),
  sinks: fc.boolean(),
  seed: fc.integer(),
});

/** The properties on one platform. */
function properties(platform: "reference" | "webgpu", resident: boolean, runs: number, oneKind = false) {
  return fc.assert(
    fc.asyncProperty(settings, async (drawn) => {
      const { sequences, formulation, chunkKeys, causal, window, softCap, sinks, seed } = drawn;
      // Options make kernels of their own, which a software adapter compiles for seconds each.
      const options: MlaPrefillOptions = oneKind ? { formulation, chunkKeys } : {
        ...{ formulation, chunkKeys, causal },
        ...(window && { slidingWindow: window }),
        ...(softCap && { logitsSoftCap: softCap }),
        ...(sinks && { softmaxAux: randomTensor([H], normals(seed)) }),
      };
      await check(sequences, options, { platform, resident }, seed);
    }),
    { numRuns: runs },
  );
}

const mixed: readonly Sequence[] = [
  { before: 0, added: 9 },
  { before: 30, added: 1 },
  { before: 7, added: 20 },
  { before: 5, added: 0 },
];

describe("mlaPrefillWithCache() on the reference", () => {
  test("agrees with the oracle on random batches", () => properties("reference", false, 60));

  test("takes sequences that are not packed", async () => {
    const sequences = [{ before: 3, added: 5 }, { before: 33, added: 5 }, { before: 0, added: 5 }];
    for (const formulation of ["auto", "absorbed", "expanded"] as const) {
      await check(sequences, { formulation, chunkKeys: 8 }, { platform: "reference", packed: false }, 3);
    }
  });

  test("refuses what does not fit, and appends nothing", async () => {
    using cache = await LatentCache.create(
      {
        ...{ platform: "reference", pages: 4, pageSize, kvLoraRank: L, qkRopeHeadDim: R },
      } as const,
    );
    const random = normals(1);
    const blockTable = { data: cache.allocate(2), shape: [1, 2] };
    const inputs = {
      ...{ cache, blockTable, seqLens: [0] },
      query: randomTensor([1, 3, H, P + R], random),
      rows: randomTensor([1, 3, L + R], random),
      wKc: randomTensor([L, kvHeads, P], random),
      wVc: randomTensor([L, kvHeads, V], random),
    };
    const refused = async (change: object, message: string, options: object = {}) => {
      const error = await assertRejects(() => mlaPrefillWithCache({ ...inputs, ...change }, options), FlashMLAError);
      assertEquals(error.code, "invalid-input");
      assert(error.message.includes(message), error.message);
    };
    await refused({ cache: {} }, "cache must be a LatentCache, got an object");
    await refused({ wVc: undefined }, "wKc and wVc are needed");
    await refused(
      { rows: randomTensor([1, 2, L + R], random) },
      "rows [1,2,16]: expected as many rows as queries",
    );
    await refused({ seqLens: [7] }, "seqLens[0] is 10, more than the 8 tokens of 2 pages of 4 tokens");
    await refused({ seqLens: [0, 1] }, "seqLens has 2 lengths, there are 1 sequences");
    await refused({}, 'formulation must be "auto", "absorbed" or "expanded", got "fast"', { formulation: "fast" });
    await refused({}, "chunkKeys must be a whole number from 1, got 0", { chunkKeys: 0 });
    await refused({}, 'unknown option "chunk"', { chunk: 4 });
  });
});

describe("mlaPrefillWithCache() on the GPU", { skip }, () => {
  test("agrees with the oracle on random batches", async () => {
    await testContext();
    await properties("webgpu", false, 6, true);
  });

  test("keeps everything on the GPU and gives back what it borrows", async () => {
    const { buffers } = await testContext();
    const { lent } = buffers;
    await check(mixed, { chunkKeys: 8, formulation: "expanded" }, { platform: "webgpu", resident: true }, 5);
    await check(mixed, { chunkKeys: 8 }, { platform: "webgpu", resident: true }, 6);
    assertEquals(buffers.lent, lent);
  });

  test("gives halves to a query of halves, of an odd number a token, too", async () => {
    await testContext();
    const random = normals(8);
    const draw = (...shape: number[]) => randomTensor(shape, random);
    const calls = { query: draw(1, 12, 1, P + R), rows: draw(1, 12, L + R), wKc: draw(L, 1, P), wVc: draw(L, 1, 5) };
    const call = async (platform: "reference" | "webgpu") => {
      using cache = await LatentCache.create({ platform, pages: 8, pageSize, kvLoraRank: L, qkRopeHeadDim: R });
      const blockTable = { data: cache.allocate(8), shape: [2, 4] };
      const where = { cache, blockTable, seqLens: [0, 0], cuSeqlens: [0, 1, 12] };
      const query = toHalves(calls.query);
      if (platform === "reference") return await mlaPrefillWithCache({ ...calls, query, ...where });
      using resident = await toGpu(query);
      const cfgs = { cfg: smallConfig, decodeCfg: smallDecodeConfig };
      using result = await mlaPrefillWithCache({ ...calls, query: resident, ...where }, cfgs);
      return await toHost(result);
    };
    const [result, expected] = [await call("webgpu"), await call("reference")];
    assertEquals([result.dtype, result.shape], ["f16", [1, 12, 1, 5]]);
    assertClose(result, toFloats(expected), { relL2: 1e-3 });
  });

  test("takes sequences that are not packed", async () => {
    await testContext();
    const sequences = [{ before: 3, added: 5 }, { before: 33, added: 5 }];
    await check(sequences, { chunkKeys: 16 }, { platform: "webgpu", resident: true, packed: false }, 7);
  });
});

describe("fewerFlops()", () => {
  const deepSeek = {
    queryHeads: 128,
    kvHeads: 128,
    kvLoraRank: 512,
    qkNopeHeadDim: 128,
    qkRopeHeadDim: 64,
    vHeadDim: 128,
  };

  test("rebuilds keys from some 170 queries on, with DeepSeek's widths and a long prefix", () => {
    const keys = 1_000_000;
    const choose = (queries: number) => fewerFlops(deepSeek, queries, keys, queries * keys);
    assertEquals(choose(1), "absorbed");
    assertEquals(choose(170), "absorbed");
    assertEquals(choose(172), "expanded");
  });

  test("rebuilds keys of prompts without a prefix, and never for one token", () => {
    const full = { causal: true, slidingWindow: null };
    for (const length of [2, 64, 4096]) {
      assertEquals(fewerFlops(deepSeek, length, length, visiblePairs(length, length, full)), "expanded");
      assertEquals(fewerFlops(deepSeek, 1, length, length), "absorbed");
    }
  });

  test("counts visible pairs as the masks show them", () => {
    assertEquals(visiblePairs(4, 4, { causal: true, slidingWindow: null }), 10);
    assertEquals(visiblePairs(4, 4, { causal: false, slidingWindow: null }), 16);
    assertEquals(visiblePairs(2, 10, { causal: true, slidingWindow: [2, 0] }), 6);
    assertEquals(flopsOf("absorbed", deepSeek, 1, 10, 10), 128 * (2 * 512 * 256 + 2 * 10 * 1088));
  });
});
