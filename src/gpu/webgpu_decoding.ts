// Caches and decoding on the platform "webgpu".

import type { AttentionState } from "../op/attention_state.ts";
import type { DecodeConfig } from "../op/decode_config.ts";
import {
  type CacheStore,
  type DecodeImplementation,
  type DecodeInputs,
  type DecodeTarget,
  namedTensors,
} from "../op/decode_implementation.ts";
import { type CacheLayout, decodedLseShape, decodedShape, type DecodeProblem } from "../op/decode_problem.ts";
import { FlashMLAError } from "../op/errors.ts";
import { toFloats, writeFloats } from "../op/half.ts";
import type { EncodedCall, MlaTrial } from "../op/implementation.ts";
import {
  type AnyTensor,
  denseStrides,
  dtypeOf,
  elementCount,
  type GpuTensor,
  isGpuTensor,
  type OwnedGpuTensor,
} from "../op/tensor.ts";
import { deviceFingerprint } from "./capabilities.ts";
import { candidateConfigs, whyInvalid } from "./decode_configs.ts";
import { prepareDecode } from "./decode_plan.ts";
import { type GpuContext, gpuContext } from "./device.ts";
import { allocated, toHost } from "./gpu_tensor.ts";
import type { KernelSteps } from "./kernel_steps.ts";
import { GpuLatentStore } from "./latent_store.ts";
import { clockProbe, timeOnGpu, timingMethod } from "./timing.ts";

/** Decoding in WGSL, on the process's own device or the caller's. */
export const webgpuDecoding: DecodeImplementation = {
  platform: "webgpu",
  backend: "gpu",
  open: async (device) => webgpuDecodeTarget(await gpuContext(device)),
};

/** Decoding on one open device. */
export function webgpuDecodeTarget(context: GpuContext): DecodeTarget {
  return new WebGpuDecodeTarget(context);
}

class WebGpuDecodeTarget implements DecodeTarget {
  readonly platform = "webgpu";
  readonly #context: GpuContext;

  constructor(context: GpuContext) {
    this.#context = context;
  }

  get description(): string {
    const { adapter, engine } = this.#context.capabilities;
    return `${adapter}, ${engine}`;
  }

  get fingerprint(): string {
    return deviceFingerprint(this.#context.capabilities);
  }

  createCache(layout: CacheLayout): Promise<CacheStore> {
    return GpuLatentStore.create(this.#context, layout);
  }

  whyInvalid(problem: DecodeProblem, cfg: DecodeConfig): string | null {
    return whyInvalid(cfg, problem, this.#context.capabilities);
  }

  heuristicCfg(problem: DecodeProblem): DecodeConfig {
    return candidateConfigs(problem, this.#context.capabilities)[0];
  }

  candidateCfgs(problem: DecodeProblem): readonly DecodeConfig[] {
    const nothing = problem.batch * problem.queryLength * problem.capacity === 0;
    return candidateConfigs(problem, this.#context.capabilities).slice(0, nothing ? 1 : undefined);
  }

  async run(
    problem: DecodeProblem,
    inputs: DecodeInputs,
    cfg: DecodeConfig,
    { out, withLse }: { readonly out?: AnyTensor; readonly withLse: boolean },
  ): Promise<AttentionState> {
    const resident = isGpuTensor(out ?? inputs.query);
    const { steps, output, lse, own } = await this.#prepare(
      problem,
      inputs,
      cfg,
      resident ? out : undefined,
      withLse,
      out,
    );
    try {
      await steps?.submit("decode", () => checkAlive(inputs, out));
      steps?.dispose();
    } catch (error) {
      steps?.dispose();
      for (const tensor of own) tensor.dispose();
      throw error;
    }
    if (resident) return { output: out ?? output, lse: lse! };
    try {
      const device = this.#context.device;
      const [result, sums] = await Promise.all([toHost(output, device), lse && toHost(lse, device)]);
      if (out !== undefined && !isGpuTensor(out) && out.dtype !== "bf16") writeFloats(out, toFloats(result).data);
      return { output: out ?? result, lse: sums! };
    } finally {
      for (const tensor of own) tensor.dispose();
    }
  }

  async encode(
    encoder: GPUCommandEncoder,
    problem: DecodeProblem,
    inputs: DecodeInputs,
    cfg: DecodeConfig,
    out?: GpuTensor,
  ): Promise<EncodedCall> {
    const { steps, output, own } = await this.#prepare(problem, inputs, cfg, out, false);
    try {
      await steps?.record(encoder, "record decoding", () => checkAlive(inputs, out));
      return { output, dispose: () => steps?.dispose() };
    } catch (error) {
      steps?.dispose();
      for (const tensor of own) tensor.dispose();
      throw error;
    }
  }

  async trial(problem: DecodeProblem, inputs: DecodeInputs, cfg: DecodeConfig): Promise<MlaTrial> {
    const timing = await timingMethod(this.#context);
    const { steps, output, own } = await this.#prepare(problem, inputs, cfg, undefined, false);
    return {
      timingMethod: timing,
      output: async () => {
        await steps?.submit("decode");
        return toFloats(await toHost(output, this.#context.device));
      },
      time: (repeats) =>
        timeOnGpu(this.#context, (encoder, timestampWrites) => steps?.encode(encoder, { timestampWrites }), repeats),
      dispose() {
        steps?.dispose();
        for (const tensor of own) tensor.dispose();
      },
    };
  }

  probe(): Promise<number | null> {
    return clockProbe(this.#context);
  }

  /** Allocates what takes the results, as far as the caller does not give it, and binds the kernels. */
  async #prepare(
    problem: DecodeProblem,
    inputs: DecodeInputs,
    cfg: DecodeConfig,
    given: AnyTensor | undefined,
    withLse: boolean,
    like: AnyTensor = given ?? inputs.query,
  ): Promise<{
    readonly steps: KernelSteps | null;
    readonly output: GpuTensor;
    readonly lse?: GpuTensor;
    readonly own: readonly OwnedGpuTensor[];
  }> {
    const out = given as GpuTensor | undefined;
    if (out !== undefined) checkOut(out, inputs);
    const own: OwnedGpuTensor[] = [];
    const allocate = async (shape: readonly number[], dtype: "f32" | "f16") => {
      const tensor = await allocated(this.#context, shape, dtype);
      own.push(tensor);
      return tensor;
    };
    try {
      const output = out ?? await allocate(decodedShape(problem), dtypeOf(like) === "f16" ? "f16" : "f32");
      const lse = withLse ? await allocate(decodedLseShape(problem), "f32") : undefined;
      const steps = elementCount(output.shape) === 0
        ? null
        : await prepareDecode(this.#context, problem, inputs, cfg, { output, lse });
      return { steps, output, lse, own };
    } catch (error) {
      for (const tensor of own) tensor.dispose();
      throw error;
    }
  }
}

/** Throws unless a result can be written there while the inputs are read. */
function checkOut(out: GpuTensor, inputs: DecodeInputs): void {
  const refuse = (why: string): never => {
    throw new FlashMLAError("invalid-input", `Cannot decode: out ${why}`);
  };
  const dense = denseStrides(out.shape);
  if (out.strides?.some((stride, axis) => stride !== dense[axis] && out.shape[axis] > 1)) {
    refuse(`has strides [${out.strides}], expected a dense tensor: [${dense}]`);
  }
  if ((out.offset ?? 0) % 4 !== 0) refuse(`begins at byte ${out.offset} of its buffer, expected a multiple of 4`);
  const { cache } = inputs;
  const buffers = namedTensors(inputs).flatMap(([name, tensor]) =>
    "buffer" in tensor ? [[name, tensor.buffer as GPUBuffer] as const] : []
  );
  if (cache instanceof GpuLatentStore) {
    buffers.push(...cache.shards.map(({ buffer }) => ["the cache", buffer] as const));
  }
  for (const [name, buffer] of buffers) {
    if (buffer === out.buffer) {
      refuse(`lies in the buffer of ${name}; WebGPU does not let a kernel read and write one buffer`);
    }
  }
}

/** Throws when a tensor was disposed of while the call was under way. */
function checkAlive(inputs: DecodeInputs, out?: AnyTensor): void {
  for (const [name, tensor] of namedTensors(inputs, out)) {
    if (!("buffer" in tensor) || (tensor as { disposed?: boolean }).disposed !== true) continue;
    throw new FlashMLAError(
      "invalid-input",
      `Cannot decode: ${name} was disposed of while the call was under way; await the call first`,
    );
  }
}
