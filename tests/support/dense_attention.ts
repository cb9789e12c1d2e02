// A second opinion on the oracle: the whole operation dense, one row after the other, in double precision from inputs to
// outputs, written from the formulas alone. It shares no code with src/reference, and takes inputs of any precision, so
// that difference quotients can be taken.
//
//   score = cap · tanh(scale · (q_nope · K_nope + q_rope · bK) / cap) + bias       over the keys that the row sees
//   lse   = log(Σ exp(score) + Σ exp(sink))
//   out   = Σ exp(score − lse) · kept / (1 − rate) · V

import { threefry2x32, type Words } from "../../src/op/dropout.ts";
import type { HostInputs, MlaInputs, MlaMathOptions } from "../../src/op/mla_problem.ts";
import type { MaskTensor, Tensor } from "../../src/op/tensor.ts";
import { sees, termAt } from "./visible_pairs.ts";

/** A tensor of numbers in any precision. */
export interface DenseTensor {
  readonly data: ArrayLike<number>;
  readonly shape: readonly number[];
}

/** The tensors of a call in any precision. */
export interface DenseInputs {
  readonly query: DenseTensor;
  readonly keyValue: DenseTensor;
  readonly wKc: DenseTensor;
  readonly wVc: DenseTensor;
  readonly bQ?: DenseTensor;
  readonly bK?: DenseTensor;
  readonly bias?: DenseTensor;
  readonly softmaxAux?: DenseTensor;
  readonly attentionMask?: MaskTensor;
  readonly cuSeqlens?: MlaInputs["cuSeqlens"];
}

/** Output `[batch, queryLength, queryHeads, vHeadDim]` and log-sum-exp `[batch, queryHeads, queryLength]` in doubles. */
export interface DenseResult {
  readonly output: Float64Array;
  readonly lse: Float64Array;
}

/** Attention in double precision. A row that sees no key is zero, and its log-sum-exp minus infinity. */
export function denseAttention(inputs: DenseInputs, options: MlaMathOptions): DenseResult {
  const { query, keyValue, wKc, wVc, bQ, bK, bias } = inputs;
  const [B, Sq, H] = query.shape;
  const Sk = keyValue.shape[1];
  const [, G, P] = wKc.shape;
  const V = wVc.shape[2];
  const R = bK?.shape[2] ?? 0;
  const { softmaxScale: scale = (P + R) ** -0.5, logitsSoftCap: cap } = options;
  const visible = sees(inputs, options);
  const keep = keptFactor(options.dropout);
  const keys = project(keyValue, wKc);
  const values = project(keyValue, wVc);

  const output = new Float64Array(B * Sq * H * V);
  const lse = new Float64Array(B * H * Sq);
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < H; h++) {
      const g = Math.floor(h * G / H);
      const sinks = sinksOf(inputs.softmaxAux, H, h);
      for (let i = 0; i < Sq; i++) {
        const q = at(query, b, i, h);
        const seen = upTo(Sk).filter((j) => visible(b, h, i, j));
        const scores = seen.map((j) => {
          const nope = sum(P, (p) => query.data[q + p] * keys[((b * Sk + j) * G + g) * P + p]);
          const rope = sum(
            R,
            (r) => (bQ ? bQ.data[at(bQ, b, i) + r] : query.data[q + P + r]) * bK!.data[at(bK!, b, j) + r],
          );
          const score = scale * (nope + rope);
          const term = bias ? termAt(bias, b, h, i, j) : 0;
          return (cap === undefined ? score : cap * Math.tanh(score / cap)) + term;
        });
        const row = (b * H + h) * Sq + i;
        lse[row] = -Infinity;
        if (scores.every((score) => score === -Infinity)) continue;
        const logits = [...scores, ...sinks];
        const top = Math.max(...logits);
        lse[row] = top + Math.log(sum(logits.length, (n) => Math.exp(logits[n] - top)));
        for (let v = 0; v < V; v++) {
          output[((b * Sq + i) * H + h) * V + v] = sum(seen.length, (k) => {
            const weight = Math.exp(scores[k] - lse[row]) * keep(b, h, i, seen[k]);
            return weight * values[((b * Sk + seen[k]) * G + g) * V + v];
          });
        }
      }
    }
  }
  return { output, lse };
}

/** The same rounded to float32. */
export function denseAttentionWithLse(
  inputs: HostInputs,
  options: MlaMathOptions,
): { readonly output: Tensor; readonly lse: Tensor } {
  const { output, lse } = denseAttention(inputs as DenseInputs, options);
  const [B, Sq, H] = inputs.query.shape;
  return {
    output: { data: Float32Array.from(output), shape: [B, Sq, H, inputs.wVc.shape[2]] },
    lse: { data: Float32Array.from(lse), shape: [B, H, Sq] },
  };
}

/** Latents times the weights of every head, `[batch · length, heads, width]`. */
function project({ data, shape: [B, S, L] }: DenseTensor, weight: DenseTensor): Float64Array {
  const columns = weight.shape[1] * weight.shape[2];
  return Float64Array.from(upTo(B * S * columns), (index) => {
    const [row, column] = [Math.floor(index / columns), index % columns];
    return sum(L, (l) => data[row * L + l] * weight.data[l * columns + column]);
  });
}

/** The sinks of one head, by the shapes that the option's documentation lists. */
function sinksOf(aux: DenseTensor | undefined, H: number, h: number): number[] {
  if (aux === undefined) return [];
  const { shape } = aux;
  const all = Array.from(aux.data);
  if (shape.length === 1) return shape[0] === H ? [all[h]] : all;
  return shape[0] === 1 ? all : all.slice(h * shape[1], (h + 1) * shape[1]);
}

/** What dropout does to a pair's probability: the definition at the head of src/op/dropout.ts. */
function keptFactor(dropout: MlaMathOptions["dropout"]): (b: number, h: number, i: number, j: number) => number {
  if (dropout === undefined || dropout.rate === 0) return () => 1;
  const { rate, seed } = dropout;
  const words: Words = [Number(BigInt(seed) & 0xffffffffn), Number(BigInt(seed) >> 32n)];
  return (b, h, i, j) => {
    const [bits] = threefry2x32(threefry2x32(words, [b, h]), [i, j]);
    return bits < Math.round(rate * 2 ** 32) ? 0 : 1 / (1 - rate);
  };
}

/** Where the entries behind the given indices of the first axes begin. */
function at({ shape }: DenseTensor, ...indices: number[]): number {
  return shape.reduce((flat, length, axis) => flat * length + (indices[axis] ?? 0), 0);
}

function sum(n: number, term: (i: number) => number): number {
  let total = 0;
  for (let i = 0; i < n; i++) total += term(i);
  return total;
}

function upTo(n: number): number[] {
  return Array.from({ length: n }, (_, i) => i);
}
