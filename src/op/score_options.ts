// What the options that change the scores may be: bias and mask, sinks, soft cap, window and dropout.

import type { Dropout, DropoutOptions } from "./dropout.ts";
import { cannotRun as fail } from "./errors.ts";
import type { MlaMathOptions, MlaProblem } from "./mla_problem.ts";
import { type AnyMask, type AnyTensor, checkMask, checkTensor, kindOf } from "./tensor.ts";

/** A bias at or below this hides its key, as minus infinity does: programs mask with the lowest float32, too. */
export const hidingBias = -2e38;

/** Checks the shape of a bias or mask. */
export function checkScoreTerm(
  name: "bias" | "attentionMask",
  value: AnyTensor | AnyMask,
  scores: Pick<MlaProblem, "batch" | "queryHeads" | "queryLength" | "keyLength">,
): void {
  if (name === "bias") checkTensor(name, value as AnyTensor);
  else checkMask(name, value as AnyMask);
  const { batch, queryHeads, queryLength, keyLength } = scores;
  const { shape } = value;
  const fits = shape.length === 4 && [1, batch].includes(shape[0]) && [1, queryHeads].includes(shape[1]) &&
    shape[2] === queryLength && shape[3] === keyLength;
  if (fits) return;
  const or1 = (n: number) => n === 1 ? "1" : `1 or ${n}`;
  fail(
    `${name} has shape [${shape.join(", ")}], expected [batch ${or1(batch)}, queryHeads ${or1(queryHeads)}, ` +
      `queryLength ${queryLength}, keyLength ${keyLength}]`,
  );
}

/** The sinks of each head; `refuse` throws, saying what is wrong with the tensor. */
export function checkSinks(
  softmaxAux: AnyTensor,
  queryHeads: number,
  refuse: (why: string) => never = fail,
): number {
  checkTensor("softmaxAux", softmaxAux);
  const { shape } = softmaxAux;
  const [first, last] = [shape[0], shape[shape.length - 1]];
  if (shape.length === 1) return first === queryHeads ? 1 : first;
  if (shape.length === 2 && [1, queryHeads].includes(first)) return last;
  return refuse(
    `softmaxAux has shape [${shape.join(", ")}], expected [n] shared by all heads, [${queryHeads}] one per head, ` +
      `[${queryHeads}, n] or [1, n]`,
  );
}

/** Whether every head has sinks of its own; otherwise all heads share them. */
export function sinksPerHead(shape: readonly number[], queryHeads: number): boolean {
  return shape[0] === queryHeads && (shape.length === 2 || queryHeads !== 1);
}

/** The soft cap; null without one. */
export function checkSoftCap(cap: number | undefined): number | null {
  if (cap === undefined) return null;
  if (typeof cap === "number" && cap > 0 && Number.isFinite(Math.fround(cap)) && Math.fround(cap) > 0) return cap;
  return fail(`logitsSoftCap must be a finite float32 number above 0, got ${kindOf(cap)}`);
}

/** The keys that a query sees to either side; null without a window. */
export function checkWindow(window: MlaMathOptions["slidingWindow"]): MlaProblem["slidingWindow"] {
  if (window === undefined) return null;
  if (typeof window === "number") {
    if (Number.isSafeInteger(window) && window > 0) return [window, window];
    return fail(`slidingWindow must be a whole number above 0 or a pair [left, right], got ${window}`);
  }
  if (!Array.isArray(window) || window.length !== 2) {
    return fail(`slidingWindow must be a whole number above 0 or a pair [left, right], got ${kindOf(window)}`);
  }
  for (const side of window) {
    if (!Number.isSafeInteger(side) || side < 0) {
      fail(`slidingWindow [${window.map(kindOf).join(", ")}] must hold whole numbers from 0`);
    }
  }
  return [window[0], window[1]];
}

/** The dropout; null without one or with rate 0. */
export function checkDropout(dropout: DropoutOptions | undefined): Dropout | null {
  if (dropout === undefined) return null;
  if (typeof dropout !== "object" || dropout === null) {
    fail(`dropout must be { rate, seed }, got ${kindOf(dropout)}`);
  }
  const { rate, seed } = dropout;
  if (typeof rate !== "number" || !(rate >= 0 && rate < 1)) {
    fail(`dropout.rate must be from 0 up to but not including 1, got ${kindOf(rate)}`);
  }
  if (!Number.isSafeInteger(seed) || seed < 0) {
    fail(`dropout.seed must be a whole number from 0 to 2^53 - 1, got ${kindOf(seed)}`);
  }
  return rate === 0 ? null : { rate, seed, firstItem: 0, firstPosition: 0 };
}
