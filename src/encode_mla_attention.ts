import { executorOf, flashMLA, MlaInvocation } from "./flash_mla.ts";
import type { MlaCallOptions } from "./mla_options.ts";
import { FlashMLAError } from "./op/errors.ts";
import type { MlaInputs } from "./op/mla_problem.ts";
import { type GpuTensor, isGpuTensor, kindOf, type OwnedGpuTensor } from "./op/tensor.ts";

/** A call recorded into an encoder of the caller's. */
export interface EncodedAttention<Out extends GpuTensor = OwnedGpuTensor> {
  /**
   * The result, once the encoder's commands have run: `options.out`, or a tensor that the caller disposes of on its own.
   */
  readonly output: Out;
  /** Gives back what the recorded commands need. Call it when they were submitted, or never will be. */
  dispose(): void;
  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void;
}

/**
 * Records Multi-head Latent Attention into a caller's encoder, so that a whole layer is one submission. Nothing is submitted
 * and nothing is read back; the first call for a kind of shape may tune, which submits work of its own before.
 *
 * The encoder must be of the device that the tensors name, or `options.device`, or the process's own. Engines notice an
 * encoder of another device only at its `finish()`.
 *
 * @param encoder The encoder, outside any pass.
 * @param inputs The tensors; those on the host are uploaded at once.
 * @param options As for `mlaAttention`; `out` lies on the GPU.
 * @returns The result and what to dispose of after the submission. Calls recorded into one encoder share their scratch.
 * @throws {FlashMLAError} As `mlaAttention` does; and with code `invalid-input` when `encoder` or `out` is of the wrong kind.
 *
 * @example
 * ```ts ignore
 * const encoder = device.createCommandEncoder();
 * const call = await encodeMlaAttention(encoder, inputs, { device, causal: true, out });
 * device.queue.submit([encoder.finish()]);
 * call.dispose();
 * ```
 */
export async function encodeMlaAttention<Out extends GpuTensor = OwnedGpuTensor>(
  encoder: GPUCommandEncoder,
  inputs: MlaInputs,
  options: MlaCallOptions<Out> = {},
): Promise<EncodedAttention<Out>> {
  const refuse = (why: string): never => {
    throw new FlashMLAError("invalid-input", `Cannot record MLA: ${why}`);
  };
  if (typeof encoder?.beginComputePass !== "function") {
    refuse(`encoder must be a GPUCommandEncoder, got ${kindOf(encoder)}`);
  }
  if (typeof options !== "object" || options === null) refuse(`options must be an object, got ${kindOf(options)}`);
  const given = options.out;
  if (given !== undefined && (typeof given !== "object" || given === null || !isGpuTensor(given))) {
    refuse(
      `out must lie on the GPU: expected { buffer, shape, dtype }, got ${
        given && "data" in given ? "a host tensor" : kindOf(given)
      }`,
    );
  }
  const executor = executorOf(options);
  const call = { inputs, options: { ...options, platform: options?.platform ?? "webgpu" } };
  const { invocation, choice } = await executor.prepare(flashMLA, call, { cfg: options?.cfg });
  if (!(invocation instanceof MlaInvocation) || invocation.target.encode === undefined) {
    return refuse(`platform "${call.options.platform}" has nothing to record; use "webgpu"`);
  }
  const { target, problem, out } = invocation;
  const { output, dispose } = await target.encode!(
    encoder,
    problem,
    invocation.inputs,
    choice.cfg,
    out as GpuTensor | undefined,
  );
  return { output: (given ?? output) as Out, dispose, [Symbol.dispose]: dispose };
}
