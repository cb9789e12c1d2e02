import type { Dropout, DropoutOptions } from "./dropout.ts";
import { cannotRun as fail } from "./errors.ts";
import { toFloats } from "./half.ts";
import { checkPrecision } from "./precision.ts";
import { checkDropout, checkScoreTerm, checkSinks, checkSoftCap, checkWindow } from "./score_options.ts";
import { checkOffsets } from "./sequence_places.ts";
import {
  type AnyMask,
  type AnyTensor,
  checkTensor,
  denseStrides,
  type DType,
  dtypeOf,
  type HostTensor,
  isGpuTensor,
  kindOf,
  overlaps,
  type Tensor,
} from "./tensor.ts";

/**
 * The tensors of one call, each in its own element type and on the host or on a GPU. Axis names are those of the papers;
 * see {@link MlaProblem} for the letters.
 *
 * @typeParam T What the tensors are; any when absent.
 * @typeParam Query What the query is: the result is like it.
 */
export interface MlaInputs<T extends AnyTensor = AnyTensor, Query extends AnyTensor = T> {
  /** Queries, `[batch, queryLength, queryHeads, qkNopeHeadDim]`, or `[…, qkNopeHeadDim + qkRopeHeadDim]` with `bK` alone. */
  readonly query: Query;
  /** Latent rows, the KV cache of MLA, `[batch, keyLength, kvLoraRank]`. */
  readonly keyValue: T;
  /** Key expansion weights, `[kvLoraRank, kvHeads, qkNopeHeadDim]`. */
  readonly wKc: T;
  /** Value expansion weights, `[kvLoraRank, kvHeads, vHeadDim]`. */
  readonly wVc: T;
  /** Rotated query part shared by all heads, `[batch, queryLength, qkRopeHeadDim]`; needs `bK`. */
  readonly bQ?: T;
  /** Rotated key part shared by all heads, `[batch, keyLength, qkRopeHeadDim]`. */
  readonly bK?: T;
  /** Offsets `[n + 1]` of n sequences packed along the sequence axis of batch 1. */
  readonly cuSeqlens?: Int32Array | Uint32Array | readonly number[];
  /** The same as the option of that name, which see; given in one place or the other. */
  readonly bias?: T;
  /** The same as the option of that name. */
  readonly softmaxAux?: T;
  /** The same as the option of that name. */
  readonly attentionMask?: AnyMask;
}

/** Inputs that all lie on the host in float32. */
export type HostInputs = MlaInputs<Tensor>;

/** The name of a tensor of numbers among the inputs. */
export type TensorName = "query" | "keyValue" | "wKc" | "wVc" | "bQ" | "bK" | "bias" | "softmaxAux";

/** The names of the tensors of numbers among the inputs: those that have gradients. */
export const tensorNames: readonly TensorName[] = [
  ...["query", "keyValue", "wKc", "wVc", "bQ", "bK", "bias", "softmaxAux"] as const,
];

/**
 * The options that change the result. In this order: scale, soft cap, window, causal mask, bias or else mask, sinks,
 * softmax, dropout. The precision is that of all products.
 */
export interface MlaMathOptions {
  /** Factor on the scores; `1/√(qkNopeHeadDim + qkRopeHeadDim)` when absent. */
  readonly softmaxScale?: number;
  /** Whether a query sees only keys up to its own position, aligned bottom-right. Default `false`. */
  readonly causal?: boolean;
  /** Bounds the scaled scores smoothly: `cap · tanh(score / cap)`, cap above 0. */
  readonly logitsSoftCap?: number;
  /**
   * How far a query sees from its own position, aligned bottom-right: `w` keys to either side (w ≥ 1), or `[left, right]`
   * (each ≥ 0). With `causal`, nothing to the right.
   */
  readonly slidingWindow?: number | readonly [left: number, right: number];
  /**
   * Added to the scores after scaling and capping, `[batch or 1, queryHeads or 1, queryLength, keyLength]`. Minus infinity
   * hides a key, and so does whatever lies at or below −2e38, such as the lowest float32.
   */
  readonly bias?: AnyTensor;
  /** Which keys are visible (non-zero), `[batch or 1, queryHeads or 1, queryLength, keyLength]`. Ignored beside a bias. */
  readonly attentionMask?: AnyMask;
  /**
   * Attention sinks: logits that join the softmax's denominator only, neither scaled nor capped. `[queryHeads]` one per
   * head, `[n]` shared by all heads, `[queryHeads, n]` or `[1, n]`. One axis as long as there are heads is per head.
   */
  readonly softmaxAux?: AnyTensor;
  /** Drops attention probabilities at random, the same ones on every platform. */
  readonly dropout?: DropoutOptions;
  /**
   * With `"f16"`, tensors of float32 and bfloat16 may be rounded to halves as they are multiplied, so that matrix units can
   * serve them; sums and softmax stay float32, and the result keeps its element type. What is lost there: the result has a
   * relative error of about 5e-4, more where scores are large (2e-3 at a standard deviation of 30), since what is rounded
   * off a score shows in its probability; and what passes ±65,504 becomes that. It is leave, not an order: plain kernels,
   * and so every device without matrix units, stay exact, and the platform `reference` takes no notice. Default `"f32"`.
   */
  readonly precision?: "f32" | "f16";
}

/**
 * How the rotary part reaches the scores: not at all, as the last columns of each query head, or through one query part
 * shared by all heads.
 */
export type RopeMode = "none" | "in_query" | "shared";

/** One call's dimensions and options after validation: all that a kernel needs to know beside the data. */
export interface MlaProblem {
  /** B. */
  readonly batch: number;
  /** Sq, per batch item. */
  readonly queryLength: number;
  /** Sk, per batch item. */
  readonly keyLength: number;
  /** Hq, a multiple of Hkv. */
  readonly queryHeads: number;
  /** Hkv. */
  readonly kvHeads: number;
  /** L, the width of a latent row. */
  readonly kvLoraRank: number;
  /** P, the part of a head's width that is rebuilt from latents. */
  readonly qkNopeHeadDim: number;
  /** R, the rotary part, shared by all key heads; 0 without one. */
  readonly qkRopeHeadDim: number;
  /** V, the width of a value head. */
  readonly vHeadDim: number;
  /** Where the rotary part of the query comes from. */
  readonly rope: RopeMode;
  /** Whether the causal mask applies. */
  readonly causal: boolean;
  /** The factor on the scores. */
  readonly softmaxScale: number;
  /** Offsets of packed sequences, or null for one sequence per batch item. */
  readonly cuSeqlens: readonly number[] | null;
  /** The soft cap on the scaled scores, or null. */
  readonly logitsSoftCap: number | null;
  /** Keys that a query sees before and after its own position, or null. */
  readonly slidingWindow: readonly [left: number, right: number] | null;
  /** What else the scores meet: a bias that is added, or a mask that hides. */
  readonly scoreTerm: "none" | "bias" | "mask";
  /** Sink logits of each head; 0 without. */
  readonly sinks: number;
  /** The dropout, or null without one or with rate 0. */
  readonly dropout: Dropout | null;
  /** What the factors of products may be rounded to. */
  readonly precision: "f32" | "f16";
  /** Element types: one for all tensors of the call, or those of the tensors by name. */
  readonly dtype: DType | Readonly<Partial<Record<TensorName, DType>>>;
}

/**
 * Validates one call and names its dimensions.
 *
 * @param inputs The tensors of the call.
 * @param options The options that change the result.
 * @returns The problem's dimensions.
 * @throws {FlashMLAError} With code `invalid-input`, naming the argument, what was expected and what came.
 */
export function mlaProblem(inputs: MlaInputs, options: MlaMathOptions = {}): MlaProblem {
  inputs = allInputs(inputs, options);
  const { query, keyValue, wKc, wVc, bQ, bK } = inputs;
  checkShape("query", query, ["batch", "queryLength", "queryHeads", "headDim"]);
  checkShape("keyValue", keyValue, ["batch", "keyLength", "kvLoraRank"]);
  checkShape("wKc", wKc, ["kvLoraRank", "kvHeads", "qkNopeHeadDim"]);
  checkShape("wVc", wVc, ["kvLoraRank", "kvHeads", "vHeadDim"]);
  const [batch, queryLength, queryHeads, queryWidth] = query.shape;
  const [, keyLength, kvLoraRank] = keyValue.shape;
  const [, kvHeads, qkNopeHeadDim] = wKc.shape;
  const vHeadDim = wVc.shape[2];

  for (const [name, weight] of Object.entries({ wKc, wVc })) {
    const { strides } = weight as { strides?: readonly number[] };
    const dense = denseStrides(weight.shape);
    if (strides?.some((stride, axis) => stride !== dense[axis] && weight.shape[axis] > 1)) {
      fail(`${name} has strides [${strides}], weights must be dense: [${dense}]`);
    }
  }
  const positive = { queryHeads, kvLoraRank, kvHeads, qkNopeHeadDim, vHeadDim };
  for (const [name, value] of Object.entries(positive)) {
    if (value < 1) fail(`${name} must be at least 1, got ${value}`);
  }
  same("keyValue", "batch", keyValue.shape[0], "query", batch);
  same("wKc", "kvLoraRank", wKc.shape[0], "keyValue", kvLoraRank);
  same("wVc", "kvLoraRank", wVc.shape[0], "keyValue", kvLoraRank);
  same("wVc", "KV heads", wVc.shape[1], "wKc", kvHeads);
  if (queryHeads % kvHeads !== 0) {
    fail(`query has ${queryHeads} heads, not a multiple of the ${kvHeads} KV heads of wKc`);
  }

  let qkRopeHeadDim = 0;
  if (bQ !== undefined && bK === undefined) fail("bQ is given without bK; pass both, or bK alone with a wider query");
  if (bK !== undefined) {
    checkShape("bK", bK, ["batch", "keyLength", "qkRopeHeadDim"]);
    same("bK", "batch", bK.shape[0], "query", batch);
    same("bK", "keyLength", bK.shape[1], "keyValue", keyLength);
    qkRopeHeadDim = bK.shape[2];
  }
  if (bQ !== undefined) {
    checkShape("bQ", bQ, ["batch", "queryLength", "qkRopeHeadDim"]);
    same("bQ", "batch", bQ.shape[0], "query", batch);
    same("bQ", "queryLength", bQ.shape[1], "query", queryLength);
    same("bQ", "qkRopeHeadDim", bQ.shape[2], "bK", qkRopeHeadDim);
  }
  const rope: RopeMode = qkRopeHeadDim === 0 ? "none" : bQ === undefined ? "in_query" : "shared";
  const expectedWidth = qkNopeHeadDim + (rope === "in_query" ? qkRopeHeadDim : 0);
  if (queryWidth !== expectedWidth) {
    const sum = rope === "in_query"
      ? `${qkNopeHeadDim} of wKc plus ${qkRopeHeadDim} of bK`
      : `the ${qkNopeHeadDim} of wKc${rope === "shared" ? ", with the rotary part in bQ" : ""}`;
    fail(`query has head dimension ${queryWidth}, expected ${expectedWidth} (${sum})`);
  }

  const { softmaxScale = 1 / Math.sqrt(qkNopeHeadDim + qkRopeHeadDim), causal = false } = options;
  if (
    typeof softmaxScale !== "number" || !(softmaxScale > 0) || !Number.isFinite(Math.fround(softmaxScale * Math.LOG2E))
  ) {
    fail(`softmaxScale must be a finite float32 number above 0, got ${kindOf(softmaxScale)}`);
  }
  if (typeof causal !== "boolean") fail(`causal must be true or false, got ${kindOf(causal)}`);

  const { bias, attentionMask, softmaxAux } = inputs;
  const scores = { batch, queryHeads, queryLength, keyLength };
  if (bias !== undefined) checkScoreTerm("bias", bias, scores);
  if (attentionMask !== undefined) checkScoreTerm("attentionMask", attentionMask, scores);

  return {
    batch,
    queryLength,
    keyLength,
    queryHeads,
    kvHeads,
    kvLoraRank,
    qkNopeHeadDim,
    qkRopeHeadDim,
    vHeadDim,
    rope,
    causal,
    softmaxScale,
    cuSeqlens: checkCuSeqlens(inputs.cuSeqlens, batch, queryLength, keyLength),
    logitsSoftCap: checkSoftCap(options.logitsSoftCap),
    slidingWindow: checkWindow(options.slidingWindow),
    scoreTerm: bias !== undefined ? "bias" : attentionMask !== undefined ? "mask" : "none",
    sinks: softmaxAux === undefined ? 0 : checkSinks(softmaxAux, queryHeads),
    dropout: checkDropout(options.dropout),
    precision: checkPrecision(options.precision),
    dtype: dtypesOf(inputs),
  };
}

/**
 * The inputs with the tensors among the options, which go through a call beside the others.
 *
 * @throws {FlashMLAError} With code `invalid-input` when one is given in both places.
 */
export function allInputs(inputs: MlaInputs, options: MlaMathOptions): MlaInputs {
  if (typeof inputs !== "object" || inputs === null) fail(`inputs must be an object of tensors, got ${kindOf(inputs)}`);
  if (typeof options !== "object" || options === null) fail(`options must be an object, got ${kindOf(options)}`);
  for (const name of ["bias", "softmaxAux", "attentionMask"] as const) {
    if (inputs[name] !== undefined && options[name] !== undefined && inputs[name] !== options[name]) {
      fail(`${name} is given among the inputs and among the options; give one`);
    }
  }
  const { bias = inputs.bias, softmaxAux = inputs.softmaxAux, attentionMask = inputs.attentionMask } = options;
  return {
    ...inputs,
    ...(bias !== undefined && { bias }),
    ...(softmaxAux !== undefined && { softmaxAux }),
    ...(attentionMask !== undefined && { attentionMask }),
  };
}

/** The tensors of a call with one function applied to each. */
export function mapTensors<From extends AnyTensor, To extends AnyTensor>(
  inputs: MlaInputs<From>,
  change: (tensor: From, name: TensorName) => To,
): MlaInputs<To> {
  const { query, keyValue, wKc, wVc, bQ, bK, bias, softmaxAux, attentionMask, cuSeqlens } = inputs;
  return {
    query: change(query, "query"),
    keyValue: change(keyValue, "keyValue"),
    wKc: change(wKc, "wKc"),
    wVc: change(wVc, "wVc"),
    ...(bQ && { bQ: change(bQ, "bQ") }),
    ...(bK && { bK: change(bK, "bK") }),
    ...(bias && { bias: change(bias, "bias") }),
    ...(softmaxAux && { softmaxAux: change(softmaxAux, "softmaxAux") }),
    ...(attentionMask && { attentionMask }),
    ...(cuSeqlens && { cuSeqlens }),
  };
}

/**
 * The inputs as they are now: what the caller does to the objects afterwards changes nothing. The data are not copied. A
 * mask beside a bias is left out.
 */
export function snapshot(inputs: MlaInputs): MlaInputs {
  const { attentionMask, cuSeqlens, ...held } = mapTensors(inputs, holdTensor);
  return {
    ...held,
    ...(attentionMask && held.bias === undefined && { attentionMask: holdTensor(attentionMask) }),
    ...(cuSeqlens && { cuSeqlens: Array.from(cuSeqlens) }),
  };
}

/** A tensor or mask as it is now, over the same memory. */
export function holdTensor<T extends AnyTensor | AnyMask>(tensor: T): T;
export function holdTensor(tensor: AnyTensor | AnyMask): AnyTensor | AnyMask {
  if (!isGpuTensor(tensor)) return { data: tensor.data, shape: [...tensor.shape], dtype: tensor.dtype } as HostTensor;
  const { buffer, shape, dtype, offset, strides, device } = tensor;
  return {
    buffer,
    shape: [...shape],
    dtype,
    offset,
    strides: strides && [...strides],
    device,
    get disposed() {
      return tensor.disposed;
    },
  } as AnyTensor | AnyMask;
}

/**
 * Host inputs in float32; exact, and the tensors themselves where they are float32 already.
 *
 * @throws {FlashMLAError} With code `invalid-input` when a tensor lies on a GPU.
 */
export function floatInputs(inputs: MlaInputs): HostInputs {
  const { attentionMask } = inputs;
  if (attentionMask !== undefined && isGpuTensor(attentionMask)) {
    fail('attentionMask lies on a GPU, the reference computes on the host: pass a Uint8Array, or platform "webgpu"');
  }
  return mapTensors(inputs, (tensor, name) => {
    if ("data" in tensor) return toFloats(tensor);
    fail(`${name} lies on a GPU, the reference computes on the host: pass await toHost(${name}), or platform "webgpu"`);
  });
}

/**
 * Checks a tensor that takes the result.
 *
 * @throws {FlashMLAError} With code `invalid-input` unless it has the result's shape and an element type to write.
 */
export function checkOut(out: AnyTensor, problem: MlaProblem): void {
  checkTensor("out", out);
  const expected = outputShape(problem);
  if (out.shape.join() !== expected.join()) fail(`out has shape [${out.shape}], the result has [${expected}]`);
  if (dtypeOf(out) === "bf16") fail('out has dtype "bf16", expected "f32" or "f16"');
  if (isGpuTensor(out) && overlaps(out)) {
    fail(`out has strides [${out.strides}], which may give two elements one place`);
  }
}

/** The shape of the result, `[batch, queryLength, queryHeads, vHeadDim]`. */
export function outputShape(problem: MlaProblem): number[] {
  return [problem.batch, problem.queryLength, problem.queryHeads, problem.vHeadDim];
}

/** The shape of the log-sum-exp, `[batch, queryHeads, queryLength]`. */
export function lseShape({ batch, queryHeads, queryLength }: MlaProblem): number[] {
  return [batch, queryHeads, queryLength];
}

function checkCuSeqlens(
  offsets: MlaInputs["cuSeqlens"],
  batch: number,
  queryLength: number,
  keyLength: number,
): number[] | null {
  if (offsets === undefined) return null;
  if (batch === 1 && queryLength !== keyLength) {
    fail(`cuSeqlens needs as many queries as keys, query has length ${queryLength} and keyValue ${keyLength}`);
  }
  return checkOffsets(offsets, batch, queryLength, "query", fail);
}

function dtypesOf(inputs: MlaInputs): MlaProblem["dtype"] {
  const given = tensorNames.flatMap((name) =>
    inputs[name] === undefined ? [] : [[name, dtypeOf(inputs[name])] as const]
  );
  const [[, first]] = given;
  return given.every(([, dtype]) => dtype === first) ? first : Object.fromEntries(given);
}

function checkShape(name: string, value: AnyTensor, axes: readonly string[]): void {
  if (value === undefined) fail(`${name} is missing; expected a tensor [${axes.join(", ")}]`);
  checkTensor(name, value);
  if (value.shape.length !== axes.length) {
    fail(`${name} must have ${axes.length} axes [${axes.join(", ")}], got shape [${value.shape.join(", ")}]`);
  }
}

function same(name: string, what: string, got: number, otherName: string, expected: number): void {
  if (got !== expected) fail(`${name} has ${what} ${got}, ${otherName} has ${expected}`);
}
