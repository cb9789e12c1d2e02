// Decoding on the GPU. What a call has decides which kernels are generated, and a software adapter compiles each for a second:
// few kinds of calls, with lengths, heads, batches and masks as they are drawn.

import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import {
  ConfigSelectorChain,
  type DecodeConfig,
  emptyOnGpu,
  encodeMlaDecode,
  Executor,
  FlashMLAError,
  type GpuIndexTensor,
  type GpuTensor,
  type HostTensor,
  type IndexTensor,
  mergeAttentionStates,
  mlaDecode,
  type MlaDecodeInputs,
  mlaDecodeKernel,
  type MlaDecodeOptions,
  mlaDecodeWithLse,
  type OwnedGpuTensor,
  toGpu,
  toHost,
  Tuner,
  viewOnGpu,
} from "../mod.ts";
import { defaultLimits } from "../src/gpu/capabilities.ts";
import { candidateConfigs, whyInvalid } from "../src/gpu/decode_configs.ts";
import { type GpuContext, gpuContext } from "../src/gpu/device.ts";
import { GpuLatentStore } from "../src/gpu/latent_store.ts";
import { decodeProblem } from "../src/op/decode_problem.ts";
import { toFloats, toHalves } from "../src/op/half.ts";
import { elementCount, type Tensor } from "../src/op/tensor.ts";
import {
  type DecodeCall,
  decodeCall,
  type DecodeCallShape,
  type Decoded,
  forward,
  mathOptions,
} from "./support/decode_call.ts";
import {
  agrees,
  cacheProperties,
  decodeAt,
  decodeInBuffers,
  decodeProperties,
  heldBy,
  identical,
  ofSequences,
  type Place,
  sequencesOf,
  storedTensors,
  unusedEntry,
} from "./support/decode_properties.ts";
import { openTestDevice, skip, smallDecodeConfig, testContext } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { mulberry32, normals, randomTensor } from "./support/random_problem.ts";
import { range, take } from "./support/tensor_parts.ts";

const cfg = smallDecodeConfig;
const place: Place = { platform: "webgpu", cfg };

type Kind = Partial<DecodeCallShape>;

/** Few kinds that meet every feature, both element types of each tensor, and widths that are quads and that are none. */
const kinds = {
  plain: {
    ...{ kvLoraRank: 16, qkRopeHeadDim: 8, qkNopeHeadDim: 12, vHeadDim: 8, dtype: "f32", query: "f32", pageSize: 16 },
    ...{ absorbed: false, logitsSoftCap: null, sinks: "none" },
  },
  oddHalves: {
    ...{ kvLoraRank: 7, qkRopeHeadDim: 5, qkNopeHeadDim: 3, vHeadDim: 5, dtype: "f16", query: "f16", pageSize: 16 },
    ...{ absorbed: false },
  },
  withoutPages: {
    ...{ kvLoraRank: 12, qkRopeHeadDim: 0, qkNopeHeadDim: 9, vHeadDim: 9, dtype: "f16", query: "f16", pageSize: 0 },
    ...{ absorbed: true, logitsSoftCap: null, sinks: "none" },
  },
  odd: {
    ...{ kvLoraRank: 9, qkRopeHeadDim: 2, qkNopeHeadDim: 5, vHeadDim: 6, dtype: "f32", query: "f32", pageSize: 1 },
    ...{ absorbed: true, logitsSoftCap: null, causal: false, slidingWindow: null },
  },
} as const satisfies Record<string, Kind>;

/** A map of calls to some kinds, each call to one that its seed decides. */
function narrowedTo(...some: readonly Kind[]): (shape: DecodeCallShape) => DecodeCallShape {
  return (shape) => {
    const kind = some[(shape.seed >>> 5) % some.length];
    return {
      ...shape,
      // The array of sinks has a length of its own for every four heads.
      kvHeads: Math.min(2, shape.kvHeads),
      headsPerKvHead: Math.min(shape.kvHeads > 1 ? 2 : 4, shape.headsPerKvHead),
      logitsSoftCap: shape.logitsSoftCap ?? 2,
      sinks: shape.sinks === "none" ? "[H, n]" : shape.sinks,
      ...kind,
    };
  };
}

const all = Object.values(kinds);

/** Which kinds a property is tested with, and with how many calls. */
const plans: Readonly<Record<string, { readonly kinds: readonly Kind[]; readonly runs: number }>> = {
  "absorbing before and projecting afterwards is what the weights do": { kinds: [kinds.plain], runs: 8 },
  "parts of the keys merge in either order": { kinds: [kinds.plain], runs: 8 },
  "pages lie anywhere, without a difference to the bit": { kinds: [kinds.plain, kinds.oddHalves, kinds.odd], runs: 12 },
  "with splitKeys a sequence is computed alike to the bit in any batch": { kinds: all, runs: 16 },
  "NaN in a row reaches the queries that see it, and no other": { kinds: all.slice(0, 3), runs: 12 },
  "decoding is attention over the same rows": { kinds: all, runs: 100 },
};
const others = { kinds: all, runs: 12 };

describe("mlaDecode() on the GPU", { skip }, () => {
  for (const [name, check] of Object.entries(decodeProperties)) {
    test(name, async () => {
      await testContext();
      const { kinds, runs } = plans[name] ?? others;
      await check(decodeAt(place), { runs, narrow: narrowedTo(...kinds) });
    });
  }
});

describe("splits of fixed length", { skip }, () => {
  test("are merged alike to the bit beside sequences with many more of them", async () => {
    await testContext();
    const decode = decodeAt(place);
    const call = drawn(kinds.plain, [[300, 1], [1, 1], [1100, 1], [2300, 1], [150, 1], [8300, 1]]);
    const whole = await decode(call, { splitKeys: 64 });
    agrees(whole, forward(call), "f32");
    for (const chosen of [[0], [2], [3], [5], [1, 4], [4, 0, 2], [3, 1, 0]]) {
      const some = await decode(sequencesOf(call, chosen), { splitKeys: 64 });
      identical(some, ofSequences(whole, call, chosen), `sequences ${chosen}`);
    }
  });
});

describe("LatentCache on the GPU", { skip }, () => {
  for (const [name, check] of Object.entries(cacheProperties)) {
    test(name, async () => {
      await testContext();
      const some = name.startsWith("a table that begins") ? [kinds.plain] : [kinds.plain, kinds.oddHalves];
      await check(place, { runs: 10, narrow: narrowedTo(...some) });
    });
  }
});

/** One call of a kind, with nothing of it left to chance. */
function drawn(
  kind: Kind,
  sequences: readonly (readonly [keys: number, tokens: number])[],
  more: Kind = {},
): DecodeCall {
  return decodeCall({
    ...narrowedTo(kind)({
      ...{ kvHeads: 1, headsPerKvHead: 2, kvLoraRank: 1, qkNopeHeadDim: 1, qkRopeHeadDim: 0, vHeadDim: 1 },
      ...{ absorbed: false, dtype: "f32", query: "f32", pageSize: 4, packed: false, causal: true },
      ...{ slidingWindow: null, logitsSoftCap: null, sinks: "none", small: false, seed: 11 },
      sequences: sequences.map(([keys, tokens]) => ({ keys, tokens })),
    }),
    ...more,
  });
}

// FlashMLA's own grid, reduced: [sequences, queries, keys, heads, causal], with lengths all alike, and drawn about that
// number with some of them 0. Its elements are a tenth of normal ones; unused tails are NaN, unused entries 2147480000.
const grid = {
  "f32 in pages of 16": {
    kind: { dtype: "f32", query: "f32", pageSize: 16 },
    cases: [[1, 1, 20, 1, true], [2, 2, 140, 128, true], [6, 1, 1030, 9, true], [2, 4, 140, 64, true]],
  },
  "f16 in pages of 64": {
    kind: { dtype: "f16", query: "f16", pageSize: 64 },
    cases: [[6, 1, 140, 63, true], [2, 2, 1030, 9, true], [1, 4, 140, 128, false], [1, 1, 1030, 64, true]],
  },
  "f16 in pages of 1": {
    kind: { dtype: "f16", query: "f16", pageSize: 1 },
    cases: [[1, 1, 140, 9, true], [6, 4, 20, 3, false], [2, 1, 1030, 63, true]],
  },
} as const;

describe("FlashMLA's grid on the GPU", { skip }, () => {
  for (const [name, { kind, cases }] of Object.entries(grid)) {
    test(name, async () => {
      await testContext();
      for (const [count, tokens, keys, heads, causal] of cases) {
        for (const varied of [false, true]) {
          const random = mulberry32(count * keys + heads);
          const normal = normals(keys + heads);
          const lengths = range(0, count).map((i) => {
            if (!varied) return keys;
            // At least one of several is empty.
            return i === count - 1 || random() < 0.2 ? 0 : Math.max(tokens, Math.round(keys + normal() * keys / 2));
          });
          const call = decodeCall({
            ...{ ...kind, packed: false, kvHeads: 1, headsPerKvHead: heads, absorbed: true, causal, small: true },
            ...{ kvLoraRank: 16, qkRopeHeadDim: 8, qkNopeHeadDim: 8, vHeadDim: 8, seed: keys + heads },
            ...{ slidingWindow: null, logitsSoftCap: null, sinks: "none" },
            sequences: lengths.map((keys) => ({ keys, tokens })),
          });
          const what = `B ${count}, Sq ${tokens}, Sk ${lengths}, H ${heads}`;
          const [result, expected] = [await decodeAt(place)(call), forward(call)];
          const bounds = kind.query === "f16" ? { cosDiff: 5e-6, relL2: 3e-3 } : { relL2: 1e-5 };
          assertClose(result.output, expected.output, bounds, what);
          expected.lse.data.forEach((value, i) => {
            const got = result.lse.data[i];
            assert(Object.is(got, value) || Math.abs(got - value) < 1e-4, `${what}: log-sum-exp ${got}, not ${value}`);
          });
        }
      }
    });
  }

  test("latents of 512 + 64 halves in 16 KiB of workgroup memory", async () => {
    const context = await gpuContext(await openTestDevice());
    context.buffers.poison = true;
    const { device, capabilities } = context;
    assertEquals(capabilities.limits.maxComputeWorkgroupStorageSize, 16384);
    const call = drawn(
      { kvLoraRank: 512, qkRopeHeadDim: 64, qkNopeHeadDim: 128, vHeadDim: 128, dtype: "f16", query: "f16" },
      [[70, 1], [0, 1], [5, 1]],
      {
        ...{ absorbed: true, kvHeads: 16, headsPerKvHead: 1, small: true, pageSize: 64 },
        sinks: "none",
        logitsSoftCap: null,
      },
    );
    agrees(await decodeAt({ ...place, device })(call), forward(call), "f16");
    device.destroy();
  });
});

describe("a cache of several buffers", { skip }, () => {
  const some = [
    "decoding is attention over the same rows",
    "keys are split into any number of parts",
    "NaN in a row reaches the queries that see it, and no other",
  ];
  for (const name of some) {
    test(name, async () => {
      const decode = decodeInBuffers(await testContext(), cfg, 5);
      await decodeProperties[name](decode, { runs: 10, narrow: narrowedTo(kinds.plain) });
    });
  }

  test("copies pages within a buffer and from one to the other", async () => {
    const context = await testContext();
    const layout = { kvLoraRank: 3, qkRopeHeadDim: 2, dtype: "f32", pageSize: 2, pages: 7, keyLength: 0 } as const;
    const store = await GpuLatentStore.create(context, layout, 200);
    assertEquals(store.shards.map(({ firstPage, pages }) => [firstPage, pages]), [[0, 3], [3, 3], [6, 1]]);
    const blockTable = { data: Int32Array.of(0, 1, 2, 3, 4, 5, 6), shape: [1, 7] };
    const seqLens = { data: Int32Array.of(0), shape: [1] };
    const rows = randomTensor([1, 14, 5], normals(1));
    const places = Uint32Array.from(range(0, 14));
    await store.append({ rows, rowStarts: [0, 14], places, blockTable, seqLens, copies: [] });
    const none = { rows: take(rows, 1, []), rowStarts: [0, 0], places: new Uint32Array(0), blockTable, seqLens };
    await store.append({ ...none, copies: [[0, 1], [2, 6], [3, 5], [4, 0]] });
    const { rows: read, dispose } = await store.gather(blockTable, 0, 1, 12);
    const expected = [8, 9, 0, 1, 4, 5, 6, 7, 8, 9, 6, 7, 4, 5].slice(1, 13);
    assertEquals(toFloats(await toHost(read as GpuTensor)), take(rows, 1, expected));
    dispose();
    store.dispose();
  });

  test("refuses pages that fit into no buffer", async () => {
    const context = await testContext();
    const layout = { kvLoraRank: 3, qkRopeHeadDim: 2, dtype: "f32", pageSize: 2, pages: 7, keyLength: 0 } as const;
    const error = await assertRejects(
      () => GpuLatentStore.create(context, layout, 60),
      FlashMLAError,
      "Cannot create the cache: a page takes 64 bytes",
    );
    assertEquals(error.code, "limit");
  });
});

/** Integers on the GPU, at an odd place of their buffer. */
function integersOnGpu(context: GpuContext, data: ArrayLike<number>, shape: readonly number[]): GpuIndexTensor {
  const buffer = context.device.createBuffer({ size: 4 * data.length + 300, usage: 0x80 | 0x4 | 0x8 });
  context.device.queue.writeBuffer(buffer, 268, Int32Array.from(data));
  return { buffer, shape, dtype: "i32", offset: 268, device: context.device };
}

/** A tensor on the GPU as a part of another, between NaN. */
async function partOnGpu(tensor: Tensor, half: boolean): Promise<{ view: GpuTensor; whole: OwnedGpuTensor }> {
  const shape = tensor.shape.map((n, axis) => axis === 1 ? n + 2 : axis === tensor.shape.length - 1 ? n + 3 : n);
  const data = new Float32Array(elementCount(shape)).fill(NaN);
  const strides = shape.map((_, axis) => elementCount(shape.slice(axis + 1)));
  const start = strides[1] + strides[shape.length - 1];
  tensor.data.forEach((value, i) => {
    let [rest, at] = [i, start];
    for (let axis = shape.length - 1; axis >= 0; axis--) {
      at += rest % tensor.shape[axis] * strides[axis];
      rest = Math.floor(rest / tensor.shape[axis]);
    }
    data[at] = value;
  });
  const whole = await toGpu(half ? toHalves({ data, shape }) : { data, shape });
  return { view: viewOnGpu(whole, { shape: tensor.shape, offset: start, strides }), whole };
}

/** The pages of one sequence. */
function rowOf({ data, shape }: IndexTensor, sequence: number): Int32Array {
  return data.subarray(sequence * shape[1], (sequence + 1) * shape[1]);
}

/** A result on the GPU, read and given back. */
async function fetched({ output, lse }: { output: OwnedGpuTensor; lse: OwnedGpuTensor }): Promise<Decoded> {
  const result = { output: toFloats(await toHost(output)), lse: toFloats(await toHost(lse)) };
  output.dispose();
  lse.dispose();
  return result;
}

/** Sequences of which only one needs another page for its last tokens. */
const resident = [[9, 2], [2, 2], [131, 2], [71, 2]] as const;

describe("decoding with everything on the GPU", { skip }, () => {
  for (const name of ["plain", "oddHalves"] as const) {
    test(`appends and decodes in one submission, and gives all memory back: ${name}`, async () => {
      const context = await testContext();
      const { device, buffers: { lent } } = context;
      const call = drawn(kinds[name], resident.map(([keys, tokens]) => [keys, name === "plain" ? tokens : 1]));
      const half = call.shape.query === "f16";
      const before = call.rows.map((rows) => take(rows, 1, range(0, rows.shape[1] - 2)));
      const { cache, blockTable, seqLens } = await heldBy(place, { ...call, rows: before });
      cache.reserve({ blockTable, seqLens, newTokens: 2 });
      const added = call.rows.map((rows) => [...take(rows, 1, range(rows.shape[1] - 2, rows.shape[1])).data]).flat();
      const rows = await partOnGpu(
        { data: Float32Array.from(added), shape: [4, 2, call.rows[0].shape[2]] },
        call.shape.dtype === "f16",
      );
      const query = await partOnGpu(call.query, half);
      const stored = (tensor: Tensor) => toGpu(call.shape.dtype === "f16" ? toHalves(tensor) : tensor);
      const [wKc, wVc] = [await stored(call.weights.wKc), await stored(call.weights.wVc)];
      const sinks = call.softmaxAux && await toGpu(call.softmaxAux);
      const table = integersOnGpu(context, blockTable.data, blockTable.shape);
      const lens = integersOnGpu(context, seqLens, [4]);
      const grown = await toGpu({ data: seqLens.map((keys) => keys + 2), shape: [4] });
      const shape = forward(call).output.shape;
      const out = await emptyOnGpu(shape, { dtype: half ? "f16" : "f32" });
      const options = { ...mathOptions(call), ...(sinks && { softmaxAux: sinks }), cfg };
      const inputs = { query: query.view, cache, wKc, wVc, blockTable: table, seqLens: grown };

      const encoder = device.createCommandEncoder();
      const appended = await cache.encodeAppend(encoder, rows.view, { blockTable: table, seqLens: lens });
      const decoded = await encodeMlaDecode(encoder, inputs, { ...options, out });
      assertEquals(decoded.output, out);
      device.queue.submit([encoder.finish()]);
      appended.dispose();
      decoded.dispose();
      const expected = forward(call);
      const output = toFloats(await toHost(out));
      agrees({ output, lse: expected.lse }, expected, call.shape.query, "recorded");

      // The same at once, without a tensor for the result, checked, and with lengths on the host.
      const whole = await mlaDecodeWithLse(inputs, { ...options, checkIndices: true }) as never;
      agrees(await fetched(whole), expected, call.shape.query, "lengths on the GPU");
      const mixed = { ...inputs, seqLens: seqLens.map((keys) => keys + 2) };
      agrees(await fetched(await mlaDecodeWithLse(mixed, options) as never), expected, call.shape.query, "on the host");
      const owned = await encodeMlaDecode(device.createCommandEncoder(), inputs, options);
      owned.dispose();
      (owned.output as OwnedGpuTensor).dispose();

      cache.dispose();
      for (const tensor of [rows.whole, query.whole, wKc, wVc, grown, out, ...(sinks ? [sinks] : [])]) tensor.dispose();
      assertEquals(context.buffers.lent, lent);
    });
  }

  test("with lengths on the GPU a sequence is computed alike to the bit in any batch", async () => {
    const context = await testContext();
    const call = drawn(kinds.plain, [[0, 2], ...resident, [600, 2], [2300, 2]]);
    const { cache, blockTable, seqLens } = await heldBy(place, call);
    const read = async (chosen: readonly number[]) => {
      // A table as wide as these sequences need.
      const columns = chosen.reduce((most, sequence) => Math.max(most, Math.ceil(seqLens[sequence] / 16)), 1);
      return await mlaDecodeWithLse({
        query: take(call.query, 0, chosen),
        cache,
        ...call.weights,
        blockTable: {
          data: Int32Array.from(chosen.flatMap((sequence) => [...rowOf(blockTable, sequence).subarray(0, columns)])),
          shape: [chosen.length, columns],
        },
        seqLens: integersOnGpu(context, chosen.map((sequence) => seqLens[sequence]), [chosen.length]),
      }, { ...mathOptions(call), cfg, splitKeys: 64 });
    };
    const whole = await read(range(0, 7));
    agrees(whole, forward(call), "f32");
    for (const chosen of [[6], [5], [0], [5, 3, 1], range(0, 7).toReversed()]) {
      const part = { output: take(whole.output, 0, chosen), lse: take(whole.lse, 0, chosen) };
      identical(await read(chosen), part, `sequences ${chosen}`);
    }
    cache.dispose();
  });

  test("merges parts of the keys on the GPU", async () => {
    await testContext();
    const call = drawn(kinds.plain, [[45, 1], [33, 1]]);
    const query = await toGpu(call.query);
    const { cache, blockTable } = await heldBy(place, call);
    const options = { ...mathOptions(call), cfg };
    const columns = blockTable.shape[1];
    // The first page of each sequence, and all others.
    const rest = { data: blockTable.data.filter((_, i) => i % columns > 0), shape: [2, columns - 1] };
    const read = async (blockTable: typeof rest, seqLens: number[]) =>
      await mlaDecodeWithLse({ query, cache, ...call.weights, blockTable, seqLens }, options) as never as {
        output: OwnedGpuTensor;
        lse: OwnedGpuTensor;
      };
    const parts = [await read(blockTable as typeof rest, [16, 16]), await read(rest, [29, 17])];
    for (const [a, b] of [parts, parts.toReversed()]) {
      agrees(await fetched(await mergeAttentionStates(a, b)), forward(call), "f32");
    }
    for (const tensor of [query, ...parts.flatMap(({ output, lse }) => [output, lse])]) tensor.dispose();
    cache.dispose();
  });

  test("checks indices on the GPU when it is asked to, and is safe when it is not", async () => {
    const context = await testContext();
    const call = drawn(kinds.plain, [[37, 1], [24, 1]]);
    const { cache, blockTable, seqLens } = await heldBy(place, call);
    const columns = blockTable.shape[1];
    const read = (table: ArrayLike<number>, lens: readonly number[], checkIndices: boolean) =>
      mlaDecode({
        ...{ query: call.query, cache, ...call.weights },
        blockTable: integersOnGpu(context, table, blockTable.shape),
        seqLens: integersOnGpu(context, lens, [2]),
      }, { ...mathOptions(call), cfg, checkIndices });
    const refused = async (table: ArrayLike<number>, lens: readonly number[], message: string) => {
      const error = await assertRejects(() => read(table, lens, true), FlashMLAError, `Cannot decode: ${message}`);
      assertEquals(error.code, "invalid-input");
      assertEquals((await read(table, lens, false) as Tensor).shape, [2, 1, 2, 8]);
    };
    const capacity = columns * 16;
    await refused(
      blockTable.data,
      [37, capacity + 1],
      `seqLens[1] is ${capacity + 1} on the GPU, expected 0 to the ${capacity} tok`,
    );
    await refused(blockTable.data, [-1, 24], "seqLens[0] is -1 on the GPU, expected 0 to the");
    await refused(
      blockTable.data,
      [37, capacity],
      `blockTable[1, 2] is ${unusedEntry}, outside the cache, which has pages 0 to`,
    );
    const other = blockTable.data.slice();
    other[1] = -3;
    await refused(other, [37, 24], "blockTable[0, 1] is -3, outside the cache");
    cache.free([blockTable.data[columns]]);
    await refused(blockTable.data, [37, 24], `blockTable[1, 0] is ${blockTable.data[columns]}, a page that was freed`);
    agrees(
      { output: await read(blockTable.data, [...seqLens], false) as Tensor, lse: forward(call).lse },
      forward(call),
      "f32",
    );

    // Without pages: lengths past the tensor are cut to what there is.
    const contiguous = drawn(kinds.withoutPages, [[6, 1], [6, 1]]);
    const inputs = (lens: readonly number[]): MlaDecodeInputs => ({
      ...storedTensors(contiguous),
      cache: toHalves({
        data: Float32Array.from(contiguous.rows.flatMap(({ data }) => [...data])),
        shape: [2, 6, 12],
      }),
      seqLens: integersOnGpu(context, lens, [2]),
    });
    const options = { ...mathOptions(contiguous), cfg, kvLoraRank: 12 };
    await assertRejects(
      () => mlaDecodeWithLse(inputs([7, 6]), { ...options, checkIndices: true }),
      FlashMLAError,
      "seqLens[0] is 7 on the GPU, expected 0 to the 6 tokens",
    );
    for (const lens of [[6, 6], [7, 1000]]) {
      const { output, lse } = await mlaDecodeWithLse(inputs(lens), options) as { output: HostTensor; lse: Tensor };
      agrees({ output: toFloats(output), lse }, forward(contiguous), "f16", `lengths ${lens} of 6 keys`);
    }
    cache.dispose();
  });

  test("writes out where it is told to: on either side, in either type, at an odd place of a buffer", async () => {
    await testContext();
    const call = drawn(kinds.plain, [[9, 1], [6, 1], [0, 1]]);
    const { cache, blockTable, seqLens } = await heldBy(place, call);
    const expected = forward(call);
    const { shape } = expected.output;
    const inputs: MlaDecodeInputs = { query: call.query, cache, ...call.weights, blockTable, seqLens };
    const count = elementCount(shape);
    for (const dtype of ["f32", "f16"] as const) {
      const host = { data: new Float32Array(count).fill(NaN), shape };
      const out = dtype === "f16" ? toHalves(host) : host;
      assertEquals(await mlaDecode(inputs, { ...mathOptions(call), cfg, out }) as unknown, out);
      agrees({ output: toFloats(out), lse: expected.lse }, expected, dtype, `out in ${dtype}`);
      const whole = await toGpu(
        dtype === "f16" ? toHalves({ data: new Float32Array(count + 9).fill(3), shape: [count + 9] }) : {
          ...{ data: new Float32Array(count + 9).fill(3), shape: [count + 9] },
        },
      );
      const start = dtype === "f16" ? 6 : 5;
      const view = viewOnGpu(whole, { shape, offset: start });
      assertEquals(await mlaDecode(inputs, { ...mathOptions(call), cfg, out: view }) as unknown, view);
      const read = toFloats(await toHost(whole)).data;
      const output = { data: read.slice(start, start + count), shape };
      agrees({ output, lse: expected.lse }, expected, dtype, `out on the GPU in ${dtype}`);
      const around = [...read.subarray(0, start), ...read.subarray(start + count)];
      assertEquals(around, around.map(() => 3));
      whole.dispose();
    }
    cache.dispose();
  });

  test("rows of a cache tensor with anything between them, to whole quads and past them", async () => {
    await testContext();
    for (const [kind, dtype, quad] of [["odd", "f32", 4], ["oddHalves", "f16", 8]] as const) {
      const plain = { absorbed: false, sinks: "none", logitsSoftCap: null, pageSize: 0 } as const;
      const call = drawn({ ...kinds[kind], ...plain, dtype, query: dtype }, [[9, 1], [6, 1]]);
      const expected = forward(call);
      const width = call.rows[0].shape[2];
      for (const between of [quad - width % quad, quad, 3]) {
        const row = width + between;
        const data = new Float32Array(2 * 10 * row).fill(NaN);
        call.rows.forEach((rows, s) => {
          for (let key = 0; key < rows.shape[1]; key++) {
            data.set(rows.data.subarray(key * width, (key + 1) * width), (10 * s + key) * row);
          }
        });
        const shape = [2, 10, row];
        using whole = await toGpu(dtype === "f16" ? toHalves({ data, shape }) : { data, shape });
        const cache = viewOnGpu(whole, { shape: [2, 10, width], strides: [10 * row, row, 1] });
        const halves = dtype === "f16" ? toHalves : (tensor: Tensor) => tensor;
        const { query, weights } = call;
        const inputs = { query: halves(query), cache, wKc: halves(weights.wKc), wVc: halves(weights.wVc) };
        const output = toFloats(await mlaDecode({ ...inputs, seqLens: [9, 6] }, { ...mathOptions(call), cfg }));
        agrees({ output, lse: expected.lse }, expected, dtype, `${between} elements between rows of ${width}`);
      }
    }
  });

  test("refuses tensors that were disposed of, lie elsewhere, or cannot take the result", async () => {
    const context = await testContext();
    const { lent } = context.buffers;
    const call = drawn(kinds.plain, [[9, 1], [6, 1]]);
    const { cache, blockTable, seqLens } = await heldBy(place, call);
    const inputs: MlaDecodeInputs = { query: call.query, cache, ...call.weights, blockTable, seqLens };
    const refused = async (changes: Partial<MlaDecodeInputs>, options: MlaDecodeOptions, message: string) => {
      const error = await assertRejects(
        () => mlaDecode({ ...inputs, ...changes }, { cfg, ...options }),
        FlashMLAError,
        message,
      );
      assertEquals(error.code, "invalid-input");
    };
    const gone = await toGpu(call.query);
    gone.dispose();
    await refused({ query: gone }, {}, "query");
    const query = await toGpu(call.query);
    await refused({ query }, { out: { ...query, shape: [2, 1, 2, 8] } }, "out lies in the buffer of query");
    query.dispose();
    const device = await openTestDevice();
    await refused({}, { device }, "options.device is another device than the cache's");
    const other = await toGpu(call.query, device);
    await refused({ query: other }, {}, "query lies on another device than the cache");
    other.dispose();
    device.destroy();
    const encoder = context.device.createCommandEncoder();
    const host = { data: new Float32Array(32), shape: [2, 1, 2, 8] };
    await assertRejects(
      () => encodeMlaDecode(encoder, inputs, { cfg, out: host as never }),
      FlashMLAError,
      "out must lie on the GPU",
    );
    await assertRejects(
      () => encodeMlaDecode({} as never, inputs, { cfg }),
      FlashMLAError,
      "encoder must be a GPUCommandEncoder",
    );
    await assertRejects(() => mlaDecode(inputs, { cfg: { ...cfg, blockRows: 3 } }), FlashMLAError, "blockRows");
    cache.dispose();
    assertEquals(context.buffers.lent, lent);
  });

  test("notices a block table that is disposed of while the call is under way", async () => {
    await testContext();
    const call = drawn(kinds.plain, [[41, 1]]);
    const { cache, blockTable, seqLens } = await heldBy(place, call);
    const table = await toGpu(blockTable);
    const pending = mlaDecode({ query: call.query, cache, ...call.weights, blockTable: table, seqLens }, { cfg });
    table.dispose();
    await assertRejects(() => pending, FlashMLAError, "blockTable was disposed of while the call was under way");
    cache.dispose();
  });

  test("leaves cache, counts and table as they were when an append fails", async () => {
    const context = await testContext();
    const call = drawn(kinds.plain, [[41, 1]]);
    const { cache, blockTable, seqLens } = await heldBy(place, call);
    const read = () => mlaDecodeWithLse({ query: call.query, cache, ...call.weights, blockTable, seqLens }, { cfg });
    const before = await read();
    const { lent } = context.buffers;
    cache.fork(blockTable.data.subarray(0, 3));
    const [table, free] = [[...blockTable.data], cache.freePages];
    const rows = await toGpu({ data: new Float32Array(24).fill(NaN), shape: [1, 1, 24] });
    const pending = cache.append(rows, { blockTable, seqLens });
    rows.dispose();
    const error = await assertRejects(
      () => pending,
      FlashMLAError,
      "rows were disposed of while the call was under way",
    );
    assertEquals(error.code, "invalid-input");
    assertEquals([[...blockTable.data], cache.freePages, context.buffers.lent], [table, free, lent]);
    identical(await read(), before, "after a failed append");
    await cache.append({ data: new Float32Array(24).fill(1), shape: [1, 1, 24] }, { blockTable, seqLens });
    assertEquals(cache.freePages, free - 1);
    identical(await read(), before, "after an append behind its keys");
    cache.dispose();
  });
});

describe("configurations of decoding", { skip }, () => {
  const layout = { pages: 100, pageSize: 64, keyLength: 0, kvLoraRank: null } as const;
  const problemOf = (L: number, R: number, dtype: "f32" | "f16", splitKeys?: number) =>
    decodeProblem(
      {
        query: { data: new Float32Array(16 * (L + R)), shape: [1, 1, 16, L + R] },
        blockTable: { data: new Int32Array(100), shape: [1, 100] },
        seqLens: [6000],
      },
      { ...layout, dtype, width: L + R },
      { kvLoraRank: L, softmaxScale: 1, ...(splitKeys && { splitKeys }) },
    );

  test("fit 16 KiB of workgroup memory, and say so where none does", async () => {
    const { capabilities } = await gpuContext();
    for (const software of [false, true]) {
      const small = { ...capabilities, limits: defaultLimits, software, subgroups: null, matrixUnits: null };
      for (const [L, R] of [[512, 64], [256, 32], [512, 0], [7, 5], [1, 0]]) {
        for (const dtype of ["f32", "f16"] as const) {
          for (const splitKeys of [undefined, 64]) {
            const problem = problemOf(L, R, dtype, splitKeys);
            const found = candidateConfigs(problem, small);
            assert(found.length > 0);
            for (const cfg of found) assertEquals(whyInvalid(cfg, problem, small), null);
            if (splitKeys !== undefined) assertEquals(found.length, 1);
          }
        }
      }
      const error = assertThrows(
        () => candidateConfigs(problemOf(1e5, 0, "f32"), small),
        FlashMLAError,
        "no tile fits",
      );
      assertEquals(error.code, "limit");
    }
  });

  test("are refused when they cannot run, with the field and the limit", async () => {
    const { capabilities } = await gpuContext();
    const problem = problemOf(512, 64, "f32");
    const small = { ...capabilities, limits: defaultLimits, matrixUnits: null, subgroups: null };
    for (
      const [change, message] of [
        [{ workgroups: 0 }, "workgroups must be a positive integer, got 0"],
        [{ blockRows: 2.5 }, "blockRows must be a positive integer, got 2.5"],
        [{ pinned: 1 }, "pinned must be true or false, got 1"],
        [{ blockK: 64, numWarps: 2 }, "maxComputeWorkgroupStorageSize = 16384"],
        [{ subgroups: true }, "subgroups is true, the device has none"],
        [{ matrixUnits: true }, "matrixUnits is true, the device has none"],
      ] as const
    ) {
      const why = whyInvalid({ ...cfg, ...change } as DecodeConfig, problem, small);
      assert(why?.includes(message), `${JSON.stringify(change)}: ${why}`);
    }
    const why = whyInvalid({ ...cfg, blockK: 12 }, problemOf(16, 8, "f32", 64), small);
    assert(why?.includes("blockK 12 does not divide splitKeys 64"), `${why}`);
  });

  test("are chosen where a call brings none, and measured where there are several", async () => {
    await testContext();
    const call = drawn(kinds.plain, [[9, 1], [6, 1]]);
    const { cache, blockTable, seqLens } = await heldBy(place, call);
    const inputs: MlaDecodeInputs = { query: call.query, cache, ...call.weights, blockTable, seqLens };
    const tuner = new Tuner({ warmup: 1, iters: 2, budgetMs: 20, totalBudgetMs: 120_000 });
    const executor = new Executor(new ConfigSelectorChain({ tuner })) as never;
    const expected = forward(call);
    for (let i = 0; i < 2; i++) {
      const result = await mlaDecodeWithLse(inputs, { ...mathOptions(call), executor }) as Decoded;
      agrees(result, expected, "f32", "a configuration of the library's choice");
    }
    const invocation = await mlaDecodeKernel.prepare({ inputs, options: mathOptions(call) });
    const others = [cfg, { ...cfg, workgroups: 1 }];
    const { timings } = await tuner.tune(mlaDecodeKernel, invocation, others);
    const measured = timings.filter(({ rejected }) => rejected === null);
    assert(measured.length >= others.length, JSON.stringify(timings));
    cache.dispose();
  });
});

describe("decoding on a device without half precision", { skip }, () => {
  test("is attention over the same rows", async () => {
    const device = await openTestDevice();
    const context = await gpuContext(device);
    context.buffers.poison = true;
    assertEquals(context.capabilities.f16, false);
    const narrow = narrowedTo(kinds.oddHalves, kinds.withoutPages);
    await decodeProperties["decoding is attention over the same rows"](decodeAt({ ...place, device }), {
      runs: 10,
      narrow,
    });
    assertEquals(context.buffers.lent, 0);
    device.destroy();
  });
});
