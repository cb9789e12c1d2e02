// Random calls for property tests. The arbitraries make small records of numbers, so that a failing case shrinks and prints
// in one line; the tensors are grown from the record's seed.

import fc from "fast-check";
import type { HostInputs, MlaMathOptions, RopeMode } from "../../src/op/mla_problem.ts";
import { elementCount, type MaskTensor, type Tensor } from "../../src/op/tensor.ts";

/** How elements are drawn: standard normal, or a tenth of that clamped to ±1, which keeps every logit small. */
export type InputValues = "plain" | "small";

/** A part of the operation that a call may leave out, by the name of its option. */
export type Feature = "attentionMask" | "bias" | "softmaxAux" | "logitsSoftCap" | "slidingWindow" | "dropout";

/** All of them. */
export const everyFeature: readonly Feature[] = [
  ...["attentionMask", "bias", "softmaxAux", "logitsSoftCap", "slidingWindow", "dropout"] as const,
];

/** A random mask or bias. */
export interface TermShape {
  /** Whether every batch item has its own; otherwise the first axis is 1. */
  readonly perItem: boolean;
  /** Whether every query head has its own; otherwise the second axis is 1. */
  readonly perHead: boolean;
  /** How many pairs of ten are hidden: by a zero in a mask, by minus infinity in a bias. */
  readonly hidden: number;
  /** How many rows of ten are hidden as a whole. */
  readonly hiddenRows: number;
}

/** The features of a random call; a feature that is absent or null is left out of it. */
export interface ProblemFeatures {
  readonly attentionMask?: TermShape | null;
  readonly bias?: TermShape | null;
  /** The shape of the sinks, with Hq the number of query heads. */
  readonly softmaxAux?: { readonly form: "[Hq]" | "[n]" | "[Hq, n]" | "[1, n]"; readonly n: number } | null;
  readonly logitsSoftCap?: number | null;
  readonly slidingWindow?: number | readonly [left: number, right: number] | null;
  readonly dropout?: { readonly rate: number; readonly seed: number } | null;
}

/** Everything that decides a random call, as numbers that print in one line. */
export interface ProblemShape {
  readonly batch: number;
  readonly queryLength: number;
  readonly keyLength: number;
  readonly kvHeads: number;
  /** Query heads per KV head. */
  readonly headsPerKvHead: number;
  readonly kvLoraRank: number;
  readonly qkNopeHeadDim: number;
  /** Width of the rotary part, 0 with `rope: "none"` and sometimes else. */
  readonly qkRopeHeadDim: number;
  readonly vHeadDim: number;
  /** Which of `bQ` and `bK` are passed. */
  readonly rope: RopeMode;
  readonly causal: boolean;
  /** The option of that name, or null to leave it out. */
  readonly softmaxScale: number | null;
  /** Offsets of packed sequences, or null for one sequence per batch item. */
  readonly cuSeqlens: readonly number[] | null;
  readonly values: InputValues;
  /** Decides every element. */
  readonly seed: number;
  /** What the call has beyond that; nothing when absent. */
  readonly features?: ProblemFeatures;
}

/** The largest dimensions to draw. Lengths and batch start at 0, widths and heads at 1. */
export interface ProblemLimits {
  readonly batch: number;
  /** Both query and key length; with packed sequences, of each sequence. */
  readonly length: number;
  readonly sequences: number;
  readonly kvHeads: number;
  readonly headsPerKvHead: number;
  readonly kvLoraRank: number;
  readonly qkNopeHeadDim: number;
  readonly qkRopeHeadDim: number;
  readonly vHeadDim: number;
  /** The distributions to draw from. */
  readonly values: readonly InputValues[];
  /** The features that calls may have, each one about every other time. Without any, calls are as before there were any. */
  readonly features: readonly Feature[];
}

/** Small enough for thousands of calls per minute, odd enough to cross every unrolling. */
export const SMALL: ProblemLimits = {
  batch: 3,
  length: 13,
  sequences: 5,
  kvHeads: 3,
  headsPerKvHead: 3,
  kvLoraRank: 11,
  qkNopeHeadDim: 9,
  qkRopeHeadDim: 7,
  vHeadDim: 9,
  values: ["plain", "small"],
  features: [],
};

/** The tensors and options of one call. */
export interface MlaCall {
  readonly inputs: HostInputs;
  readonly options: MlaMathOptions;
}

/** Problems with one sequence per batch item, query and key lengths drawn apart. */
export function batchedProblems(limits: Partial<ProblemLimits> = {}): fc.Arbitrary<ProblemShape> {
  const { batch, length, ...rest } = { ...SMALL, ...limits };
  return fc.record({
    batch: mostlyPositive(batch),
    queryLength: mostlyPositive(length),
    keyLength: mostlyPositive(length),
    cuSeqlens: fc.constant(null),
    ...headArbitraries(rest),
    ...featureArbitraries(rest.features, length),
  }).map(finished);
}

/** Problems with packed sequences in batch 1, empty ones among them. */
export function packedProblems(limits: Partial<ProblemLimits> = {}): fc.Arbitrary<ProblemShape> {
  const { length, sequences, ...rest } = { ...SMALL, ...limits };
  const lengths = fc.array(mostlyPositive(length), { maxLength: sequences });
  const heads = { ...headArbitraries(rest), ...featureArbitraries(rest.features, length) };
  return fc.record({ lengths, ...heads }).map(({ lengths, ...heads }) => {
    const cuSeqlens = [0];
    for (const n of lengths) cuSeqlens.push(cuSeqlens[cuSeqlens.length - 1] + n);
    const total = cuSeqlens[cuSeqlens.length - 1];
    return finished({ batch: 1, queryLength: total, keyLength: total, cuSeqlens, ...heads });
  });
}

/** Batched problems and, once in three, packed ones. */
export function problems(limits: Partial<ProblemLimits> = {}): fc.Arbitrary<ProblemShape> {
  return fc.oneof(
    { weight: 2, arbitrary: batchedProblems(limits) },
    { weight: 1, arbitrary: packedProblems(limits) },
  );
}

/** Grows the tensors and options of a problem: the same record always gives the same call. */
export function randomCall(shape: ProblemShape): MlaCall {
  const { batch: B, queryLength: Sq, keyLength: Sk, kvHeads: Hkv, headsPerKvHead, rope } = shape;
  const { kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = shape;
  const random = normals(shape.seed);
  const draw = (...axes: number[]) => randomTensor(axes, random, shape.values);
  const { logitsSoftCap = null, slidingWindow = null, dropout = null } = shape.features ?? {};
  return {
    inputs: {
      query: draw(B, Sq, Hkv * headsPerKvHead, rope === "in_query" ? P + R : P),
      keyValue: draw(B, Sk, L),
      wKc: draw(L, Hkv, P),
      wVc: draw(L, Hkv, V),
      ...(rope === "shared" ? { bQ: draw(B, Sq, R) } : {}),
      ...(rope === "none" ? {} : { bK: draw(B, Sk, R) }),
      ...(shape.cuSeqlens === null ? {} : { cuSeqlens: shape.cuSeqlens }),
      ...featureTensors(shape),
    },
    options: {
      causal: shape.causal,
      ...(shape.softmaxScale === null ? {} : { softmaxScale: shape.softmaxScale }),
      ...(logitsSoftCap === null ? {} : { logitsSoftCap }),
      ...(slidingWindow === null ? {} : { slidingWindow }),
      ...(dropout === null ? {} : { dropout }),
    },
  };
}

/** The mask, bias and sinks of a problem. Each has its own source, so that none changes when another is left out. */
function featureTensors(shape: ProblemShape): Pick<HostInputs, "attentionMask" | "bias" | "softmaxAux"> {
  const { attentionMask = null, bias = null, softmaxAux = null } = shape.features ?? {};
  const heads = shape.kvHeads * shape.headsPerKvHead;
  const termAxes = ({ perItem, perHead }: TermShape) => [
    ...[perItem ? shape.batch : 1, perHead ? heads : 1, shape.queryLength, shape.keyLength],
  ];
  return {
    ...(attentionMask &&
      { attentionMask: randomMask(termAxes(attentionMask), attentionMask, shape.seed ^ 0x6d61736b) }),
    ...(bias && { bias: randomBias(termAxes(bias), bias, shape.seed ^ 0x62696173) }),
    ...(softmaxAux && { softmaxAux: randomTensor(sinkAxes(softmaxAux, heads), normals(shape.seed ^ 0x73696e6b)) }),
  };
}

function sinkAxes({ form, n }: NonNullable<ProblemFeatures["softmaxAux"]>, heads: number): number[] {
  switch (form) {
    case "[Hq]":
      return [heads];
    case "[n]":
      return [n];
    case "[Hq, n]":
      return [heads, n];
    case "[1, n]":
      return [1, n];
  }
}

/** A mask: 0 where it hides, any other byte where it does not. */
function randomMask(axes: readonly number[], term: TermShape, seed: number): MaskTensor {
  const uniform = mulberry32(seed);
  const data = new Uint8Array(elementCount(axes));
  hide(axes, term, uniform, (index, hidden) => data[index] = hidden ? 0 : 1 + Math.floor(255 * uniform()));
  return { data, shape: axes };
}

/** A bias: standard normal, minus infinity where it hides. */
function randomBias(axes: readonly number[], term: TermShape, seed: number): Tensor {
  const random = normals(seed ^ 1);
  const data = new Float32Array(elementCount(axes));
  hide(axes, term, mulberry32(seed), (index, hidden) => data[index] = hidden ? -Infinity : random());
  return { data, shape: axes };
}

function hide(
  axes: readonly number[],
  { hidden, hiddenRows }: TermShape,
  uniform: () => number,
  decide: (index: number, hidden: boolean) => void,
): void {
  const keys = axes[axes.length - 1];
  for (let row = 0; row < elementCount(axes.slice(0, -1)); row++) {
    const wholly = uniform() * 10 < hiddenRows;
    for (let key = 0; key < keys; key++) decide(row * keys + key, uniform() * 10 < hidden || wholly);
  }
}

/**
 * Draws a tensor.
 *
 * @param shape Axis lengths.
 * @param random A source of standard normal numbers, such as {@link normals}.
 * @param values The distribution.
 */
export function randomTensor(shape: readonly number[], random: () => number, values: InputValues = "plain"): Tensor {
  const data = new Float32Array(elementCount(shape));
  for (let i = 0; i < data.length; i++) {
    data[i] = values === "plain" ? random() : Math.max(-1, Math.min(1, random() / 10));
  }
  return { data, shape };
}

/** A reproducible source of standard normal numbers: mulberry32, then Box and Muller's transform. */
export function normals(seed: number): () => number {
  const uniform = mulberry32(seed);
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}

/** A reproducible source of numbers in [0, 1): mulberry32. */
export function mulberry32(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** 0 once in eight, where uniform drawing would give it rarely for lengths and too often for batches. */
function mostlyPositive(max: number): fc.Arbitrary<number> {
  return fc.oneof({ weight: 1, arbitrary: fc.constant(0) }, { weight: 7, arbitrary: fc.integer({ min: 1, max }) });
}

function headArbitraries(limits: Omit<ProblemLimits, "batch" | "length" | "sequences">) {
  const upTo = (max: number) => fc.integer({ min: 1, max });
  return {
    kvHeads: upTo(limits.kvHeads),
    headsPerKvHead: upTo(limits.headsPerKvHead),
    widths: fc.oneof(
      { weight: 4, arbitrary: widthArbitraries(limits, (width) => Math.ceil(width / 4) * 4) },
      { weight: 4, arbitrary: widthArbitraries(limits, (width) => width - (width % 4 === 0 ? 1 : 0)) },
      { weight: 1, arbitrary: widthArbitraries(limits, (width) => width) },
    ),
    rope: fc.constantFrom<RopeMode>("none", "in_query", "shared"),
    causal: fc.boolean(),
    softmaxScale: fc.constantFrom(null, 0.5, 0.0625),
    values: fc.constantFrom(...limits.values),
    seed: fc.integer(),
  };
}

/**
 * Widths of rows, all of them multiples of four, none of them, or as they come. Kernels differ in which of their arrays
 * are read in quads: mixtures have to be among the problems, but each one costs a software adapter a compilation.
 */
function widthArbitraries(
  limits: Omit<ProblemLimits, "batch" | "length" | "sequences">,
  round: (width: number) => number,
) {
  const upTo = (max: number) => fc.integer({ min: 1, max }).map((width) => Math.max(1, round(width)));
  return fc.record({
    kvLoraRank: upTo(limits.kvLoraRank),
    qkNopeHeadDim: upTo(limits.qkNopeHeadDim),
    qkRopeHeadDim: fc.nat(limits.qkRopeHeadDim).map((width) => width === 0 ? 0 : round(width)),
    vHeadDim: upTo(limits.vHeadDim),
  });
}

/** The features of a problem, each one drawn about every other time; nothing is drawn where there are none to have. */
function featureArbitraries(
  features: readonly Feature[],
  length: number,
): { readonly features: fc.Arbitrary<ProblemFeatures | undefined> } {
  if (features.length === 0) return { features: fc.constant(undefined) };
  const term = fc.record({
    perItem: fc.boolean(),
    perHead: fc.boolean(),
    hidden: fc.constantFrom(0, 3, 8),
    hiddenRows: fc.constantFrom(0, 2),
  });
  // Narrow windows are the ones that hide something: no less often than wide ones, however long sequences are.
  const side = fc.oneof(fc.nat(3), fc.nat(length));
  const drawn: { readonly [F in Feature]: fc.Arbitrary<NonNullable<ProblemFeatures[F]>> } = {
    attentionMask: term,
    bias: term,
    softmaxAux: fc.record({
      form: fc.constantFrom("[Hq]" as const, "[n]" as const, "[Hq, n]" as const, "[1, n]" as const),
      n: fc.integer({ min: 1, max: 3 }),
    }),
    logitsSoftCap: fc.constantFrom(30, 3, 0.5),
    slidingWindow: fc.oneof(side.map((w) => Math.max(1, w)), fc.tuple(side, side)),
    dropout: fc.record({ rate: fc.constantFrom(0.5, 0, 0.2, 0.9), seed: fc.maxSafeNat() }),
  };
  const half = <T>(arbitrary: fc.Arbitrary<T>) => fc.oneof({ withCrossShrink: true }, fc.constant(null), arbitrary);
  return {
    features: fc.record(
      Object.fromEntries(features.map((feature) => [feature, half<unknown>(drawn[feature])])),
    ) as fc.Arbitrary<ProblemFeatures>,
  };
}

function finished(
  { widths, features, ...shape }: Omit<ProblemShape, keyof Widths> & { widths: Widths },
): ProblemShape {
  const { rope } = shape;
  return { ...shape, ...widths, ...(rope === "none" ? { qkRopeHeadDim: 0 } : {}), ...(features && { features }) };
}

type Widths = Pick<ProblemShape, "kvLoraRank" | "qkNopeHeadDim" | "qkRopeHeadDim" | "vHeadDim">;
