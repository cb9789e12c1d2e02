// The operation as a kernel with configurations: the one place where op, registry, tuning and platforms meet.

import { PersistentCache } from "./cache/persistent_cache.ts";
import type { FlashMLAConfig } from "./op/config.ts";
import { FlashMLAError } from "./op/errors.ts";
import type { MlaImplementation, MlaTarget, TrialOptions } from "./op/implementation.ts";
import { lengthBucket } from "./op/length_bucket.ts";
import { gradientsAgree, outputsAgree } from "./op/agreement.ts";
import type { AttentionState } from "./op/attention_state.ts";
import { tellMaskIgnored } from "./op/mla_event.ts";
import { checkGradOutput, type MlaGradients } from "./op/mla_gradients.ts";
import {
  allInputs,
  checkOut,
  holdTensor,
  type MlaInputs,
  type MlaProblem,
  mlaProblem,
  snapshot,
} from "./op/mla_problem.ts";
import { checkOptions, deviceOf, gpuTensors, type MlaCallOptions, type MlaOptions } from "./mla_options.ts";
import { checkApart, checkStillThere, residualsOf } from "./op/residuals.ts";
import { canonicalPlatform } from "./op/platform.ts";
import { type AnyTensor, kindOf, type ResultLike, type Tensor } from "./op/tensor.ts";
import { detectPlatform, kernelRegistry } from "./platforms.ts";
import { Executor } from "./tune/executor.ts";
import { Invocation, type InvocationInit } from "./tune/invocation.ts";
import { type Forward, Kernel, type OutputCheck, type Trial } from "./tune/kernel.ts";
import { ConfigSelectorChain } from "./tune/selector_chain.ts";
import { Tuner } from "./tune/tuner.ts";

/** One call of the operation. */
export interface MlaCall {
  /** The tensors. */
  readonly inputs: MlaInputs;
  /** The options. */
  readonly options?: MlaCallOptions;
}

/** An executor of {@link FlashMLA}. */
export type MlaExecutor = Executor<MlaCall, FlashMLAConfig, AnyTensor>;

/** A validated call with the target that it was resolved to. */
export class MlaInvocation extends Invocation<MlaCall> {
  /** The call's tensors, also those among its options, as they were when the call was made; the data are the caller's. */
  readonly inputs: MlaInputs;
  /** What takes the result, if the caller gave it. */
  readonly out: AnyTensor | undefined;
  /** The call's dimensions. */
  readonly problem: MlaProblem;
  /** Where it will run. */
  readonly target: MlaTarget;

  /**
   * Made by {@link FlashMLA.prepare}.
   *
   * @param init What identifies the call.
   * @param inputs The call's tensors.
   * @param problem The call's dimensions.
   * @param target Where it will run.
   * @param out What takes the result, if the caller gave it.
   */
  constructor(
    init: InvocationInit<MlaCall>,
    inputs: MlaInputs,
    problem: MlaProblem,
    target: MlaTarget,
    out?: AnyTensor,
  ) {
    super(init);
    this.inputs = inputs;
    this.out = out;
    this.problem = problem;
    this.target = target;
  }
}

/** Multi-head Latent Attention as a {@link Kernel}: ejkernel's `FlashMLA` on WebGPU and plain TypeScript. */
export class FlashMLA extends Kernel<MlaCall, FlashMLAConfig, AnyTensor, AttentionState, MlaGradients> {
  /** Operation name, part of every cache key. */
  readonly opId = "flash_mla";
  /** Raised when old measurements stop being valid. */
  readonly version = "2";

  /** There are gradients. */
  override get hasGradients(): boolean {
    return true;
  }

  /** Adapters that run on the CPU compile the gradients' kernels for half a minute and more. */
  override tunesBackward(invocation: Invocation<MlaCall>): boolean {
    return prepared(invocation).target.software !== true;
  }

  /**
   * The implementation that a configuration is for.
   *
   * @param cfg A configuration; its platform and backend are looked up.
   * @returns The registered implementation of highest priority.
   * @throws {FlashMLAError} With code `unsupported-platform`, listing what is registered.
   */
  getImpl(cfg: Pick<FlashMLAConfig, "platform" | "backend">): MlaImplementation {
    return kernelRegistry.get(this.opId, { platform: cfg.platform, backend: cfg.backend });
  }

  /**
   * Validates a call, finds its platform and opens its device.
   *
   * @param call The call.
   * @returns The call with its keys, its dimensions and its target.
   * @throws {FlashMLAError} When the call is malformed or its platform is not to be had.
   */
  override async prepare(call: MlaCall): Promise<MlaInvocation> {
    const { options = {} } = call;
    const problem = mlaProblem(call.inputs, options);
    checkOptions(options);
    if (options.out !== undefined) checkOut(options.out, problem);
    const given = allInputs(call.inputs, options);
    const inputs = snapshot(given);
    const out = options.out && holdTensor(options.out);
    const { platform: asked = "auto", cfg, onEvent } = options;
    if (given.bias !== undefined && given.attentionMask !== undefined) tellMaskIgnored(onEvent);
    const device = deviceOf(inputs, options);
    // What a call brings along says where it runs: a configuration names its platform, tensors on a GPU are WebGPU's.
    const resident = gpuTensors(inputs, out).length > 0;
    const implied = cfg?.platform ?? (device === undefined && !resident ? "auto" : "webgpu");
    const platform = await detectPlatform(this.opId, asked === "auto" ? implied : asked);
    const target = await kernelRegistry.get(this.opId, { platform }).open(device, onEvent);
    const { cuSeqlens, dropout, ...dimensions } = problem;
    const sequences = cuSeqlens === null ? null : cuSeqlens.length - 1;
    return new MlaInvocation(
      {
        opId: this.opId,
        version: this.version,
        call,
        device: target.fingerprint,
        // Where sequences lie and what a dropout drops are values.
        signature: { ...dimensions, sequences, dropout: dropout !== null },
        bucket: lengthBucket(problem),
      },
      inputs,
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
  override checkCfg(invocation: Invocation<MlaCall>, cfg: FlashMLAConfig): void {
    const { problem, target } = prepared(invocation);
    if (typeof cfg !== "object" || cfg === null) {
      throw new FlashMLAError("invalid-config", `Cannot use cfg: expected a FlashMLAConfig, got ${String(cfg)}`);
    }
    if (canonicalPlatform(cfg.platform) !== canonicalPlatform(target.platform)) {
      throw new FlashMLAError(
        "invalid-config",
        `Cannot use cfg: it is for platform "${cfg.platform}", the call runs on "${target.platform}"`,
      );
    }
    const reason = target.whyInvalid(problem, cfg);
    if (reason !== null) {
      throw new FlashMLAError("invalid-config", `Cannot use cfg on ${target.description}: ${reason}`);
    }
  }

  /**
   * Runs a call.
   *
   * @param invocation A prepared call.
   * @param cfg A configuration that {@link FlashMLA.checkCfg} accepts.
   * @returns The attention output, `[batch, queryLength, queryHeads, vHeadDim]`: the call's `out`, or like the query.
   */
  override async run(invocation: Invocation<MlaCall>, cfg: FlashMLAConfig): Promise<AnyTensor> {
    const { problem, target, inputs, out, call } = prepared(invocation);
    this.checkCfg(invocation, cfg);
    const result = await target.run(problem, inputs, cfg, out);
    return out === undefined ? result : call.options?.out ?? result;
  }

  /**
   * Runs a call and keeps its log-sum-exp.
   *
   * @param invocation A prepared call.
   * @param cfg A configuration that {@link FlashMLA.checkCfg} accepts.
   * @returns The output as {@link FlashMLA.run} gives it, and the log-sum-exp on its side.
   */
  async runWithLse(invocation: Invocation<MlaCall>, cfg: FlashMLAConfig): Promise<AttentionState> {
    const { problem, target, inputs, out, call } = prepared(invocation);
    this.checkCfg(invocation, cfg);
    const { output, lse } = await target.runWithLse(problem, inputs, cfg, out);
    return { output: out === undefined ? output : call.options?.out ?? output, lse };
  }

  /**
   * Runs a call and keeps what its gradients need: the output and the log-sum-exp. What lies on the host is copied, so that
   * the caller may change it; what lies on a GPU is the caller's.
   *
   * @param invocation A prepared call. Its `out` lies in no input's memory.
   * @param cfg A configuration that {@link FlashMLA.checkCfg} accepts.
   * @returns The output, and the residuals.
   */
  override async fwdWithResiduals(
    invocation: Invocation<MlaCall>,
    cfg: FlashMLAConfig,
  ): Promise<Forward<AnyTensor, AttentionState>> {
    const { inputs, out } = prepared(invocation);
    if (out !== undefined) checkApart(inputs, out);
    const state = await this.runWithLse(invocation, cfg);
    return { output: state.output, residuals: residualsOf({ ...state, output: out ?? state.output }) };
  }

  /**
   * Computes the gradients of a call that {@link FlashMLA.fwdWithResiduals} ran, from its inputs, which must be what they
   * were.
   *
   * @param invocation The call.
   * @param cfg The configuration that it ran under.
   * @param residuals What the run kept.
   * @param gradOutput The gradient of the output, of its shape.
   * @returns One gradient for each tensor of numbers, like its tensor; bfloat16 gives float32.
   */
  override async vjp(
    invocation: Invocation<MlaCall>,
    cfg: FlashMLAConfig,
    residuals: AttentionState,
    gradOutput: AnyTensor,
  ): Promise<MlaGradients> {
    const { problem, target, inputs } = prepared(invocation);
    this.checkCfg(invocation, cfg);
    checkGradOutput(gradOutput, residuals.output);
    checkStillThere(inputs, residuals);
    return await target.backward(problem, inputs, cfg, residuals, holdTensor(gradOutput));
  }

  /** A good configuration without measuring: by the number of workgroups that a problem gives each tile. */
  override heuristicCfg(invocation: Invocation<MlaCall>): FlashMLAConfig {
    const { problem, target } = prepared(invocation);
    return target.heuristicCfg(problem);
  }

  /** The configurations worth measuring on the call's device, the heuristic's first. */
  override candidateCfgs(invocation: Invocation<MlaCall>): readonly FlashMLAConfig[] {
    const { problem, target } = prepared(invocation);
    return target.candidateCfgs(problem);
  }

  /** The first candidate on plain kernels: a device that miscomputes on its matrix units does so in all that use them. */
  override baselineCfg(invocation: Invocation<MlaCall>): FlashMLAConfig {
    return this.candidateCfgs(invocation).find(({ matrixUnits }) => !matrixUnits) ?? this.heuristicCfg(invocation);
  }

  /** Compiles a candidate and uploads the call's own inputs. A caller's output tensor is left alone. */
  override trial(
    invocation: Invocation<MlaCall>,
    cfg: FlashMLAConfig,
    options: TrialOptions = {},
  ): Promise<Trial<Tensor, MlaGradients>> {
    const { problem, target, inputs } = prepared(invocation);
    return target.trial(problem, inputs, cfg, options);
  }

  /** Milliseconds of known work on the call's device; null where only the host clock is to be had. */
  override probe(invocation: Invocation<MlaCall>): Promise<number | null> {
    return prepared(invocation).target.probe();
  }

  /**
   * Compares outputs by ‖candidate − best‖ / ‖best‖; non-finite elements must stand in the same places. Less strictly where
   * halves are among the inputs, or where the call lets matrix units round to them and one of the configurations does.
   */
  override compare(
    candidate: AnyTensor,
    best: AnyTensor,
    invocation?: Invocation<MlaCall>,
    cfgs?: readonly FlashMLAConfig[],
  ): OutputCheck {
    return outputsAgree(candidate, best, invocation && prepared(invocation).problem, usesUnits(cfgs));
  }

  /** Compares gradients in the same way, each tensor on its own. */
  override compareGradients(
    invocation: Invocation<MlaCall>,
    candidate: MlaGradients,
    best: MlaGradients,
    cfgs?: readonly FlashMLAConfig[],
  ): OutputCheck {
    return gradientsAgree(prepared(invocation).problem, candidate, best, usesUnits(cfgs));
  }
}

/** Whether one of the configurations is for matrix units, as far as they are known. */
function usesUnits(cfgs: readonly FlashMLAConfig[] | undefined): boolean {
  return cfgs === undefined || cfgs.some(({ matrixUnits }) => matrixUnits);
}

function prepared(invocation: Invocation<MlaCall>): MlaInvocation {
  if (invocation instanceof MlaInvocation) return invocation;
  throw new FlashMLAError("invalid-input", "Cannot use the invocation: FlashMLA.prepare must have made it");
}

/** The operation, as {@link mlaAttention} runs it. */
export const flashMLA: FlashMLA = new FlashMLA();

let shared: MlaExecutor | null = null;

/**
 * The executor of calls that bring none: ejkernel's tuner settings (5 warm-ups, 100 iterations, bounded by time), and the
 * persistent cache "mla". Made on first use, so that the environment is read then.
 *
 * @returns The same executor every time.
 */
export function defaultExecutor(): MlaExecutor {
  return shared ??= new Executor(
    new ConfigSelectorChain({
      tuner: new Tuner({ warmup: 5, iters: 100 }),
      persistent: new PersistentCache<FlashMLAConfig>("mla"),
    }),
  );
}

/**
 * Multi-head Latent Attention (MLA, DeepSeek-V2, https://arxiv.org/abs/2405.04434): keys and values are rebuilt from
 * latent rows, then softmax attention runs over them.
 *
 * ```text
 * K = c·wKc   V = c·wVc   score = softmaxScale · (q_nope·K + q_rope·bK)   output = softmax(score) · V
 * ```
 *
 * The first call for a kind of shape measures which tile configuration is fastest on this device and remembers it; see
 * {@link ConfigSelectorChain}. The caller's tensors are read, never written; leave their data unchanged until the promise
 * settles. A query that sees no key gives a zero row.
 *
 * Tensors may lie on the host or on a GPU, in float32 or halves, mixed as they come. The result is like the query: a host
 * tensor for a host tensor, and for a query on a GPU a tensor on that GPU, which the caller disposes of; nothing is read
 * back then, and the promise settles when the work was submitted.
 *
 * @param inputs The tensors; see {@link MlaInputs} for their shapes.
 * @param options Mask, scale, platform, configuration, and the tensor that takes the result.
 * @returns The output, `[batch, queryLength, queryHeads, vHeadDim]`: a new tensor, or `options.out`.
 * @throws {FlashMLAError} When shapes disagree (`invalid-input`), the platform is not to be had
 * (`unsupported-platform`), the configuration cannot run (`invalid-config`), the problem passes a limit of the device
 * (`limit`), or the device fails (`device`).
 *
 * @example Eight tokens, two heads
 * ```ts
 * import { mlaAttention } from "@flash-mla/webgpu";
 *
 * const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
 * const output = await mlaAttention({
 *   query: ones(1, 8, 2, 16),
 *   keyValue: ones(1, 8, 4),
 *   wKc: ones(4, 2, 16),
 *   wVc: ones(4, 2, 32),
 * }, { causal: true, platform: "reference" });
 * console.log(output.shape); // [1, 8, 2, 32]
 * ```
 */
export function mlaAttention<Query extends AnyTensor>(
  inputs: MlaInputs<AnyTensor, Query>,
  options?: MlaOptions & {
    /** Absent: the result is a new tensor like the query. */
    readonly out?: undefined;
  },
): Promise<ResultLike<Query>>;
/**
 * The same, with the result written to a tensor of the caller's.
 *
 * @param inputs The tensors.
 * @param options The options, `out` among them.
 * @returns `options.out`.
 */
export function mlaAttention<Out extends AnyTensor>(
  inputs: MlaInputs,
  options: MlaOptions & {
    /** The tensor that takes the result. */
    readonly out: Out;
  },
): Promise<Out>;
/**
 * The same, with a tensor for the result that may be absent.
 *
 * @param inputs The tensors.
 * @param options The options.
 * @returns `options.out`, or a new tensor like the query.
 */
export function mlaAttention<Query extends AnyTensor, Out extends AnyTensor>(
  inputs: MlaInputs<AnyTensor, Query>,
  options: MlaCallOptions<Out>,
): Promise<Out | ResultLike<Query>>;
export async function mlaAttention(inputs: MlaInputs, options: MlaCallOptions = {}): Promise<AnyTensor> {
  return await executorOf(options).run(flashMLA, { inputs, options }, { cfg: options?.cfg });
}

/** The executor that a call names, or the default one. */
export function executorOf(options: MlaCallOptions): MlaExecutor {
  const executor = options?.executor ?? defaultExecutor();
  const methods = [executor.run, executor.prepare, executor.vjp];
  if (methods.every((method) => typeof method === "function")) return executor;
  throw new FlashMLAError("invalid-input", `Cannot run MLA: executor must be an Executor, got ${kindOf(executor)}`);
}
