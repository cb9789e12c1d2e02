// Decoding as a kernel with configurations: where caches, op, registry and tuning meet.

import { PersistentCache } from "./cache/persistent_cache.ts";
import { decodeRegistry } from "./decode_platforms.ts";
import { asTensor, insideOf, LatentCache } from "./latent_cache.ts";
import { outputsAgree } from "./op/agreement.ts";
import type { AttentionState, LseLike } from "./op/attention_state.ts";
import type { DecodeConfig } from "./op/decode_config.ts";
import type { DecodeInputs, DecodeTarget } from "./op/decode_implementation.ts";
import {
  checkPages,
  decodedShape,
  type DecodeMathOptions,
  type DecodeProblem,
  decodeProblem,
  type DecodeTensors,
  tensorLayout,
} from "./op/decode_problem.ts";
import { FlashMLAError } from "./op/errors.ts";
import type { MlaTrial } from "./op/implementation.ts";
import { type AnyIndexTensor, isGpuIndex } from "./op/index_tensor.ts";
import { ceilPowerOfTwo } from "./op/length_bucket.ts";
import type { MlaEvent } from "./op/mla_event.ts";
import { holdTensor } from "./op/mla_problem.ts";
import { canonicalPlatform, type Platform } from "./op/platform.ts";
import { reach } from "./op/segments.ts";
import {
  type AnyTensor,
  checkTensor,
  dtypeOf,
  type GpuTensor,
  isGpuTensor,
  kindOf,
  overlaps,
  type OwnedGpuTensor,
  type ResultLike,
} from "./op/tensor.ts";
import { readIndices } from "./gpu/index_readback.ts";
import { detectPlatform } from "./platforms.ts";
import { Executor } from "./tune/executor.ts";
import { Invocation, type InvocationInit } from "./tune/invocation.ts";
import { Kernel, type OutputCheck } from "./tune/kernel.ts";
import { ConfigSelectorChain } from "./tune/selector_chain.ts";
import { Tuner } from "./tune/tuner.ts";

/**
 * The tensors of one call of {@link mlaDecode}.
 *
 * @typeParam Query What the query is: the result is like it.
 */
export interface MlaDecodeInputs<Query extends AnyTensor = AnyTensor> extends DecodeTensors<Query> {
  /**
   * Queries, `[batch, queryLength, queryHeads, qkNopeHeadDim + qkRopeHeadDim]` with the weights. Without them the query was
   * absorbed before: `[…, kvLoraRank + qkRopeHeadDim]`, its first part multiplied by wKc.
   */
  readonly query: Query;
  /** The cache, or one tensor `[sequences, keyLength, kvLoraRank + qkRopeHeadDim]` without pages. */
  readonly cache: LatentCache | AnyTensor;
  /** Key expansion weights, `[kvLoraRank, kvHeads, qkNopeHeadDim]`. */
  readonly wKc?: AnyTensor;
  /** Value expansion weights, `[kvLoraRank, kvHeads, vHeadDim]`. */
  readonly wVc?: AnyTensor;
  /** Page numbers of each sequence, `[sequences, maxPages]`; entries past a sequence's last page may hold anything. */
  readonly blockTable?: AnyIndexTensor;
  /** Keys of each sequence, those of the query's own tokens among them. All of the cache when absent without pages. */
  readonly seqLens?: DecodeTensors["seqLens"];
  /** Offsets `[sequences + 1]` of the queries of sequences packed along the sequence axis of batch 1. */
  readonly cuSeqlens?: DecodeTensors["cuSeqlens"];
}

/** The options of one call of {@link mlaDecode}. */
export interface MlaDecodeOptions<Out extends AnyTensor = AnyTensor> extends DecodeMathOptions {
  /** Where to run, with a tensor for a cache; a `LatentCache` says it itself. */
  readonly platform?: Platform | "auto";
  /** A configuration for this call only; chosen by the executor's chain when absent. */
  readonly cfg?: DecodeConfig;
  /** What chooses the configuration; {@link defaultDecodeExecutor} when absent. */
  readonly executor?: MlaDecodeExecutor;
  /** The WebGPU device; that of the cache or the tensors, or the process's own, when absent. */
  readonly device?: GPUDevice;
  /** Hears of what the call's user may want to know. */
  readonly onEvent?: (event: MlaEvent) => void;
  /**
   * Whether block tables and lengths that lie on a GPU are read back and checked, which waits for the device. Default
   * `false`.
   */
  readonly checkIndices?: boolean;
  /**
   * The tensor that takes the result, `[batch, queryLength, queryHeads, vHeadDim]`, or `[…, kvLoraRank]` with an absorbed
   * query; dense, in float32 or halves. When absent, the result is a new tensor like the query.
   */
  readonly out?: Out;
}

/** One call. */
export interface MlaDecodeCall {
  /** The tensors. */
  readonly inputs: MlaDecodeInputs;
  /** The options. */
  readonly options?: MlaDecodeOptions;
}

/** An executor of {@link MlaDecode}. */
export type MlaDecodeExecutor = Executor<MlaDecodeCall, DecodeConfig, AnyTensor>;

/** A validated call with the target that it was resolved to. */
export class MlaDecodeInvocation extends Invocation<MlaDecodeCall> {
  /** The call's tensors as they were when the call was made. */
  readonly inputs: DecodeInputs;
  /** The call's dimensions. */
  readonly problem: DecodeProblem;
  /** Where it will run. */
  readonly target: DecodeTarget;
  /** What takes the result, if the caller gave it. */
  readonly out: AnyTensor | undefined;

  /**
   * Made by {@link MlaDecode.prepare}.
   *
   * @param init What identifies the call.
   * @param inputs The call's tensors.
   * @param problem The call's dimensions.
   * @param target Where it will run.
   * @param out What takes the result, if the caller gave it.
   */
  constructor(
    init: InvocationInit<MlaDecodeCall>,
    inputs: DecodeInputs,
    problem: DecodeProblem,
    target: DecodeTarget,
    out?: AnyTensor,
  ) {
    super(init);
    this.inputs = inputs;
    this.problem = problem;
    this.target = target;
    this.out = out;
  }
}

function fail(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot decode: ${why}`);
}

const knownOptions = [
  ...["softmaxScale", "causal", "logitsSoftCap", "slidingWindow", "softmaxAux", "kvLoraRank", "splitKeys"],
  ...["platform", "cfg", "executor", "device", "onEvent", "checkIndices", "out"],
];

function checkOptions(options: MlaDecodeOptions): void {
  if (typeof options !== "object" || options === null) fail(`options must be an object, got ${kindOf(options)}`);
  for (const name of Object.keys(options)) {
    if (!knownOptions.includes(name)) fail(`unknown option "${name}"; known are ${knownOptions.join(", ")}`);
  }
  const { device, cfg, onEvent } = options;
  if (onEvent !== undefined && typeof onEvent !== "function") {
    fail(`onEvent must be a function, got ${kindOf(onEvent)}`);
  }
  if (device !== undefined && typeof device?.createBuffer !== "function") {
    fail(`device must be a GPUDevice, got ${kindOf(device)}`);
  }
  if (cfg !== undefined && (typeof cfg !== "object" || cfg === null)) {
    fail(`cfg must be a DecodeConfig, got ${kindOf(cfg)}`);
  }
}

function checkOut(out: AnyTensor, problem: DecodeProblem): void {
  checkTensor("out", out);
  const expected = decodedShape(problem);
  if (out.shape.join() !== expected.join()) fail(`out has shape [${out.shape}], the result has [${expected}]`);
  if (dtypeOf(out) === "bf16") fail('out has dtype "bf16", expected "f32" or "f16"');
  if (isGpuTensor(out) && overlaps(out)) {
    fail(`out has strides [${out.strides}], which may give two elements one place`);
  }
}

/** Absorbed attention over a paged cache, as a {@link Kernel}. */
export class MlaDecode extends Kernel<MlaDecodeCall, DecodeConfig, AnyTensor> {
  /** Operation name, part of every cache key. */
  readonly opId = "mla_decode";
  /** Raised when old measurements stop being valid. */
  readonly version = "1";

  /**
   * Validates a call and finds its target.
   *
   * @param call The call.
   * @returns The call with its keys, its dimensions and its target.
   * @throws {FlashMLAError} When the call is malformed or its platform is not to be had.
   */
  override async prepare(call: MlaDecodeCall): Promise<MlaDecodeInvocation> {
    const { inputs, options = {} } = call;
    if (typeof inputs !== "object" || inputs === null) {
      fail(`inputs must be an object of tensors, got ${kindOf(inputs)}`);
    }
    checkOptions(options);
    const { cache } = inputs;
    const paged = cache instanceof LatentCache ? insideOf(cache) : null;
    const problem = decodeProblem(
      inputs,
      paged === null ? tensorLayout(cache as AnyTensor, inputs) : {
        ...paged.layout,
        width: paged.layout.kvLoraRank + paged.layout.qkRopeHeadDim,
      },
      options,
    );
    if (options.out !== undefined) checkOut(options.out, problem);
    const { blockTable } = inputs;
    const seqLens = inputs.seqLens === undefined ? asTensor(problem.seqLens!) : heldIndex(asTensor(inputs.seqLens));
    if (paged !== null) {
      const holders = (page: number) => paged.allocator.holders(page);
      if (problem.seqLens !== null && !isGpuIndex(blockTable!)) {
        checkPages(blockTable!, problem.seqLens, paged.layout, holders);
      } else if (options.checkIndices === true) {
        await checkGpuIndices(problem, blockTable!, seqLens, holders, options.device ?? paged.store.device);
      }
    } else if (problem.seqLens === null && options.checkIndices === true) {
      await checkGpuIndices(problem, null, seqLens, () => 1, options.device);
    }
    const held: DecodeInputs = {
      query: holdTensor(inputs.query),
      cache: paged === null ? holdTensor(cache as AnyTensor) : paged.store,
      ...(inputs.wKc && { wKc: holdTensor(inputs.wKc), wVc: holdTensor(inputs.wVc!) }),
      ...(options.softmaxAux && { softmaxAux: holdTensor(options.softmaxAux) }),
      ...(blockTable && { blockTable: heldIndex(blockTable) }),
      seqLens,
    };
    const out = options.out && holdTensor(options.out);
    const target = paged?.target ?? await targetOf(held, options, out);
    checkSameDevice(held, options, out, paged?.store.device);
    return new MlaDecodeInvocation(
      {
        opId: this.opId,
        version: this.version,
        call,
        device: target.fingerprint,
        signature: signatureOf(problem),
        bucket: bucketOf(problem),
      },
      held,
      problem,
      target,
      out,
    );
  }

  /**
   * Checks a configuration against a call and its device.
   *
   * @param invocation A prepared call.
   * @param cfg The configuration.
   * @throws {FlashMLAError} With code `invalid-config`, naming the limit and the value.
   */
  override checkCfg(invocation: Invocation<MlaDecodeCall>, cfg: DecodeConfig): void {
    const { problem, target } = prepared(invocation);
    const refuse = (why: string): never => {
      throw new FlashMLAError("invalid-config", `Cannot use cfg${why}`);
    };
    if (typeof cfg !== "object" || cfg === null) refuse(`: expected a DecodeConfig, got ${kindOf(cfg)}`);
    if (canonicalPlatform(cfg.platform) !== canonicalPlatform(target.platform)) {
      refuse(`: it is for platform "${cfg.platform}", the call runs on "${target.platform}"`);
    }
    const reason = target.whyInvalid(problem, cfg);
    if (reason !== null) refuse(` on ${target.description}: ${reason}`);
  }

  /**
   * Runs a call.
   *
   * @param invocation A prepared call.
   * @param cfg A configuration that {@link MlaDecode.checkCfg} accepts.
   * @returns The result: the call's `out`, or like the query.
   */
  override async run(invocation: Invocation<MlaDecodeCall>, cfg: DecodeConfig): Promise<AnyTensor> {
    const { problem, target, inputs, out, call } = prepared(invocation);
    this.checkCfg(invocation, cfg);
    const { output } = await target.run(problem, inputs, cfg, { out, withLse: false });
    return call.options?.out ?? output;
  }

  /**
   * Runs a call and keeps its log-sum-exp.
   *
   * @param invocation A prepared call.
   * @param cfg A configuration that {@link MlaDecode.checkCfg} accepts.
   * @returns The result as {@link MlaDecode.run} gives it, and the log-sum-exp on its side.
   */
  async runWithLse(invocation: Invocation<MlaDecodeCall>, cfg: DecodeConfig): Promise<AttentionState> {
    const { problem, target, inputs, out, call } = prepared(invocation);
    this.checkCfg(invocation, cfg);
    const { output, lse } = await target.run(problem, inputs, cfg, { out, withLse: true });
    return { output: call.options?.out ?? output, lse: lse! };
  }

  /** A good configuration without measuring. */
  override heuristicCfg(invocation: Invocation<MlaDecodeCall>): DecodeConfig {
    const { problem, target } = prepared(invocation);
    return target.heuristicCfg(problem);
  }

  /**
   * The configurations worth measuring on the call's device, the heuristic's first. With `splitKeys` it is the only one, so
   * that all batches are computed alike.
   */
  override candidateCfgs(invocation: Invocation<MlaDecodeCall>): readonly DecodeConfig[] {
    const { problem, target } = prepared(invocation);
    return target.candidateCfgs(problem);
  }

  /** Makes a candidate ready on the call's own tensors. */
  override trial(invocation: Invocation<MlaDecodeCall>, cfg: DecodeConfig): Promise<MlaTrial> {
    const { problem, target, inputs } = prepared(invocation);
    return target.trial(problem, inputs, cfg);
  }

  /** Milliseconds of known work on the call's device; null where only the host clock is to be had. */
  override probe(invocation: Invocation<MlaDecodeCall>): Promise<number | null> {
    return prepared(invocation).target.probe();
  }

  /** Compares outputs by ‖candidate − best‖ / ‖best‖; non-finite elements must stand in the same places. */
  override compare(candidate: AnyTensor, best: AnyTensor, invocation?: Invocation<MlaDecodeCall>): OutputCheck {
    if (invocation === undefined) return outputsAgree(candidate, best);
    const { dtype, cache } = prepared(invocation).problem;
    return outputsAgree(candidate, best, { dtype: { ...dtype, keyValue: cache.dtype } });
  }
}

function prepared(invocation: Invocation<MlaDecodeCall>): MlaDecodeInvocation {
  if (invocation instanceof MlaDecodeInvocation) return invocation;
  throw new FlashMLAError("invalid-input", "Cannot use the invocation: MlaDecode.prepare must have made it");
}

/** A table or lengths as they are now; those on the host are copied. */
function heldIndex(index: AnyIndexTensor): AnyIndexTensor {
  if (!isGpuIndex(index)) return { data: index.data.slice(), shape: [...index.shape] };
  const { buffer, shape, dtype, offset, device } = index;
  return { buffer, shape: [...shape], dtype, offset, device };
}

async function checkGpuIndices(
  problem: DecodeProblem,
  blockTable: AnyIndexTensor | null,
  seqLens: AnyIndexTensor,
  holders: (page: number) => number,
  device: GPUDevice | undefined,
): Promise<void> {
  const lens = Array.from(await readIndices(seqLens, device));
  lens.forEach((keys, sequence) => {
    if (keys >= 0 && keys <= problem.capacity) return;
    fail(`seqLens[${sequence}] is ${keys} on the GPU, expected 0 to the ${problem.capacity} tokens of its pages`);
  });
  if (blockTable === null) return;
  const table = { data: await readIndices(blockTable, device), shape: blockTable.shape };
  checkPages(table, lens, problem.cache, holders);
}

/** The target of a call whose cache is a tensor. */
async function targetOf(
  inputs: DecodeInputs,
  { device, platform = "auto", cfg, onEvent }: MlaDecodeOptions,
  out: AnyTensor | undefined,
): Promise<DecodeTarget> {
  const named = namedTensors(inputs, out).filter(([, tensor]) => isOnGpu(tensor));
  const owner = device ?? named.map(([, tensor]) => (tensor as GpuTensor).device).find((found) => found !== undefined);
  const implied = cfg?.platform ?? (owner === undefined && named.length === 0 ? "auto" : "webgpu");
  const found = await detectPlatform("flash_mla", platform === "auto" ? implied : platform);
  return await decodeRegistry.get("mla_decode", { platform: found }).open(owner, onEvent);
}

function namedTensors(
  { query, cache, wKc, wVc, softmaxAux, blockTable, seqLens }: DecodeInputs,
  out: AnyTensor | undefined,
): [name: string, tensor: AnyTensor | AnyIndexTensor][] {
  const tensors = { query, wKc, wVc, softmaxAux, blockTable, seqLens, out, ...("append" in cache ? {} : { cache }) };
  return Object.entries(tensors).filter((entry): entry is [string, AnyTensor] => entry[1] !== undefined);
}

function isOnGpu(tensor: AnyTensor | AnyIndexTensor): boolean {
  return "buffer" in tensor && !("data" in tensor);
}

function checkSameDevice(
  inputs: DecodeInputs,
  { device }: MlaDecodeOptions,
  out: AnyTensor | undefined,
  ofCache: GPUDevice | undefined,
): void {
  let [owner, found] = ofCache === undefined ? ["options.device", device] : ["the cache", ofCache];
  if (device !== undefined && found !== device) fail("options.device is another device than the cache's");
  for (const [name, tensor] of namedTensors(inputs, out)) {
    const own = isOnGpu(tensor) ? (tensor as GpuTensor).device : undefined;
    if (own === undefined) continue;
    if (found !== undefined && own !== found) fail(`${name} lies on another device than ${owner}`);
    [owner, found] = [name, own];
  }
}

/** Queries of the sequence that has most. */
function mostTokens({ tokenStarts }: DecodeProblem): number {
  return tokenStarts.reduce((most, start, i) => Math.max(most, start - tokenStarts[Math.max(0, i - 1)]), 0);
}

function signatureOf(problem: DecodeProblem): unknown {
  const { seqLens, tokenStarts, ...dimensions } = problem;
  return {
    ...dimensions,
    keys: seqLens === null ? "on the GPU" : seqLens.reduce((sum, keys) => sum + keys, 0),
    tokens: tokenStarts[tokenStarts.length - 1],
  };
}

/** All that decides which configuration is best; with fixed splits nothing of the batch. */
function bucketOf(problem: DecodeProblem): string {
  const { sequences, queryHeads, kvHeads, kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim } = problem;
  const { cache, dtype, causal, logitsSoftCap, sinks, splitKeys, seqLens, capacity, slidingWindow } = problem;
  const longest = seqLens === null ? capacity : seqLens.reduce((most, keys) => Math.max(most, keys), 0);
  const average = seqLens === null ? capacity : seqLens.reduce((sum, keys) => sum + keys, 0) / Math.max(1, sequences);
  const side = (keys: number) => Number.isFinite(keys) ? `${ceilPowerOfTwo(keys)}` : "all";
  const batch = splitKeys === null
    ? `B${ceilPowerOfTwo(sequences)} Sq${ceilPowerOfTwo(mostTokens(problem))} Sk${ceilPowerOfTwo(longest)} of ` +
      `${ceilPowerOfTwo(Math.ceil(average))}${seqLens === null ? " on the GPU" : ""}`
    : `splits of ${splitKeys}`;
  return [
    `${Object.values(dtype).join(" ")} over ${cache.dtype} ${batch}`,
    `Hq${queryHeads} Hkv${kvHeads} L${kvLoraRank} P${qkNopeHeadDim ?? "absorbed"} R${qkRopeHeadDim} V${vHeadDim}`,
    cache.pageSize === 0 ? "no pages" : `pages of ${cache.pageSize}`,
    causal ? "causal" : "full",
    ...(slidingWindow === null ? [] : [`window ${reach(problem).map(side).join(" ")}`]),
    ...(logitsSoftCap === null ? [] : ["soft cap"]),
    ...(sinks === 0 ? [] : ["sinks"]),
  ].join(", ");
}

/** Decoding, as {@link mlaDecode} runs it. */
export const mlaDecodeKernel: MlaDecode = new MlaDecode();

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
  return fail(`executor must be an Executor, got ${kindOf(executor)}`);
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
    fail(`encoder must be a GPUCommandEncoder, got ${kindOf(encoder)}`);
  }
  const given = options?.out;
  if (given !== undefined && !isGpuTensor<AnyTensor>(given)) fail("out must lie on the GPU, got a host tensor");
  const call = { inputs, options: { ...options, platform: options?.platform ?? "webgpu" } };
  const { invocation, choice } = await executorOf(options).prepare(mlaDecodeKernel, call, { cfg: options?.cfg });
  const { target, problem, inputs: held, out } = prepared(invocation);
  if (target.encode === undefined) return fail(`platform "${target.platform}" has nothing to record; use "webgpu"`);
  mlaDecodeKernel.checkCfg(invocation, choice.cfg);
  const { output, dispose } = await target.encode(encoder, problem, held, choice.cfg, out as GpuTensor | undefined);
  return { output: (given ?? output) as Out, dispose, [Symbol.dispose]: dispose };
}
