// Which attention probabilities a dropout drops: a counter-based generator, so that the answer for one element depends on
// its place alone. Every platform and tiling, forward and backward, draws the same bits.
//
//   key(b, h)    = Threefry-2x32-20(seed, (b, h))
//   bits(i, j)   = first word of Threefry-2x32-20(key(b, h), (i, j))       i query, j key, positions in the batch item
//   kept(i, j)   = bits(i, j) ≥ ⌊rate · 2^32⌉                              a kept probability is divided by 1 − rate
//
// Threefry: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. It needs additions,
// rotations and exclusive ors alone, all of which WGSL has; Philox needs the upper half of 32-bit products.

/** Dropout of attention probabilities, after the softmax. */
export interface DropoutOptions {
  /** The share of probabilities that are dropped, from 0 up to but not including 1. */
  readonly rate: number;
  /** Decides which ones: a non-negative safe integer. */
  readonly seed: number;
}

/** A validated dropout, and where a piece of a call lies in the whole: positions count through the whole call. */
export interface Dropout extends DropoutOptions {
  /** Batch item of the whole call that the piece's first one is. */
  readonly firstItem: number;
  /** Position in the whole batch item of the piece's first one. */
  readonly firstPosition: number;
}

/** Two words. */
export type Words = readonly [number, number];

/** Rotations of Threefry-2x32, in turn. */
export const threefryRotations: readonly number[] = [13, 15, 26, 6, 17, 29, 16, 24];

/** The parity constant of Threefry's key schedule. */
export const threefryParity = 0x1bd11bda;

/** Threefry-2x32 with 20 rounds. */
export function threefry2x32([key0, key1]: Words, [counter0, counter1]: Words): Words {
  const schedule = [key0, key1, key0 ^ key1 ^ threefryParity];
  let x0 = (counter0 + key0) | 0;
  let x1 = (counter1 + key1) | 0;
  for (let round = 0; round < 20; round++) {
    const by = threefryRotations[round % 8];
    x0 = (x0 + x1) | 0;
    x1 = ((x1 << by) | (x1 >>> (32 - by))) ^ x0;
    if (round % 4 !== 3) continue;
    const group = (round + 1) / 4;
    x0 = (x0 + schedule[group % 3]) | 0;
    x1 = (x1 + schedule[(group + 1) % 3] + group) | 0;
  }
  return [x0 >>> 0, x1 >>> 0];
}

/** A seed as a key. */
export function seedWords(seed: number): Words {
  return [seed % 2 ** 32, Math.floor(seed / 2 ** 32)];
}

/** The words from which on an element is kept. */
export function dropoutThreshold(rate: number): number {
  return Math.min(2 ** 32 - 1, Math.round(rate * 2 ** 32));
}

/**
 * The factors of one head's probabilities: 0 for those that are dropped, 1 / (1 − rate) for the others.
 *
 * @param dropout The dropout.
 * @param item Batch item within the piece.
 * @param head Query head.
 * @returns A function of the query's and the key's position within the piece's batch item.
 */
export function dropoutFactors(
  { rate, seed, firstItem, firstPosition }: Dropout,
  item: number,
  head: number,
): (query: number, key: number) => number {
  const headKey = threefry2x32(seedWords(seed), [firstItem + item, head]);
  const threshold = dropoutThreshold(rate);
  return (query, key) => {
    const [bits] = threefry2x32(headKey, [firstPosition + query, firstPosition + key]);
    return bits >= threshold ? 1 / (1 - rate) : 0;
  };
}
