// The kernels alone on this machine's adapter: time, TFLOP/s and the configuration that the tuner chose.
//
//   deno task bench:kernels            a table
//   deno task bench:kernels --json     and one JSON object in the last line
//   deno task bench:kernels --f16      tensors of halves
//   deno task bench:kernels --only="S 2048"   shapes whose name has these words
//
// FLOPs are those of the operation: 2·rows·L·heads·(P+V) for the expansion, 2·(P+R+V) per visible (query, key, head) for
// the attention; work on masked or padded elements is not counted.

import { flashMLA, type FlashMLAConfig, type MlaCall, type MlaInvocation } from "../mod.ts";
import { gpuContext } from "../src/gpu/device.ts";
import type { PreparedAttention } from "../src/gpu/prepared_attention.ts";
import { clockProbe, timingMethod } from "../src/gpu/timing.ts";
import { Tuner } from "../src/tune/tuner.ts";
import { argument, flag } from "./arguments.ts";
import { prepareForward } from "./prepared_forward.ts";
import { attentionShapes, benchInputs, type BenchShape } from "./shapes.ts";
import { measureSteadily } from "./steady_timing.ts";
import { workOf } from "./work.ts";

interface Row {
  readonly shape: string;
  readonly config: FlashMLAConfig;
  readonly compileMs: number;
  readonly expandMs: number;
  readonly expandTflops: number;
  readonly attendMs: number;
  readonly attendTflops: number;
  readonly spread: number;
}

const context = await gpuContext();
const method = await timingMethod(context);
const quick = context.capabilities.software;
const half = flag("f16");
const only = argument("only") ?? "";
console.log(
  `${context.capabilities.adapter}, ${context.capabilities.engine}, ${half ? "f16" : "f32"}, timed by ${method}`,
);
const tuner = new Tuner({ totalBudgetMs: 20_000 });

/** Median milliseconds of some of the kernels, and relative spread. */
function measure(prepared: PreparedAttention, only: readonly string[]): Promise<[ms: number, spread: number]> {
  return measureSteadily(context, (repeats) => prepared.time(repeats, only), 50, 11);
}

async function row(shape: BenchShape): Promise<Row> {
  const inputs = benchInputs(shape, half ? "f16" : "f32");
  const { causal, slidingWindow } = shape;
  const call: MlaCall = { inputs, options: { causal, slidingWindow, platform: "webgpu" } };
  const invocation: MlaInvocation = await flashMLA.prepare(call);
  const { problem } = invocation;
  const candidates = flashMLA.candidateCfgs(invocation);
  const { cfg } = await tuner.tune(flashMLA, invocation, candidates, undefined, { validateBackward: false });
  context.pipelines.clear();
  const start = performance.now();
  const { prepared, dispose } = await prepareForward(context, problem, inputs, cfg, half ? "f16" : "f32");
  await prepared.output();
  const compileMs = performance.now() - start;
  const [expandMs] = await measure(prepared, ["expandKeys", "expandValues"]);
  const [attendMs, spread] = await measure(prepared, ["attend"]);
  dispose();
  return {
    shape: shape.name,
    config: cfg,
    compileMs,
    expandMs,
    expandTflops: workOf("expand", problem, 4).flops / expandMs / 1e9,
    attendMs,
    attendTflops: workOf("attend", problem, 4).flops / attendMs / 1e9,
    spread,
  };
}

const rows: Row[] = [];
for (const shape of attentionShapes(quick).filter(({ name }) => name.includes(only))) rows.push(await row(shape));

const digits = (value: number, n = 2) => value.toFixed(n).padStart(8);
console.log(`${"shape".padEnd(44)} expand ms  TFLOP/s attend ms  TFLOP/s   spread  compile  config`);
for (const { shape, config, compileMs, expandMs, expandTflops, attendMs, attendTflops, spread } of rows) {
  const { blockQ, blockK, numWarps, rowsPerThread, numStages, blockDepth, probKeys, expandBlock } = config;
  console.log(
    shape.padEnd(44) + digits(expandMs, 3) + digits(expandTflops) + digits(attendMs, 3) + digits(attendTflops) +
      digits(spread * 100, 1) + "%" + digits(compileMs / 1000) + "s  " +
      `${blockQ}×${blockK} ${numWarps}w${rowsPerThread} ${numStages}×${blockDepth} p${probKeys} e${expandBlock}` +
      `${config.subgroups ? " shuffled" : ""}`,
  );
}
console.log(`clock probe ${(await clockProbe(context))?.toFixed(4) ?? "none"} ms`);
if (flag("json")) {
  console.log(
    JSON.stringify({
      capabilities: context.capabilities,
      dtype: half ? "f16" : "f32",
      timing: method,
      date: new Date().toISOString(),
      rows,
    }),
  );
}
