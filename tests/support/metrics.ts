// How far a result is from the expected one. Sums run over the elements that are finite in both, in double precision;
// NaN and infinities have no distance: they must stand at the same positions, or the difference is infinite.

import { toFloats } from "../../src/op/half.ts";
import { type AnyTensor, isGpuTensor, type Tensor } from "../../src/op/tensor.ts";
import { AssertionError } from "@std/assert";
import { noteError } from "./worst_errors.ts";

/**
 * The relative Euclidean distance ‖actual − expected‖ / ‖expected‖.
 *
 * @param actual The values to judge.
 * @param expected The values to judge by.
 * @returns 0 for equal values; infinite when the lengths or the non-finite positions differ, or when `expected` is all
 * zero and `actual` is not.
 */
export function relL2(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (firstStructuralDifference(actual, expected) !== null) return Infinity;
  const { error, norm } = squares(actual, expected);
  return error === 0 ? 0 : Math.sqrt(error / norm);
}

/**
 * The cosine-like difference 1 − 2·Σxy / Σ(x² + y²): near zero when direction and length both agree.
 *
 * @param actual The values to judge.
 * @param expected The values to judge by.
 * @returns 0 for equal values and wherever Σ expected² < 1e-12; infinite when the lengths or the non-finite positions
 * differ.
 */
export function cosDiff(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (firstStructuralDifference(actual, expected) !== null) return Infinity;
  const { error, norm, both } = squares(actual, expected);
  // Σ(x² + y²) − 2Σxy = Σ(x − y)²: the same quantity without the cancellation.
  return norm < 1e-12 ? 0 : error / both;
}

/** The largest differences that {@link assertClose} accepts; a bound that is absent is not checked. */
export interface Bounds {
  /** Bound on {@link relL2}. */
  readonly relL2?: number;
  /** Bound on {@link cosDiff}. */
  readonly cosDiff?: number;
  /** Added to the relL2 bound as an error per element (root mean square), for results that cancel to almost nothing. */
  readonly absolute?: number;
}

/**
 * Throws unless two tensors have the same shape, the same non-finite positions and differ by less than the bounds.
 *
 * @param result The tensor to judge, of any element type, on the host.
 * @param expected The tensor to judge by.
 * @param bounds What is tolerated; a `relL2` of 0 asks for equal values.
 * @param what What is compared, for the message.
 */
export function assertClose(result: AnyTensor, expected: Tensor, bounds: Bounds, what = "result"): void {
  const fail: (why: string) => never = (why) => {
    throw new AssertionError(`${what}: ${why}`);
  };
  if (isGpuTensor(result)) fail("it lies on the GPU");
  const actual = toFloats(result);
  if (actual.shape.join() !== expected.shape.join()) fail(`shape [${actual.shape}], expected [${expected.shape}]`);
  const structural = firstStructuralDifference(actual.data, expected.data);
  if (structural !== null) fail(structural);

  const { error, norm, worst } = squares(actual.data, expected.data);
  const where = `; worst at [${indexOf(worst, actual.shape)}]: ${actual.data[worst]}, expected ${expected.data[worst]}`;
  if (bounds.relL2 !== undefined) {
    const allowed = bounds.relL2 * Math.sqrt(norm) + (bounds.absolute ?? 0) * Math.sqrt(actual.data.length);
    const relative = relL2(actual.data, expected.data);
    if (!(Math.sqrt(error) <= allowed)) fail(`relL2 ${relative} > ${bounds.relL2}${where}`);
    if (bounds.absolute === undefined) noteError("relL2", relative, bounds.relL2);
    else noteError(`error over relL2 ${bounds.relL2} + ${bounds.absolute} an element`, Math.sqrt(error) / allowed, 1);
  }
  if (bounds.cosDiff !== undefined) {
    const got = cosDiff(actual.data, expected.data);
    if (!(got <= bounds.cosDiff)) fail(`cosDiff ${got} > ${bounds.cosDiff}${where}`);
    noteError("cosDiff", got, bounds.cosDiff);
  }
}

function firstStructuralDifference(actual: ArrayLike<number>, expected: ArrayLike<number>): string | null {
  if (actual.length !== expected.length) return `${actual.length} elements, expected ${expected.length}`;
  for (let i = 0; i < actual.length; i++) {
    const comparable = Number.isFinite(actual[i]) && Number.isFinite(expected[i]);
    if (!comparable && !Object.is(actual[i], expected[i])) {
      return `${actual[i]} at element ${i}, expected ${expected[i]}`;
    }
  }
  return null;
}

function squares(actual: ArrayLike<number>, expected: ArrayLike<number>) {
  let error = 0, norm = 0, both = 0, worst = 0, worstError = -1;
  for (let i = 0; i < actual.length; i++) {
    const [x, y] = [actual[i], expected[i]];
    if (!Number.isFinite(x)) continue;
    const difference = (x - y) ** 2;
    error += difference;
    norm += y * y;
    both += x * x + y * y;
    if (difference > worstError) [worst, worstError] = [i, difference];
  }
  return { error, norm, both, worst };
}

function indexOf(element: number, shape: readonly number[]): number[] {
  const index: number[] = [];
  for (const axis of shape.toReversed()) {
    index.unshift(element % axis);
    element = Math.floor(element / axis);
  }
  return index;
}
