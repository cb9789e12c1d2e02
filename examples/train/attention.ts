// Where the example uses the library: attention, and its gradients.

import type { HostInputs, MlaExecutor } from "../../mod.ts"; // in your project: "@flash-mla/webgpu"
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

/** How the library runs it. */
export interface AttentionOptions {
  readonly platform: "webgpu" | "reference";
  readonly executor?: MlaExecutor;
}

/** Attention as the library computes it. */
export function libraryAttention(_options: AttentionOptions): Attention {
  // Until mlaAttentionVjp is there: the reference itself.
  return (inputs) => {
    const problem = mlaProblem(inputs, { causal: true });
    const { output } = referenceMlaAttentionWithLse(inputs, problem);
    return Promise.resolve({
      output,
      vjp: (gradOutput: Tensor) =>
        Promise.resolve(referenceMlaAttentionBackward(inputs, problem, gradOutput) as AttentionGradients),
      dispose() {},
    });
  };
}
