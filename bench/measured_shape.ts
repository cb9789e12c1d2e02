// All rows of one shape: each path's configuration chosen, its first call taken on a device of its own, and its steps timed
// in turns with those of the other paths.

import { type MlaInputs, type MlaInvocation, toGpu, type Tuner } from "../mod.ts";
import type { GpuContext } from "../src/gpu/device.ts";
import { mapTensors } from "../src/op/mla_problem.ts";
import type { HostTensor, OwnedGpuTensor } from "../src/op/tensor.ts";
import { type BenchRow, type Chosen, figures, type RowName } from "./bench_row.ts";
import type { Ceilings } from "./ceilings.ts";
import { type FirstCall, measureFirstCall } from "./first_call.ts";
import { sampleInterleaved } from "./interleaved.ts";
import { type KernelPath, PathKernel } from "./kernel_path.ts";
import { prepareForward } from "./prepared_forward.ts";
import { benchInputs, type BenchShape } from "./shapes.ts";
import type { Timed } from "./steady_timing.ts";
import { workOf, type WorkStep } from "./work.ts";

/** How rows are measured. */
export interface Measuring {
  readonly context: GpuContext;
  readonly ceilings: Ceilings;
  /** Chooses configurations; the heuristic's when null. */
  readonly tuner: Tuner | null;
  /** The whole calls to measure of a shape and path: `forward`, `forward+backward`. */
  readonly calls: (shape: BenchShape, path: KernelPath) => readonly ("forward" | "forward+backward")[];
}

/** A step that is ready to be timed. */
interface ReadyStep {
  readonly name: RowName;
  readonly path: KernelPath;
  readonly invocation: MlaInvocation;
  readonly chosen: Chosen;
  readonly time: Timed;
  /** Of whole calls. */
  readonly first?: FirstCall;
  readonly driverKnewKernels?: boolean;
}

/** Milliseconds of a sample: long beside the pauses of 10 ms in which Deno waits for its end, and the card slows down. */
const sampleMs = 30;

const rounds = 7;

/** Measures a shape. A path that fails gives a row that says why. */
export async function measureShape(
  measuring: Measuring,
  shape: BenchShape,
  paths: readonly KernelPath[],
): Promise<BenchRow[]> {
  const { context, ceilings, calls } = measuring;
  const ready: ReadyStep[] = [];
  const rows: BenchRow[] = [];
  const held: { dispose(): void }[] = [];
  const uploaded = new Map<string, Promise<MlaInputs>>();
  const inputsOf = (dtype: "f32" | "f16") => {
    const found = uploaded.get(dtype) ?? upload(context, benchInputs(shape, dtype), held);
    uploaded.set(dtype, found);
    return found;
  };
  try {
    for (const path of paths) {
      for (const call of calls(shape, path)) {
        try {
          ready.push(...await prepareCall(measuring, shape, path, call, await inputsOf(path.dtype), held));
        } catch (error) {
          rows.push({ shape: shape.name, path: path.name, step: call, error: messageOf(error) });
        }
      }
    }
    const sampled = await sampleInterleaved(context, ready.map(({ time }) => time), { sampleMs, rounds });
    ready.forEach(({ name, path, invocation, chosen, first, driverKnewKernels }, i) => {
      const samples = sampled[i];
      if (samples instanceof Error) {
        rows.push({ ...name, error: messageOf(samples) });
        return;
      }
      const work = workOf(name.step, invocation.problem, path.dtype === "f16" ? 2 : 4);
      const measured = figures(name, path, samples, work, ceilings);
      rows.push({ ...measured, ...chosen, ...(first && { first, driverKnewKernels }) });
    });
    return rows;
  } finally {
    for (const part of held.splice(0).reverse()) part.dispose();
  }
}

async function prepareCall(
  { context, tuner }: Measuring,
  shape: BenchShape,
  path: KernelPath,
  call: "forward" | "forward+backward",
  inputs: MlaInputs,
  held: { dispose(): void }[],
): Promise<ReadyStep[]> {
  const backward = call === "forward+backward";
  const kernel = new PathKernel(path);
  const { causal, slidingWindow } = shape;
  const invocation = await kernel.prepare({ inputs, options: { causal, slidingWindow, platform: "webgpu" } });
  const { problem, target } = invocation;
  const guess = kernel.heuristicCfg(invocation);
  const firstCall = (cfg: Chosen["cfg"]) => measureFirstCall(problem, inputs, path.dtype, cfg, backward);
  // Before the tuner compiles anything: the driver would remember.
  let first = await firstCall(guess);
  let chosen: Chosen = { cfg: guess, chosenBy: "heuristic", miscomputed: [] };
  let driverKnewKernels = false;
  if (tuner !== null) {
    chosen = await kernel.tuned(invocation, tuner, backward);
    if (JSON.stringify(chosen.cfg) !== JSON.stringify(guess)) {
      first = await firstCall(chosen.cfg);
      driverKnewKernels = true;
    }
  }
  const whole = { path, invocation, chosen, first, driverKnewKernels };
  const name = (step: WorkStep): RowName => ({ shape: shape.name, path: path.name, step });
  if (backward) {
    const trial = await target.trial(problem, inputs, chosen.cfg, { backward: true });
    held.push(trial);
    return [{ ...whole, name: name(call), time: (repeats) => trial.time(repeats) }];
  }
  const { prepared, dispose } = await prepareForward(context, problem, inputs, chosen.cfg, path.dtype);
  held.push({ dispose });
  // All that begins with this expands: keys, values, and on matrix units rotary keys.
  const [expand, attend] = [true, false].map((wanted) =>
    prepared.kernelNames.filter((kernel) => kernel.startsWith("expand") === wanted)
  );
  const part = (step: WorkStep, kernels: readonly string[]): ReadyStep => ({
    ...{ path, invocation, chosen, name: name(step) },
    time: (repeats) => prepared.time(repeats, kernels),
  });
  // Attention alone works on keys and values of a run before.
  await prepared.submit();
  return [
    ...expand.length === 0 ? [] : [part("expand", expand)],
    part("attend", attend),
    { ...whole, name: name(call), time: (repeats) => prepared.time(repeats) },
  ];
}

/** The inputs on the GPU, to be disposed of with the rest. */
async function upload(context: GpuContext, inputs: MlaInputs, held: { dispose(): void }[]): Promise<MlaInputs> {
  const tensors: Promise<[string, OwnedGpuTensor]>[] = [];
  mapTensors(inputs, (tensor, name) => {
    tensors.push(
      toGpu(tensor as HostTensor, context.device).then((made) => {
        held.push(made);
        return [name, made];
      }),
    );
    return tensor;
  });
  return { ...inputs, ...Object.fromEntries(await Promise.all(tensors)) };
}

/** What went wrong, in one line. */
function messageOf(error: unknown): string {
  const message = error instanceof Error ? error.message : String(error);
  return message.replaceAll(/\s+/g, " ").slice(0, 300);
}
