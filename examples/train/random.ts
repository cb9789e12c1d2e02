// Random numbers whose whole state is four integers, so that a checkpoint can keep it: xoshiro128** by Blackman and Vigna
// (2018), seeded through SplitMix32.

/** A generator; the same seed gives the same numbers in every runtime. */
export class Random {
  /** The state, `[4]`. */
  readonly state: Uint32Array;

  /**
   * Starts from a seed, or goes on from a state that another generator left.
   *
   * @param seed An integer, or four words of state.
   */
  constructor(seed: number | Uint32Array) {
    this.state = typeof seed === "number" ? seededState(seed) : Uint32Array.from(seed);
  }

  /** 32 random bits. */
  bits(): number {
    const s = this.state;
    const result = Math.imul(rotateLeft(Math.imul(s[1], 5), 7), 9) >>> 0;
    const shifted = s[1] << 9;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= shifted;
    s[3] = rotateLeft(s[3], 11);
    return result;
  }

  /** Uniform in [0, 1). */
  uniform(): number {
    return this.bits() / 2 ** 32;
  }

  /** An integer in [0, limit). */
  below(limit: number): number {
    return Math.floor(this.uniform() * limit);
  }

  /** Standard normal, by Box and Muller. */
  normal(): number {
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
    return radius * Math.cos(2 * Math.PI * this.uniform());
  }
}

function seededState(seed: number): Uint32Array {
  let counter = seed | 0;
  return Uint32Array.from({ length: 4 }, () => {
    counter = (counter + 0x9e3779b9) | 0;
    let word = Math.imul(counter ^ (counter >>> 16), 0x21f0aaad);
    word = Math.imul(word ^ (word >>> 15), 0x735a2d97);
    return word ^ (word >>> 15);
  });
}

function rotateLeft(word: number, by: number): number {
  return (word << by) | (word >>> (32 - by));
}
