// The gradients' kernels on this machine's adapter, one by one and all together, under each backward tile.
//
//   deno task bench:gradients                     a table for each shape and tile
//   deno task bench:gradients --f16               tensors of halves
//   deno task bench:gradients --only="S 4096"     shapes whose name has these words
//   deno task bench:gradients --tiles=64,128      the tiles to measure
//   deno task bench:gradients --json              and one JSON object in the last line
//
// FLOPs are those of the operation, of visible (query, key, head) triples only: 2·(2·(P+R) + V) for ∂query and
// 2·(2·(P+R) + 2·V) for ∂K and ∂V, scores counted in both, as both compute them; 2·rows·L·heads·width for each GEMM.

import { flashMLA, type MlaCall, toHalves } from "../mod.ts";
import { allocateSums, backwardPieces, preparePiece } from "../src/gpu/backward_call.ts";
import { whyBackwardInvalid } from "../src/gpu/backward_plan.ts";
import { ownCall } from "../src/gpu/call_memory.ts";
import { gpuContext } from "../src/gpu/device.ts";
import { clockProbe, timingMethod } from "../src/gpu/timing.ts";
import { webgpuTarget } from "../src/gpu/webgpu_implementation.ts";
import { mapTensors, type MlaProblem } from "../src/op/mla_problem.ts";
import { segments, visibleKeys } from "../src/op/segments.ts";
import type { HostTensor, Tensor } from "../src/op/tensor.ts";
import { tuningGradOutput } from "../src/op/tuning_grad_output.ts";
import { attentionShapes, benchInputs, type BenchShape } from "./shapes.ts";

const context = await gpuContext();
const quick = context.capabilities.software;
const argument = (name: string) => Deno.args.find((given) => given.startsWith(`--${name}=`))?.slice(name.length + 3);
const half = Deno.args.includes("--f16");
const only = argument("only") ?? (quick ? "S 512" : "V2-Lite, B 1, S");
const tiles = (argument("tiles") ?? (quick ? "32" : "128,64")).split(",").map(Number);
const method = await timingMethod(context);
const { adapter, engine } = context.capabilities;
console.log(`${adapter}, ${engine}, ${half ? "f16" : "f32"}, timed by ${method}`);

/** Visible (query, key) pairs, times query heads. */
function visibleTriples(problem: MlaProblem): number {
  let pairs = 0;
  for (const segment of segments(problem)) {
    for (let row = segment.queryStart; row < segment.queryEnd; row++) {
      const { start, end } = visibleKeys(segment, row, problem);
      pairs += end - start;
    }
  }
  return pairs * problem.queryHeads;
}

/** FLOPs of each kernel that has many. */
function flopsOf(problem: MlaProblem): Record<string, number> {
  const { batch, keyLength, kvHeads, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = problem;
  const triples = visibleTriples(problem);
  const gemm = (width: number) => 2 * batch * keyLength * L * kvHeads * width;
  return {
    expandKeys: gemm(P),
    expandValues: gemm(V),
    query: 2 * triples * (2 * (P + R) + V),
    keys: 2 * triples * (2 * (P + R) + 2 * V),
    latentsFromKeys: gemm(P),
    latentsFromValues: gemm(V),
    weightsFromKeys: gemm(P),
    weightsFromValues: gemm(V),
  };
}

type Timed = (repeats: number) => Promise<number>;

/** Keeps the device busy until its clock is steady: a card that idled needs seconds of load to reach full speed. */
async function warmUp(time: Timed, repeats: number): Promise<void> {
  if (quick) return;
  let [steady, fastest] = [0, Infinity];
  const deadline = performance.now() + 8000;
  while (steady < 5 && performance.now() < deadline) {
    await time(4 * repeats);
    const probe = await clockProbe(context) ?? 0;
    steady = probe > 0.98 * fastest ? steady + 1 : 0;
    fastest = Math.min(fastest, probe);
  }
}

/** Median milliseconds at a steady clock. */
async function measure(time: Timed): Promise<number> {
  await time(1);
  const repeats = Math.max(1, Math.ceil((quick ? 1 : 40) / await time(1)));
  await warmUp(time, repeats);
  const samples: number[] = [];
  for (let i = 0; i < (quick ? 3 : 9); i++) samples.push(await time(repeats) / repeats);
  return samples.sort((a, b) => a - b)[Math.floor(samples.length / 2)];
}

interface Row {
  readonly shape: string;
  readonly gradBlock: number;
  readonly compileMs: number;
  readonly forwardAndBackwardMs: number;
  readonly backwardMs: number;
  readonly kernels: Readonly<Record<string, { readonly ms: number; readonly tflops: number | null }>>;
}

async function row(shape: BenchShape, gradBlock: number): Promise<Row | null> {
  const floats = benchInputs(shape);
  const host = half ? mapTensors<Tensor, HostTensor>(floats, toHalves) : floats;
  const { causal, slidingWindow } = shape;
  const call: MlaCall = { inputs: host, options: { causal, slidingWindow, platform: "webgpu" } };
  const { problem, inputs } = await flashMLA.prepare(call);
  const target = webgpuTarget(context);
  const cfg = { ...target.heuristicCfg(problem), gradBlock };
  const why = whyBackwardInvalid(cfg, problem, context.capabilities);
  if (why !== null) {
    console.log(`${shape.name}: ${why}`);
    return null;
  }
  const saved = await target.runWithLse(problem, inputs, cfg);
  const gradFloats = tuningGradOutput(problem);
  const gradOutput = half ? toHalves(gradFloats) : gradFloats;
  const gradients = await allocateSums(context, inputs);
  const [piece] = backwardPieces(context, problem, inputs, { ...saved, gradOutput, gradients });
  context.pipelines.clear();
  const start = performance.now();
  const { prepared, dispose } = await preparePiece(context, piece, cfg, async (make) => ownCall(await make()));
  await prepared.submit();
  const compileMs = performance.now() - start;
  const flops = flopsOf(problem);
  const kernels: Record<string, { ms: number; tflops: number | null }> = {};
  for (const name of prepared.kernelNames) {
    const ms = await measure((repeats) => prepared.time(repeats, [name]));
    kernels[name] = { ms, tflops: flops[name] === undefined ? null : flops[name] / ms / 1e9 };
  }
  const backwardMs = await measure((repeats) => prepared.time(repeats));
  dispose();
  mapTensors(gradients, (sum) => (sum.dispose(), sum));
  const trial = await target.trial(problem, inputs, cfg, { backward: true });
  const forwardAndBackwardMs = await measure((repeats) => trial.time(repeats));
  trial.dispose();
  return { shape: shape.name, gradBlock, compileMs, forwardAndBackwardMs, backwardMs, kernels };
}

const rows: Row[] = [];
for (const shape of attentionShapes(quick).filter(({ name }) => name.includes(only))) {
  for (const gradBlock of tiles) {
    const measured = await row(shape, gradBlock);
    if (measured === null) continue;
    rows.push(measured);
    const { compileMs, backwardMs, forwardAndBackwardMs, kernels } = measured;
    console.log(
      `\n${shape.name}, tile ${gradBlock}: backward ${backwardMs.toFixed(3)} ms, forward and backward ` +
        `${forwardAndBackwardMs.toFixed(3)} ms, compiled in ${(compileMs / 1000).toFixed(1)} s`,
    );
    for (const [name, { ms, tflops }] of Object.entries(kernels)) {
      console.log(`  ${name.padEnd(20)} ${ms.toFixed(3).padStart(9)} ms ${tflops?.toFixed(1).padStart(8) ?? ""}`);
    }
  }
}
console.log(`clock probe ${(await clockProbe(context))?.toFixed(4) ?? "none"} ms`);
if (Deno.args.includes("--json")) {
  console.log(JSON.stringify({
    capabilities: context.capabilities,
    dtype: half ? "f16" : "f32",
    timing: method,
    date: new Date().toISOString(),
    rows,
  }));
}
