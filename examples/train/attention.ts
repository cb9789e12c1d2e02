// Where the example uses the library: attention, and its gradients.

import type { HostInputs } from "../../mod.ts"; // in your project: "@flash-mla/webgpu"
import { mlaProblem } from "../../src/op/mla_problem.ts";
import { referenceMlaAttentionWithLse } from "../../src/reference/mla_attention.ts";
import { referenceMlaAttentionBackward } from "../../src/reference/mla_attention_backward.ts";
import type { Tensor } from "../../mod.ts";

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
  readonly platform: "webgpu" | "reference";
  /** The device, in words. */
  readonly adapter: string;
}

/**
 * Attention as the library computes it.
 *
 * @param _asked Where to run; `auto` takes WebGPU where there is an adapter and the reference elsewhere.
 */
export function libraryAttention(_asked: "auto" | "webgpu" | "reference"): Promise<RunningAttention> {
  // Until mlaAttentionVjp is there: the reference itself.
  const attention: Attention = (inputs) => {
    const problem = mlaProblem(inputs, { causal: true });
    const { output } = referenceMlaAttentionWithLse(inputs, problem);
    return Promise.resolve({
      output,
      vjp: (gradOutput: Tensor) =>
        Promise.resolve(referenceMlaAttentionBackward(inputs, problem, gradOutput) as AttentionGradients),
      dispose() {},
    });
  };
  return Promise.resolve({ attention, platform: "reference", adapter: "this processor" });
}
