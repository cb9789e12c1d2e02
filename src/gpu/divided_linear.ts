// Linear layers whose weight may be larger than a binding: then it lies in several buffers, each with some of its columns. Each
// is multiplied into memory of its own, from where a copy brings the columns to their place in the rows.

import type { Capabilities } from "./capabilities.ts";
import type { KernelStep, KernelSteps } from "./kernel_steps.ts";
import { rotateStep } from "./layer_steps.ts";
import { linearBytes, type LinearRows, linearSteps, type LinearWeight } from "./linear.ts";
import type { StorageType } from "./operand_layout.ts";

/** A weight in one buffer for each run of its columns. */
export interface DividedWeight extends Omit<LinearWeight, "buffer" | "bias"> {
  /** The runs in order; all but the last have a multiple of {@link columnUnit} columns. */
  readonly runs: readonly LinearWeight[];
}

/** Columns whose elements begin at an offset that a binding may have, in halves and in float32. */
export const columnUnit = 128;

/**
 * How many columns of a weight go to a buffer.
 *
 * @param inputs K.
 * @param outputs N.
 * @param elementBytes Bytes of an element.
 * @param mostBytes What a binding can cover.
 * @returns All of them, or a multiple of {@link columnUnit}; 0 where not even those of one unit fit.
 */
export function columnsOfRun(inputs: number, outputs: number, elementBytes: number, mostBytes: number): number {
  const most = Math.floor(mostBytes / (inputs * elementBytes));
  return outputs <= most ? outputs : Math.floor(most / columnUnit) * columnUnit;
}

/**
 * The dispatches of a linear layer.
 *
 * @param steps Takes the parameters and what is between.
 * @param capabilities The device's.
 * @param label The kernels' name in messages and measurements.
 * @param rows The rows.
 * @param weight The weight.
 * @param result What takes the result, `[rows, outputs]`, dense from the buffer's start on.
 * @throws {FlashMLAError} With code `limit` when rows or results pass a binding or a dispatch is too wide.
 */
export function dividedLinearSteps(
  steps: KernelSteps,
  capabilities: Capabilities,
  label: string,
  rows: LinearRows,
  weight: DividedWeight,
  result: { readonly buffer: GPUBuffer; readonly dtype: StorageType },
): KernelStep[] {
  const { runs, outputs } = weight;
  if (runs.length === 1) return linearSteps(steps, capabilities, label, rows, runs[0], result);
  const { count } = rows;
  const { dtype } = result;
  // Dispatches run one after another: all runs take the same memory.
  const between = steps.borrow(linearBytes(count, runs[0], dtype));
  let first = 0;
  return runs.flatMap((run) => {
    const columns = run.outputs;
    const work = {
      source: { buffer: between, dtype, base: 0, row: columns },
      result: { ...result, row: outputs, first },
      ...{ count, heads: 1, before: columns, dim: 0, layout: null, turns: null, factors: null },
    };
    first += columns;
    return [
      ...linearSteps(steps, capabilities, label, rows, run, { buffer: between, dtype }),
      rotateStep(steps, label, work, capabilities.limits),
    ];
  });
}
