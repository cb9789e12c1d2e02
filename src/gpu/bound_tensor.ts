// Tensors as kernels of decoding bind them: in the caller's buffer, or uploaded; halves always two to a word.

import { halfBits, toFloats } from "../op/half.ts";
import { type AnyIndexTensor, isGpuIndex } from "../op/index_tensor.ts";
import {
  type AnyTensor,
  denseStrides,
  dtypeOf,
  elementBytes,
  elementCount,
  type GpuTensor,
  isGpuTensor,
  spanElements,
} from "../op/tensor.ts";
import type { GpuLimits } from "./capabilities.ts";
import type { KernelSteps } from "./kernel_steps.ts";
import type { PackedElements } from "./kernels/packed_element.ts";
import { checkBinding } from "./limit_checks.ts";

/** A tensor that is ready to be bound. */
export interface BoundTensor {
  /** What to bind. */
  readonly binding: GPUBufferBinding;
  /** Elements from the binding's start to the first one. */
  readonly base: number;
  /** Elements from one entry to the next along each axis. */
  readonly strides: readonly number[];
  /** How kernels read it. */
  readonly elements: PackedElements;
}

/** Where a GPU tensor's binding begins: a multiple of WebGPU's strictest alignment. */
function window(tensor: GpuTensor, limits: GpuLimits, name: string): { binding: GPUBufferBinding; base: number } {
  const { buffer, offset = 0, dtype } = tensor;
  const bytes = elementBytes(dtype);
  const start = Math.floor(offset / 256) * 256;
  const base = (offset - start) / bytes;
  // Kernels read whole quads of words at most.
  const size = Math.min(buffer.size - start, Math.max(16, Math.ceil((base + spanElements(tensor)) * bytes / 16) * 16));
  checkBinding(name, size, limits);
  return { binding: { buffer, offset: start, size: Math.floor(size / 4) * 4 }, base };
}

/**
 * Brings a tensor to the kernels.
 *
 * @param steps Takes what is uploaded.
 * @param name The tensor's name in messages.
 * @param tensor The tensor. bfloat16 becomes float32.
 * @param limits The device's limits.
 */
export function boundTensor(steps: KernelSteps, name: string, tensor: AnyTensor, limits: GpuLimits): BoundTensor {
  const { shape } = tensor;
  const dense = denseStrides(shape);
  if (isGpuTensor(tensor)) {
    const { dtype, strides = dense } = tensor;
    const { binding, base } = window(tensor, limits, name);
    const rowAxes = strides.slice(0, -1).filter((_, axis) => shape[axis] > 1);
    const quads = [base, shape[shape.length - 1], ...rowAxes].every((n) => n % 4 === 0) &&
      (binding.size! % (4 * elementBytes(dtype))) === 0;
    return { binding, base, strides, elements: { storage: dtype === "f16" ? "halves" : "floats", quads } };
  }
  const half = dtypeOf(tensor) === "f16";
  const quads = shape[shape.length - 1] % 4 === 0;
  const source = half ? halfBits(tensor.data as Uint16Array) : toFloats(tensor).data;
  const bytes = new Uint8Array(Math.max(16, Math.ceil(source.byteLength / 16) * 16));
  bytes.set(new Uint8Array(source.buffer, source.byteOffset, source.byteLength));
  checkBinding(name, bytes.byteLength, limits);
  const buffer = steps.upload(bytes.buffer);
  return {
    binding: { buffer, size: bytes.byteLength },
    base: 0,
    strides: dense,
    elements: { storage: half ? "halves" : "floats", quads },
  };
}

/** Brings integers to the kernels: what to bind, and the words from there to the first one. */
export function boundIndices(
  steps: KernelSteps,
  index: AnyIndexTensor,
): { readonly binding: GPUBufferBinding; readonly base: number } {
  if (!isGpuIndex(index)) {
    const data = index.data.length === 0 ? new Int32Array(4) : new Int32Array(index.data);
    return { binding: { buffer: steps.upload(data), size: data.byteLength }, base: 0 };
  }
  const { buffer, offset = 0, shape } = index;
  const start = Math.floor(offset / 256) * 256;
  const size = Math.max(4, offset - start + 4 * elementCount(shape));
  return { binding: { buffer, offset: start, size: Math.min(size, buffer.size - start) }, base: (offset - start) / 4 };
}
