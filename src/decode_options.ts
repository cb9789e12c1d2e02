// What a call of decoding says beside its problem: cache and tensors, place and configuration.

import type { LatentCache } from "./latent_cache.ts";
import type { MlaDecodeExecutor } from "./decode_kernel.ts";
import type { DecodeConfig } from "./op/decode_config.ts";
import { type DecodeInputs, namedTensors } from "./op/decode_implementation.ts";
import { decodedShape, type DecodeMathOptions, type DecodeProblem, type DecodeTensors } from "./op/decode_problem.ts";
import { FlashMLAError } from "./op/errors.ts";
import type { AnyIndexTensor } from "./op/index_tensor.ts";
import type { MlaEvent } from "./op/mla_event.ts";
import type { Platform } from "./op/platform.ts";
import { type AnyTensor, checkTensor, dtypeOf, type GpuTensor, isGpuTensor, kindOf, overlaps } from "./op/tensor.ts";

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

/** Refuses a call of decoding for its input, saying why. */
export function cannotDecode(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot decode: ${why}`);
}

const knownOptions = [
  ...["softmaxScale", "causal", "logitsSoftCap", "slidingWindow", "softmaxAux", "kvLoraRank", "splitKeys"],
  ...["platform", "cfg", "executor", "device", "onEvent", "checkIndices", "out"],
];

/** Throws when an option is unknown or of the wrong kind. */
export function checkOptions(options: MlaDecodeOptions): void {
  if (typeof options !== "object" || options === null) {
    cannotDecode(`options must be an object, got ${kindOf(options)}`);
  }
  for (const name of Object.keys(options)) {
    if (!knownOptions.includes(name)) cannotDecode(`unknown option "${name}"; known are ${knownOptions.join(", ")}`);
  }
  const { device, cfg, onEvent } = options;
  if (onEvent !== undefined && typeof onEvent !== "function") {
    cannotDecode(`onEvent must be a function, got ${kindOf(onEvent)}`);
  }
  if (device !== undefined && typeof device?.createBuffer !== "function") {
    cannotDecode(`device must be a GPUDevice, got ${kindOf(device)}`);
  }
  if (cfg !== undefined && (typeof cfg !== "object" || cfg === null)) {
    cannotDecode(`cfg must be a DecodeConfig, got ${kindOf(cfg)}`);
  }
}

/** Throws unless a tensor can take the result. */
export function checkOut(out: AnyTensor, problem: DecodeProblem): void {
  checkTensor("out", out);
  const expected = decodedShape(problem);
  if (out.shape.join() !== expected.join()) cannotDecode(`out has shape [${out.shape}], the result has [${expected}]`);
  if (dtypeOf(out) === "bf16") cannotDecode('out has dtype "bf16", expected "f32" or "f16"');
  if (isGpuTensor(out) && overlaps(out)) {
    cannotDecode(`out has strides [${out.strides}], which may give two elements one place`);
  }
}

/** Whether a tensor lies on a GPU. */
export function isOnGpu(tensor: AnyTensor | AnyIndexTensor): boolean {
  return "buffer" in tensor && !("data" in tensor);
}

/** Throws when tensors name different devices. */
export function checkSameDevice(
  inputs: DecodeInputs,
  { device }: MlaDecodeOptions,
  out: AnyTensor | undefined,
  ofCache: GPUDevice | undefined,
): void {
  let [owner, found] = ofCache === undefined ? ["options.device", device] : ["the cache", ofCache];
  if (device !== undefined && found !== device) cannotDecode("options.device is another device than the cache's");
  for (const [name, tensor] of namedTensors(inputs, out)) {
    const own = isOnGpu(tensor) ? (tensor as GpuTensor).device : undefined;
    if (own === undefined) continue;
    if (found !== undefined && own !== found) cannotDecode(`${name} lies on another device than ${owner}`);
    [owner, found] = [name, own];
  }
}
