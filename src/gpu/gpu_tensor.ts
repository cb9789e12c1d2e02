// Tensors in GPU memory that the library allocates, fills and reads.

import { FlashMLAError } from "../op/errors.ts";
import { halfBits, halfTensor, toFloats, zeros } from "../op/half.ts";
import { checkIndexTensor, type IndexTensor, type OwnedGpuIndexTensor } from "../op/index_tensor.ts";
import {
  checkMask,
  checkShape,
  checkTensor,
  denseStrides,
  elementBytes,
  elementCount,
  type F16Tensor,
  type GpuTensor,
  type HostTensor,
  isGpuTensor,
  kindOf,
  type MaskTensor,
  type OwnedGpuMask,
  type OwnedGpuTensor,
  spanElements,
  type Tensor,
} from "../op/tensor.ts";
import { BufferUsage } from "./buffers.ts";
import { type GpuContext, gpuContext, unlessLost } from "./device.ts";
import { foreignBuffer, inErrorScopes } from "./error_scopes.ts";
import { settled } from "./settled.ts";

/** How the elements of a tensor on a GPU are stored. */
type Stored = "f32" | "f16" | "u8" | "i32";

/** Allocates a dense tensor with arbitrary elements. */
function allocateTensor<Type extends Stored>(
  context: GpuContext,
  shape: readonly number[],
  dtype: Type,
): PooledTensor<Type> {
  return new PooledTensor(context, context.buffers.acquire("storage", tensorBytes(shape, dtype)), [...shape], dtype);
}

/** Bytes of a dense tensor in whole words. */
function tensorBytes(shape: readonly number[], dtype: Stored): number {
  const elementSize = dtype === "u8" ? 1 : dtype === "i32" ? 4 : elementBytes(dtype);
  return Math.max(4, Math.ceil(elementCount(shape) * elementSize / 4) * 4);
}

/** A tensor in a buffer of the device's pool. */
class PooledTensor<Type extends Stored> {
  readonly buffer: GPUBuffer;
  readonly shape: readonly number[];
  readonly dtype: Type;
  readonly device: GPUDevice;
  readonly #context: GpuContext;
  #disposed = false;

  constructor(context: GpuContext, buffer: GPUBuffer, shape: readonly number[], dtype: Type) {
    this.buffer = buffer;
    this.shape = shape;
    this.dtype = dtype;
    this.device = context.device;
    this.#context = context;
  }

  get disposed(): boolean {
    return this.#disposed;
  }

  dispose(): void {
    if (!this.#disposed) this.#context.buffers.release("storage", this.buffer);
    this.#disposed = true;
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

/** How {@link emptyOnGpu} allocates. */
export interface EmptyOptions {
  /** How elements are stored; `f32` when absent. */
  readonly dtype?: "f32" | "f16";
  /** The device; the process's own when absent. */
  readonly device?: GPUDevice;
}

/**
 * Allocates a tensor on a GPU, for results, KV caches and whatever kernels of the caller's write. Its elements are
 * arbitrary.
 *
 * @param shape The axis lengths, non-negative integers.
 * @param options Element type and device.
 * @returns The tensor, dense, in a buffer of usage `STORAGE`, `COPY_SRC` and `COPY_DST`. The caller disposes of it.
 * @throws {FlashMLAError} When the shape or the type is none (`invalid-input`), the tensor is larger than a buffer may be
 * (`limit`), or the device has no memory left (`device`).
 */
export async function emptyOnGpu(shape: readonly number[], options: EmptyOptions = {}): Promise<OwnedGpuTensor> {
  const { dtype = "f32", device } = options;
  if (dtype !== "f32" && dtype !== "f16") {
    throw new FlashMLAError(
      "invalid-input",
      `Cannot allocate a tensor: dtype must be "f32" or "f16", got ${kindOf(dtype)}`,
    );
  }
  checkShape("shape", shape);
  return await allocated(await gpuContext(device), shape, dtype);
}

/** What part of a tensor {@link viewOnGpu} shows. Lengths are in elements. */
export interface ViewOptions {
  /** The axis lengths. */
  readonly shape: readonly number[];
  /** Elements from the tensor's first one to the view's; 0 when absent. */
  readonly offset?: number;
  /** Elements from one entry to the next along each axis, the last one 1; dense when absent. */
  readonly strides?: readonly number[];
}

/**
 * A view of a part of a tensor on a GPU: nothing is copied, and it counts as disposed of when the tensor is.
 *
 * @param tensor The tensor.
 * @param options The part: a shape, where it begins, and its strides, all in elements.
 * @returns The view.
 * @throws {FlashMLAError} With code `invalid-input` when the part does not fit the tensor's buffer.
 *
 * @example The latents of a KV cache of rows of 512 + 64 columns, 100 of 4,096 rows filled
 * ```ts ignore
 * const cache = await emptyOnGpu([1, 4096, 576], { dtype: "f16" });
 * const keyValue = viewOnGpu(cache, { shape: [1, 100, 512], strides: [4096 * 576, 576, 1] });
 * const bK = viewOnGpu(cache, { shape: [1, 100, 64], strides: [4096 * 576, 576, 1], offset: 512 });
 * ```
 */
export function viewOnGpu(tensor: GpuTensor, options: ViewOptions): GpuTensor {
  const { shape, offset = 0, strides } = options;
  const { buffer, dtype, device, offset: origin = 0 } = tensor;
  const view: GpuTensor = {
    buffer,
    dtype,
    device,
    shape: [...shape],
    offset: origin + offset * elementBytes(dtype),
    ...(strides && { strides: [...strides] }),
    get disposed() {
      return tensor.disposed === true;
    },
  };
  checkTensor("view", view);
  return view;
}

/**
 * Allocates a tensor and does a first step with it.
 *
 * @throws {FlashMLAError} When the device has no memory left, or refuses the step; the tensor is given back then.
 */
export async function allocated<Type extends Stored>(
  context: GpuContext,
  shape: readonly number[],
  dtype: Type,
  step?: (tensor: { readonly buffer: GPUBuffer }) => void,
): Promise<PooledTensor<Type>> {
  // Nothing is asked of the device that it could refuse.
  if (step === undefined && context.buffers.hasIdle("storage", tensorBytes(shape, dtype))) {
    return await unlessLost(context, () => Promise.resolve(allocateTensor(context, shape, dtype)));
  }
  let made: PooledTensor<Type> | undefined;
  try {
    return await unlessLost(context, () =>
      inErrorScopes(context, "hold a tensor", () => {
        made = allocateTensor(context, shape, dtype);
        step?.(made);
        return made;
      }));
  } catch (error) {
    if (made !== undefined) context.buffers.discard(made.buffer);
    throw error;
  }
}

/**
 * Copies a host tensor to a GPU, to be used by many calls: weights, or what one call after another works on.
 *
 * @param tensor The tensor. Halves stay halves, bfloat16 becomes float32.
 * @param device The device; the process's own when absent.
 * @returns The tensor on the device, dense. The caller disposes of it.
 * @throws {FlashMLAError} When it is no host tensor (`invalid-input`), is larger than a buffer may be (`limit`), or the
 * device fails or is not to be had (`device`, `unsupported-platform`).
 *
 * @example
 * ```ts ignore
 * import { tensor, toGpu } from "@flash-mla/webgpu";
 *
 * using wKc = await toGpu(tensor(new Float32Array(512 * 16 * 128), [512, 16, 128]));
 * ```
 */
export function toGpu(tensor: HostTensor, device?: GPUDevice): Promise<OwnedGpuTensor>;
/**
 * Copies an attention mask to a GPU, to be used by many calls.
 *
 * @param mask The mask, bytes on the host.
 * @param device The device; the process's own when absent.
 * @returns The mask on the device, dense. The caller disposes of it.
 */
export function toGpu(mask: MaskTensor, device?: GPUDevice): Promise<OwnedGpuMask>;
/**
 * Copies integers to a GPU: block tables and lengths that kernels of the caller's go on with.
 *
 * @param indices The integers on the host.
 * @param device The device; the process's own when absent.
 * @returns The integers on the device. The caller disposes of them.
 */
export function toGpu(indices: IndexTensor, device?: GPUDevice): Promise<OwnedGpuIndexTensor>;
export async function toGpu(
  tensor: HostTensor | MaskTensor | IndexTensor,
  device?: GPUDevice,
): Promise<OwnedGpuTensor | OwnedGpuMask | OwnedGpuIndexTensor> {
  if (tensor?.data instanceof Int32Array) {
    const indices = tensor as IndexTensor;
    checkIndexTensor("indices", indices);
    const context = await gpuContext(device);
    const words = new Int32Array(indices.data);
    return await allocated(context, indices.shape, "i32", ({ buffer }) => {
      if (words.length > 0) context.device.queue.writeBuffer(buffer, 0, words);
    });
  }
  if (tensor?.data instanceof Uint8Array) {
    const mask = tensor as MaskTensor;
    checkMask("mask", mask);
    const context = await gpuContext(device);
    const words = new Uint8Array(Math.ceil(mask.data.length / 4) * 4);
    words.set(mask.data);
    return await allocated(context, mask.shape, "u8", ({ buffer }) => {
      if (words.length > 0) context.device.queue.writeBuffer(buffer, 0, words);
    });
  }
  return await tensorToGpu(tensor as HostTensor, device);
}

async function tensorToGpu(tensor: HostTensor, device?: GPUDevice): Promise<OwnedGpuTensor> {
  checkTensor("tensor", tensor);
  if (isGpuTensor(tensor)) {
    throw new FlashMLAError("invalid-input", "Cannot copy tensor to the GPU: it lies on a GPU already");
  }
  const context = await gpuContext(device);
  const source = tensor.dtype === "f16" ? halfBits(tensor.data) : toFloats(tensor).data;
  // Copied, since whole words are written, and engines take no memory that is shared with other threads.
  const bytes = new Uint8Array(Math.ceil(source.byteLength / 4) * 4);
  bytes.set(new Uint8Array(source.buffer, source.byteOffset, source.byteLength));
  const dtype = tensor.dtype === "f16" ? "f16" : "f32";
  return await allocated(context, tensor.shape, dtype, ({ buffer }) => {
    if (bytes.length > 0) context.device.queue.writeBuffer(buffer, 0, bytes);
  });
}

/**
 * Copies a tensor from a GPU to the host, after all work submitted before.
 *
 * @param tensor The tensor. Its buffer needs usage `COPY_SRC`, which tensors of this library have.
 * @param device The buffer's device, where the tensor does not name it; the process's own when absent.
 * @returns A dense tensor of the same element type: halves in a `Float16Array`, or as bits where the runtime has none.
 * @throws {FlashMLAError} When it is no such tensor (`invalid-input`), or the device fails (`device`).
 */
export async function toHost(tensor: GpuTensor, device?: GPUDevice): Promise<Tensor | F16Tensor> {
  checkTensor("tensor", tensor);
  const refuse = (why: string): never => {
    throw new FlashMLAError("invalid-input", `Cannot copy tensor to the host: ${why}`);
  };
  if (!isGpuTensor(tensor)) return refuse(`expected { buffer, shape, dtype }, got a tensor on the host`);
  const { buffer, shape, dtype, offset = 0, strides = denseStrides(shape) } = tensor;
  if ((buffer.usage & BufferUsage.COPY_SRC) === 0) {
    refuse(`its buffer must have usage COPY_SRC, got usage 0x${buffer.usage.toString(16)}`);
  }
  if (device !== undefined && typeof device?.createBuffer !== "function") {
    refuse(`device must be a GPUDevice, got ${kindOf(device)}`);
  }
  if (device !== undefined && tensor.device !== undefined && tensor.device !== device) {
    refuse("it lies on another device than the one given");
  }
  const context = await gpuContext(tensor.device ?? device);
  if (elementCount(shape) === 0) return zeros(shape, dtype);
  const bytes = elementBytes(dtype);
  const start = Math.floor(offset / 4) * 4;
  const size = Math.ceil((offset + spanElements(tensor) * bytes - start) / 4) * 4;
  const readback = context.buffers.acquire("readback", size);
  try {
    return await unlessLost(context, async () => {
      await inErrorScopes(context, "read the tensor", () => {
        const encoder = context.device.createCommandEncoder({ label: "flash-mla toHost" });
        encoder.copyBufferToBuffer(buffer, start, readback, 0, size);
        context.device.queue.submit([encoder.finish()]);
      });
      await settled(context.device, readback.mapAsync(1, 0, size));
      const mapped = readback.getMappedRange(0, size);
      const first = (offset - start) / bytes;
      const read = dtype === "f16" ? new Uint16Array(mapped) : new Float32Array(mapped);
      const dense = gather(read.subarray(first), shape, strides);
      readback.unmap();
      context.buffers.release("readback", readback);
      return dense instanceof Uint16Array ? halfTensor(dense, shape) : { data: dense, shape };
    });
  } catch (error) {
    // It may be mapped or waiting for it: nobody may get it from the pool.
    context.buffers.discard(readback);
    throw foreignBuffer("copy tensor to the host", error) ?? error;
  }
}

/** A dense copy of strided elements. */
function gather<Data extends Float32Array | Uint16Array>(
  from: Data,
  shape: readonly number[],
  strides: readonly number[],
): Float32Array | Uint16Array {
  const count = elementCount(shape);
  if (strides.join() === denseStrides(shape).join()) return from.slice(0, count);
  const dense = from instanceof Uint16Array ? new Uint16Array(count) : new Float32Array(count);
  const width = shape[shape.length - 1];
  const index = shape.slice(0, -1).map(() => 0);
  for (let row = 0; row * width < count; row++) {
    const at = index.reduce((sum, n, axis) => sum + n * strides[axis], 0);
    dense.set(from.subarray(at, at + width), row * width);
    for (let axis = index.length - 1; axis >= 0; axis--) {
      if (++index[axis] < shape[axis]) break;
      index[axis] = 0;
    }
  }
  return dense;
}
