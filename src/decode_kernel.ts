// Decoding as a kernel with configurations: where caches, op, registry and tuning meet.

import { decodeRegistry } from "./decode_platforms.ts";
import {
  cannotDecode,
  checkOptions,
  checkOut,
  checkSameDevice,
  isOnGpu,
  type MlaDecodeInputs,
  type MlaDecodeOptions,
} from "./decode_options.ts";
import { readIndices } from "./gpu/index_readback.ts";
import { asTensor, insideOf, LatentCache } from "./latent_cache.ts";
import { outputsAgree } from "./op/agreement.ts";
import type { AttentionState } from "./op/attention_state.ts";
import { decodeBucket, decodeSignature } from "./op/decode_bucket.ts";
import type { DecodeConfig } from "./op/decode_config.ts";
import { type DecodeInputs, type DecodeTarget, namedTensors } from "./op/decode_implementation.ts";
import { type DecodeProblem, decodeProblem, tensorLayout } from "./op/decode_problem.ts";
import { checkPages } from "./op/sequence_places.ts";
import { FlashMLAError } from "./op/errors.ts";
import type { MlaTrial } from "./op/implementation.ts";
import { type AnyIndexTensor, isGpuIndex } from "./op/index_tensor.ts";
import { holdTensor } from "./op/mla_problem.ts";
import { canonicalPlatform } from "./op/platform.ts";
import { type AnyTensor, type GpuTensor, kindOf } from "./op/tensor.ts";
import { detectPlatform } from "./platforms.ts";
import type { Executor } from "./tune/executor.ts";
import { Invocation, type InvocationInit } from "./tune/invocation.ts";
import { Kernel, type OutputCheck } from "./tune/kernel.ts";

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
      cannotDecode(`inputs must be an object of tensors, got ${kindOf(inputs)}`);
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
    const { platform = "auto" } = options;
    if (paged !== null && platform !== "auto" && canonicalPlatform(platform) !== paged.target.platform) {
      cannotDecode(`options.platform is "${platform}", the cache is of platform "${paged.target.platform}"`);
    }
    const { blockTable } = inputs;
    const seqLens = inputs.seqLens === undefined ? asTensor(problem.seqLens!) : heldIndex(asTensor(inputs.seqLens));
    if (paged !== null) {
      const holders = (page: number) => paged.allocator.holders(page);
      if (problem.seqLens !== null && !isGpuIndex(blockTable!)) {
        checkPages(blockTable!, problem.seqLens, paged.layout, holders, cannotDecode);
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
        signature: decodeSignature(problem),
        bucket: decodeBucket(problem),
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

  /** The first candidate on plain kernels, as for `FlashMLA`. */
  override baselineCfg(invocation: Invocation<MlaDecodeCall>): DecodeConfig {
    return this.candidateCfgs(invocation).find(({ matrixUnits }) => !matrixUnits) ?? this.heuristicCfg(invocation);
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

/** The invocation as the kernel made it. */
export function prepared(invocation: Invocation<MlaDecodeCall>): MlaDecodeInvocation {
  if (invocation instanceof MlaDecodeInvocation) return invocation;
  throw new FlashMLAError("invalid-input", "Cannot use the invocation: MlaDecode.prepare must have made it");
}

/** A table or lengths as they are now; those on the host are copied. */
function heldIndex(index: AnyIndexTensor): AnyIndexTensor {
  if (!isGpuIndex(index)) return { data: index.data.slice(), shape: [...index.shape] };
  const { buffer, shape, dtype, offset, device } = index;
  return {
    buffer,
    shape: [...shape],
    dtype,
    offset,
    device,
    get disposed() {
      return index.disposed;
    },
  };
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
    cannotDecode(
      `seqLens[${sequence}] is ${keys} on the GPU, expected 0 to the ${problem.capacity} tokens of its pages`,
    );
  });
  if (blockTable === null) return;
  const table = { data: await readIndices(blockTable, device), shape: blockTable.shape };
  checkPages(table, lens, problem.cache, holders, cannotDecode);
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

/** Decoding, as `mlaDecode` runs it. */
export const mlaDecodeKernel: MlaDecode = new MlaDecode();
