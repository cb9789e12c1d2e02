// Decoding on this machine's adapter: attention and merging alone, on a cache in shuffled pages, for models' heads.
//
//   deno task bench:decode                       a table; bytes and FLOPs as FlashMLA counts them
//   deno task bench:decode --f32                 a cache of float32
//   deno task bench:decode --matrix              matrix units (Dawn)
//   deno task bench:decode --only="H 16"         rows whose name has these words
//   deno task bench:decode --lengths=8192        only these lengths; --batches=1,32 likewise
//   deno task bench:decode --layer               the whole operation by kernel, with the weights, at 8,192 keys
//   deno task bench:decode --svg=roofline.svg    a chart under the device's roofline; --peak=618 says its TFLOP/s,
//                                                --bandwidth=2980 its GB/s where the copy of this run is not to be used
//   deno task bench:decode --json                and one JSON object in the last line
//
//   bytes = 2 · B · ( H·(L+R) + Sk·(L+R) + H·L ) of halves        FLOPs = 2 · B · H · Sk · (2L + R)

import {
  type DecodeConfig,
  emptyOnGpu,
  LatentCache,
  mlaDecodeKernel,
  openDevice,
  type OwnedGpuTensor,
  toGpu,
  toHalves,
} from "../mod.ts";
import { prepareDecode } from "../src/gpu/decode_plan.ts";
import { gpuContext } from "../src/gpu/device.ts";
import { subgroupMatrixFeature } from "../src/gpu/request_device.ts";
import { clockProbe, timeOnGpu, timingMethod } from "../src/gpu/timing.ts";
import type { MlaDecodeInvocation } from "../src/decode_kernel.ts";
import { normals } from "../tests/support/random_problem.ts";
import { argument } from "./arguments.ts";
import { copyBandwidth } from "./copy_bandwidth.ts";
import { roofline, type RooflinePoint } from "./roofline.ts";
import { measureSteadily } from "./steady_timing.ts";

const matrix = Deno.args.includes("--matrix");
const device = matrix ? await openDevice({ engine: "dawn", features: [subgroupMatrixFeature] }) : undefined;
const context = await gpuContext(device);
const quick = context.capabilities.software;
const dtype = Deno.args.includes("--f32") ? "f32" : "f16";
const elementBytes = dtype === "f32" ? 4 : 2;
const { adapter, engine, limits } = context.capabilities;
console.log(`${adapter}, ${engine}, ${dtype} cache, timed by ${await timingMethod(context)}`);

const [L, R, P, V, pageSize] = [512, 64, 128, 128, 64];
const models = [["DeepSeek-V2-Lite", 16], ["Kimi-K2", 64], ["DeepSeek-V3", 128]] as const;
const numbers = (text: string | undefined, otherwise: number[]) =>
  text === undefined ? otherwise : text.split(",").map(Number);
const lengths = numbers(argument("lengths"), quick ? [1024] : [1024, 4096, 8192, 32768, 131072]);
const batches = numbers(argument("batches"), quick ? [1] : [1, 8, 32, 128]);
const only = argument("only") ?? (quick ? "V2-Lite" : "");

interface Point {
  readonly model: string;
  readonly heads: number;
  readonly batch: number;
  readonly keys: number;
}

// One binding has to cover the cache, as it does in most programs.
const mostTokens = Math.floor(
  Math.min(limits.maxStorageBufferBindingSize, limits.maxBufferSize, 20e9) / ((L + R) * elementBytes),
);
const points: Point[] = models.flatMap(([model, heads]) =>
  batches.flatMap((batch) => lengths.map((keys): Point => ({ model, heads, batch, keys })))
).filter(({ model, heads, batch, keys }) => `${model}, H ${heads}, B ${batch}, Sk ${keys}`.includes(only));
const possible = points.filter(({ batch, keys }) => batch * Math.ceil(keys / pageSize) * pageSize <= mostTokens);
for (const { model, batch, keys } of points.filter((point) => !possible.includes(point))) {
  console.log(`not run, its cache passes maxStorageBufferBindingSize: ${model}, B ${batch}, Sk ${keys}`);
}

const pages = Math.max(1, ...possible.map(({ batch, keys }) => batch * Math.ceil(keys / pageSize)));
const cache = await LatentCache.create({
  device: context.device,
  pages,
  pageSize,
  kvLoraRank: L,
  qkRopeHeadDim: R,
  dtype,
});
await fill(cache);
const order = shuffled(pages);

/** Random rows in every page: zeros would let a card run cooler. */
async function fill(cache: LatentCache): Promise<void> {
  const all = { data: cache.allocate(pages), shape: [1, pages] };
  const random = normals(7);
  const count = Math.min(pages * pageSize, quick ? 1024 : 65536);
  const data = Float32Array.from({ length: count * (L + R) }, () => Math.max(-1, Math.min(1, random() / 10)));
  using rows = await toGpu({ data, shape: [1, count, L + R] }, context.device);
  for (let first = 0; first < pages * pageSize; first += count) {
    const tokens = Math.min(count, pages * pageSize - first);
    const part = { ...rows, buffer: rows.buffer, device: rows.device, dtype: rows.dtype, shape: [1, tokens, L + R] };
    await cache.append(part, { blockTable: all, seqLens: [first] });
  }
}

function shuffled(count: number): Int32Array {
  const random = normals(11);
  const keys = Float64Array.from({ length: count }, random);
  return Int32Array.from({ length: count }, (_, i) => i).sort((a, b) => keys[a] - keys[b]);
}

async function randomQuery(batch: number, heads: number, width: number): Promise<OwnedGpuTensor> {
  const random = normals(3);
  const data = Float32Array.from({ length: batch * heads * width }, () => random() / 10);
  const floats = { data, shape: [batch, 1, heads, width] };
  return await toGpu(dtype === "f16" ? toHalves(floats) : floats, context.device);
}

interface Row extends Point {
  readonly cfg: DecodeConfig;
  readonly ms: number;
  readonly spread: number;
  readonly gbps: number;
  readonly tflops: number;
}

/** Measures one point under the fastest of its candidates. */
async function measure({ model, heads, batch, keys }: Point): Promise<Row> {
  const columns = Math.ceil(keys / pageSize);
  const blockTable = { data: order.slice(0, batch * columns), shape: [batch, columns] };
  using query = await randomQuery(batch, heads, L + R);
  const seqLens = new Int32Array(batch).fill(keys);
  const invocation = await mlaDecodeKernel.prepare({
    inputs: { query, cache, blockTable, seqLens },
    options: { softmaxScale: 1 / Math.sqrt(P + R) },
  });
  const { target, problem, inputs } = invocation;
  let best: { cfg: DecodeConfig; ms: number } | null = null;
  for (const cfg of target.candidateCfgs(problem)) {
    const trial = await target.trial(problem, inputs, cfg);
    await trial.time(1);
    const repeats = Math.max(1, Math.ceil((quick ? 1 : 10) / await trial.time(1)));
    await trial.time(repeats);
    const ms = Math.min(await trial.time(repeats), await trial.time(repeats)) / repeats;
    trial.dispose();
    if (best === null || ms < best.ms) best = { cfg, ms };
  }
  const trial = await target.trial(problem, inputs, best!.cfg);
  const [ms, spread] = await measureSteadily(context, (repeats) => trial.time(repeats), 30, 7);
  trial.dispose();
  const bytes = elementBytes * batch * (heads * (L + R) + keys * (L + R) + heads * L);
  const flops = 2 * batch * heads * keys * (2 * L + R);
  return { model, heads, batch, keys, cfg: best!.cfg, ms, spread, gbps: bytes / ms / 1e6, tflops: flops / ms / 1e9 };
}

/** The whole operation with weights, kernel by kernel. */
async function layer(model: string, heads: number, batch: number, keys: number): Promise<void> {
  const columns = Math.ceil(keys / pageSize);
  const random = normals(5);
  const weight = (width: number) => {
    const data = Float32Array.from({ length: L * heads * width }, () => random() / 20);
    const floats = { data, shape: [L, heads, width] };
    return toGpu(dtype === "f16" ? toHalves(floats) : floats, context.device);
  };
  using wKc = await weight(P);
  using wVc = await weight(V);
  using query = await randomQuery(batch, heads, P + R);
  const invocation: MlaDecodeInvocation = await mlaDecodeKernel.prepare({
    inputs: {
      ...{ query, cache, wKc, wVc },
      blockTable: { data: order.slice(0, batch * columns), shape: [batch, columns] },
      seqLens: new Int32Array(batch).fill(keys),
    },
  });
  const { target, problem, inputs } = invocation;
  const cfg = target.heuristicCfg(problem);
  using output = await emptyOnGpu([batch, 1, heads, V], { dtype, device: context.device });
  const steps = await prepareDecode(context, problem, inputs, cfg, { output });
  const time = (only?: readonly string[]) => (repeats: number) =>
    timeOnGpu(context, (encoder, timestampWrites) => steps.encode(encoder, { only, timestampWrites }), repeats);
  const [whole, spread] = await measureSteadily(context, time(), 30, 5);
  console.log(
    `\n${model}, B ${batch}, Sk ${keys}, with weights: ${(1000 * whole).toFixed(1)} µs (spread ${
      (100 * spread).toFixed(1)
    } %)`,
  );
  for (const label of steps.labels) {
    const [ms] = await measureSteadily(context, time([label]), 30, 5);
    console.log(`  ${label.padEnd(16)} ${(1000 * ms).toFixed(1).padStart(9)} µs`);
  }
  steps.dispose();
}

const rows: Row[] = [];
const bandwidth = Number(argument("bandwidth") ?? (await copyBandwidth(context)).gbps);
console.log(`copy ${bandwidth.toFixed(0)} GB/s`);
if (Deno.args.includes("--layer")) {
  for (const [model, heads] of models) {
    if (!model.includes(only)) continue;
    for (const batch of batches) if (batch * 8192 <= pages * pageSize) await layer(model, heads, batch, 8192);
  }
} else {
  for (const point of possible) {
    const row = await measure(point);
    rows.push(row);
    const { model, heads, batch, keys, ms, spread, gbps, tflops, cfg } = row;
    const { blockRows, blockK, numWarps, workgroups, matrixUnits, subgroups } = cfg;
    const how = `${
      matrixUnits ? "matrix" : subgroups ? "shuffled" : "plain"
    } ${blockRows}×${blockK} ${numWarps}w, ${workgroups}`;
    console.log(
      `${model.padEnd(17)} H ${`${heads}`.padEnd(4)} B ${`${batch}`.padEnd(4)} Sk ${`${keys}`.padEnd(7)} ` +
        `${(1000 * ms).toFixed(1).padStart(9)} µs ${gbps.toFixed(0).padStart(6)} GB/s ${
          tflops.toFixed(1).padStart(7)
        } TFLOP/s ` +
        `±${(50 * spread).toFixed(1)} %  ${how}`,
    );
  }
}
const svg = argument("svg");
if (svg !== undefined && rows.length > 0) {
  const chart = rows.map(({ model, heads, batch, keys, tflops, gbps, ms }): RooflinePoint => ({
    series: `${model} (${heads} heads)`,
    intensity: tflops * 1000 / gbps,
    tflops,
    label: `${model}, B ${batch}, Sk ${keys}: ${(1000 * ms).toFixed(1)} µs, ${gbps.toFixed(0)} GB/s, ${
      tflops.toFixed(1)
    } TFLOP/s`,
  }));
  const peak = Number(argument("peak") ?? (matrix ? 618 : 41.9));
  const subtitle = `${adapter}, ${engine}, ${dtype} cache in pages of ${pageSize}`;
  await Deno.writeTextFile(
    svg,
    roofline({ title: "Decoding under the roofline", subtitle, bandwidth, roofs: [{ tflops: peak }], points: chart }),
  );
}
console.log(`clock probe ${(await clockProbe(context))?.toFixed(4) ?? "none"} ms`);
if (Deno.args.includes("--json")) {
  console.log(
    JSON.stringify({ capabilities: context.capabilities, dtype, bandwidth, date: new Date().toISOString(), rows }),
  );
}
cache.dispose();
