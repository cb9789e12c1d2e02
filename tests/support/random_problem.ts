// Random calls for property tests. The arbitraries make small records of numbers, so that a failing case shrinks and prints
// in one line; the tensors are grown from the record's seed.

import fc from "fast-check";
import type { HostInputs, MlaMathOptions, RopeMode } from "../../src/op/mla_problem.ts";
import { elementCount, type Tensor } from "../../src/op/tensor.ts";

/** How elements are drawn: standard normal, or a tenth of that clamped to ±1, which keeps every logit small. */
export type InputValues = "plain" | "small";

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
  }).map(finished);
}

/** Problems with packed sequences in batch 1, empty ones among them. */
export function packedProblems(limits: Partial<ProblemLimits> = {}): fc.Arbitrary<ProblemShape> {
  const { length, sequences, ...rest } = { ...SMALL, ...limits };
  const lengths = fc.array(mostlyPositive(length), { maxLength: sequences });
  return fc.record({ lengths, ...headArbitraries(rest) }).map(({ lengths, ...heads }) => {
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
  return {
    inputs: {
      query: draw(B, Sq, Hkv * headsPerKvHead, rope === "in_query" ? P + R : P),
      keyValue: draw(B, Sk, L),
      wKc: draw(L, Hkv, P),
      wVc: draw(L, Hkv, V),
      ...(rope === "shared" ? { bQ: draw(B, Sq, R) } : {}),
      ...(rope === "none" ? {} : { bK: draw(B, Sk, R) }),
      ...(shape.cuSeqlens === null ? {} : { cuSeqlens: shape.cuSeqlens }),
    },
    options: {
      causal: shape.causal,
      ...(shape.softmaxScale === null ? {} : { softmaxScale: shape.softmaxScale }),
    },
  };
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

function finished({ widths, ...shape }: Omit<ProblemShape, keyof Widths> & { widths: Widths }): ProblemShape {
  const { rope } = shape;
  return { ...shape, ...widths, ...(rope === "none" ? { qkRopeHeadDim: 0 } : {}) };
}

type Widths = Pick<ProblemShape, "kvLoraRank" | "qkNopeHeadDim" | "qkRopeHeadDim" | "vHeadDim">;
