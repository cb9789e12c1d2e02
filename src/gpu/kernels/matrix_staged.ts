// What the backward kernels on matrix units stream beside keys and values: queries and ∂out in halves, every row a whole
// number of fragments, behind a header that says how they were scaled.
//
//   header   quad 0: ∂out's factor's inverse, ∂s's factor, its inverse, ∂out's factor; then the maxima that decided them
//   queries  [rows, Hq, paddedP + paddedR]     ∂out  [rows, Hq, paddedV]      rows of the query range
//
// Gradients may be as small as a mean over many tokens makes them, and halves end at 6e-8: ∂out is multiplied by the power
// of two that brings its largest element to 2^14 … 2^15, and ∂s, which is smaller than half of what ∂out · V can be, by the
// one that brings that bound to 2^15. Both are undone in float32. What may still pass the largest half becomes that.

import { paddedWidth } from "./matrix_scratch.ts";
import type { HeadWidths } from "./matrix_scratch.ts";

/** Maxima of ∂out and of the values that are kept side by side, one of a workgroup each. */
export const maximaOfEach = 256;

/** Quads of the header. */
export const headerQuads: number = 1 + 2 * maximaOfEach / 4;

/** Bytes of the staged rows and their header. */
export function stagedBytes(widths: HeadWidths, rows: number, queryHeads: number): number {
  const width = paddedWidth(widths.qkNopeHeadDim) + paddedWidth(widths.qkRopeHeadDim) + paddedWidth(widths.vHeadDim);
  return 16 * headerQuads + 2 * rows * queryHeads * width;
}
