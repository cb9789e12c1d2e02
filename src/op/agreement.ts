// How near two results of one call must be when they come from different configurations: nearer than rounding is apart,
// further apart than a mistake is near.

import { toFloats } from "./half.ts";
import type { MlaGradients } from "./mla_gradients.ts";
import { type MlaProblem, tensorNames } from "./mla_problem.ts";
import { type AnyTensor, isGpuTensor } from "./tensor.ts";

/** What decides how near results must be. */
export type Roundings = Pick<MlaProblem, "dtype"> & Partial<Pick<MlaProblem, "precision">>;

/** Whether two results agree. */
export interface Agreement {
  /** Whether they do. */
  readonly ok: boolean;
  /** The metric and its value. */
  readonly detail: string;
}

/**
 * relL2 between two outputs above which one is wrong, not merely rounded. With halves, matrix units round expanded keys and
 * values, and probabilities, to them: 3e-4 together.
 */
const outputBounds = { f32: 1e-4, f16: 3e-3 };

/**
 * The same for gradients. In float32 it is what a gradient may be off from the exact one. Halves are allowed what a result
 * in them may be off: probabilities, their gradients and the result are each rounded once more, some 3e-4 apiece, and a
 * tile that is left out of a sum shows as 1e-2 and more.
 */
const gradientBounds = { f32: 3e-4, f16: 3e-3 };

/**
 * The share of the bound that each element is allowed relative to those of the latents' gradient, whose part through the
 * values does not cancel. Where a row sees one key its other gradients are zero but for rounding.
 */
const cancelled = 1e-2;

/**
 * Compares two outputs by ‖candidate − best‖ / ‖best‖; non-finite elements must stand in the same places.
 *
 * @param candidate An output.
 * @param best The best known one.
 * @param problem The call's element types; float32 when absent.
 * @param onUnits Whether either may be of matrix units, which take the leave that the problem's precision gives.
 */
export function outputsAgree(
  candidate: AnyTensor,
  best: AnyTensor,
  problem?: Roundings,
  onUnits = true,
): Agreement {
  if (isGpuTensor(candidate) || isGpuTensor(best)) return { ok: true, detail: "not compared: it stayed on the GPU" };
  const found = distance(toFloats(candidate).data, toFloats(best).data, "output");
  if (typeof found === "string") return { ok: false, detail: found };
  const error = relative(found);
  return {
    ok: error <= outputBounds[problem === undefined ? "f32" : elements(problem, onUnits)],
    detail: `relL2 ${error.toExponential(2)} against the best known output`,
  };
}

/**
 * Compares gradients tensor by tensor in the same way.
 *
 * @param problem The call's dimensions and element types.
 * @param candidate Gradients.
 * @param best The best known ones.
 * @param onUnits Whether either may be of matrix units.
 * @returns Whether all agree, and the tensor that is furthest apart.
 */
export function gradientsAgree(
  problem: MlaProblem,
  candidate: MlaGradients,
  best: MlaGradients,
  onUnits = true,
): Agreement {
  const bound = gradientBounds[elements(problem, onUnits)];
  const floor = bound * cancelled * meanSquareRoot(best.keyValue);
  let furthest = { name: "", error: -1 };
  for (const name of tensorNames) {
    const expected = best[name];
    if (expected === undefined) continue;
    const got = candidate[name];
    if (got === undefined) return { ok: false, detail: `${name} is missing` };
    if (isGpuTensor(got) || isGpuTensor(expected)) {
      return { ok: true, detail: `not compared: ${name} stayed on the GPU` };
    }
    const found = distance(toFloats(got).data, toFloats(expected).data, "gradient");
    if (typeof found === "string") return { ok: false, detail: `${name}: ${found}` };
    const error = relative(found);
    if (error > bound && found.difference > floor * Math.sqrt(found.count)) {
      return { ok: false, detail: `${name}: relL2 ${error.toExponential(2)} against the best known gradient` };
    }
    if (error > furthest.error) furthest = { name, error };
  }
  return { ok: true, detail: `relL2 at most ${furthest.error.toExponential(2)} (${furthest.name})` };
}

interface Distance {
  readonly difference: number;
  readonly norm: number;
  readonly count: number;
}

/** Euclidean distance and length over the finite elements; in words where an element is finite in one alone. */
function distance(got: Float32Array, expected: Float32Array, what: string): Distance | string {
  if (got.length !== expected.length) {
    return `${got.length} elements where the best known ${what} has ${expected.length}`;
  }
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < expected.length; i++) {
    if (Number.isFinite(expected[i]) !== Number.isFinite(got[i])) {
      return `element ${i} is ${got[i]} where the best known ${what} has ${expected[i]}`;
    }
    if (!Number.isFinite(expected[i])) continue;
    difference += (got[i] - expected[i]) ** 2;
    norm += expected[i] ** 2;
  }
  return { difference: Math.sqrt(difference), norm: Math.sqrt(norm), count: expected.length };
}

function relative({ difference, norm }: Distance): number {
  return norm === 0 ? difference : difference / norm;
}

function meanSquareRoot(tensor: AnyTensor): number {
  if (isGpuTensor(tensor)) return 0;
  const values = toFloats(tensor).data;
  let sum = 0;
  for (const value of values) if (Number.isFinite(value)) sum += value * value;
  return Math.sqrt(sum / Math.max(1, values.length));
}

/** The coarsest element type of a call, of its tensors or of what they are rounded to. */
function elements({ dtype, precision }: Roundings, onUnits: boolean): "f32" | "f16" {
  if (precision === "f16" && onUnits) return "f16";
  const halves = typeof dtype === "string" ? dtype === "f16" : Object.values(dtype).includes("f16");
  return halves ? "f16" : "f32";
}
