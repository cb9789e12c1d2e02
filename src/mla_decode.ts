import { PersistentCache } from "./cache/persistent_cache.ts";
import { type MlaDecodeExecutor, mlaDecodeKernel, prepared } from "./decode_kernel.ts";
import { cannotDecode, type MlaDecodeInputs, type MlaDecodeOptions } from "./decode_options.ts";
import type { AttentionState, LseLike } from "./op/attention_state.ts";
import type { DecodeConfig } from "./op/decode_config.ts";
import {
  type AnyTensor,
  type GpuTensor,
  isGpuTensor,
  kindOf,
  type OwnedGpuTensor,
  type ResultLike,
} from "./op/tensor.ts";
import { Executor } from "./tune/executor.ts";
import { ConfigSelectorChain } from "./tune/selector_chain.ts";
import { Tuner } from "./tune/tuner.ts";

let shared: MlaDecodeExecutor | null = null;

/**
 * The executor of calls that bring none: it measures once per kind of shape and remembers in the persistent cache
 * "mla_decode".
 *
 * @returns The same executor every time.
 */
export function defaultDecodeExecutor(): MlaDecodeExecutor {
  return shared ??= new Executor(
    new ConfigSelectorChain({
      tuner: new Tuner({ warmup: 5, iters: 100 }),
      persistent: new PersistentCache<DecodeConfig>("mla_decode"),
    }),
  );
}

function executorOf(options: MlaDecodeOptions | undefined): MlaDecodeExecutor {
  const executor = options?.executor ?? defaultDecodeExecutor();
  if (typeof executor.run === "function" && typeof executor.prepare === "function") return executor;
  return cannotDecode(`executor must be an Executor, got ${kindOf(executor)}`);
}

/**
 * Attention of new tokens over a cache of latents, as generating needs it: with the weights absorbed, so that each latent row
 * is read once for a whole block of heads, and nothing of the cache is expanded.
 *
 * ```text
 * score = softmaxScale · ((q_nope·wKc)·c + q_rope·k_rope)     output = (softmax(score)·c)·wVc
 * ```
 *
 * Lengths count the query's own tokens, which were appended before. The last token of a sequence stands on its last key; a
 * sequence without keys gives zero rows. What lies behind a sequence's keys, in its last page or in its row of the table, may
 * hold anything.
 *
 * Tensors may lie on the host or on the cache's GPU; the result is like the query.
 *
 * @param inputs The tensors and the cache; see {@link MlaDecodeInputs}.
 * @param options Mask, scale, configuration, and the tensor that takes the result.
 * @returns The result, `[batch, queryLength, queryHeads, vHeadDim]`, or `[…, kvLoraRank]` with an absorbed query: a new tensor
 * like the query, or `options.out`.
 * @throws {FlashMLAError} When something does not fit or a page is not one of the cache's (`invalid-input`), the
 * configuration cannot run (`invalid-config`), the problem passes a limit (`limit`), or the device fails (`device`).
 *
 * @example Two sequences of different lengths in a tensor without pages
 * ```ts
 * import { mlaDecode } from "@flash-mla/webgpu";
 *
 * const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
 * const output = await mlaDecode({
 *   query: ones(2, 1, 3, 8 + 4),
 *   cache: ones(2, 10, 16 + 4),
 *   seqLens: [10, 7],
 *   wKc: ones(16, 3, 8),
 *   wVc: ones(16, 3, 6),
 * }, { platform: "reference" });
 * console.log(output.shape, output.data[0]); // [2, 1, 3, 6] 16
 * ```
 */
export async function mlaDecode<Query extends AnyTensor, Out extends AnyTensor = ResultLike<Query>>(
  inputs: MlaDecodeInputs<Query>,
  options: MlaDecodeOptions<Out> = {},
): Promise<Out> {
  return await executorOf(options).run(mlaDecodeKernel, { inputs, options }, { cfg: options?.cfg }) as Out;
}

/**
 * The same with the log-sum-exp of each row, to be merged with attention over other keys by `mergeAttentionStates`.
 *
 * @param inputs The tensors, as for {@link mlaDecode}.
 * @param options The options, as for {@link mlaDecode}.
 * @returns The result, and the log-sum-exp `[batch, queryHeads, queryLength]` in float32 on its side; −∞ for a row that sees
 * no key.
 * @throws {FlashMLAError} As {@link mlaDecode} does.
 *
 * @example
 * ```ts
 * import { mlaDecodeWithLse } from "@flash-mla/webgpu";
 *
 * const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
 * const { output, lse } = await mlaDecodeWithLse(
 *   { query: ones(1, 1, 2, 20), cache: ones(1, 8, 20) },
 *   { kvLoraRank: 16, softmaxScale: 1, platform: "reference" },
 * );
 * console.log(output.shape, lse.shape, lse.data[0] - 20); // [1, 1, 2, 16] [1, 2, 1] log 8
 * ```
 */
export async function mlaDecodeWithLse<Query extends AnyTensor, Out extends AnyTensor = ResultLike<Query>>(
  inputs: MlaDecodeInputs<Query>,
  options: MlaDecodeOptions<Out> = {},
): Promise<AttentionState<Out, LseLike<Out>>> {
  const { invocation, choice } = await executorOf(options).prepare(mlaDecodeKernel, { inputs, options }, {
    cfg: options?.cfg,
  });
  return await mlaDecodeKernel.runWithLse(invocation, choice.cfg) as AttentionState<Out, LseLike<Out>>;
}

/** A call recorded into an encoder of the caller's. */
export interface EncodedDecode<Out extends GpuTensor = OwnedGpuTensor> {
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
 * Records {@link mlaDecode} into a caller's encoder, behind a `LatentCache.encodeAppend` or whatever else. Nothing is
 * submitted and nothing is read back; the first call for a kind of shape may tune, which submits work of its own before.
 *
 * @param encoder The encoder, outside any pass, of the cache's device.
 * @param inputs The tensors; those on the host are uploaded at once.
 * @param options As for {@link mlaDecode}; `out` lies on the GPU.
 * @returns The result and what to dispose of after the submission.
 * @throws {FlashMLAError} As {@link mlaDecode} does; and with code `invalid-input` when `encoder` or `out` is of the wrong
 * kind.
 */
export async function encodeMlaDecode<Out extends GpuTensor = OwnedGpuTensor>(
  encoder: GPUCommandEncoder,
  inputs: MlaDecodeInputs,
  options: MlaDecodeOptions<Out> = {},
): Promise<EncodedDecode<Out>> {
  if (typeof encoder?.beginComputePass !== "function") {
    cannotDecode(`encoder must be a GPUCommandEncoder, got ${kindOf(encoder)}`);
  }
  const given = options?.out;
  if (given !== undefined && !isGpuTensor<AnyTensor>(given)) cannotDecode("out must lie on the GPU, got a host tensor");
  const call = { inputs, options: { ...options, platform: options?.platform ?? "webgpu" } };
  const { invocation, choice } = await executorOf(options).prepare(mlaDecodeKernel, call, { cfg: options?.cfg });
  const { target, problem, inputs: held, out } = prepared(invocation);
  if (target.encode === undefined) {
    return cannotDecode(`platform "${target.platform}" has nothing to record; use "webgpu"`);
  }
  mlaDecodeKernel.checkCfg(invocation, choice.cfg);
  const { output, dispose } = await target.encode(encoder, problem, held, choice.cfg, out as GpuTensor | undefined);
  return { output: (given ?? output) as Out, dispose, [Symbol.dispose]: dispose };
}
