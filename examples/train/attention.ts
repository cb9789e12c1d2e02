// Where the example uses the library: attention, and its gradients.

import {
  ConfigSelectorChain,
  detectPlatform,
  Executor,
  flashMLA,
  type HostInputs,
  mlaAttentionVjp,
  type MlaExecutor,
  type Platform,
  type Tensor,
} from "../../mod.ts"; // in your project: "@flash-mla/webgpu"

/** The gradients of attention's inputs, each of its input's shape. */
export interface AttentionGradients {
  readonly query: Tensor;
  readonly keyValue: Tensor;
  readonly wKc: Tensor;
  readonly wVc: Tensor;
  readonly bK?: Tensor;
}

/** One run of causal attention, which can be gone back through until it is disposed of. */
export interface Attended {
  /** `[batch, length, heads, vHeadDim]`. */
  readonly output: Tensor;
  /** The gradients of the inputs for ∂output. */
  vjp(gradOutput: Tensor): Promise<AttentionGradients>;
  /** Frees what {@link vjp} needs. */
  dispose(): void;
}

/** Causal Multi-head Latent Attention. */
export type Attention = (inputs: HostInputs) => Promise<Attended>;

/** Attention, and where it runs. */
export interface RunningAttention {
  readonly attention: Attention;
  readonly platform: Platform;
  /** The device, in words. */
  readonly adapter: string;
}

/**
 * Attention as the library computes it.
 *
 * @param asked Where to run; `auto` takes WebGPU where there is an adapter and the reference elsewhere.
 */
export async function libraryAttention(asked: "auto" | "webgpu" | "reference"): Promise<RunningAttention> {
  // Without measuring: that is worth its time where the same kernels run for hours.
  const executor: MlaExecutor = new Executor(new ConfigSelectorChain({ policy: { cacheMissFallback: "heuristics" } }));
  const platform = await detectPlatform("flash_mla", asked);
  const options = { causal: true, platform, executor };
  const { target } = await flashMLA.prepare({ inputs: oneToken(), options });
  return { attention: (inputs) => mlaAttentionVjp(inputs, options), platform, adapter: target.description };
}

/** The least that attention can be asked for, to ask where it would run. */
function oneToken(): HostInputs {
  const zeros = (...shape: number[]) => ({ data: new Float32Array(1), shape });
  return { query: zeros(1, 1, 1, 1), keyValue: zeros(1, 1, 1), wKc: zeros(1, 1, 1), wVc: zeros(1, 1, 1) };
}
