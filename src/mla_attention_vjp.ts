import { executorOf, flashMLA } from "./flash_mla.ts";
import type { MlaCallOptions } from "./mla_options.ts";
import type { AttentionState, LseLike } from "./op/attention_state.ts";
import type { MlaGradients } from "./op/mla_gradients.ts";
import type { MlaInputs } from "./op/mla_problem.ts";
import { privateCopy } from "./op/residuals.ts";
import type { AnyTensor, ResultLike } from "./op/tensor.ts";

/**
 * A call that was run, and the function that computes its gradients. The functions need no `this`.
 *
 * @typeParam Inputs The call's inputs.
 * @typeParam Output What the output is.
 */
export interface MlaVjp<Inputs extends MlaInputs = MlaInputs, Output extends AnyTensor = AnyTensor>
  extends AttentionState<Output, LseLike<Output>> {
  /**
   * Computes the gradients of `Σ output · gradOutput`. May be called any number of times, also at the same time, until
   * `dispose()`. Two runs on one device give the same bits.
   *
   * @param gradOutput The gradient of the output, `[batch, queryLength, queryHeads, vHeadDim]`, of any element type; on a
   * GPU or on the host, but for the platform `reference`.
   * @returns One gradient for each tensor of numbers among the inputs and options, like its tensor; those on a GPU are the
   * caller's to dispose of.
   * @throws {FlashMLAError} With code `invalid-input` when `gradOutput` does not have the output's shape, when a tensor on a GPU that
   * gradients are computed from was disposed of, or after `dispose()`; `limit` when the problem passes a limit of the device,
   * and `device` when that fails.
   */
  vjp(gradOutput: AnyTensor): Promise<MlaGradients<Inputs>>;
  /**
   * Lets go of the inputs and residuals; gradients under way are still computed. The output and the log-sum-exp stay the
   * caller's. Calling it twice does no harm.
   */
  dispose(): void;
  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void;
}

/**
 * Multi-head Latent Attention and its gradients, for training. Nothing of size queryLength × keyLength is kept: gradients
 * are computed from the inputs, the output and the log-sum-exp, which recompute the probabilities.
 *
 * The inputs' data must stay as they are until the last `vjp()`. On the host the output and the log-sum-exp may change: the
 * residuals hold copies of them, `batch · queryLength · queryHeads · (vHeadDim · element size + 4)` bytes, until
 * `dispose()` or until the result is collected. On a GPU the residuals are the output and the log-sum-exp themselves: leave
 * them unchanged, and dispose of them after the last `vjp()`; nothing else is held there.
 *
 * @param inputs The tensors, as for {@link mlaAttention}.
 * @param options The options, as for {@link mlaAttention}; `out` lies in no input's memory. Bias and sinks have gradients
 * too; with `dropout`, gradients are those of the probabilities that were kept.
 * @returns The output and the log-sum-exp as {@link mlaAttentionWithLse} gives them, and `vjp()`.
 * @throws {FlashMLAError} As {@link mlaAttention} does; and with code `invalid-input` when `out` lies in an input's memory.
 *
 * @example One step of gradient descent on the value weights
 * ```ts
 * import { mlaAttentionVjp } from "@flash-mla/webgpu";
 *
 * const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
 * const inputs = { query: ones(1, 8, 2, 16), keyValue: ones(1, 8, 4), wKc: ones(4, 2, 16), wVc: ones(4, 2, 32) };
 * const { output, vjp, dispose } = await mlaAttentionVjp(inputs, { causal: true, platform: "reference" });
 * // The loss is half the sum of squares, so that its gradient is the output itself.
 * const { wVc } = await vjp(output);
 * inputs.wVc.data.forEach((weight, i) => inputs.wVc.data[i] = weight - 0.001 * wVc.data[i]);
 * dispose();
 * console.log(wVc.shape); // [4, 2, 32]
 * ```
 */
export async function mlaAttentionVjp<
  Inputs extends MlaInputs,
  Out extends AnyTensor = ResultLike<Inputs["query"]>,
>(inputs: Inputs, options: MlaCallOptions<Out> = {}): Promise<MlaVjp<Inputs, Out>> {
  const call = { inputs, options };
  const { output, residuals, vjp, dispose } = await executorOf(options).vjp(flashMLA, call, { cfg: options?.cfg });
  const lse = privateCopy(residuals.lse) as LseLike<Out>;
  return {
    output: output as Out,
    lse,
    vjp: async (gradOutput) => await vjp(gradOutput) as unknown as MlaGradients<Inputs>,
    dispose,
    [Symbol.dispose]: dispose,
  };
}
