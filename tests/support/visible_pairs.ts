// Which query sees which key, straight from the definitions, one pair at a time: nothing of the library decides it.

import type { MlaInputs, MlaMathOptions } from "../../src/op/mla_problem.ts";
import type { AnyMask, MaskTensor } from "../../src/op/tensor.ts";

/** What decides it, of a call's tensors. */
export interface VisibleInputs {
  readonly query: { readonly shape: readonly number[] };
  readonly keyValue: { readonly shape: readonly number[] };
  readonly cuSeqlens?: MlaInputs["cuSeqlens"];
  readonly bias?: Term;
  readonly attentionMask?: AnyMask;
}

interface Term {
  readonly data: ArrayLike<number>;
  readonly shape: readonly number[];
}

/** Whether query `i` of head `head` sees key `j`, both counted within batch item `item`. */
export type Sees = (item: number, head: number, i: number, j: number) => boolean;

/** By window, causal mask and packed sequences alone: whatever a bias or a mask says. */
export function seesByPosition(
  { query, keyValue, cuSeqlens }: VisibleInputs,
  { causal = false, slidingWindow }: Pick<MlaMathOptions, "causal" | "slidingWindow">,
): (i: number, j: number) => boolean {
  const later = keyValue.shape[1] - query.shape[1];
  const window = typeof slidingWindow === "number" ? [slidingWindow, slidingWindow] : slidingWindow;
  return (i, j) => {
    if (cuSeqlens !== undefined && sequenceOf(cuSeqlens, i) !== sequenceOf(cuSeqlens, j)) return false;
    // Packed sequences have as many queries as keys, so the last query stands on the last key in each of them.
    const position = i + later;
    if (causal && j > position) return false;
    return window === undefined || (position - j <= window[0] && j - position <= window[1]);
  };
}

/** By everything: a bias of minus infinity hides, and without a bias a zero in the mask does. */
export function sees(inputs: VisibleInputs, options: MlaMathOptions): Sees {
  const byPosition = seesByPosition(inputs, options);
  const { bias } = inputs;
  const mask = inputs.attentionMask as MaskTensor | undefined;
  return (item, head, i, j) => {
    if (!byPosition(i, j)) return false;
    if (bias !== undefined) return termAt(bias, item, head, i, j) > -2e38;
    return mask === undefined || termAt(mask, item, head, i, j) !== 0;
  };
}

/** The element of a mask or bias that belongs to a pair, where the first axes may be 1. */
export function termAt({ data, shape }: Term, item: number, head: number, i: number, j: number): number {
  const [batch, heads, queries, keys] = shape;
  return data[(((batch === 1 ? 0 : item) * heads + (heads === 1 ? 0 : head)) * queries + i) * keys + j];
}

function sequenceOf(cuSeqlens: NonNullable<MlaInputs["cuSeqlens"]>, position: number): number {
  for (let n = 0; n + 1 < cuSeqlens.length; n++) {
    if (cuSeqlens[n] <= position && position < cuSeqlens[n + 1]) return n;
  }
  return -1;
}
