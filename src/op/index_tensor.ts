// Tensors of 32-bit integers: block tables and sequence lengths.

import { FlashMLAError } from "./errors.ts";
import { checkGpuStorage, checkShape, elementCount, kindOf } from "./tensor.ts";

/** A dense, row-major host tensor of 32-bit integers. */
export interface IndexTensor {
  /** The elements, last axis fastest. */
  readonly data: Int32Array;
  /** The axis lengths. */
  readonly shape: readonly number[];
  /** Absent, or `i32`. */
  readonly dtype?: "i32";
}

/** The same in a buffer of a WebGPU device, dense. */
export interface GpuIndexTensor {
  /** The buffer, of usage `STORAGE`. */
  readonly buffer: GPUBuffer;
  /** The axis lengths. */
  readonly shape: readonly number[];
  /** `i32`. */
  readonly dtype: "i32";
  /** Bytes from the buffer's start to the first element, a multiple of 4. Default 0. */
  readonly offset?: number;
  /** The device of the buffer. Default: that of the call. */
  readonly device?: GPUDevice;
  /** True once the buffer was given back. */
  readonly disposed?: boolean;
}

/** A tensor of integers on a GPU that the library allocated: the caller gives it back. */
export interface OwnedGpuIndexTensor extends GpuIndexTensor {
  /** The device of the buffer. */
  readonly device: GPUDevice;
  /** True once the buffer was given back. */
  readonly disposed: boolean;
  /** Gives the buffer back; work that was submitted before still sees it. Calling it twice does no harm. */
  dispose(): void;
  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void;
}

/** A tensor of integers wherever it lies. */
export type AnyIndexTensor = IndexTensor | GpuIndexTensor;

/** Whether integers lie on a GPU. */
export function isGpuIndex(value: AnyIndexTensor | ArrayLike<number>): value is GpuIndexTensor {
  return typeof value === "object" && value !== null && "buffer" in value && !ArrayBuffer.isView(value) &&
    !("data" in value);
}

/** Throws unless `value` is a tensor of integers whose memory holds its shape; `name` is the argument to blame. */
export function checkIndexTensor(name: string, value: AnyIndexTensor): void {
  const fail: (why: string) => never = (why) => {
    throw new FlashMLAError("invalid-input", `Cannot use ${name} as a tensor of integers: ${why}`);
  };
  if (typeof value !== "object" || value === null || !Array.isArray(value.shape)) {
    fail(`expected { data, shape } with data an Int32Array, or { buffer, shape, dtype: "i32" }, got ${kindOf(value)}`);
  }
  checkShape(name, value.shape);
  if (value.dtype !== undefined && value.dtype !== "i32") fail(`dtype must be "i32", got ${kindOf(value.dtype)}`);
  if (isGpuIndex(value)) return checkGpuStorage(value, 4, fail);
  if (!(value.data instanceof Int32Array)) fail(`data must be an Int32Array, got ${kindOf(value.data)}`);
  const expected = elementCount(value.shape);
  if (value.data.length !== expected) {
    fail(`shape [${value.shape}] needs ${expected} elements, data has ${value.data.length}`);
  }
}
