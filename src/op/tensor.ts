import { FlashMLAError } from "./errors.ts";

/** A dense, row-major host tensor. A plain `{ data, shape }` literal is one. */
export interface Tensor {
  /** The elements, last axis fastest; its length is the product of `shape`. */
  readonly data: Float32Array;
  /** The axis lengths; zero is legal. */
  readonly shape: readonly number[];
}

/**
 * Makes a {@link Tensor} and checks that the data fill the shape exactly. Nothing is copied.
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
 * console.log(query.shape.length); // 4
 * ```
 */
export function tensor(data: Float32Array, shape: readonly number[]): Tensor {
  const made = { data, shape: [...shape] };
  checkTensor("data", made);
  return made;
}

/** The number of elements that a shape holds; 1 for the empty shape. */
export function elementCount(shape: readonly number[]): number {
  return shape.reduce((product, axis) => product * axis, 1);
}

/** Throws unless `value` is a tensor whose data fill its shape; `name` is the argument to blame. */
export function checkTensor(name: string, value: Tensor): void {
  const fail = (why: string) => {
    throw new FlashMLAError("invalid-input", `Cannot use ${name} as a tensor: ${why}`);
  };
  if (typeof value !== "object" || value === null || !Array.isArray(value.shape)) {
    fail(`expected { data: Float32Array, shape: number[] }, got ${kindOf(value)}`);
  }
  if (!(value.data instanceof Float32Array)) fail(`data must be a Float32Array, got ${kindOf(value.data)}`);
  for (const axis of value.shape) {
    if (!Number.isSafeInteger(axis) || axis < 0) {
      fail(`shape [${value.shape}] must hold non-negative integers, got ${axis}`);
    }
  }
  const expected = elementCount(value.shape);
  if (value.data.length !== expected) {
    fail(`shape [${value.shape}] needs ${expected} elements, data has ${value.data.length}`);
  }
}

/** What a value is, in words fit for an error message. */
export function kindOf(value: unknown): string {
  if (value === null) return "null";
  if (Array.isArray(value)) return `an array of ${value.length}`;
  if (ArrayBuffer.isView(value)) return value.constructor.name;
  if (typeof value === "object") return "an object";
  return typeof value === "string" ? JSON.stringify(value) : String(value);
}
