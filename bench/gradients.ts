// The gradients' kernels on this machine's adapter, one by one and all together, under each backward tile.
//
//   deno task bench:gradients                     a table for each shape and tile
//   deno task bench:gradients --f16               tensors of halves
//   deno task bench:gradients --f16 --matrix      on matrix units (Dawn), and how far that is from the plain kernels
//   deno task bench:gradients --only="S 4096"     shapes whose name has these words
//   deno task bench:gradients --tiles=64,128      the tiles to measure
//   deno task bench:gradients --json              and one JSON object in the last line
//
// FLOPs are those of the operation, of visible (query, key, head) triples only: 2·(2·(P+R) + V) for ∂query and
// 2·(2·(P+R) + 2·V) for ∂K and ∂V, scores counted in both, as both compute them; 2·rows·L·heads·width for each GEMM.

import { flashMLA, type FlashMLAConfig, type MlaCall, openDevice, toFloats, toHalves } from "../mod.ts";
import { allocateSums, backwardPieces, preparePiece } from "../src/gpu/backward_call.ts";
import { whyBackwardInvalid } from "../src/gpu/backward_plan.ts";
import { ownCall } from "../src/gpu/call_memory.ts";
import { gpuContext } from "../src/gpu/device.ts";
import { subgroupMatrixFeature } from "../src/gpu/request_device.ts";
import { clockProbe, timingMethod } from "../src/gpu/timing.ts";
import { webgpuTarget } from "../src/gpu/webgpu_implementation.ts";
import { mapTensors, type MlaInputs, type MlaProblem } from "../src/op/mla_problem.ts";
import type { AnyTensor, HostTensor, Tensor } from "../src/op/tensor.ts";
import { relL2 } from "../tests/support/metrics.ts";
import { tuningGradOutput } from "../src/op/tuning_grad_output.ts";
import { argument } from "./arguments.ts";
import { attentionShapes, benchInputs, type BenchShape } from "./shapes.ts";
import { measureSteadily, type Timed } from "./steady_timing.ts";
import { expansionFlops, visibleTriples } from "./work.ts";

const matrix = Deno.args.includes("--matrix");
const context = await gpuContext(matrix ? await openDevice({ features: [subgroupMatrixFeature] }) : undefined);
const quick = context.capabilities.software;
const half = Deno.args.includes("--f16");
const only = argument("only") ?? (quick ? "S 512" : "V2-Lite, B 1, S");
const tiles = (argument("tiles") ?? (quick ? "32" : "128,64")).split(",").map(Number);
const method = await timingMethod(context);
const { adapter, engine } = context.capabilities;
console.log(`${adapter}, ${engine}, ${half ? "f16" : "f32"}, timed by ${method}`);

/** FLOPs of each kernel that has many. */
function flopsOf(problem: MlaProblem): Record<string, number> {
  const { qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = problem;
  const triples = visibleTriples(problem);
  const gemm = (width: number) => expansionFlops(problem, width);
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

/** Median milliseconds and relative spread. */
const measure = (time: Timed) => measureSteadily(context, time, 40, 9);

/** relL2 of output and gradients under one configuration from those under another. */
async function distances(
  problem: MlaProblem,
  inputs: MlaInputs,
  cfgs: readonly FlashMLAConfig[],
  gradOutput: AnyTensor,
): Promise<Record<string, number>> {
  const target = webgpuTarget(context);
  const [got, expected] = await Promise.all(cfgs.map(async (cfg) => {
    const saved = await target.runWithLse(problem, inputs, cfg);
    return { output: saved.output, ...await target.backward(problem, inputs, cfg, saved, gradOutput) };
  })) as Record<string, HostTensor>[];
  const of = (name: string) => relL2(toFloats(got[name]).data, toFloats(expected[name]).data);
  return Object.fromEntries(Object.keys(got).map((name) => [name, of(name)]));
}

interface Row {
  readonly shape: string;
  readonly gradBlock: number;
  readonly compileMs: number;
  readonly forwardMs: number;
  readonly forwardAndBackwardMs: number;
  readonly spread: number;
  readonly backwardMs: number;
  /** relL2 from the plain kernels, on matrix units. */
  readonly distances: Readonly<Record<string, number>>;
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
    const [ms] = await measure((repeats) => prepared.time(repeats, [name]));
    kernels[name] = { ms, tflops: flops[name] === undefined ? null : flops[name] / ms / 1e9 };
  }
  const [backwardMs] = await measure((repeats) => prepared.time(repeats));
  dispose();
  mapTensors(gradients, (sum) => (sum.dispose(), sum));
  const trial = await target.trial(problem, inputs, cfg, { backward: true });
  const [forwardAndBackwardMs, spread] = await measure((repeats) => trial.time(repeats));
  trial.dispose();
  const forward = await target.trial(problem, inputs, cfg);
  const [forwardMs] = await measure((repeats) => forward.time(repeats));
  forward.dispose();
  const plain = target.candidateCfgs(problem).find(({ matrixUnits }) => !matrixUnits)!;
  return {
    ...{ shape: shape.name, gradBlock, compileMs, forwardMs, forwardAndBackwardMs, spread, backwardMs, kernels },
    distances: cfg.matrixUnits ? await distances(problem, inputs, [cfg, plain], gradOutput) : {},
  };
}

const rows: Row[] = [];
for (const shape of attentionShapes(quick).filter(({ name }) => name.includes(only))) {
  for (const gradBlock of tiles) {
    const measured = await row(shape, gradBlock);
    if (measured === null) continue;
    rows.push(measured);
    const { compileMs, forwardMs, backwardMs, forwardAndBackwardMs, spread, kernels, distances } = measured;
    console.log(
      `\n${shape.name}, tile ${gradBlock}: forward ${forwardMs.toFixed(3)} ms, backward ${backwardMs.toFixed(3)} ms, ` +
        `forward and backward ${forwardAndBackwardMs.toFixed(3)} ms (spread ${
          (spread * 100).toFixed(1)
        } %), backward ` +
        `compiled in ${(compileMs / 1000).toFixed(1)} s`,
    );
    const apart = Object.entries(distances).map(([name, distance]) => `${name} ${distance.toExponential(1)}`);
    if (apart.length > 0) console.log(`  relL2 from the plain kernels: ${apart.join(", ")}`);
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
