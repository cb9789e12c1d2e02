// Random calls of decoding for property tests: few numbers that print in one line, tensors grown from a seed, and what the
// forward oracle makes of them, sequence by sequence over the same rows.

import fc from "fast-check";
import type { DecodeMathOptions } from "../../src/op/decode_problem.ts";
import { toFloats, toHalves } from "../../src/op/half.ts";
import { type MlaMathOptions, mlaProblem } from "../../src/op/mla_problem.ts";
import { elementCount, type Tensor } from "../../src/op/tensor.ts";
import { referenceMlaAttentionWithLse } from "../../src/reference/mla_attention.ts";
import { normals, randomTensor } from "./random_problem.ts";

/** One sequence of a call. */
export interface SequenceShape {
  /** Its keys, those of its own tokens among them where there are as many. */
  readonly keys: number;
  /** Its queries. */
  readonly tokens: number;
}

/** Everything that decides a random call. */
export interface DecodeCallShape {
  readonly sequences: readonly SequenceShape[];
  /** Whether queries are packed by cuSeqlens; otherwise all sequences have as many tokens as the first. */
  readonly packed: boolean;
  readonly kvHeads: number;
  readonly headsPerKvHead: number;
  readonly kvLoraRank: number;
  readonly qkNopeHeadDim: number;
  readonly qkRopeHeadDim: number;
  readonly vHeadDim: number;
  /** Whether the query was multiplied by wKc before, so that the result has the width of the latents. */
  readonly absorbed: boolean;
  /** How the cache stores rows. */
  readonly dtype: "f32" | "f16";
  /** How the query is stored; weights are as the cache. */
  readonly query: "f32" | "f16";
  /** Tokens of a page; 0 for a tensor without pages. */
  readonly pageSize: number;
  readonly causal: boolean;
  readonly slidingWindow: number | readonly [left: number, right: number] | null;
  readonly logitsSoftCap: number | null;
  /** The shape of the sinks, with H the number of query heads. */
  readonly sinks: "none" | "[H]" | "[n]" | "[H, n]" | "[1, n]";
  /** Whether elements are a tenth of normal ones, clamped to ±1, as FlashMLA's tests draw them. */
  readonly small: boolean;
  /** Decides every element. */
  readonly seed: number;
}

/** The largest lengths to draw, and what else costs time. */
export interface DecodeCallLimits {
  readonly keys: number;
  readonly tokens: number;
  readonly sequences: number;
}

const someLimits: DecodeCallLimits = { keys: 150, tokens: 4, sequences: 4 };

/** Random calls: lengths, heads and widths odd, one or nothing, as well as ordinary. */
export function decodeCalls(limits: Partial<DecodeCallLimits> = {}): fc.Arbitrary<DecodeCallShape> {
  const { keys, tokens, sequences } = { ...someLimits, ...limits };
  const length = (max: number) =>
    fc.oneof(
      { weight: 1, arbitrary: fc.constant(0) },
      { weight: 3, arbitrary: fc.integer({ min: 1, max: Math.min(max, 12) }) },
      { weight: 4, arbitrary: fc.integer({ min: 1, max }) },
    );
  const upTo = (max: number) => fc.integer({ min: 1, max });
  const side = fc.oneof(fc.nat(3), fc.nat(keys));
  const half = <T>(arbitrary: fc.Arbitrary<T>) => fc.oneof(fc.constant(null), arbitrary);
  return fc.record({
    sequences: fc.array(
      fc.record({
        keys: length(keys),
        tokens: fc.oneof({ weight: 1, arbitrary: fc.constant(0) }, {
          weight: 7,
          arbitrary: upTo(tokens),
        }),
      }),
      { maxLength: sequences },
    ),
    packed: fc.boolean(),
    kvHeads: upTo(3),
    headsPerKvHead: upTo(4),
    kvLoraRank: upTo(17),
    qkNopeHeadDim: upTo(9),
    qkRopeHeadDim: fc.nat(7),
    vHeadDim: upTo(9),
    absorbed: fc.boolean(),
    dtype: fc.constantFrom("f32", "f16"),
    query: fc.constantFrom("f32", "f16"),
    pageSize: fc.constantFrom(0, 1, 2, 4, 16, 64, 256),
    causal: fc.boolean(),
    slidingWindow: half(fc.oneof(side.map((w) => Math.max(1, w)), fc.tuple(side, side))),
    logitsSoftCap: half(fc.constantFrom(30, 3, 0.5)),
    sinks: fc.constantFrom("none", "[H]", "[n]", "[H, n]", "[1, n]"),
    small: fc.boolean(),
    seed: fc.integer(),
  });
}

/** The tensors of one call, in float32 that its element types hold exactly. */
export interface DecodeCall {
  readonly shape: DecodeCallShape;
  /** `[batch, queryLength, H, …]`, or `[1, total, H, …]` packed. */
  readonly query: Tensor;
  /** Offsets of packed queries. */
  readonly cuSeqlens?: readonly number[];
  /** Rows of each sequence, `[1, keys, L + R]`. */
  readonly rows: readonly Tensor[];
  /** The weights, with an absorbed query too. */
  readonly weights: { readonly wKc: Tensor; readonly wVc: Tensor };
  readonly softmaxAux?: Tensor;
  readonly softmaxScale: number;
}

/** Query heads of a call. */
export function headsOf({ kvHeads, headsPerKvHead }: DecodeCallShape): number {
  return kvHeads * headsPerKvHead;
}

/** The queries of each sequence. */
export function tokensOf({ sequences, packed }: DecodeCallShape): number[] {
  return sequences.map(({ tokens }) => packed ? tokens : sequences[0].tokens);
}

/** The nearest tensor whose elements an element type holds. */
export function roundedTo(dtype: "f32" | "f16", tensor: Tensor): Tensor {
  return dtype === "f16" ? toFloats(toHalves(tensor)) : tensor;
}

/** Grows the tensors of a call. */
export function decodeCall(shape: DecodeCallShape): DecodeCall {
  const { sequences, packed, dtype, absorbed, small, kvHeads } = shape;
  const { kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = shape;
  const random = normals(shape.seed);
  const draw = (kind: "f32" | "f16", ...axes: number[]) =>
    roundedTo(kind, randomTensor(axes, random, small ? "small" : "plain"));
  const heads = headsOf(shape);
  const tokens = tokensOf(shape);
  const total = tokens.reduce((sum, n) => sum + n, 0);
  const axes = packed ? [1, total] : [sequences.length, sequences[0]?.tokens ?? 1];
  const weights = { wKc: draw(dtype, L, kvHeads, P), wVc: draw(dtype, L, kvHeads, V) };
  const drawn = draw(shape.query, ...axes, heads, P + R);
  const query = absorbed ? roundedTo(shape.query, absorbedQuery(drawn, weights.wKc)) : drawn;
  const n = 2;
  const sinkAxes = { "none": null, "[H]": [heads], "[n]": [3], "[H, n]": [heads, n], "[1, n]": [1, n] }[shape.sinks];
  return {
    shape,
    query,
    ...(packed && { cuSeqlens: tokens.reduce((ends, count) => [...ends, ends[ends.length - 1] + count], [0]) }),
    rows: sequences.map(({ keys }) => draw(dtype, 1, keys, L + R)),
    weights,
    ...(sinkAxes && { softmaxAux: draw("f32", ...sinkAxes) }),
    softmaxScale: 1 / Math.sqrt(P + R),
  };
}

/** Queries multiplied by wKc, their rotated part behind that: `[…, P + R]` becomes `[…, L + R]`. */
export function absorbedQuery({ data, shape }: Tensor, wKc: Tensor): Tensor {
  const [L, kvHeads, P] = wKc.shape;
  const [heads, width] = shape.slice(2);
  const R = width - P;
  const rows = elementCount(shape.slice(0, 3));
  const result = new Float32Array(rows * (L + R));
  for (let row = 0; row < rows; row++) {
    const g = Math.floor(row % heads * kvHeads / heads);
    for (let l = 0; l < L; l++) {
      let sum = 0;
      for (let p = 0; p < P; p++) sum += data[row * width + p] * wKc.data[(l * kvHeads + g) * P + p];
      result[row * (L + R) + l] = sum;
    }
    result.set(data.subarray(row * width + P, (row + 1) * width), row * (L + R) + L);
  }
  return { data: result, shape: [...shape.slice(0, 3), L + R] };
}

/** Attended latents multiplied by wVc: `[…, L]` becomes `[…, V]`. */
export function projectedOutput({ data, shape }: Tensor, wVc: Tensor): Tensor {
  const [L, kvHeads, V] = wVc.shape;
  const heads = shape[2];
  const rows = elementCount(shape.slice(0, 3));
  const result = new Float32Array(rows * V);
  for (let i = 0; i < result.length; i++) {
    const [row, v] = [Math.floor(i / V), i % V];
    const g = Math.floor(row % heads * kvHeads / heads);
    let sum = 0;
    for (let l = 0; l < L; l++) sum += data[row * L + l] * wVc.data[(l * kvHeads + g) * V + v];
    result[i] = sum;
  }
  return { data: result, shape: [...shape.slice(0, 3), V] };
}

/** Weights under which the expanded keys and values are the latents themselves. */
function identity(L: number): Tensor {
  return { data: Float32Array.from({ length: L * L }, (_, i) => i % (L + 1) === 0 ? 1 : 0), shape: [L, 1, L] };
}

/** The options of a call that change its result. */
export function mathOptions({ shape, softmaxScale, softmaxAux }: DecodeCall): DecodeMathOptions {
  const { causal, slidingWindow, logitsSoftCap, absorbed } = shape;
  return {
    causal,
    ...(absorbed && { softmaxScale }),
    ...(slidingWindow !== null && { slidingWindow }),
    ...(logitsSoftCap !== null && { logitsSoftCap }),
    ...(softmaxAux && { softmaxAux }),
  };
}

/** A result with its log-sum-exp, on the host in float32. */
export interface Decoded {
  readonly output: Tensor;
  readonly lse: Tensor;
}

/** What the forward oracle makes of a call: each sequence is a call of its own, over the same rows. */
export function forward(call: DecodeCall): Decoded {
  const { shape, query, rows, softmaxScale } = call;
  const { kvLoraRank: L, qkRopeHeadDim: R, absorbed } = shape;
  const [batch, queryLength, heads, width] = query.shape;
  const tokens = tokensOf(shape);
  const weights = absorbed ? { wKc: identity(L), wVc: identity(L) } : call.weights;
  const V = weights.wVc.shape[2];
  const output = { data: new Float32Array(batch * queryLength * heads * V), shape: [batch, queryLength, heads, V] };
  const lse = { data: new Float32Array(batch * heads * queryLength), shape: [batch, heads, queryLength] };
  const options: MlaMathOptions = { ...mathOptions(call), softmaxScale };
  let first = 0;
  rows.forEach((own, sequence) => {
    const count = tokens[sequence];
    const [keyValue, bK] = [columns(own, 0, L), columns(own, L, L + R)];
    const inputs = {
      query: {
        data: query.data.subarray(first * heads * width, (first + count) * heads * width),
        shape: [1, count, heads, width],
      },
      keyValue,
      ...weights,
      ...(R > 0 && { bK }),
    };
    const result = referenceMlaAttentionWithLse(
      { ...inputs, ...(call.softmaxAux && { softmaxAux: call.softmaxAux }) },
      mlaProblem(inputs, options),
    );
    output.data.set(result.output.data, first * heads * V);
    for (let i = 0; i < count; i++) {
      const [item, position] = [Math.floor((first + i) / queryLength), (first + i) % queryLength];
      for (let h = 0; h < heads; h++) {
        lse.data[(item * heads + h) * queryLength + position] = result.lse.data[h * count + i];
      }
    }
    first += count;
  });
  return { output, lse };
}

/** Some columns of `[1, length, width]`. */
function columns({ data, shape }: Tensor, start: number, end: number): Tensor {
  const [, length, width] = shape;
  const part = new Float32Array(length * (end - start));
  for (let i = 0; i < length; i++) {
    part.set(data.subarray(i * width + start, i * width + end), i * (end - start));
  }
  return { data: part, shape: [1, length, end - start] };
}
