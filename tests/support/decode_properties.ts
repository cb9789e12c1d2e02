// What is true of decoding over a cache whatever computes it, as checks over random calls.

import { assert, assertEquals, AssertionError } from "@std/assert";
import fc from "fast-check";
import {
  type DecodeConfig,
  type HostTensor,
  type IndexTensor,
  LatentCache,
  mergeAttentionStates,
  type MlaDecodeOptions,
  mlaDecodeWithLse,
} from "../../mod.ts";
import type { GpuContext } from "../../src/gpu/device.ts";
import { GpuLatentStore } from "../../src/gpu/latent_store.ts";
import { webgpuDecodeTarget } from "../../src/gpu/webgpu_decoding.ts";
import { placesOf } from "../../src/op/append_problem.ts";
import type { CacheStore, DecodeTarget } from "../../src/op/decode_implementation.ts";
import { type CacheLayout, decodeProblem } from "../../src/op/decode_problem.ts";
import { toFloats, toHalves } from "../../src/op/half.ts";
import type { Tensor } from "../../src/op/tensor.ts";
import {
  type DecodeCall,
  decodeCall,
  type DecodeCallLimits,
  decodeCalls,
  type DecodeCallShape,
  type Decoded,
  forward,
  mathOptions,
  projectedOutput,
  roundedTo,
  tokensOf,
} from "./decode_call.ts";
import { stored } from "./dtype_attention.ts";
import { assertClose } from "./metrics.ts";
import { mulberry32, normals, randomTensor } from "./random_problem.ts";
import { concatenate, range, take } from "./tensor_parts.ts";

/** What a block table holds where nobody may look. */
export const unusedEntry = 2147480000;

/** How a call is laid out and cut. */
export interface Arrangement {
  /** Seed of the order in which pages are handed out. */
  readonly order?: number;
  /** The option of that name. */
  readonly splitKeys?: number;
  /** Workgroups that splitting aims at. */
  readonly workgroups?: number;
}

/** An implementation under test: a whole call, its rows put into a cache of its own. */
export type Decode = (call: DecodeCall, arrangement?: Arrangement) => Promise<Decoded>;

/** Where caches of the library's own live, and under which configuration they are read. */
export interface Place {
  readonly platform: "reference" | "webgpu";
  readonly device?: GPUDevice;
  readonly cfg?: DecodeConfig;
}

/** How hard to look. */
export interface DecodePropertyOptions {
  /** Random calls to try. */
  readonly runs: number;
  /** Maps drawn calls to fewer kinds, where each kind costs compilations. */
  readonly narrow?: (shape: DecodeCallShape) => DecodeCallShape;
  /** Largest lengths. */
  readonly limits?: Partial<DecodeCallLimits>;
  /** Whether products round to halves on their way, so that results are as exact as those of halves. */
  readonly halves?: boolean;
}

/** The order of pages: all of them, shuffled. */
export function shuffled(pages: Int32Array, seed: number): Int32Array {
  const random = mulberry32(seed);
  const order = pages.slice();
  for (let i = order.length - 1; i > 0; i--) {
    const other = Math.floor(random() * (i + 1));
    [order[i], order[other]] = [order[other], order[i]];
  }
  return order;
}

/** A block table for sequences of so many keys, with an unused column behind the longest, and the pages that are left. */
export function tableFor(
  keys: readonly number[],
  pageSize: number,
  pages: Int32Array,
): { readonly blockTable: IndexTensor; readonly left: Int32Array } {
  const columns = keys.reduce((most, count) => Math.max(most, Math.ceil(count / pageSize)), 0) + 1;
  const data = new Int32Array(keys.length * columns).fill(unusedEntry);
  let next = 0;
  keys.forEach((count, sequence) => {
    for (let i = 0; i * pageSize < count; i++) data[sequence * columns + i] = pages[next++];
  });
  return { blockTable: { data, shape: [keys.length, columns] }, left: pages.subarray(next) };
}

/** Pages that sequences of so many keys take, and two more. */
export function pagesFor(keys: readonly number[], pageSize: number): number {
  return keys.reduce((sum, count) => sum + Math.ceil(count / pageSize), 2);
}

/** A cache that holds a call's rows in pages of a random order. What is not a row of the call is NaN. */
export async function heldBy(
  { platform, device }: Place,
  call: DecodeCall,
  order = 1,
): Promise<{ readonly cache: LatentCache; readonly blockTable: IndexTensor; readonly seqLens: Int32Array }> {
  const { kvLoraRank, qkRopeHeadDim, dtype, pageSize } = call.shape;
  const keys = call.rows.map(({ shape }) => shape[1]);
  const pages = pagesFor(keys, pageSize);
  const cache = await LatentCache.create({ platform, device, pages, pageSize, kvLoraRank, qkRopeHeadDim, dtype });
  const all = cache.allocate(pages);
  const width = kvLoraRank + qkRopeHeadDim;
  const nothing = { data: new Float32Array(pages * pageSize * width).fill(NaN), shape: [1, pages * pageSize, width] };
  await cache.append(nothing, { blockTable: { data: all, shape: [1, pages] }, seqLens: [0] });
  const { blockTable, left } = tableFor(keys, pageSize, shuffled(all, order));
  cache.free(left);
  if (keys.length > 0) {
    const cuSeqlens = keys.reduce((ends, count) => [...ends, ends[ends.length - 1] + count], [0]);
    await cache.append(concatenate(call.rows, 1), { blockTable, seqLens: keys.map(() => 0), cuSeqlens });
  }
  return { cache, blockTable, seqLens: Int32Array.from(keys) };
}

/** A call's rows as one tensor without pages, NaN behind those of each sequence. */
export function rowsTensor({ rows, shape }: DecodeCall): Tensor {
  const width = shape.kvLoraRank + shape.qkRopeHeadDim;
  const longest = rows.reduce((most, { shape }) => Math.max(most, shape[1]), 0) + 1;
  const data = new Float32Array(rows.length * longest * width).fill(NaN);
  rows.forEach((own, sequence) => data.set(own.data, sequence * longest * width));
  return { data, shape: [rows.length, longest, width] };
}

/** The tensors of a call but for its cache, in the types that they are stored in. */
export function storedTensors(call: DecodeCall) {
  const { absorbed, dtype, query } = call.shape;
  return {
    query: stored(call.query, query),
    ...(!absorbed && { wKc: stored(call.weights.wKc, dtype), wVc: stored(call.weights.wVc, dtype) }),
    ...(call.cuSeqlens && { cuSeqlens: call.cuSeqlens }),
  };
}

/** The public functions at a place. */
export function decodeAt(place: Place): Decode {
  return async (call, { order = 1, splitKeys, workgroups } = {}) => {
    const { platform, device, cfg } = place;
    const { kvLoraRank, dtype, pageSize } = call.shape;
    const seqLens = Int32Array.from(call.rows, ({ shape }) => shape[1]);
    const options: MlaDecodeOptions<HostTensor> = {
      ...mathOptions(call),
      ...(splitKeys && { splitKeys }),
      ...(cfg && { cfg: { ...cfg, ...(workgroups && { workgroups }) } }),
      ...(device && { device }),
    };
    const tensors = storedTensors(call);
    if (pageSize === 0) {
      const cache = stored(rowsTensor(call), dtype);
      return onHost(await mlaDecodeWithLse({ ...tensors, cache, seqLens }, { ...options, platform, kvLoraRank }));
    }
    const { cache, blockTable } = await heldBy(place, call, order);
    try {
      return onHost(await mlaDecodeWithLse({ ...tensors, cache, blockTable, seqLens }, options));
    } finally {
      cache.dispose();
    }
  };
}

/**
 * A target under test, without the public functions around it.
 *
 * @param target The target.
 * @param cfg The configuration.
 * @param createCache Makes the cache; the target when absent.
 */
export function decodeBy(
  target: DecodeTarget,
  cfg: DecodeConfig,
  createCache: (layout: CacheLayout) => Promise<CacheStore> = (layout) => target.createCache(layout),
): Decode {
  return async (call, { order = 1, splitKeys, workgroups } = {}) => {
    const { kvLoraRank, qkRopeHeadDim, dtype } = call.shape;
    const pageSize = call.shape.pageSize || 4;
    const keys = call.rows.map(({ shape }) => shape[1]);
    const layout = { kvLoraRank, qkRopeHeadDim, dtype, pageSize, pages: pagesFor(keys, pageSize), keyLength: 0 };
    const width = kvLoraRank + qkRopeHeadDim;
    const { pages } = layout;
    const { blockTable } = tableFor(keys, pageSize, shuffled(Int32Array.from(range(0, pages)), order));
    const seqLens = { data: Int32Array.from(keys), shape: [keys.length] };
    const tensors = { ...storedTensors(call), blockTable, seqLens };
    const options = { ...mathOptions(call), ...(splitKeys && { splitKeys }) };
    const problem = decodeProblem(tensors, { ...layout, width }, options);
    const { softmaxAux } = call;
    const store = await createCache(layout);
    try {
      const count = pages * pageSize;
      const common = { blockTable, seqLens, copies: [] };
      const nothing = { data: new Float32Array(count * width).fill(NaN), shape: [1, count, width] };
      await store.append({
        ...common,
        rows: nothing,
        rowStarts: [0, count],
        places: Uint32Array.from(range(0, count)),
      });
      if (keys.length > 0) {
        const rows = concatenate(call.rows, 1);
        const rowStarts = keys.reduce((ends, count) => [...ends, ends[ends.length - 1] + count], [0]);
        const places = placesOf(blockTable, keys.map(() => 0), rowStarts, pageSize);
        await store.append({ ...common, rows, rowStarts, places });
      }
      const whole = { ...cfg, ...(workgroups && { workgroups }) };
      const why = target.whyInvalid(problem, whole);
      if (why !== null) throw new AssertionError(why);
      const result = await target.run(
        problem,
        { ...tensors, cache: store, ...(softmaxAux && { softmaxAux }) },
        whole,
        { withLse: true },
      );
      return onHost(result as { output: HostTensor; lse: HostTensor });
    } finally {
      store.dispose();
    }
  };
}

/** The same of a cache in buffers of so many pages each. */
export function decodeInBuffers(context: GpuContext, cfg: DecodeConfig, pages: number): Decode {
  return decodeBy(webgpuDecodeTarget(context), cfg, async (layout) => {
    const single = await GpuLatentStore.create(context, { ...layout, pages: 1 });
    single.dispose();
    const store = await GpuLatentStore.create(context, layout, pages * single.bytes);
    assertEquals(store.shards.length, Math.ceil(layout.pages / pages));
    assertEquals(store.bytes, layout.pages * single.bytes);
    return store;
  });
}

function onHost({ output, lse }: { readonly output: HostTensor; readonly lse: HostTensor }): Decoded {
  return { output: toFloats(output), lse: toFloats(lse) };
}

/** Asserts that a result is the expected one, as exactly as the call's element types allow. */
export function agrees(result: Decoded, expected: Decoded, query: "f32" | "f16", what?: string, halves = false): void {
  const coarse = query === "f16" || halves;
  assertClose(
    result.output,
    expected.output,
    coarse ? { relL2: 3e-3, cosDiff: 5e-6, absolute: 1e-6 } : { relL2: 1e-5, absolute: 1e-6 },
    `${what ?? "result"}: output`,
  );
  lseAgrees(result.lse, expected.lse, halves ? 1e-3 : 1e-4, what);
}

function lseAgrees(result: Tensor, expected: Tensor, most: number, what = "result"): void {
  assertEquals(result.shape, expected.shape, `${what}: log-sum-exp's shape`);
  expected.data.forEach((value, i) => {
    const got = result.data[i];
    // Beyond 1 the error of float32 scores grows with them.
    const near = Math.abs(got - value) <= most * Math.max(1, Math.abs(value) / 10);
    if (!Object.is(got, value) && !near) {
      throw new AssertionError(`${what}: log-sum-exp ${got} at ${i} of [${expected.shape}], expected ${value}`);
    }
  });
}

/** Asserts that two results are the same to the bit. */
export function identical(result: Decoded, expected: Decoded, what: string): void {
  for (const name of ["output", "lse"] as const) {
    assertEquals(result[name].shape, expected[name].shape, `${what}: ${name}'s shape`);
    const [got, wanted] = [result[name], expected[name]].map(({ data }) => new Uint32Array(data.buffer));
    const at = got.findIndex((bits, i) => bits !== wanted[i]);
    if (at < 0) continue;
    throw new AssertionError(`${what}: ${name} ${result[name].data[at]} at ${at}, was ${expected[name].data[at]}`);
  }
}

async function forAll(
  { runs, narrow = (shape) => shape, limits }: DecodePropertyOptions,
  check: (shape: DecodeCallShape) => Promise<void>,
): Promise<void> {
  await fc.assert(fc.asyncProperty(decodeCalls(limits), (shape) => check(narrow(shape))), { numRuns: runs, seed: 5 });
}

/** One property of calls: throws when it finds one for which it does not hold. */
export type DecodePropertyCheck = (decode: Decode, options: DecodePropertyOptions) => Promise<void>;

/** Decoding is attention over the same rows. */
const decodingIsAttention: DecodePropertyCheck = (decode, options) =>
  forAll(options, async (shape) => {
    const call = decodeCall(shape);
    agrees(await decode(call), forward(call), shape.query, undefined, options.halves);
  });

/** Absorbing before and projecting afterwards is what the weights do. */
const absorbingIsOutside: DecodePropertyCheck = (decode, options) =>
  forAll(options, async (shape) => {
    const given = { ...shape, query: "f32", dtype: "f32" } as const;
    const call = decodeCall({ ...given, absorbed: true });
    const { output, lse } = await decode(call);
    const expected = forward(decodeCall({ ...given, absorbed: false }));
    agrees({ output: projectedOutput(output, call.weights.wVc), lse }, expected, "f32");
  });

/** Where pages lie makes no difference, not to the bit. */
const pagesLieAnywhere: DecodePropertyCheck = (decode, options) =>
  forAll(options, async (shape) => {
    const call = decodeCall({ ...shape, pageSize: shape.pageSize || 4 });
    const first = await decode(call, { order: 2 });
    identical(await decode(call, { order: 3 }), first, "another order of pages");
  });

/** However keys are split, the result is the same. */
const splitsAreMerged: DecodePropertyCheck = (decode, options) =>
  forAll(options, async (shape) => {
    const call = decodeCall(shape);
    const expected = forward(call);
    const arrangements = [{ workgroups: 1 }, { workgroups: 3 }, { workgroups: 64 }, { splitKeys: 64 }, {
      splitKeys: 128,
    }];
    for (const arrangement of arrangements) {
      const what = JSON.stringify(arrangement);
      agrees(await decode(call, arrangement), expected, shape.query, what, options.halves);
    }
  });

/** Two parts of the keys, merged in either order, are all keys. */
const partsAreMerged: DecodePropertyCheck = (decode, options) =>
  forAll(options, async (shape) => {
    // What a query of several, or a window, sees of a part depends on where the part ends.
    const causal = shape.causal && tokensOf(shape).every((tokens) => tokens < 2);
    const call = decodeCall({ ...shape, causal, slidingWindow: null, query: "f32" });
    const { softmaxAux, ...rest } = call;
    const parts = await Promise.all(["before", "behind"].map((part) =>
      decode({
        ...rest,
        rows: call.rows.map((own, sequence) => {
          const cut = (shape.seed >>> sequence) % (own.shape[1] + 1);
          return take(own, 1, part === "before" ? range(0, cut) : range(cut, own.shape[1]));
        }),
      })
    ));
    const expected = forward(call);
    for (const [a, b] of [parts, parts.toReversed()]) {
      const { output, lse } = await mergeAttentionStates(a, b, { ...(softmaxAux && { softmaxAux }) });
      agrees(onHost({ output, lse }), expected, "f32", undefined, options.halves);
    }
  });

/** With splits of fixed length a sequence is computed alike, to the bit, whatever else there is and in whichever order. */
const batchesDoNotMatter: DecodePropertyCheck = (decode, options) =>
  forAll(options, async (shape) => {
    const call = decodeCall(shape);
    const splitKeys = 64;
    const whole = await decode(call, { splitKeys });
    const all = range(0, call.rows.length);
    for (const chosen of [...all.map((sequence) => [sequence]), all.toReversed(), [...all, ...all.slice(0, 1)]]) {
      const some = await decode(sequencesOf(call, chosen), { splitKeys });
      identical(some, ofSequences(whole, call, chosen), `sequences ${chosen} of ${all.length}`);
    }
  });

/** What is NaN in a row reaches the queries that see it, and no other. */
const hiddenRowsStayHidden: DecodePropertyCheck = (decode, options) =>
  forAll(options, async (shape) => {
    const call = decodeCall({
      ...shape,
      causal: true,
      slidingWindow: shape.slidingWindow ?? [shape.seed >>> 3 & 15, 0],
    });
    const spoiled = {
      ...call,
      rows: call.rows.map((own, sequence) => {
        const [, keys, width] = own.shape;
        const data = own.data.slice();
        if (keys > 0) data[(shape.seed >>> sequence) % keys * width + (shape.seed >>> 9) % width] = NaN;
        return { data, shape: own.shape };
      }),
    };
    agrees(await decode(spoiled), forward(spoiled), shape.query, "with NaN in a row", options.halves);
  });

/** The call of some of a call's sequences. */
export function sequencesOf(call: DecodeCall, chosen: readonly number[]): DecodeCall {
  const { shape, query, rows } = call;
  const sequences = chosen.map((sequence) => shape.sequences[sequence]);
  const tokens = chosen.map((sequence) => tokensOf(shape)[sequence]);
  return {
    ...call,
    shape: { ...shape, sequences },
    query: shape.packed ? take(query, 1, tokensAt(call, chosen)) : take(query, 0, chosen),
    ...(shape.packed && { cuSeqlens: tokens.reduce((ends, count) => [...ends, ends[ends.length - 1] + count], [0]) }),
    rows: chosen.map((sequence) => rows[sequence]),
  };
}

/** The part of a result that belongs to some of a call's sequences. */
export function ofSequences({ output, lse }: Decoded, call: DecodeCall, chosen: readonly number[]): Decoded {
  if (!call.shape.packed) return { output: take(output, 0, chosen), lse: take(lse, 0, chosen) };
  const tokens = tokensAt(call, chosen);
  return { output: take(output, 1, tokens), lse: take(lse, 2, tokens) };
}

/** Positions of the packed queries of some sequences. */
function tokensAt({ cuSeqlens }: DecodeCall, chosen: readonly number[]): number[] {
  return chosen.flatMap((sequence) => range(cuSeqlens![sequence], cuSeqlens![sequence + 1]));
}

/** The properties of whole calls, by name. */
export const decodeProperties: Readonly<Record<string, DecodePropertyCheck>> = {
  "decoding is attention over the same rows": decodingIsAttention,
  "absorbing before and projecting afterwards is what the weights do": absorbingIsOutside,
  "pages lie anywhere, without a difference to the bit": pagesLieAnywhere,
  "keys are split into any number of parts": splitsAreMerged,
  "parts of the keys merge in either order": partsAreMerged,
  "with splitKeys a sequence is computed alike to the bit in any batch": batchesDoNotMatter,
  "NaN in a row reaches the queries that see it, and no other": hiddenRowsStayHidden,
};

/** One property of caches over time. */
export type CachePropertyCheck = (place: Place, options: DecodePropertyOptions) => Promise<void>;

/** Sequences that were drawn, each with keys and with a page size. */
function grown(shape: DecodeCallShape): DecodeCallShape {
  const sequences = shape.sequences.length === 0 ? [{ keys: 3, tokens: 2 }] : shape.sequences;
  return {
    ...shape,
    // As many tokens and keys before them for each: a step is a batch of single tokens.
    sequences: sequences.map(({ keys }) => ({ keys: keys + 1, tokens: 1 })),
    packed: false,
    causal: true,
    slidingWindow: shape.slidingWindow,
    pageSize: shape.pageSize || 4,
  };
}

/** The call over a cache as it is. */
function readAt(place: Place, cache: LatentCache, call: DecodeCall, blockTable: IndexTensor): Promise<Decoded> {
  const seqLens = call.rows.map(({ shape }) => shape[1]);
  const options: MlaDecodeOptions<HostTensor> = { ...mathOptions(call), cfg: place.cfg };
  return mlaDecodeWithLse({ ...storedTensors(call), cache, blockTable, seqLens }, options).then(onHost);
}

/** Token by token, appended and decoded, is one call of all tokens. */
const stepsAreOneCall: CachePropertyCheck = (place, options) =>
  forAll(options, async (drawn) => {
    const steps = 3;
    const shape = grown(drawn);
    const { sequences, kvLoraRank, qkRopeHeadDim, dtype, pageSize } = shape;
    const whole = decodeCall({
      ...shape,
      sequences: sequences.map(({ keys }) => ({ keys: keys + steps - 1, tokens: steps })),
    });
    const expected = forward(whole);
    const pages = pagesFor(whole.rows.map(({ shape }) => shape[1]), pageSize);
    const cache = await LatentCache.create({ ...placed(place), pages, pageSize, kvLoraRank, qkRopeHeadDim, dtype });
    const columns = Math.max(...whole.rows.map(({ shape }) => Math.ceil(shape[1] / pageSize)));
    const blockTable = {
      data: new Int32Array(sequences.length * columns).fill(unusedEntry),
      shape: [sequences.length, columns],
    };
    const seqLens = sequences.map(() => 0);
    const add = async (upTo: readonly number[]) => {
      const newTokens = upTo.map((end, sequence) => end - seqLens[sequence]);
      cache.reserve({ blockTable, seqLens, newTokens });
      const rows = concatenate(whole.rows.map((own, i) => take(own, 1, range(seqLens[i], upTo[i]))), 1);
      const cuSeqlens = newTokens.reduce((ends, count) => [...ends, ends[ends.length - 1] + count], [0]);
      await cache.append(rows, { blockTable, seqLens, cuSeqlens });
      upTo.forEach((end, sequence) => seqLens[sequence] = end);
    };
    try {
      for (let step = 0; step < steps; step++) {
        await add(sequences.map(({ keys }) => keys + step));
        const call = {
          ...whole,
          query: take(whole.query, 1, [step]),
          rows: whole.rows.map((own, i) => take(own, 1, range(0, seqLens[i]))),
        };
        const part = { output: take(expected.output, 1, [step]), lse: take(expected.lse, 2, [step]) };
        agrees(await readAt(place, cache, call, blockTable), part, shape.query, `step ${step}`);
      }
    } finally {
      cache.dispose();
    }
  });

function placed({ platform, device }: Place) {
  return { platform, ...(device && { device }) };
}

/** A fork shares its parent's rows, and neither sees what the other appends. */
const forksAreIndependent: CachePropertyCheck = (place, options) =>
  forAll(options, async (drawn) => {
    const shape = { ...grown(drawn), sequences: [grown(drawn).sequences[0]] };
    const added = 1 + (shape.seed >>> 4) % 5;
    const { kvLoraRank, qkRopeHeadDim, dtype, pageSize } = shape;
    const call = decodeCall(shape);
    const [keys] = call.rows.map((rows) => rows.shape[1]);
    const have = Math.ceil(keys / pageSize);
    const columns = Math.ceil((keys + added) / pageSize);
    const random = normals(shape.seed + 1);
    const more = range(0, 2).map(() => roundedTo(dtype, randomTensor([1, added, kvLoraRank + qkRopeHeadDim], random)));
    const cache = await LatentCache.create({
      ...{ ...placed(place), pages: 2 * columns + 1, pageSize, kvLoraRank, qkRopeHeadDim, dtype },
    });
    const tableOf = (pages: ArrayLike<number>) => {
      const blockTable = { data: new Int32Array(columns).fill(unusedEntry), shape: [1, columns] };
      blockTable.data.set(pages);
      return blockTable;
    };
    const append = async (rows: Tensor, blockTable: IndexTensor, at: number) => {
      cache.reserve({ blockTable, seqLens: [at], newTokens: rows.shape[1] });
      await cache.append(rows, { blockTable, seqLens: [at] });
    };
    const read = (blockTable: IndexTensor, ...rows: Tensor[]) =>
      readAt(place, cache, { ...call, rows: [concatenate(rows, 1)] }, blockTable);
    const independent = (...rows: Tensor[]) => forward({ ...call, rows: [concatenate(rows, 1)] });
    try {
      const parent = tableOf([]);
      await append(call.rows[0], parent, 0);
      const before = await read(parent, call.rows[0]);
      const child = tableOf(cache.fork(parent.data.subarray(0, have)));
      assertEquals(cache.pages - cache.freePages, have);
      identical(await read(child, call.rows[0]), before, "the child as it was forked");

      await append(more[0], child, keys);
      identical(await read(parent, call.rows[0]), before, "the parent after its child appended");
      agrees(await read(child, call.rows[0], more[0]), independent(call.rows[0], more[0]), shape.query, "the child");
      // A last page that was not full was copied; the others are shared.
      const shared = Math.floor(keys / pageSize);
      assertEquals([...child.data.subarray(0, shared)], [...parent.data.subarray(0, shared)]);
      assertEquals(cache.pages - cache.freePages, have + columns - shared);

      await append(more[1], parent, keys);
      agrees(await read(child, call.rows[0], more[0]), independent(call.rows[0], more[0]), shape.query, "the child");
      agrees(await read(parent, call.rows[0], more[1]), independent(call.rows[0], more[1]), shape.query, "the parent");
      assertEquals(cache.pages - cache.freePages, 2 * columns - shared);
      cache.free(child.data);
      agrees(await read(parent, call.rows[0], more[1]), independent(call.rows[0], more[1]), shape.query, "the parent");
      cache.free(parent.data);
      assertEquals(cache.freePages, cache.pages);
    } finally {
      cache.dispose();
    }
  });

/** Two that share a page and append at once have a page each. */
const forksAppendAtOnce: CachePropertyCheck = (place, options) =>
  forAll(options, async (drawn) => {
    const shape = { ...grown(drawn), sequences: [grown(drawn).sequences[0]] };
    const call = decodeCall(shape);
    const { cache, blockTable } = await heldBy(place, call);
    const [keys] = call.rows.map((rows) => rows.shape[1]);
    const columns = blockTable.shape[1];
    const used = Math.ceil(keys / shape.pageSize);
    const both = { data: new Int32Array(2 * columns).fill(unusedEntry), shape: [2, columns] };
    for (const i of [0, 1]) both.data.set(blockTable.data.subarray(0, used), i * columns);
    cache.fork(blockTable.data.subarray(0, used));
    const rows = roundedTo(
      shape.dtype,
      randomTensor([2, 1, shape.kvLoraRank + shape.qkRopeHeadDim], normals(shape.seed + 1)),
    );
    try {
      cache.reserve({ blockTable: both, seqLens: [keys, keys], newTokens: 1 });
      await cache.append(rows, { blockTable: both, seqLens: [keys, keys] });
      const twice = {
        ...call,
        shape: { ...shape, sequences: range(0, 2).map(() => shape.sequences[0]) },
        query: concatenate([call.query, call.query], 0),
        rows: range(0, 2).map((i) => concatenate([call.rows[0], take(rows, 0, [i])], 1)),
      };
      agrees(await readAt(place, cache, twice, both), forward(twice), shape.query);
    } finally {
      cache.dispose();
    }
  });

/** Rows of any element type are rounded to the cache's. */
const rowsAreRounded: CachePropertyCheck = (place, options) =>
  forAll(options, async (drawn) => {
    const shape = grown(drawn);
    const { kvLoraRank, qkRopeHeadDim, dtype, pageSize, sequences } = shape;
    const width = kvLoraRank + qkRopeHeadDim;
    const keys = sequences[0].keys;
    const call = decodeCall({ ...shape, sequences: sequences.map(({ tokens }) => ({ keys, tokens })) });
    const given = randomTensor([sequences.length, keys, width], normals(shape.seed + 1));
    const lens = call.rows.map(() => keys);
    for (const kind of ["f32", "f16", "bf16"] as const) {
      const pages = pagesFor(lens, pageSize);
      const cache = await LatentCache.create({ ...placed(place), pages, pageSize, kvLoraRank, qkRopeHeadDim, dtype });
      const { blockTable } = tableFor(lens, pageSize, cache.allocate(pages));
      const rows = stored(given, kind);
      await cache.append(rows, { blockTable, seqLens: lens.map(() => 0) });
      const exact = toFloats(dtype === "f16" ? toHalves(toFloats(rows)) : rows);
      const expected = forward({ ...call, rows: lens.map((_, sequence) => take(exact, 0, [sequence])) });
      agrees(await readAt(place, cache, call, blockTable), expected, shape.query, `rows in ${kind}`);
      cache.dispose();
    }
  });

/** The same cache serves parts of a sequence: a table that begins at a later page is the rest of its keys. */
const tablesAreCut: CachePropertyCheck = (place, options) =>
  forAll(options, async (drawn) => {
    const shape = {
      ...grown(drawn),
      sequences: [grown(drawn).sequences[0]],
      slidingWindow: null,
      query: "f32",
    } as const;
    const call = decodeCall(shape);
    const { softmaxAux, ...rest } = call;
    const { cache, blockTable } = await heldBy(place, call);
    const [, keys] = call.rows[0].shape;
    const first = Math.floor(keys / shape.pageSize / 2);
    const columns = blockTable.shape[1];
    const part = (start: number, end: number) =>
      readAt(
        place,
        cache,
        { ...rest, rows: [take(call.rows[0], 1, range(start, end))] },
        { data: blockTable.data.slice(start / shape.pageSize), shape: [1, columns - start / shape.pageSize] },
      );
    try {
      const border = first * shape.pageSize;
      const [a, b] = [await part(0, border), await part(border, keys)];
      assert(border > 0 || a.lse.data.every((x) => x === -Infinity));
      const { output, lse } = await mergeAttentionStates(a, b, { ...(softmaxAux && { softmaxAux }) });
      agrees(onHost({ output, lse }), forward(call), "f32");
    } finally {
      cache.dispose();
    }
  });

/** The properties of caches over time, by name. */
export const cacheProperties: Readonly<Record<string, CachePropertyCheck>> = {
  "token by token, appended and decoded, is one call of all tokens": stepsAreOneCall,
  "a fork shares its parent's rows, and neither sees what the other appends": forksAreIndependent,
  "sequences that share a page append at once": forksAppendAtOnce,
  "rows of any element type are rounded to the cache's": rowsAreRounded,
  "a table that begins at a later page is the rest of the keys": tablesAreCut,
};
