import { FlashMLAError } from "./errors.ts";

/** How the elements of a tensor are stored. Arithmetic is float32 whatever the storage. */
export type DType = "f32" | "f16" | "bf16";

/** A dense, row-major host tensor in float32. A plain `{ data, shape }` literal is one. */
export interface Tensor {
  /** The elements, last axis fastest; its length is the product of `shape`. */
  readonly data: Float32Array;
  /** The axis lengths; zero is legal. */
  readonly shape: readonly number[];
  /** Absent, or `f32`. */
  readonly dtype?: "f32";
}

/** A `Float16Array`, for runtimes and compilers that do not know the name yet. */
export interface Float16Elements extends ArrayBufferView, ArrayLike<number> {
  /** 2. */
  readonly BYTES_PER_ELEMENT: number;
}

/** A dense, row-major host tensor in half precision. */
export interface F16Tensor {
  /** The elements as numbers in a `Float16Array`, or their bits in a `Uint16Array`. */
  readonly data: Float16Elements | Uint16Array;
  /** The axis lengths; zero is legal. */
  readonly shape: readonly number[];
  /** `f16`. */
  readonly dtype: "f16";
}

/** A dense, row-major host tensor of bfloat16 bits: the upper halves of float32. Computed with as float32. */
export interface Bf16Tensor {
  /** The bits. */
  readonly data: Uint16Array;
  /** The axis lengths; zero is legal. */
  readonly shape: readonly number[];
  /** `bf16`. */
  readonly dtype: "bf16";
}

/** A tensor in memory of the host. */
export type HostTensor = Tensor | F16Tensor | Bf16Tensor;

/** A tensor in a buffer of a WebGPU device, or a view of a part of one. */
export interface GpuTensor {
  /** The buffer, of usage `STORAGE`. Its size is a multiple of 4 bytes and reaches past the last element. */
  readonly buffer: GPUBuffer;
  /** The axis lengths; zero is legal. */
  readonly shape: readonly number[];
  /** How the elements are stored. */
  readonly dtype: "f32" | "f16";
  /** Bytes from the buffer's start to the first element, a multiple of the element size. Default 0. */
  readonly offset?: number;
  /** Elements from one entry to the next along each axis, the last one 1. Default: dense and row-major. */
  readonly strides?: readonly number[];
  /** The device of the buffer. Default: that of the call. */
  readonly device?: GPUDevice;
  /** True once the buffer was given back. */
  readonly disposed?: boolean;
}

/** A tensor wherever it lies. */
export type AnyTensor = HostTensor | GpuTensor;

/** A dense, row-major host tensor of bytes that say what is visible: 0 is hidden, all else is visible. */
export interface MaskTensor {
  /** The elements, last axis fastest; its length is the product of `shape`. */
  readonly data: Uint8Array;
  /** The axis lengths; zero is legal. */
  readonly shape: readonly number[];
  /** Absent, or `u8`. */
  readonly dtype?: "u8";
}

/** The same in a buffer of a WebGPU device, or a view of a part of one. */
export interface GpuMaskTensor {
  /** The buffer, of usage `STORAGE`. Its size is a multiple of 4 bytes and reaches past the last element. */
  readonly buffer: GPUBuffer;
  /** The axis lengths; zero is legal. */
  readonly shape: readonly number[];
  /** `u8`. */
  readonly dtype: "u8";
  /** Bytes from the buffer's start to the first element. Default 0. */
  readonly offset?: number;
  /** Elements from one entry to the next along each axis, the last one 1. Default: dense and row-major. */
  readonly strides?: readonly number[];
  /** The device of the buffer. Default: that of the call. */
  readonly device?: GPUDevice;
  /** True once the buffer was given back. */
  readonly disposed?: boolean;
}

/** A mask wherever it lies. */
export type AnyMask = MaskTensor | GpuMaskTensor;

/** What a result is for a given query: of the same element type, on the same side. bfloat16 gives float32. */
export type ResultLike<Query extends AnyTensor> = Query extends GpuTensor ? OwnedGpuTensor
  : Query extends F16Tensor ? F16Tensor
  : Tensor;

/** A GPU tensor that the library allocated: the caller gives it back. */
export interface OwnedGpuTensor extends GpuTensor {
  /** The device of the buffer. */
  readonly device: GPUDevice;
  /** True once the buffer was given back. */
  readonly disposed: boolean;
  /** Gives the buffer back; work that was submitted before still sees it. Calling it twice does no harm. */
  dispose(): void;
  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void;
}

/** A mask on a GPU that the library allocated: the caller gives it back. */
export interface OwnedGpuMask extends GpuMaskTensor {
  /** The device of the buffer. */
  readonly device: GPUDevice;
  /** True once the buffer was given back. */
  readonly disposed: boolean;
  /** Gives the buffer back; work that was submitted before still sees it. Calling it twice does no harm. */
  dispose(): void;
  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void;
}

/**
 * Makes a host tensor and checks that the data fill the shape exactly. Nothing is copied.
 *
 * @param data The elements in row-major order.
 * @param shape The axis lengths, non-negative integers.
 * @returns The tensor over the same memory.
 * @throws {FlashMLAError} When an axis is not a non-negative integer, or the length differs from the product of the shape.
 *
 * @example
 * ```ts
 * import { tensor } from "@flash-mla/webgpu";
 *
 * const query = tensor(new Float32Array(1 * 8 * 2 * 16), [1, 8, 2, 16]);
 * const latents = tensor(new Uint16Array(1 * 8 * 4), [1, 8, 4], { dtype: "f16" });
 * console.log(query.shape.length, latents.dtype); // 4 f16
 * ```
 */
export function tensor(data: Float32Array, shape: readonly number[]): Tensor;
/**
 * Makes a host tensor of half-precision elements.
 *
 * @param data A `Float16Array`, or a `Uint16Array` of bits.
 * @param shape The axis lengths, non-negative integers.
 * @param options The element type.
 * @returns The tensor over the same memory.
 * @throws {FlashMLAError} When an axis is not a non-negative integer, or the length differs from the product of the shape.
 */
export function tensor(
  data: Float16Elements | Uint16Array,
  shape: readonly number[],
  options: {
    /** The element type of the bits. */
    readonly dtype: "f16";
  },
): F16Tensor;
/**
 * Makes a host tensor of bfloat16 elements.
 *
 * @param data The bits.
 * @param shape The axis lengths, non-negative integers.
 * @param options The element type.
 * @returns The tensor over the same memory.
 * @throws {FlashMLAError} When an axis is not a non-negative integer, or the length differs from the product of the shape.
 */
export function tensor(
  data: Uint16Array,
  shape: readonly number[],
  options: {
    /** The element type of the bits. */
    readonly dtype: "bf16";
  },
): Bf16Tensor;
export function tensor(
  data: HostTensor["data"],
  shape: readonly number[],
  options?: { readonly dtype: "f16" | "bf16" },
): HostTensor {
  const made = { data, shape: [...shape], ...options } as HostTensor;
  checkTensor("data", made);
  return made;
}

/** The number of elements that a shape holds; 1 for the empty shape. */
export function elementCount(shape: readonly number[]): number {
  return shape.reduce((product, axis) => product * axis, 1);
}

/** Bytes of one element. */
export function elementBytes(dtype: DType): number {
  return dtype === "f32" ? 4 : 2;
}

/** The element type of a tensor. */
export function dtypeOf(tensor: AnyTensor): DType {
  return tensor.dtype ?? "f32";
}

/** Whether a tensor or mask lies on a GPU. */
export function isGpuTensor<T extends AnyTensor | AnyMask>(
  value: T,
): value is Extract<T, GpuTensor | GpuMaskTensor> {
  return "buffer" in value && !("data" in value);
}

/** The strides of a dense, row-major tensor, in elements. */
export function denseStrides(shape: readonly number[]): number[] {
  const strides: number[] = [];
  for (let axis = shape.length - 1, stride = 1; axis >= 0; axis--) {
    strides.unshift(stride);
    stride *= shape[axis];
  }
  return strides;
}

/** Throws unless `value` is a tensor whose memory holds its shape; `name` is the argument to blame. */
export function checkTensor(name: string, value: AnyTensor): void {
  const fail: (why: string) => never = (why) => {
    throw new FlashMLAError("invalid-input", `Cannot use ${name} as a tensor: ${why}`);
  };
  if (typeof value !== "object" || value === null || !Array.isArray(value.shape)) {
    fail(`expected { data, shape } or { buffer, shape, dtype }, got ${kindOf(value)}`);
  }
  checkShape(name, value.shape);
  if (isGpuTensor(value)) checkGpuTensor(value, fail);
  else checkHostTensor(value, fail);
}

/** Throws unless `shape` holds non-negative integers; `name` is the argument to blame. */
export function checkShape(name: string, shape: readonly number[]): void {
  const fail = (why: string) => {
    throw new FlashMLAError("invalid-input", `Cannot use ${name} as a tensor: ${why}`);
  };
  if (!Array.isArray(shape)) fail(`shape must be an array of axis lengths, got ${kindOf(shape)}`);
  for (const axis of shape) {
    if (!Number.isSafeInteger(axis) || axis < 0) fail(`shape [${shape}] must hold non-negative integers, got ${axis}`);
  }
}

/** Throws unless `value` is a tensor of bytes whose memory holds its shape; `name` is the argument to blame. */
export function checkMask(name: string, value: AnyMask): void {
  const fail: (why: string) => never = (why) => {
    throw new FlashMLAError("invalid-input", `Cannot use ${name} as a mask: ${why}`);
  };
  if (typeof value !== "object" || value === null || !Array.isArray(value.shape)) {
    fail(`expected { data, shape } with data a Uint8Array, or { buffer, shape, dtype: "u8" }, got ${kindOf(value)}`);
  }
  checkShape(name, value.shape);
  if (value.dtype !== undefined && value.dtype !== "u8") fail(`dtype must be "u8", got ${kindOf(value.dtype)}`);
  if (isGpuTensor(value)) return checkGpuStorage(value, 1, fail);
  if (!(value.data instanceof Uint8Array)) {
    fail(`data must be a Uint8Array (non-zero is visible), got ${kindOf(value.data)}`);
  }
  const expected = elementCount(value.shape);
  if (value.data.length !== expected) {
    fail(`shape [${value.shape}] needs ${expected} elements, data has ${value.data.length}`);
  }
}

function checkHostTensor({ data, shape, dtype }: HostTensor, fail: (why: string) => never): void {
  switch (dtype) {
    case undefined:
    case "f32":
      if (!(data instanceof Float32Array)) {
        const given: unknown = data;
        const hint = given instanceof Uint16Array || isFloat16Array(given) ? '; give dtype "f16" or "bf16"' : "";
        fail(`data must be a Float32Array, got ${kindOf(data)}${hint}`);
      }
      break;
    case "f16":
      if (!(data instanceof Uint16Array) && !isFloat16Array(data)) {
        fail(`data must be a Float16Array or a Uint16Array for dtype "f16", got ${kindOf(data)}`);
      }
      break;
    case "bf16":
      if (!(data instanceof Uint16Array)) fail(`data must be a Uint16Array for dtype "bf16", got ${kindOf(data)}`);
      break;
    default:
      fail(`dtype must be "f32", "f16" or "bf16", got ${kindOf(dtype)}`);
  }
  const expected = elementCount(shape);
  if (data.length !== expected) fail(`shape [${shape}] needs ${expected} elements, data has ${data.length}`);
}

/** WebGPU's bit for buffers that kernels read and write. */
const STORAGE = 0x80;

function checkGpuTensor(value: GpuTensor, fail: (why: string) => never): void {
  const { dtype } = value;
  if (dtype !== "f32" && dtype !== "f16") fail(`dtype must be "f32" or "f16" on the GPU, got ${kindOf(dtype)}`);
  checkGpuStorage(value, elementBytes(dtype), fail);
}

/** What of a tensor on a GPU is checked whatever its elements are. */
type GpuStorage = Pick<GpuTensor, "buffer" | "shape" | "offset" | "strides" | "disposed"> & { readonly dtype: string };

/** Throws unless a buffer holds what a tensor of elements of so many bytes says. */
export function checkGpuStorage(value: GpuStorage, bytes: number, fail: (why: string) => never): void {
  if (value.disposed === true) fail("it was disposed of");
  const { buffer, shape, dtype, offset = 0, strides } = value;
  if (typeof buffer?.size !== "number" || typeof buffer.usage !== "number") {
    fail(`buffer must be a GPUBuffer, got ${kindOf(buffer)}`);
  }
  if (!Number.isSafeInteger(offset) || offset < 0 || offset % bytes !== 0) {
    fail(`offset must be a multiple of ${bytes} bytes for dtype "${dtype}", got ${kindOf(offset)}`);
  }
  if (strides !== undefined) {
    if (!Array.isArray(strides) || strides.length !== shape.length) {
      fail(`strides must hold one number for each of the ${shape.length} axes, got ${kindOf(strides)}`);
    }
    for (const stride of strides) {
      if (!Number.isSafeInteger(stride) || stride < 0) fail(`strides [${strides}] must hold non-negative integers`);
    }
    if (strides.length > 0 && strides[strides.length - 1] !== 1 && shape[shape.length - 1] > 1) {
      fail(`strides [${strides}] must end with 1: rows are contiguous`);
    }
  }
  if ((buffer.usage & STORAGE) === 0) fail(`buffer must have usage STORAGE, got usage 0x${buffer.usage.toString(16)}`);
  const needed = offset + spanElements(value) * bytes;
  // Kernels bind whole words, so that a row of halves of odd length needs a buffer that is padded to one.
  const padded = Math.ceil(needed / 4) * 4;
  if (padded > buffer.size) {
    fail(
      `shape [${shape}] in ${dtype} at offset ${offset} needs a buffer of ${padded} bytes` +
        `${padded === needed ? "" : ` (${needed} rounded up to 4)`}, got ${buffer.size}`,
    );
  }
}

/** Elements from the first to one past the last of a GPU tensor; 0 for an empty one. */
export function spanElements({ shape, strides = denseStrides(shape) }: Pick<GpuStorage, "shape" | "strides">): number {
  if (elementCount(shape) === 0) return 0;
  return shape.reduce((span, axis, i) => span + (axis - 1) * strides[i], 1);
}

/** Whether two elements of a strided tensor may share a place: no axis may begin anew within what inner ones cover. */
export function overlaps({ shape, strides = denseStrides(shape) }: GpuTensor): boolean {
  if (elementCount(shape) === 0) return false;
  const axes = shape.map((length, i) => ({ length, stride: strides[i] })).filter(({ length }) => length > 1)
    .sort((a, b) => a.stride - b.stride);
  let covered = 1;
  for (const { length, stride } of axes) {
    if (stride < covered) return true;
    covered = stride * (length - 1) + covered;
  }
  return false;
}

function isFloat16Array(data: unknown): boolean {
  const known = (globalThis as { Float16Array?: { new (): unknown } }).Float16Array;
  return known !== undefined && data instanceof known;
}

/** What a value is, in words fit for an error message. */
export function kindOf(value: unknown): string {
  if (value === null) return "null";
  if (Array.isArray(value)) return `an array of ${value.length}`;
  if (ArrayBuffer.isView(value)) return value.constructor.name;
  if (typeof value === "object") return "an object";
  return typeof value === "string" ? JSON.stringify(value) : String(value);
}
