// What a process's first call costs beyond the kernels' own time: on a device of its own, so that nothing is compiled yet.
// The driver may know the kernels all the same, from this process or from an earlier one: NVIDIA's keeps them on disk unless
// __GL_SHADER_DISK_CACHE=0.

import { emptyOnGpu, type FlashMLAConfig, type GpuTensor, type MlaInputs, type MlaProblem } from "../mod.ts";
import { type GpuContext, unlessLost } from "../src/gpu/device.ts";
import { PipelineCache } from "../src/gpu/pipelines.ts";
import { settled } from "../src/gpu/settled.ts";
import { webgpuTarget } from "../src/gpu/webgpu_implementation.ts";
import { outputShape, type TensorName, tensorNames } from "../src/op/mla_problem.ts";
import { openBenchDevice } from "./bench_device.ts";

/** What a first call took. */
export interface FirstCall {
  /** Milliseconds from the first kernel that began to compile to the last one that was ready. */
  readonly compileMs: number;
  /** Milliseconds of the whole call, tensors on the GPU, until its result is there. */
  readonly firstCallMs: number;
}

/** Compiles as ever, and knows how long that took. Kernels compile side by side, as far as the engine lets them. */
class TimedPipelines extends PipelineCache {
  #began = Infinity;
  #ended = -Infinity;

  /** Milliseconds from the first beginning to the last end. */
  get elapsedMs(): number {
    return Math.max(0, this.#ended - this.#began);
  }

  override async get(label: string, code: string): Promise<GPUComputePipeline> {
    this.#began = Math.min(this.#began, performance.now());
    try {
      return await super.get(label, code);
    } finally {
      this.#ended = Math.max(this.#ended, performance.now());
    }
  }
}

/**
 * Runs a call for the first time on a new device.
 *
 * @param problem The call's dimensions.
 * @param inputs The call's tensors, of which only the shapes are used: the new device's are full of zeros.
 * @param dtype Their element type.
 * @param cfg The configuration.
 * @param backward Whether the gradients are computed too.
 */
export async function measureFirstCall(
  problem: MlaProblem,
  inputs: MlaInputs,
  dtype: "f32" | "f16",
  cfg: FlashMLAConfig,
  backward: boolean,
): Promise<FirstCall> {
  const opened = await openBenchDevice();
  const { device } = opened;
  try {
    const pipelines = new TimedPipelines(device);
    const context: GpuContext = { ...opened, pipelines };
    const target = webgpuTarget(context);
    const tensors: Partial<Record<TensorName, GpuTensor>> = {};
    for (const name of tensorNames) {
      const tensor = inputs[name];
      if (tensor !== undefined) tensors[name] = await emptyOnGpu(tensor.shape, { dtype, device });
    }
    const call = { ...inputs, ...tensors };
    const gradOutput = backward ? await emptyOnGpu(outputShape(problem), { dtype, device }) : null;
    const done = () => settled(device, device.queue.onSubmittedWorkDone());
    await done();
    return await unlessLost(context, async () => {
      const start = performance.now();
      if (gradOutput === null) {
        await target.run(problem, call, cfg);
      } else {
        const saved = await target.runWithLse(problem, call, cfg);
        await target.backward(problem, call, cfg, saved, gradOutput);
      }
      await done();
      return { compileMs: pipelines.elapsedMs, firstCallMs: performance.now() - start };
    });
  } finally {
    device.destroy();
  }
}
