// What a call costs beside its kernels: host arrays against tensors that stay on the GPU, and single calls against calls
// recorded into one submission. Configurations are the heuristic's, so that nothing is tuned.
//
//   deno task bench:residency          a table; FLASH_MLA_ENGINE=dawn for Dawn instead of Deno's own WebGPU
//   bun bench/residency.ts             the same in Bun
//   … --json                           and one JSON object in the last line
//
// "Kernels alone" is at the clock that this load leaves the card at; bench:kernels keeps the card busy and is the one to
// quote. On a software adapter the long shapes are left out.

import process from "node:process";
import {
  deviceCapabilities,
  encodeMlaAttention,
  flashMLA,
  type HostTensor,
  mlaAttention,
  type MlaCallOptions,
  type MlaInputs,
  openDevice,
  type OwnedGpuTensor,
  type Tensor,
  toGpu,
  toHost,
} from "../mod.ts";
import { toFloats, toHalves } from "../src/op/half.ts";
import { mapTensors, mlaProblem, outputShape } from "../src/op/mla_problem.ts";
import { relL2 } from "../tests/support/metrics.ts";
import { benchInputs, type BenchShape } from "./shapes.ts";

/** One line of the table: milliseconds of one call. */
interface Row {
  readonly shape: string;
  readonly dtype: "f32" | "f16" | null;
  readonly what: string;
  readonly medianMs: number;
  readonly minMs: number;
  readonly maxMs: number;
  readonly samples: number;
}

/** Times of one sample, by what was measured, in milliseconds of one call. */
type Sample = () => Promise<Readonly<Record<string, number>>>;

const callsPerSubmission = 8;
const wantedSamples = 31;
/** A line that takes longer stops at {@link fewestSamples}, so that the whole stays within a minute. */
const lineBudgetMs = 4000;
const fewestSamples = 5;

const v2Lite = { batch: 1, heads: 16, kvLoraRank: 512, qkNopeHeadDim: 128, qkRopeHeadDim: 64, vHeadDim: 128 };
const tiny = { batch: 1, heads: 2, kvLoraRank: 16, qkNopeHeadDim: 8, qkRopeHeadDim: 4, vHeadDim: 8 };
const ofLength = (
  name: string,
  length: number,
  heads: Omit<BenchShape, "name" | "queryLength" | "keyLength" | "causal">,
) => ({
  ...heads,
  name: `${name}, ${length} tokens`,
  queryLength: length,
  keyLength: length,
  causal: true,
});

const device = await openDevice();
const { adapter, engine, software, f16 } = await deviceCapabilities(device);
const rows: Row[] = [];
const failures: string[] = [];

/** Warms up, then takes samples; a line that fails is reported and leaves the others alone. */
async function measure(shape: string, dtype: Row["dtype"], sample: Sample): Promise<void> {
  const taken: Readonly<Record<string, number>>[] = [];
  try {
    const began = performance.now();
    // At least 5 calls and 0.2 s: the first calls compile, and a card that idled is slow.
    for (let i = 0; i < 5 || performance.now() < began + 200; i++) await sample();
    const deadline = performance.now() + lineBudgetMs;
    while (taken.length < wantedSamples && (taken.length < fewestSamples || performance.now() < deadline)) {
      taken.push(await sample());
    }
  } catch (error) {
    failures.push(`${shape}, ${dtype}: ${error instanceof Error ? error.message : error}`);
    return;
  }
  for (const what of Object.keys(taken[0])) {
    const sorted = taken.map((times) => times[what]).sort((a, b) => a - b);
    rows.push({
      shape,
      dtype,
      what,
      medianMs: sorted[Math.floor(sorted.length / 2)],
      minMs: sorted[0],
      maxMs: sorted[sorted.length - 1],
      samples: sorted.length,
    });
  }
}

async function elapsed(work: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await work();
  return performance.now() - start;
}

const done = () => device.queue.onSubmittedWorkDone();

/** Records calls into one submission and waits for its end. */
async function submission(calls: number, inputs: MlaInputs, options: MlaCallOptions<OwnedGpuTensor>) {
  const start = performance.now();
  const cpuStart = process.cpuUsage();
  const encoder = device.createCommandEncoder();
  const recorded = [];
  for (let i = 0; i < calls; i++) recorded.push(await encodeMlaAttention(encoder, inputs, options));
  const { user, system } = process.cpuUsage(cpuStart);
  const recording = performance.now() - start;
  device.queue.submit([encoder.finish()]);
  for (const call of recorded) call.dispose();
  await done();
  return {
    total: (performance.now() - start) / calls,
    recording: recording / calls,
    processor: (user + system) / 1000 / calls,
  };
}

async function measureShape(shape: BenchShape, dtype: "f32" | "f16", detailed: boolean): Promise<void> {
  console.error(`${shape.name}, ${dtype} …`);
  const stored = (tensor: Tensor): HostTensor => dtype === "f16" ? toHalves(tensor) : tensor;
  const host = mapTensors<Tensor, HostTensor>(benchInputs(shape), stored);
  const allocated: OwnedGpuTensor[] = [];
  const upload = async (tensor: HostTensor) => {
    const uploaded = await toGpu(tensor, device);
    allocated.push(uploaded);
    return uploaded;
  };
  const resident = {
    query: await upload(host.query),
    keyValue: await upload(host.keyValue),
    wKc: await upload(host.wKc),
    wVc: await upload(host.wVc),
    bK: await upload(host.bK!),
  };
  const results = outputShape(mlaProblem(host));
  const out = await upload(stored({ data: new Float32Array(results.reduce((a, b) => a * b)), shape: results }));

  const math = { device, causal: shape.causal, onEvent: () => {} };
  const cfg = flashMLA.heuristicCfg(await flashMLA.prepare({ inputs: resident, options: math }));
  const options = { ...math, cfg, out };

  await measure(shape.name, dtype, async () => ({
    "host arrays in and out": await elapsed(() => mlaAttention(host, { ...math, cfg })),
  }));
  await measure(shape.name, dtype, async () => {
    const start = performance.now();
    await mlaAttention(resident, options);
    const submitted = performance.now() - start;
    await done();
    return { "GPU tensors, to completion": performance.now() - start, "GPU tensors, until it is submitted": submitted };
  });
  const trial = await flashMLA.trial(await flashMLA.prepare({ inputs: resident, options }), cfg);
  await measure(
    shape.name,
    dtype,
    async () => ({ [`kernels alone, by ${trial.timingMethod}`]: await trial.time(8) / 8 }),
  );
  trial.dispose();
  if (detailed) {
    await measure(shape.name, dtype, async () => {
      const { total, recording } = await submission(1, resident, options);
      return { "recorded, 1 a submission, to completion": total, "recording it, 1 a submission": recording };
    });
    await measure(shape.name, dtype, async () => {
      const { total, recording, processor } = await submission(callsPerSubmission, resident, options);
      const many = `${callsPerSubmission} a submission`;
      return {
        [`recorded, ${many}, to completion`]: total,
        [`recording it, ${many}`]: recording,
        [`processor time of that, ${many}`]: processor,
      };
    });
  }
  compare(shape.name, dtype, await toHost(out), await mlaAttention(host, { ...math, cfg }));
  for (const tensor of allocated) tensor.dispose();
}

/** Times of wrong results are worth nothing: both ways ran the same kernels on the same inputs. */
function compare(shape: string, dtype: "f32" | "f16", resident: HostTensor, host: HostTensor): void {
  const difference = relL2(toFloats(resident).data, toFloats(host).data);
  if (!(difference < 1e-6)) {
    failures.push(`${shape}, ${dtype}: relL2 ${difference} between GPU tensors and host arrays`);
  }
}

function table(): void {
  const halves = f16 ? "" : "; no shader-f16: halves are converted to float32";
  console.log(`\n${adapter}, ${engine}${halves}. Milliseconds of one call, configurations by the heuristic.\n`);
  const number = (value: number) => value.toFixed(3).padStart(10);
  let group = "";
  for (const { shape, dtype, what, medianMs, minMs, maxMs, samples } of rows) {
    const title = dtype === null ? shape : `${shape}, ${dtype}`;
    if (title !== group) console.log(`${(group = title).padEnd(48)}    median       min       max   samples`);
    console.log(
      `  ${what.padEnd(44)}${number(medianMs)}${number(minMs)}${number(maxMs)}${String(samples).padStart(10)}`,
    );
  }
  for (const failure of failures) console.log(`FAILED ${failure}`);
}

await measure("the engine", null, async () => ({
  "a submission of nothing, to completion": await elapsed(async () => {
    device.queue.submit([device.createCommandEncoder().finish()]);
    await done();
  }),
}));
for (const dtype of ["f32", "f16"] as const) {
  for (const shape of [ofLength("tiny heads (2, L 16)", 8, tiny), ofLength("DeepSeek-V2-Lite", 64, v2Lite)]) {
    await measureShape(shape, dtype, true);
  }
  if (software) continue;
  for (const length of [512, 2048]) await measureShape(ofLength("DeepSeek-V2-Lite", length, v2Lite), dtype, false);
}
table();
if (process.argv.includes("--json")) {
  console.log(JSON.stringify({ engine, adapter, f16, date: new Date().toISOString(), rows, failures }));
}
device.destroy();
process.exitCode = failures.length === 0 ? 0 : 1;
