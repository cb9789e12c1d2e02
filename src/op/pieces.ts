// Cutting a call into calls over fewer sequences. Sequences do not see each other, so the pieces' results are the rows
// of the whole, in order.

import type { MlaInputs, MlaProblem } from "./mla_problem.ts";
import { type AnyMask, type AnyTensor, denseStrides, elementBytes, elementCount, type HostTensor } from "./tensor.ts";

/** A part of a call: whole sequences of it. Its tensors are views of the call's. */
export interface Piece {
  /** The part's dimensions. */
  readonly problem: MlaProblem;
  /** The part's tensors. */
  readonly inputs: MlaInputs;
  /** The part of the tensor that takes the result, if the caller gave one. */
  readonly out?: AnyTensor;
  /** The part of the tensor that takes the log-sum-exp, if the caller gave one on a GPU. */
  readonly lse?: AnyTensor;
  /** First of its query rows in the whole. */
  readonly queryRow: number;
}

/** The tensors that take a call's results. */
export interface ResultTensors {
  /** Takes the output. */
  readonly out?: AnyTensor;
  /** Takes the log-sum-exp; on a GPU. */
  readonly lse?: AnyTensor;
}

/**
 * Cuts a call so that no piece has more than `maxKeyRows` key rows, unless one sequence alone has more.
 *
 * @param problem The whole problem.
 * @param inputs The whole call's tensors.
 * @param maxKeyRows Key rows that one piece may have.
 * @param results What takes the whole call's results, as far as the caller gave it.
 * @returns The pieces in order; the call itself when it is small enough.
 */
export function pieces(
  problem: MlaProblem,
  inputs: MlaInputs,
  maxKeyRows: number,
  { out, lse }: ResultTensors = {},
): Piece[] {
  const { batch, queryLength, keyLength, cuSeqlens, dropout } = problem;
  if (batch * keyLength <= maxKeyRows) return [{ problem, inputs, out, lse, queryRow: 0 }];
  if (cuSeqlens === null) {
    const perPiece = Math.max(1, Math.floor(maxKeyRows / keyLength));
    return Array.from({ length: Math.ceil(batch / perPiece) }, (_, i) => {
      const first = i * perPiece;
      const items = Math.min(perPiece, batch - first);
      return {
        problem: { ...problem, batch: items, dropout: dropout && { ...dropout, firstItem: first } },
        inputs: view(inputs, (tensor) => rows(tensor, 0, first, items), (term) => someItems(term, first, items)),
        out: out && rows(out, 0, first, items),
        lse: lse && rows(lse, 0, first, items),
        queryRow: first * queryLength,
      };
    });
  }
  return packedRanges(cuSeqlens, maxKeyRows).map(([first, last]) => {
    const offsets = cuSeqlens.slice(first, last + 1).map((offset) => offset - cuSeqlens[first]);
    const start = cuSeqlens[first];
    const length = offsets[offsets.length - 1];
    return {
      problem: {
        ...problem,
        queryLength: length,
        keyLength: length,
        cuSeqlens: offsets,
        dropout: dropout && { ...dropout, firstPosition: start },
      },
      inputs: {
        ...view(inputs, (tensor) => rows(tensor, 1, start, length), (term) => square(term, start, length)),
        cuSeqlens: offsets,
      },
      out: out && rows(out, 1, start, length),
      lse: lse && rows(lse, 2, start, length),
      queryRow: start,
    };
  });
}

/** Groups packed sequences: half-open index ranges whose lengths add up to at most `atMost`, one sequence at least. */
function packedRanges(cuSeqlens: readonly number[], atMost: number): [first: number, last: number][] {
  const ranges: [number, number][] = [];
  let first = 0;
  for (let last = 1; last < cuSeqlens.length; last++) {
    const fits = last + 1 < cuSeqlens.length && cuSeqlens[last + 1] - cuSeqlens[first] <= atMost;
    if (fits) continue;
    ranges.push([first, last]);
    first = last;
  }
  return ranges;
}

/** The inputs with every tensor replaced that has batch and sequence axes: `cutTerm` does bias and mask. */
function view(
  inputs: MlaInputs,
  cut: (tensor: AnyTensor) => AnyTensor,
  cutTerm: <T extends AnyTensor | AnyMask>(term: T) => T,
): MlaInputs {
  const { query, keyValue, bQ, bK, bias, attentionMask } = inputs;
  return {
    ...inputs,
    query: cut(query),
    keyValue: cut(keyValue),
    ...(bQ && { bQ: cut(bQ) }),
    ...(bK && { bK: cut(bK) }),
    ...(bias && { bias: cutTerm(bias) }),
    ...(attentionMask && { attentionMask: cutTerm(attentionMask) }),
  };
}

/** Some batch items of a bias or mask, or the one that all items share. */
function someItems<T extends AnyTensor | AnyMask>(term: T, first: number, items: number): T {
  return term.shape[0] === 1 ? term : rows(term, 0, first, items);
}

/** The queries and keys of a bias or mask from `first` on: a view on a GPU, a copy on the host. */
function square<T extends AnyTensor | AnyMask>(term: T, first: number, length: number): T {
  if ("buffer" in term) return rows(rows(term, 2, first, length), 3, first, length);
  const { data, shape: [batch, heads, queryLength, keyLength] } = term as HostTensor;
  const shape = [batch, heads, length, length];
  const part = new (data.constructor as typeof Float32Array)(elementCount(shape));
  for (let row = 0; row < batch * heads * length; row++) {
    const start = (Math.floor(row / length) * queryLength + first + row % length) * keyLength + first;
    part.set((data as Float32Array).subarray(start, start + length), row * length);
  }
  return { ...term, data: part, shape };
}

/** A view of `length` entries along one axis; on the host, axes before it have length 1. */
function rows<T extends AnyTensor | AnyMask>(tensor: T, axis: number, first: number, length: number): T {
  const shape = tensor.shape.map((n, i) => (i === axis ? length : n));
  const { strides = denseStrides(tensor.shape) } = tensor as { strides?: readonly number[] };
  const start = first * strides[axis];
  if ("buffer" in tensor) {
    const { offset = 0, dtype } = tensor;
    const { buffer, device } = tensor;
    return {
      buffer,
      dtype,
      device,
      shape,
      strides,
      offset: offset + start * (dtype === "u8" ? 1 : elementBytes(dtype)),
      get disposed() {
        return tensor.disposed;
      },
    } as unknown as T;
  }
  const end = (first + length) * strides[axis];
  const { data, dtype } = tensor as HostTensor;
  return { data: (data as Float32Array).subarray(start, end), shape, dtype } as unknown as T;
}
