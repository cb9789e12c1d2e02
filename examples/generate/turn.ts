// Rotary positions of tokens that are not a text's first. train.ts's model counts positions from 0 in each pass; turning
// what it has turned once more, by the position of the pass's first token, adds the two up.

import { rotary } from "../train/rotary.ts";

/** Cosine and sine of each pair's angle, `[positions, rotated]`. */
export function turns(positions: number, rotated: number): Float32Array {
  // A pair (1, 0) turned by an angle is its cosine and sine.
  const pairs = Float32Array.from({ length: positions * rotated }, (_, i) => 1 - i % 2);
  return rotary(pairs, { heads: 1, width: rotated, rotated, length: positions }).output;
}

/**
 * Turns the last columns of all rows alike.
 *
 * @param x `[rows, width]`.
 * @param width The length of a row.
 * @param turn Cosine and sine for each pair of the last columns: a row of {@link turns}.
 */
export function turned(x: Float32Array, width: number, turn: Float32Array): Float32Array {
  const output = Float32Array.from(x);
  for (let row = width - turn.length; row < x.length; row += width) {
    for (let i = 0; i < turn.length; i += 2) {
      const [cos, sin, at] = [turn[i], turn[i + 1], row + i];
      output[at] = x[at] * cos - x[at + 1] * sin;
      output[at + 1] = x[at] * sin + x[at + 1] * cos;
    }
  }
  return output;
}
