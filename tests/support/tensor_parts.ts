// Cutting, reordering and changing host tensors, for tests that relate one call to another.

import { elementCount, type Tensor } from "../../src/op/tensor.ts";

/** The entries of one axis at `indices`, in that order; more than once where an index is repeated. */
export function take(from: Tensor, axis: number, indices: readonly number[]): Tensor {
  return { data: taken(new Float32Array(0), from, axis, indices), shape: from.shape.with(axis, indices.length) };
}

/** The same of bytes. */
export function takeBytes(
  from: { readonly data: Uint8Array; readonly shape: readonly number[] },
  axis: number,
  indices: readonly number[],
): { readonly data: Uint8Array; readonly shape: readonly number[] } {
  return { data: taken(new Uint8Array(0), from, axis, indices), shape: from.shape.with(axis, indices.length) };
}

function taken<Data extends Float32Array | Uint8Array>(
  kind: Data,
  from: { readonly data: Data; readonly shape: readonly number[] },
  axis: number,
  indices: readonly number[],
): Data {
  const before = elementCount(from.shape.slice(0, axis));
  const after = elementCount(from.shape.slice(axis + 1));
  const data = new (kind.constructor as new (length: number) => Data)(before * indices.length * after);
  for (let i = 0; i < before; i++) {
    indices.forEach((index, k) => {
      const start = (i * from.shape[axis] + index) * after;
      data.set(from.data.subarray(start, start + after), (i * indices.length + k) * after);
    });
  }
  return data;
}

/** Puts tensors of equal other axes one behind the other along one axis. */
export function concatenate(parts: readonly Tensor[], axis: number): Tensor {
  const total = parts.reduce((sum, { shape }) => sum + shape[axis], 0);
  const shape = parts[0].shape.with(axis, total);
  const before = elementCount(shape.slice(0, axis));
  const after = elementCount(shape.slice(axis + 1));
  const data = new Float32Array(elementCount(shape));
  let at = 0;
  for (const part of parts) {
    const width = part.shape[axis] * after;
    for (let i = 0; i < before; i++) {
      data.set(part.data.subarray(i * width, (i + 1) * width), i * total * after + at);
    }
    at += width;
  }
  return { data, shape };
}

/** The sum over one axis in double precision; the axis stays, with length 1. */
export function sumOver(from: Tensor, axis: number): Tensor {
  const before = elementCount(from.shape.slice(0, axis));
  const after = elementCount(from.shape.slice(axis + 1));
  const sums = new Float64Array(before * after);
  from.data.forEach((x, index) => {
    const outer = Math.floor(index / (after * from.shape[axis]));
    sums[outer * after + index % after] += x;
  });
  return { data: Float32Array.from(sums), shape: from.shape.with(axis, 1) };
}

/** The elementwise sum of tensors of one shape, in double precision. */
export function total(parts: readonly Tensor[]): Tensor {
  const { shape, data } = parts[0];
  return { data: data.map((_, i) => parts.reduce((sum, part) => sum + part.data[i], 0)), shape };
}

/** Appends the same `[batch, length, width]` columns to every head of `[batch, length, heads, …]`. */
export function appendToHeads(heads: Tensor, shared: Tensor): Tensor {
  const [batch, length, count, own] = heads.shape;
  const extra = shared.shape[2];
  const data = new Float32Array(batch * length * count * (own + extra));
  for (let row = 0; row < batch * length * count; row++) {
    const position = Math.floor(row / count);
    data.set(heads.data.subarray(row * own, (row + 1) * own), row * (own + extra));
    data.set(shared.data.subarray(position * extra, (position + 1) * extra), row * (own + extra) + own);
  }
  return { data, shape: [batch, length, count, own + extra] };
}

/** A copy with one row of `count` equal rows made NaN. */
export function withNan(from: Tensor, count: number, row: number): Tensor {
  const width = from.data.length / count;
  const copy = map(from, (x) => x);
  copy.data.fill(NaN, row * width, (row + 1) * width);
  return copy;
}

/** A tensor with every element multiplied. */
export function scaled(from: Tensor, factor: number): Tensor {
  return map(from, (x) => x * factor);
}

/** A tensor with one function applied to every element. */
export function map(from: Tensor, change: (element: number, index: number) => number): Tensor {
  return { data: from.data.map(change), shape: from.shape };
}

/** The integers from `start` up to but not including `end`. */
export function range(start: number, end: number): number[] {
  return Array.from({ length: Math.max(0, end - start) }, (_, i) => start + i);
}
