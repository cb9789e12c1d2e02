import { executorOf, flashMLA } from "./flash_mla.ts";
import type { MlaCallOptions } from "./mla_options.ts";
import type { AttentionState, LseLike } from "./op/attention_state.ts";
import type { MlaInputs } from "./op/mla_problem.ts";
import type { AnyTensor, ResultLike } from "./op/tensor.ts";

/**
 * Multi-head Latent Attention with the log-sum-exp of each row: what it takes to join attention over some keys with
 * attention over others, by {@link mergeAttentionStates}.
 *
 * ```text
 * lse = log( Σ_j exp(score_j) + Σ_n exp(sink_n) )          the natural logarithm; −∞ for a row that sees no key
 * ```
 *
 * @param inputs The tensors, as for {@link mlaAttention}.
 * @param options The options, as for {@link mlaAttention}.
 * @returns The output, `[batch, queryLength, queryHeads, vHeadDim]`, as {@link mlaAttention} gives it, and the log-sum-exp,
 * `[batch, queryHeads, queryLength]` in float32, on the output's side: on the host, or on the GPU as a tensor that the
 * caller disposes of.
 * @throws {FlashMLAError} As {@link mlaAttention} does.
 *
 * @example Eight tokens, two heads
 * ```ts
 * import { mlaAttentionWithLse } from "@flash-mla/webgpu";
 *
 * const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
 * const { output, lse } = await mlaAttentionWithLse({
 *   query: ones(1, 8, 2, 16),
 *   keyValue: ones(1, 8, 4),
 *   wKc: ones(4, 2, 16),
 *   wVc: ones(4, 2, 32),
 * }, { causal: true, platform: "reference" });
 * console.log(output.shape, lse.shape); // [1, 8, 2, 32] [1, 2, 8]
 * console.log(lse.data[7] - lse.data[0]); // log 8: the last query sees eight equal keys, the first sees one
 * ```
 */
export async function mlaAttentionWithLse<Query extends AnyTensor, Out extends AnyTensor = ResultLike<Query>>(
  inputs: MlaInputs<AnyTensor, Query>,
  options: MlaCallOptions<Out> = {},
): Promise<AttentionState<Out, LseLike<Out>>> {
  const { invocation, choice } = await executorOf(options).prepare(flashMLA, { inputs, options }, {
    cfg: options?.cfg,
  });
  return await flashMLA.runWithLse(invocation, choice.cfg) as AttentionState<Out, LseLike<Out>>;
}
