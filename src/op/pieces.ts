// Cutting a call into calls over fewer sequences. Sequences do not see each other, so the pieces' results are the rows
// of the whole, in order.

import type { MlaInputs, MlaProblem } from "./mla_problem.ts";
import { type AnyTensor, denseStrides, elementBytes, type HostTensor, isGpuTensor } from "./tensor.ts";

/** A part of a call: whole sequences of it. Its tensors are views of the call's. */
export interface Piece {
  /** The part's dimensions. */
  readonly problem: MlaProblem;
  /** The part's tensors. */
  readonly inputs: MlaInputs;
  /** The part of the tensor that takes the result, if the caller gave one. */
  readonly out?: AnyTensor;
  /** First of its query rows in the whole. */
  readonly queryRow: number;
}

/**
 * Cuts a call so that no piece has more than `maxKeyRows` key rows, unless one sequence alone has more.
 *
 * @param problem The whole problem.
 * @param inputs The whole call's tensors.
 * @param maxKeyRows Key rows that one piece may have.
 * @param out What takes the whole call's result, if the caller gave it.
 * @returns The pieces in order; the call itself when it is small enough.
 */
export function pieces(problem: MlaProblem, inputs: MlaInputs, maxKeyRows: number, out?: AnyTensor): Piece[] {
  const { batch, queryLength, keyLength, cuSeqlens } = problem;
  if (batch * keyLength <= maxKeyRows) return [{ problem, inputs, out, queryRow: 0 }];
  if (cuSeqlens === null) {
    const perPiece = Math.max(1, Math.floor(maxKeyRows / keyLength));
    return Array.from({ length: Math.ceil(batch / perPiece) }, (_, i) => {
      const first = i * perPiece;
      const items = Math.min(perPiece, batch - first);
      return {
        problem: { ...problem, batch: items },
        inputs: view(inputs, (tensor) => rows(tensor, 0, first, items)),
        out: out && rows(out, 0, first, items),
        queryRow: first * queryLength,
      };
    });
  }
  return packedRanges(cuSeqlens, maxKeyRows).map(([first, last]) => {
    const offsets = cuSeqlens.slice(first, last + 1).map((offset) => offset - cuSeqlens[first]);
    const length = offsets[offsets.length - 1];
    return {
      problem: { ...problem, queryLength: length, keyLength: length, cuSeqlens: offsets },
      inputs: { ...view(inputs, (tensor) => rows(tensor, 1, cuSeqlens[first], length)), cuSeqlens: offsets },
      out: out && rows(out, 1, cuSeqlens[first], length),
      queryRow: cuSeqlens[first],
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

/** The inputs with every tensor that has batch and sequence axes replaced. */
function view(inputs: MlaInputs, cut: (tensor: AnyTensor) => AnyTensor): MlaInputs {
  const { query, keyValue, bQ, bK } = inputs;
  return {
    ...inputs,
    query: cut(query),
    keyValue: cut(keyValue),
    ...(bQ && { bQ: cut(bQ) }),
    ...(bK && { bK: cut(bK) }),
  };
}

/** A view of `length` entries along one of the first two axes; axes before it have length 1. */
function rows(tensor: AnyTensor, axis: 0 | 1, first: number, length: number): AnyTensor {
  const shape = tensor.shape.map((n, i) => (i === axis ? length : n));
  const { strides = denseStrides(tensor.shape) } = tensor as { strides?: readonly number[] };
  const start = first * strides[axis];
  if (isGpuTensor(tensor)) {
    const { offset = 0, dtype } = tensor;
    const { buffer, device } = tensor;
    return {
      buffer,
      dtype,
      device,
      shape,
      strides,
      offset: offset + start * elementBytes(dtype),
      get disposed() {
        return tensor.disposed;
      },
    };
  }
  const end = (first + length) * strides[axis];
  return { data: (tensor.data as Float32Array).subarray(start, end), shape, dtype: tensor.dtype } as HostTensor;
}
