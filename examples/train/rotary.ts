import type { Layer } from "./layer.ts";

/** Which columns of which rows are rotated. */
export interface RotaryShape {
  /** Rows per position: the heads of a query, 1 for the key that all heads share. */
  readonly heads: number;
  /** The length of a row. */
  readonly width: number;
  /** How many columns at the row's end are rotated; even. */
  readonly rotated: number;
  /** Positions per sequence; the rows of one follow those of another. */
  readonly length: number;
}

/**
 * RoPE: turns each pair of the last columns by an angle that grows with the position, so that the product of a query and a
 * key knows how far they are apart.
 *
 * @param x `[sequences, length, heads, width]`.
 * @param shape Its axes.
 */
export function rotary(x: Float32Array, shape: RotaryShape): Layer {
  return { output: turned(x, shape, 1), backward: (gradOutput) => turned(gradOutput, shape, -1) };
}

function turned(x: Float32Array, { heads, width, rotated, length }: RotaryShape, direction: 1 | -1): Float32Array {
  const output = Float32Array.from(x);
  const positions = x.length / (heads * width);
  for (let pair = 0; pair < rotated / 2; pair++) {
    // Wavelengths from 2π to thousands of positions, as in the paper of RoPE (Su et al., 2021).
    const frequency = 10_000 ** (-2 * pair / rotated);
    for (let position = 0; position < positions; position++) {
      const angle = direction * frequency * (position % length);
      const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
      for (let head = 0; head < heads; head++) {
        const at = (position * heads + head + 1) * width - rotated + 2 * pair;
        output[at] = x[at] * cos - x[at + 1] * sin;
        output[at + 1] = x[at] * sin + x[at + 1] * cos;
      }
    }
  }
  return output;
}
