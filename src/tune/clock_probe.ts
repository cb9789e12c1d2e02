// The card's clock is not constant: one idles at 345 MHz, runs at 1980 MHz after seconds of load, and drops again in every
// gap. A probe of known work beside each sample shows what the clock was, so that samples can be brought to one clock.

/** Reads a kernel's probe and remembers what it read. */
export class ClockProbe {
  readonly #probe: () => Promise<number | null>;
  readonly #readings: number[] = [];
  #last: number | null = null;
  #exists = true;

  /**
   * Follows one probe; nothing is read yet.
   *
   * @param probe Runs the probe once; null when the kernel has none.
   */
  constructor(probe: () => Promise<number | null>) {
    this.#probe = probe;
  }

  /** The latest reading in milliseconds, or null when there is none to trust. */
  get last(): number | null {
    return this.#last;
  }

  /** Runs the probe once more. A probe that is missing or throws is not asked again. */
  async read(): Promise<number | null> {
    if (!this.#exists) return null;
    const ms = await this.#probe().catch(() => null);
    if (ms === null) {
      this.#exists = false;
      return this.#last = null;
    }
    if (!(ms > 0 && Number.isFinite(ms))) return this.#last = null;
    this.#readings.push(ms);
    return this.#last = ms;
  }

  /**
   * Brings a sample to the clock that prevailed over the whole run.
   *
   * @param ms The sample as it was read.
   * @param clock The probe's time beside the sample, or null.
   * @returns What the sample would have read while the probe took its median time.
   */
  normalise(ms: number, clock: number | null): number {
    return clock === null ? ms : ms * median(this.#readings) / clock;
  }
}

/** The middle value, or the mean of the two in the middle; NaN for no values. */
export function median(values: readonly number[]): number {
  if (values.length === 0) return NaN;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
