// What appending and decoding refuse, before anything runs: each message names the argument, what was expected and what came.

import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import {
  type AnyTensor,
  type DecodeConfig,
  FlashMLAError,
  type GpuIndexTensor,
  LatentCache,
  type LatentCacheOptions,
  mlaDecode,
  type MlaDecodeInputs,
  type MlaDecodeOptions,
  mlaDecodeWithLse,
} from "../mod.ts";
import { insideOf } from "../src/latent_cache.ts";
import { decodeProblem } from "../src/op/decode_problem.ts";
import { elementCount, type Tensor } from "../src/op/tensor.ts";

/** Zeros of a shape. */
function zeros(...shape: number[]): Tensor {
  return { data: new Float32Array(elementCount(shape)), shape };
}

/** A tensor of integers. */
function integers(shape: number[], ...data: number[]) {
  return { data: Int32Array.from(data), shape };
}

/** Integers on a GPU, as far as validation looks. */
function onGpu(...shape: number[]): GpuIndexTensor {
  return { buffer: { size: 4096, usage: 0x80 } as GPUBuffer, shape, dtype: "i32" };
}

// L 8, R 2, P 4, V 9, Hkv 3, H 6; pages of 4 tokens. No two axes of one tensor alike.
const weights = { wKc: zeros(8, 3, 4), wVc: zeros(8, 3, 9) };
const layout = { pages: 10, pageSize: 4, kvLoraRank: 8, qkRopeHeadDim: 2, platform: "reference" } as const;

interface Filled {
  readonly cache: LatentCache;
  readonly blockTable: { readonly data: Int32Array; readonly shape: number[] };
}

/** Two sequences of 5 and 9 keys, in a table of 4 columns. */
async function filled(options: Partial<LatentCacheOptions> = {}): Promise<Filled> {
  const cache = await LatentCache.create({ ...layout, ...options });
  const blockTable = { data: new Int32Array(8).fill(2147480000), shape: [2, 4] };
  cache.reserve({ blockTable, seqLens: [0, 0], newTokens: [5, 9] });
  const cuSeqlens = [0, 5, 14];
  await cache.append(zeros(1, 14, 10), { blockTable, seqLens: [0, 0], cuSeqlens });
  return { cache, blockTable };
}

/** Asserts that a call is refused with a message, by both functions. */
async function refuses(
  inputs: Partial<MlaDecodeInputs>,
  options: MlaDecodeOptions,
  message: string,
  code = "invalid-input",
): Promise<void> {
  for (const decode of [mlaDecode, mlaDecodeWithLse]) {
    const error = await assertRejects(() => decode(inputs as MlaDecodeInputs, options), FlashMLAError, message);
    assertEquals(error.code, code);
  }
}

/** A call that is right, with something else in it. */
function called({ cache, blockTable }: Filled, changes: Partial<MlaDecodeInputs> = {}): MlaDecodeInputs {
  return { query: zeros(2, 1, 6, 6), cache, blockTable, seqLens: [5, 9], ...weights, ...changes };
}

/** The same of an absorbed query over a tensor without pages. */
const absorbed = { query: zeros(2, 3, 6, 10), cache: zeros(2, 7, 10) };
const alone = { kvLoraRank: 8, softmaxScale: 0.5, platform: "reference" } as const;

describe("LatentCache.create()", () => {
  test("refuses layouts that are none", async () => {
    const refused = async (changes: Record<string, unknown>, message: string, code = "invalid-input") => {
      const error = await assertRejects(
        () => LatentCache.create({ ...layout, ...changes }),
        FlashMLAError,
        message,
      );
      assertEquals(error.code, code);
    };
    const say = "Cannot create the cache: ";
    for (const pageSize of [3, 12, 48, 512]) {
      await refused({ pageSize }, `${say}pageSize must be a power of two from 1 to 256, got ${pageSize}`);
    }
    await refused({ pageSize: 0 }, `${say}pageSize must be a whole number from 1, got 0`);
    await refused({ pageSize: 2.5 }, `${say}pageSize must be a whole number from 1, got 2.5`);
    await refused({ pages: 0 }, `${say}pages must be a whole number from 1, got 0`);
    await refused({ pages: undefined }, `${say}pages must be a whole number from 1, got undefined`);
    await refused({ kvLoraRank: 0 }, `${say}kvLoraRank must be a whole number from 1, got 0`);
    await refused({ qkRopeHeadDim: -1 }, `${say}qkRopeHeadDim must be a whole number from 0, got -1`);
    await refused({ pages: 2 ** 30 }, `${say}pages · pageSize must be at most 2^31 tokens, got ${2 ** 32}`);
    await refused({ dtype: "bf16" }, `${say}dtype must be "f32" or "f16", got "bf16"`);
    await assertRejects(
      () => LatentCache.create(null as unknown as LatentCacheOptions),
      FlashMLAError,
      `${say}options must be an object, got null`,
    );
  });

  test("makes pages of 64 tokens of float32 unless told otherwise, of every power of two to 256", async () => {
    const { pageSize: _, ...rest } = layout;
    const cache = await LatentCache.create(rest);
    assertEquals([cache.pageSize, cache.dtype, cache.platform, cache.device], [64, "f32", "reference", undefined]);
    assertEquals([cache.pages, cache.freePages, cache.kvLoraRank, cache.qkRopeHeadDim], [10, 10, 8, 2]);
    for (const pageSize of [1, 2, 4, 8, 16, 32, 64, 128, 256]) {
      assertEquals((await LatentCache.create({ ...layout, pageSize, dtype: "f16" })).pageSize, pageSize);
    }
  });

  test("makes a cache that is of no use once it was disposed of", async () => {
    const made = await filled();
    made.cache.dispose();
    made.cache.dispose();
    assert(made.cache.disposed);
    const message = "Cannot use the cache: it was disposed of";
    for (const use of [() => made.cache.allocate(1), () => made.cache.freePages, () => made.cache.clear()]) {
      assertThrows(use, FlashMLAError, message);
    }
    await assertRejects(
      () => made.cache.append(zeros(2, 1, 10), { blockTable: made.blockTable, seqLens: [5, 9] }),
      FlashMLAError,
      message,
    );
    await refuses(called(made), {}, message);
  });
});

/** Asserts that something is refused, and leaves pages, counts, table and rows as they were. */
async function leavesAlone({ cache, blockTable }: Filled, change: () => unknown, message: string, code: string) {
  const { allocator, store } = insideOf(cache);
  const rows = async (sequence: number, count: number) => {
    const { rows } = await store.gather({ data: before, shape: blockTable.shape }, sequence, 0, count);
    return [...(rows as Tensor).data];
  };
  const before = blockTable.data.slice();
  const state = async () => [
    ...[[...blockTable.data], await rows(0, 5), await rows(1, 9)],
    Array.from({ length: cache.pages }, (_, page) => allocator.holders(page)),
  ];
  const old = await state();
  const error = await assertRejects(async () => await change(), FlashMLAError, message);
  assertEquals(error.code, code);
  assertEquals(await state(), old);
}

describe("LatentCache.reserve()", () => {
  test("gives sequences the pages that they need, behind those that they have", async () => {
    const { cache, blockTable } = await filled();
    const before = blockTable.data.slice();
    assertEquals(cache.freePages, 5);
    // Five keys and three more still fit into two pages; nine and four do not into three.
    const taken = cache.reserve({ blockTable, seqLens: Int32Array.of(5, 9), newTokens: Int32Array.of(3, 4) });
    assertEquals([taken.length, cache.freePages], [1, 4]);
    before[7] = taken[0];
    assertEquals([...blockTable.data], [...before]);
    assertEquals(cache.reserve({ blockTable, seqLens: [5, 9], newTokens: 0 }).length, 0);
  });

  test("refuses what does not fit, and takes and writes nothing then", async () => {
    const made = await filled();
    const { cache, blockTable } = made;
    const refused = async (changes: Record<string, unknown>, message: string, code = "invalid-input") => {
      const reserve = () => cache.reserve({ blockTable, seqLens: [5, 9], newTokens: 1, ...changes } as never);
      await leavesAlone(made, reserve, message, code);
    };
    const say = "Cannot reserve room in the cache: ";
    const outgrown = `${say}sequence 1 has 9 keys and would get 8, its row of blockTable has room for 16`;
    await refused({ newTokens: [1, 8] }, outgrown);
    await refused({ newTokens: [1] }, `${say}newTokens has 1 numbers, there are 2 sequences`);
    await refused({ newTokens: [1, -1] }, `${say}newTokens must hold whole numbers, got -1`);
    await refused({ newTokens: 0.5 }, `${say}newTokens must hold whole numbers, got 0.5`);
    await refused({ seqLens: [5, -9] }, `${say}seqLens[1] must not be negative, got -9`);
    await refused({ seqLens: [17, 9] }, `${say}seqLens[0] is 17, more than the 16 tokens of 4 pages of 4 tokens`);
    await refused({ seqLens: [5, 9, 1] }, `${say}blockTable has 2 rows, there are 3 sequences`);
    await refused(
      { blockTable: zeros(2, 4) },
      "Cannot use blockTable as a tensor of integers: data must be an Int32Array",
    );
    await refused({ blockTable: integers([8], ...blockTable.data) }, `${say}blockTable must have 2 axes`);
    await refused({ blockTable: undefined }, `${say}blockTable is missing`);
    await refused({ blockTable: onGpu(2, 4) }, `${say}blockTable lies on a GPU; it is written on the host`);
    cache.allocate(4);
    // One page is left; both sequences need one.
    await refused({ newTokens: [4, 4] }, "Cannot allocate 2 pages: 1 of 10 are free", "limit");
  });
});

describe("LatentCache.append()", () => {
  test("refuses what does not fit, and leaves cache, counts and table as they were", async () => {
    const made = await filled();
    const { cache, blockTable } = made;
    cache.reserve({ blockTable, seqLens: [5, 9], newTokens: 3 });
    const refused = async (rows: AnyTensor, changes: Record<string, unknown>, message: string) => {
      const append = () => cache.append(rows, { blockTable, seqLens: [5, 9], ...changes } as never);
      await leavesAlone(made, append, message, "invalid-input");
    };
    const say = "Cannot append to the cache: ";
    const rows = zeros(2, 3, 10).data.fill(7);
    const good = { data: rows, shape: [2, 3, 10] };
    await refused(zeros(2, 3, 9), {}, `${say}rows are 9 elements wide, the cache's are 10`);
    await refused(
      { data: rows, shape: [6, 10] },
      {},
      `${say}rows must have 3 axes [batch, length, kvLoraRank + qkRope`,
    );
    await refused({ data: rows, shape: [2, 4, 10] }, {}, "shape [2,4,10] needs 80 elements, data has 60");
    await refused(undefined as never, {}, "rows");
    await refused(zeros(3, 3, 10), {}, `${say}blockTable has 2 rows, there are 3 sequences`);
    await refused(
      zeros(2, 8, 10),
      {},
      `${say}sequence 1 has 9 keys and gets 8, its row of blockTable has room for 16 (4`,
    );
    await refused(good, { seqLens: [5, -9] }, `${say}seqLens[1] must not be negative, got -9`);
    await refused(good, { seqLens: [5, 17] }, `${say}seqLens[1] is 17, more than the 16 tokens of 4 pages of 4 tokens`);
    await refused(good, { seqLens: [5] }, `${say}seqLens has 1 lengths, there are 2 sequences`);
    await refused(good, { seqLens: [5, 9.5] }, `${say}seqLens must hold integers, got 9.5 at index 1`);
    await refused(good, { seqLens: undefined }, `${say}seqLens is missing`);
    await refused(
      good,
      { seqLens: "59" },
      `${say}seqLens must be an Int32Array, an array of numbers, or integers on a`,
    );
    await refused(
      good,
      { blockTable: undefined },
      `${say}blockTable is missing; expected integers [sequences, maxPages]`,
    );
    await refused(good, { cuSeqlens: [0, 2, 6] }, `${say}cuSeqlens packs sequences into batch 1, rows has batch 2`);
    const packed = { data: rows, shape: [1, 6, 10] };
    await refused(packed, { cuSeqlens: [0, 2, 5] }, `${say}cuSeqlens must end at the sequence length 6, got 5`);
    await refused(packed, { cuSeqlens: [1, 2, 6] }, `${say}cuSeqlens must start at 0, got 1`);
    await refused(packed, { cuSeqlens: [0, 7, 6] }, `${say}cuSeqlens must not decrease, got 7 then 6 at index 2`);
    await refused(packed, { cuSeqlens: [] }, `${say}cuSeqlens must hold n + 1 offsets, got none`);
    await refused(packed, { cuSeqlens: [0, 2, 4, 6] }, `${say}blockTable has 2 rows, there are 3 sequences`);
    await refused(good, { blockTable: onGpu(2, 4) }, "Cannot append to the cache: blockTable lies on a GPU");
    await assertRejects(
      () => cache.append(good, null as never),
      FlashMLAError,
      `${say}expected { blockTable, seqLens }`,
    );
  });

  test("refuses pages outside the cache and pages that nobody holds", async () => {
    const made = await filled();
    const { cache, blockTable } = made;
    const refused = async (page: number, message: string) => {
      const table = { data: blockTable.data.slice(), shape: blockTable.shape };
      // The sixth key of the first sequence goes to its second page.
      table.data[1] = page;
      await leavesAlone(
        made,
        () => cache.append(zeros(2, 1, 10), { blockTable: table, seqLens: [5, 9] }),
        `Cannot append to the cache: ${message}`,
        "invalid-input",
      );
    };
    await refused(10, "blockTable[0, 1] is 10, outside the cache, which has pages 0 to 9");
    await refused(-1, "blockTable[0, 1] is -1, outside the cache");
    await refused(2147480000, "blockTable[0, 1] is 2147480000, outside the cache");
    const [page] = cache.allocate(1);
    cache.free([page]);
    await refused(page, `blockTable[0, 1] is ${page}, a page that was freed or never allocated`);
  });

  test("does not look at pages that it does not write to", async () => {
    const { cache, blockTable } = await filled();
    blockTable.data.set([2147480000, 2147480000], 4);
    await cache.append(zeros(2, 1, 10), { blockTable, seqLens: [5, 9] });
    const nothing = { blockTable: integers([2, 0]), seqLens: [0, 0] };
    await cache.append(zeros(2, 0, 10), nothing);
    await cache.append(zeros(0, 3, 10), { blockTable: integers([0, 4]), seqLens: [] });
  });

  test("refuses two sequences that append to one page, unless each holds it", async () => {
    const made = await filled();
    const { cache, blockTable } = made;
    const parent = blockTable.data.slice(0, 2);
    blockTable.data.set([...parent, 2147480000, 2147480000], 4);
    const append = () => cache.append(zeros(2, 1, 10), { blockTable, seqLens: [5, 5] });
    const message = `sequences 0 and 1 both append to page ${parent[1]}, which is held once; cache.fork() holds pages`;
    await leavesAlone(made, append, message, "invalid-input");
    cache.fork(parent);
    await append();
    assert(blockTable.data[1] !== blockTable.data[5]);
    assertEquals(blockTable.data[0], blockTable.data[4]);
  });

  test("refuses to copy shared pages when none is free, and leaves everything as it was", async () => {
    const made = await filled();
    const { cache, blockTable } = made;
    cache.fork(blockTable.data.subarray(0, 2));
    cache.fork(blockTable.data.subarray(4, 7));
    cache.allocate(4);
    const message = "Cannot append to the cache: 2 shared pages have to be copied, 1 of 10 are free";
    const append = () => cache.append(zeros(2, 1, 10), { blockTable, seqLens: [5, 9] });
    await leavesAlone(made, append, message, "limit");
    cache.free([blockTable.data[6]]);
    await append();
    assertEquals(cache.freePages, 0);
  });

  test("takes no encoder on the reference", async () => {
    const { cache, blockTable } = await filled();
    const encoder = { beginComputePass() {} } as unknown as GPUCommandEncoder;
    const where = { blockTable, seqLens: [5, 9] };
    const record = (given: GPUCommandEncoder) => cache.encodeAppend(given, zeros(2, 1, 10), where);
    await assertRejects(() => record(encoder), FlashMLAError, 'platform "reference" has nothing to record');
    await assertRejects(() => record({} as never), FlashMLAError, "encoder must be a GPUCommandEncoder, got an object");
  });
});

describe("mlaDecode()", () => {
  test("refuses block tables whose pages are outside the cache, freed, or never allocated", async () => {
    const made = await filled();
    const { cache, blockTable } = made;
    const refused = async (entry: number, page: number, message: string) => {
      const table = { data: blockTable.data.slice(), shape: blockTable.shape };
      table.data[entry] = page;
      await refuses(called(made, { blockTable: table }), {}, `Cannot decode: ${message}`);
    };
    await refused(0, 10, "blockTable[0, 0] is 10, outside the cache, which has pages 0 to 9");
    await refused(6, -1, "blockTable[1, 2] is -1, outside the cache, which has pages 0 to 9");
    await refused(5, 2147480000, "blockTable[1, 1] is 2147480000, outside the cache");
    const free = insideOf(cache).allocator;
    const page = Array.from({ length: 10 }, (_, i) => i).find((i) => free.holders(i) === 0)!;
    await refused(4, page, `blockTable[1, 0] is ${page}, a page that was freed or never allocated`);
    cache.free(blockTable.data.subarray(4, 7));
    await refuses(called(made), {}, `blockTable[1, 0] is ${blockTable.data[4]}, a page that was freed or never alloc`);
    // What lies behind a sequence's keys may be anything.
    await mlaDecode(called(made, { seqLens: [5, 0] }));
  });

  test("refuses lengths that are none, or more than the table has room for", async () => {
    const made = await filled();
    const refused = (seqLens: unknown, message: string) =>
      refuses(called(made, { seqLens: seqLens as number[] }), {}, `Cannot decode: ${message}`);
    await refused([-1, 9], "seqLens[0] must not be negative, got -1");
    await refused(Int32Array.of(5, 17), "seqLens[1] is 17, more than the 16 tokens of 4 pages of 4 tokens");
    await refused(integers([2], 5, -2), "seqLens[1] must not be negative, got -2");
    await refused([5, 9, 1], "seqLens has 3 lengths, there are 2 sequences");
    await refused([5, NaN], "seqLens must hold integers, got NaN at index 1");
    await refused(undefined, "seqLens is missing; expected an Int32Array, the keys of each sequence");
    await refused(
      { length: 2 },
      "seqLens must be an Int32Array, an array of numbers, or integers on a GPU, got an obj",
    );
    await refused(onGpu(3), "seqLens has shape [3], there are 2 sequences");
    await refuses(
      { ...absorbed, seqLens: [7, 8] },
      alone,
      "seqLens[1] is 8, more than the 7 tokens of the cache tensor",
    );
  });

  test("refuses block tables of another shape or kind", async () => {
    const made = await filled();
    const refused = (blockTable: unknown, message: string) =>
      refuses(called(made, { blockTable: blockTable as never }), {}, message);
    await refused(integers([1, 4], 0, 1, 2, 3), "Cannot decode: blockTable has 1 rows, there are 2 sequences");
    await refused(
      integers([8], ...made.blockTable.data),
      "blockTable must have 2 axes [sequences, maxPages], got shape [8]",
    );
    await refused(undefined, "Cannot decode: blockTable is missing; expected integers [sequences, maxPages]");
    await refused({ data: made.blockTable.data, shape: [2, 3] }, "shape [2,3] needs 6 elements, data has 8");
    await refused({ data: [0, 1], shape: [2, 1] }, "data must be an Int32Array, got an array");
    await refused({ data: made.blockTable.data, shape: [2, 4], dtype: "u32" }, 'dtype must be "i32", got "u32"');
    await refuses(
      { ...absorbed, blockTable: made.blockTable },
      alone,
      "blockTable is given with a cache tensor that has no pages; pass a LatentCache",
    );
  });

  test("refuses heads and widths that do not fit", async () => {
    const made = await filled();
    const refused = (changes: Partial<MlaDecodeInputs>, message: string, options: MlaDecodeOptions = {}) =>
      refuses(called(made, changes), options, `Cannot decode: ${message}`);
    await refused(
      { query: zeros(2, 1, 6, 7) },
      "query has head dimension 7, expected 6 (4 of wKc plus 2 of the cache)",
    );
    await refused({ query: zeros(2, 1, 5, 6) }, "query has 5 heads, not a multiple of the 3 KV heads of wKc");
    await refused({ query: zeros(2, 1, 0, 6) }, "queryHeads must be at least 1, got 0");
    await refused(
      { query: zeros(2, 6, 6) },
      "query must have 4 axes [batch, queryLength, queryHeads, headDim], got shape",
    );
    await refused(
      { query: undefined },
      "query is missing; expected a tensor [batch, queryLength, queryHeads, headDim]",
    );
    await refused({ wKc: zeros(7, 3, 4), wVc: zeros(7, 3, 9) }, "cache has kvLoraRank 8, wKc has 7");
    await refused({ wVc: zeros(7, 3, 9) }, "wVc has kvLoraRank 7, wKc has 8");
    await refused({ wVc: zeros(8, 2, 9) }, "wVc has 2 KV heads, wKc has 3");
    await refused({ wVc: zeros(8, 3, 0) }, "vHeadDim must be at least 1, got 0");
    await refused(
      { wKc: zeros(8, 12) },
      "wKc must have 3 axes [kvLoraRank, kvHeads, qkNopeHeadDim], got shape [8, 12]",
    );
    await refused(
      { wVc: undefined },
      "wKc is given without wVc; pass both, or neither with a query that was multiplied",
    );
    await refused({ wKc: undefined }, "wVc is given without wKc; pass both");
    await refused({}, "options.kvLoraRank has kvLoraRank 9, wKc has 8", { kvLoraRank: 9 });
    await refused(
      { query: zeros(2, 1, 6, 9), wKc: undefined, wVc: undefined },
      "query has head dimension 9, expected 10 (8 of the latents plus 2 rotated) without weights",
      { softmaxScale: 1 },
    );
  });

  test("refuses cache tensors that do not fit", async () => {
    const refused = (changes: Partial<MlaDecodeInputs>, message: string, options: MlaDecodeOptions = alone) =>
      refuses({ ...absorbed, ...changes }, options, `Cannot decode: ${message}`);
    await refused({ cache: zeros(3, 7, 10) }, "cache has 3 sequences, query has batch 2");
    await refused({ cache: zeros(2, 7, 9) }, "query has head dimension 10, expected 9");
    await refused(
      { cache: zeros(2, 7, 6) },
      "cache has rows of 6 elements, fewer than the kvLoraRank 8 of options.kvLo",
    );
    await refused({ cache: zeros(2, 70) }, "cache must have 3 axes [sequences, keyLength, kvLoraRank + qkRopeHeadDim]");
    await refused({ cache: undefined }, "cache is missing");
    await refused({}, "kvLoraRank is not known: give options.kvLoraRank, a LatentCache, or wKc and wVc", {
      platform: "reference",
    });
    await refused({}, "kvLoraRank of options.kvLoraRank must be a whole number from 1, got 0", {
      ...alone,
      kvLoraRank: 0,
    });
    await refused(
      { query: zeros(1, 6, 6, 10), cuSeqlens: [0, 1, 3, 6] },
      "cache has 2 sequences, cuSeqlens has 3",
    );
  });

  test("refuses an absorbed query without a scale, and options that are none", async () => {
    const made = await filled();
    const refused = (options: Record<string, unknown>, message: string) =>
      refuses(called(made), options as MlaDecodeOptions, message);
    const { softmaxScale: _, ...rest } = alone;
    await refuses(absorbed, rest, "Cannot decode: softmaxScale must be given with an absorbed query");
    await refused({ softmaxScale: 0 }, "softmaxScale must be a finite float32 number above 0, got 0");
    await refused({ softmaxScale: 1e39 }, "softmaxScale must be a finite float32 number above 0");
    await refused({ softmaxscale: 1 }, 'Cannot decode: unknown option "softmaxscale"; known are softmaxScale, causal');
    await refused({ causal: 1 }, "Cannot decode: causal must be true or false, got 1");
    await refused({ logitsSoftCap: 0 }, "logitsSoftCap must be a finite float32 number above 0, got 0");
    await refused({ slidingWindow: [-1, 2] }, "slidingWindow");
    await refused(
      { softmaxAux: zeros(5, 2) },
      "Cannot decode: softmaxAux has shape [5, 2], expected [n] shared by all",
    );
    for (const splitKeys of [0, 32, 96, 63.5, "64"]) {
      await refused({ splitKeys }, "Cannot decode: splitKeys must be a power of two from 64, got ");
    }
    await refused({ device: {} }, "Cannot decode: device must be a GPUDevice, got an object");
    await refused({ onEvent: 1 }, "Cannot decode: onEvent must be a function, got 1");
    await refused({ cfg: 1 }, "Cannot decode: cfg must be a DecodeConfig, got 1");
    await refused({ executor: {} }, "Cannot decode: executor must be an Executor, got an object");
    await refused({ out: zeros(2, 1, 6, 8) }, "Cannot decode: out has shape [2,1,6,8], the result has [2,1,6,9]");
    const bits = { data: new Uint16Array(108), shape: [2, 1, 6, 9], dtype: "bf16" };
    await refused({ out: bits }, 'Cannot decode: out has dtype "bf16", expected "f32" or "f16"');
    await refuses(null as never, {}, "Cannot decode: inputs must be an object of tensors, got null");
    await refuses(called(made), null as never, "");
  });

  test("refuses configurations of another platform, and indices on a GPU on the reference", async () => {
    const made = await filled();
    const cfg = { platform: "webgpu", backend: "gpu" } as DecodeConfig;
    const message = 'Cannot use cfg: it is for platform "webgpu", the call runs on "reference"';
    await refuses(called(made), { cfg }, message, "invalid-config");
    await refuses(called(made, { seqLens: onGpu(2) }), {}, "seqLens lies on a GPU, the reference computes on the host");
    await refuses(called(made, { blockTable: onGpu(2, 4) }), {}, "blockTable lies on a GPU, the reference computes on");
  });

  test("refuses packed queries that do not fit", async () => {
    const made = await filled();
    const refused = (cuSeqlens: unknown, message: string, query = zeros(1, 5, 6, 6)) =>
      refuses(called(made, { query, cuSeqlens: cuSeqlens as number[] }), {}, `Cannot decode: ${message}`);
    await refused([0, 2, 4], "cuSeqlens must end at the sequence length 5, got 4");
    await refused([0, 6, 5], "cuSeqlens must not decrease, got 6 then 5 at index 2");
    await refused([0, 2.5, 5], "cuSeqlens must hold integers, got 2.5 at index 1");
    await refused("05", "cuSeqlens must be an Int32Array, a Uint32Array or an array of numbers");
    await refused([0, 2, 5], "cuSeqlens packs sequences into batch 1, query has batch 2", zeros(2, 5, 6, 6));
    await refused([0, 1, 2, 5], "blockTable has 2 rows, there are 3 sequences");
    const packed = { query: zeros(1, 5, 6, 6), cuSeqlens: [0, 2, 5], seqLens: onGpu(2) };
    await refuses(
      called(made, packed),
      {},
      "cuSeqlens packs queries of different numbers, which needs seqLens on the host; they lie on a GPU",
    );
  });
});

describe("decodeProblem()", () => {
  test("names every dimension and option", () => {
    const layout = { pages: 10, pageSize: 4, dtype: "f16", keyLength: 0, width: 10, kvLoraRank: 8 } as const;
    const tensors = { query: zeros(1, 5, 6, 6), ...weights, seqLens: [5, 0, 9], blockTable: onGpu(3, 4) };
    const options = { causal: false, logitsSoftCap: 30, slidingWindow: 3, softmaxAux: zeros(6, 2), splitKeys: 128 };
    assertEquals(decodeProblem({ ...tensors, cuSeqlens: Uint32Array.of(0, 1, 1, 5) }, layout, options), {
      sequences: 3,
      batch: 1,
      queryLength: 5,
      tokenStarts: [0, 1, 1, 5],
      queryHeads: 6,
      kvHeads: 3,
      kvLoraRank: 8,
      qkNopeHeadDim: 4,
      qkRopeHeadDim: 2,
      vHeadDim: 9,
      causal: false,
      softmaxScale: 1 / Math.sqrt(6),
      logitsSoftCap: 30,
      slidingWindow: [3, 3],
      sinks: 2,
      cache: { kvLoraRank: 8, qkRopeHeadDim: 2, dtype: "f16", pageSize: 4, pages: 10, keyLength: 0 },
      maxPages: 4,
      seqLens: [5, 0, 9],
      capacity: 16,
      splitKeys: 128,
      dtype: { query: "f32", wKc: "f32", wVc: "f32" },
    });
  });

  test("takes the width of the heads before absorption from nowhere but the scale", () => {
    const layout = { pages: 0, pageSize: 0, dtype: "f32", keyLength: 7, width: 10, kvLoraRank: null } as const;
    const problem = decodeProblem({ query: zeros(2, 3, 6, 10) }, layout, { kvLoraRank: 8, softmaxScale: 0.25 });
    const { kvHeads, qkNopeHeadDim, vHeadDim, qkRopeHeadDim, softmaxScale, seqLens, tokenStarts } = problem;
    assertEquals(
      { kvHeads, qkNopeHeadDim, vHeadDim, qkRopeHeadDim, softmaxScale, seqLens, tokenStarts },
      {
        ...{ kvHeads: 6, qkNopeHeadDim: null, vHeadDim: 8, qkRopeHeadDim: 2, softmaxScale: 0.25 },
        ...{ seqLens: [7, 7], tokenStarts: [0, 3, 6] },
      },
    );
  });
});
