// Whole attention layers on this machine's adapter, as models have them: a prompt of 2,048 tokens, and one token at 8,192
// cached ones. Each kernel is timed by itself, in the call's own memory, and beside the time that its bytes and FLOPs need.
//
//   deno task bench:layer                             on Dawn with matrix units: FLASH_MLA_ENGINE=dawn in front
//   deno task bench:layer --only="V3, decode"         calls whose name has these words
//   deno task bench:layer --f32                       weights and cache of float32
//   deno task bench:layer --plain                     without matrix units where there are some
//   deno task bench:layer --batch=32                  sequences that decode together
//   deno task bench:layer --peak=618 --bandwidth=2980 what the device can do: TFLOP/s, GB/s of a copy
//   deno task bench:layer --json=FILE                 writes the figures there
//   deno task bench:layer --tiny                      small layers and short sequences, to see that it runs
//
// The floor of a kernel is max(bytes / bandwidth, FLOPs / peak), that of a layer the sum over its kernels; a share is floor /
// time. A layer is timed as all its dispatches in one pass, again and again. "calls in a row" is what a program takes that runs
// layer after layer, the host's work and the kernels side by side.

import { type HostTensor, MlaAttention, mlaModelConfig, openDevice, presets, toGpu } from "../mod.ts";
import { readEnvironment } from "../src/environment.ts";
import { type GpuContext, gpuContext } from "../src/gpu/device.ts";
import { subgroupMatrixFeature } from "../src/gpu/request_device.ts";
import { settled } from "../src/gpu/settled.ts";
import { timingMethod } from "../src/gpu/timing.ts";
import { weightShapes } from "../src/layer/layer_weights.ts";
import type { Formulation } from "../src/op/formulation.ts";
import { floatToHalf } from "../src/op/half.ts";
import { elementCount } from "../src/op/tensor.ts";
import { median } from "../src/tune/clock_probe.ts";
import { normals } from "../tests/support/random_problem.ts";
import { layerCosts } from "./layer_costs.ts";
import { recorded } from "./recorded_dispatches.ts";
import { measureSteadily } from "./steady_timing.ts";

const argument = (name: string) => Deno.args.find((given) => given.startsWith(`--${name}=`))?.slice(name.length + 3);
const has = (name: string) => Deno.args.includes(`--${name}`);
const onDawn = readEnvironment("FLASH_MLA_ENGINE") === "dawn";
const context = await opened();
const { adapter, engine, matrixUnits, software } = context.capabilities;
const dtype = has("f32") ? "f32" : "f16";
const elementBytes = dtype === "f32" ? 4 : 2;
const tiny = has("tiny") || software;
const units = matrixUnits !== null && dtype === "f16";
const bandwidth = Number(argument("bandwidth") ?? 2980);
// An H100's, of design.md: matrix units, and register loops of float32 under Dawn and under wgpu.
const peak = Number(argument("peak") ?? (units ? 618 : onDawn ? 63.6 : 41.9));
const batch = Number(argument("batch") ?? 1);
const only = argument("only") ?? "";
console.log(
  `${adapter}, ${engine}, ${dtype}, ${units ? "" : "no "}matrix units, timed by ${await timingMethod(context)}`,
);
console.log(`floors by ${bandwidth} GB/s and ${peak} TFLOP/s`);

/** Dawn's matrix units where there are some, unless plain kernels are asked for. */
async function opened(): Promise<GpuContext> {
  if (!onDawn || has("plain")) return await gpuContext();
  try {
    return await gpuContext(await openDevice({ engine: "dawn", features: [subgroupMatrixFeature] }));
  } catch {
    return await gpuContext();
  }
}

interface Kernel {
  readonly label: string;
  readonly us: number;
  readonly spread: number;
  /** Null where nothing is said of its least work. */
  readonly floorUs: number | null;
}

interface Row {
  readonly name: string;
  readonly formulation: Formulation;
  readonly us: number;
  readonly spread: number;
  readonly floorUs: number;
  /** What a call takes until it returns: the work on the host, and the engine's. */
  readonly hostUs: number;
  /** What each of many calls takes, one submitted after another, and the last waited for. */
  readonly rowUs: number;
  /** What a call takes that is waited for until its kernels have run. */
  readonly waitedUs: number;
  readonly kernels: readonly Kernel[];
}

const models = [["V2-Lite", presets.deepseekV2Lite.config], ["V3", presets.deepseekV3.config]] as const;
const small = {
  hidden_size: 256,
  num_attention_heads: 4,
  kv_lora_rank: 64,
  qk_nope_head_dim: 32,
  qk_rope_head_dim: 16,
  v_head_dim: 32,
};
const [promptTokens, cachedTokens, chunk] = tiny ? [64, 128, 64] : [2048, 8192, 2048];
/** Calls that are timed one after another: of short ones as many as make the runtime compile its own code. */
const callsOf = (tokens: number) => tiny ? 3 : tokens === 1 ? 300 : 20;

/** Random elements, a block of them again and again: drawing each of 187 million takes longer than all the rest. */
function repeated(shape: readonly number[], scale: number, seed: number): HostTensor {
  const random = normals(seed);
  const values = Float32Array.from({ length: 65_521 }, () => random() * scale);
  const count = elementCount(shape);
  const block = dtype === "f16" ? Uint16Array.from(values, floatToHalf) : values;
  const data = dtype === "f16" ? new Uint16Array(count) : new Float32Array(count);
  for (let at = 0; at < count; at += block.length) data.set(block.subarray(0, Math.min(block.length, count - at)), at);
  return { data, shape, dtype } as HostTensor;
}

async function load(file: Readonly<Record<string, unknown>>): Promise<MlaAttention> {
  const config = mlaModelConfig(tiny ? { ...file, ...small, q_lora_rank: file.q_lora_rank && 96 } : file);
  const weights = Object.entries(weightShapes(config)).map(([name, shape], i): [string, HostTensor] => [
    name,
    shape.length === 1
      ? { data: new Float32Array(shape[0]).fill(1), shape }
      : repeated(shape, 1 / Math.sqrt(shape[1]), i),
  ]);
  return await MlaAttention.load(config, new Map(weights), { device: context.device, dtype });
}

/** Measures one call by kernel. */
async function measure(name: string, layer: MlaAttention, work: { tokens: number; before: number }): Promise<Row> {
  const { tokens, before } = work;
  const { hiddenSize } = layer.config;
  const calls = callsOf(tokens);
  using cache = await layer.createCache({ batch, length: before === 0 ? tokens : before + (7 + 2 * calls) * tokens });
  const states = async (length: number, seed: number) =>
    await toGpu({ ...repeated([batch, length, hiddenSize], 1, seed) } as HostTensor, context.device);
  for (let filled = 0; filled < before;) {
    const length = Math.min(chunk, before - filled);
    using input = await states(length, filled);
    (await layer.forward(input, { cache })).dispose();
    filled += length;
  }
  using input = await states(tokens, 7);
  const forward = async () => {
    // A prompt is the first of its sequence each time.
    if (before === 0) cache.reset();
    return await layer.forward(input, { cache });
  };
  // Compiled, and with all memory in the pool, before it is watched.
  (await forward()).dispose();
  const caught = await recorded(context, async () => (await forward()).dispose());
  const labels = [...new Set(caught.dispatches.map(({ label }) => label))];
  const formulation = labels.includes("expandKeys") ? "expanded" : "absorbed";
  const keys = before === 0 ? tokens : before + 2 * tokens;
  const costs = layerCosts({ config: layer.config, batch, tokens, keys, elementBytes, formulation });
  const kernels: Kernel[] = [];
  for (const label of labels) {
    const [ms, spread] = await measureSteadily(context, caught.time((dispatch) => dispatch.label === label), 20, 5);
    const cost = costs[label];
    const floorUs = cost ? Math.max(cost.bytes / bandwidth / 1e3, cost.flops / peak / 1e6) : null;
    kernels.push({ label, us: 1000 * ms, spread, floorUs });
  }
  const [ms, spread] = await measureSteadily(context, caught.time(), 50, 7);
  caught.dispose();
  const { queue } = context.device;
  const hosts: number[] = [];
  const done = () => settled(context.device, queue.onSubmittedWorkDone());
  for (let i = 0; i < calls; i++) (await forward()).dispose();
  await done();
  const started = performance.now();
  for (let i = 0; i < calls; i++) {
    const start = performance.now();
    (await forward()).dispose();
    hosts.push(performance.now() - start);
  }
  await done();
  const rowUs = 1000 * (performance.now() - started) / calls;
  const waits: number[] = [];
  for (let i = 0; i < 5; i++) {
    const start = performance.now();
    const output = await forward();
    await done();
    waits.push(performance.now() - start);
    output.dispose();
  }
  const [hostUs, waitedUs] = [1000 * median(hosts), 1000 * median(waits)];
  const floorUs = kernels.reduce((sum, { floorUs }) => sum + (floorUs ?? 0), 0);
  return { name, formulation, us: 1000 * ms, spread, floorUs, hostUs, rowUs, waitedUs, kernels };
}

function print({ name, formulation, us, spread, floorUs, hostUs, rowUs, waitedUs, kernels }: Row): void {
  const line = (label: string, time: number, floor: number | null, spread: number) =>
    `  ${label.padEnd(18)} ${time.toFixed(1).padStart(10)} µs ` +
    (floor === null ? "" : `floor ${floor.toFixed(1).padStart(8)} µs, ${(100 * floor / time).toFixed(0).padStart(3)} %`)
      .padEnd(26) +
    ` ±${(50 * spread).toFixed(1)} %`;
  console.log(`\n${name}, ${formulation}`);
  for (const kernel of kernels) console.log(line(kernel.label, kernel.us, kernel.floorUs, kernel.spread));
  console.log(line("layer", us, floorUs, spread));
  const plain = (label: string, time: number) => `  ${label.padEnd(18)} ${time.toFixed(1).padStart(10)} µs`;
  console.log(plain("host of a call", hostUs));
  console.log(plain("calls in a row", rowUs));
  console.log(plain("a call waited for", waitedUs));
}

const rows: Row[] = [];
for (const [model, file] of models) {
  const points = [
    { name: `${model}, prefill ${promptTokens}`, tokens: promptTokens, before: 0 },
    { name: `${model}, decode at ${cachedTokens}, B ${batch}`, tokens: 1, before: cachedTokens - 2 },
  ].filter(({ name }) => name.includes(only));
  if (points.length === 0) continue;
  using layer = await load(file);
  for (const point of points) {
    const row = await measure(point.name, layer, point);
    rows.push(row);
    print(row);
  }
}
const file = argument("json");
if (file !== undefined) {
  const date = new Date().toISOString();
  const figures = { capabilities: context.capabilities, dtype, bandwidth, peak, tiny, date, rows };
  await Deno.writeTextFile(file, `${JSON.stringify(figures, null, 2)}\n`);
}
