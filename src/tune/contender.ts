import type { CandidateTiming } from "../cache/cache_record.ts";
import { type ClockProbe, median } from "./clock_probe.ts";
import type { TrialOptions } from "../op/implementation.ts";
import { messageOf } from "./descent.ts";
import type { Invocation } from "./invocation.ts";
import type { Kernel, Trial } from "./kernel.ts";

/** How long and how often one candidate is timed. */
export interface TimingLimits {
  /** At most this many single runs before timing. */
  readonly warmup: number;
  /** At most this many samples. */
  readonly iters: number;
  /** Milliseconds that one candidate may take to warm up and be timed. */
  readonly budgetMs: number;
  /** Shortest sample under the host clock, in milliseconds. */
  readonly minSampleMs: number;
  /** Shortest sample under timestamp queries, in milliseconds. */
  readonly minTimestampMs: number;
  /** The host clock, in milliseconds. */
  readonly now: () => number;
}

/** The coarsest step seen in the host clock. All candidates share it, so that their samples are alike. */
export interface ClockGrain {
  /** In milliseconds; grows as coarser steps are seen. */
  ms: number;
}

// A reading of the host clock is off by up to one step: samples of 10 steps are good to a few percent each.
const GRAINS_PER_SAMPLE = 10;
// Repeats grow fourfold until a sample is long enough: a candidate 50 times slower than another never runs away.
const GROWTH = 4;
const MAX_REPEATS = 1 << 14;

/** One candidate on its way through the tuner: made ready, checked, warmed up, timed, and released. */
export class Contender<Cfg, Out, Gradients> {
  /** The candidate. */
  readonly cfg: Cfg;
  readonly #limits: TimingLimits;
  readonly #grain: ClockGrain;
  readonly #samples: { readonly ms: number; readonly clock: number | null }[] = [];
  #trial: Trial<Out, Gradients> | null = null;
  #timingMethod: "timestamp" | "wall" = "wall";
  #runMs = 0;
  #spentMs = 0;
  #rejected: string | null = null;
  #failure: unknown = null;

  /**
   * Enters a candidate; it is not compiled yet.
   *
   * @param cfg The candidate.
   * @param limits How long and how often it is timed.
   * @param grain The step of the clock, shared with the other candidates.
   */
  constructor(cfg: Cfg, limits: TimingLimits, grain: ClockGrain) {
    this.cfg = cfg;
    this.#limits = limits;
    this.#grain = grain;
  }

  /** How many samples there are. */
  get samples(): number {
    return this.#samples.length;
  }

  /** Why it was rejected, or null. */
  get rejected(): string | null {
    return this.#rejected;
  }

  /** What it threw, when that is why it was rejected. */
  get failure(): unknown {
    return this.#failure;
  }

  /** How its samples were timed. */
  get timingMethod(): "timestamp" | "wall" {
    return this.#timingMethod;
  }

  /** Whether its samples or its time are used up. */
  get done(): boolean {
    return this.samples >= this.#limits.iters || this.#spentMs >= this.#limits.budgetMs;
  }

  /** Compiles the candidate, its gradients too if they are wanted; a failure rejects it. */
  async prepare<Call>(
    kernel: Kernel<Call, Cfg, Out, unknown, Gradients>,
    invocation: Invocation<Call>,
    options: TrialOptions,
  ): Promise<void> {
    try {
      kernel.checkCfg(invocation, this.cfg);
      this.#trial = await kernel.trial(invocation, this.cfg, options);
      this.#timingMethod = this.#trial.timingMethod;
    } catch (error) {
      this.fail(error);
    }
  }

  /** Runs the candidate once and returns its result. */
  output(): Promise<Out> {
    return this.#ready().output();
  }

  /** Runs the candidate backward once and returns its gradients. */
  async gradients(): Promise<Gradients> {
    const trial = this.#ready();
    if (trial.gradients === undefined) throw new Error("its trial has no gradients");
    return await trial.gradients();
  }

  /** Runs the candidate until it is warm, and finds out how many runs make a sample. */
  async warmUp(): Promise<void> {
    const { warmup, budgetMs } = this.#limits;
    for (let run = 0; run < warmup && this.#spentMs < budgetMs / 4; run++) this.#runMs = await this.#time(1);
    if (this.#spentMs < budgetMs) await this.#calibrate();
    // A run this slow (a software adapter takes seconds) is its own sample: there is no time for another.
    if (this.#spentMs >= budgetMs) this.#samples.push({ ms: this.#runMs, clock: null });
  }

  /** Takes one sample, with the probe's time before and after it. */
  async sample(probe: ClockProbe): Promise<void> {
    const repeats = Math.min(MAX_REPEATS, Math.max(1, Math.ceil(this.#sampleMs() / this.#runMs)));
    const before = probe.last;
    const ms = await this.#time(repeats) / repeats;
    const after = await probe.read();
    const clock = before === null || after === null ? after ?? before : (before + after) / 2;
    this.#samples.push({ ms, clock });
  }

  /** The median of its samples in milliseconds a run, at the clock that prevailed; NaN without a sample. */
  medianMs(probe: ClockProbe): number {
    return median(this.#samples.map(({ ms, clock }) => probe.normalise(ms, clock)));
  }

  /** Takes the candidate out of the race; its samples no longer count. */
  reject(reason: string): void {
    this.#rejected ??= reason;
    this.#samples.length = 0;
  }

  /** Rejects the candidate for what it threw. */
  fail(error: unknown): void {
    this.#failure = error;
    this.reject(messageOf(error));
  }

  /** Its shortest sample, at the clock that prevailed: what it can do at best. */
  shortestMs(probe: ClockProbe): number {
    return Math.min(...this.#samples.map(({ ms, clock }) => probe.normalise(ms, clock)));
  }

  /** How it fared. */
  timing(probe: ClockProbe): CandidateTiming<Cfg> {
    const ms = this.samples === 0 ? null : this.medianMs(probe);
    return { cfg: this.cfg, ms, samples: this.samples, rejected: this.#rejected };
  }

  /** Frees what the trial holds; calling it twice does no harm. */
  release(): void {
    const trial = this.#trial;
    this.#trial = null;
    try {
      trial?.dispose();
    } catch {
      // A trial on a lost device may not be able to free itself; the other trials must still be.
    }
  }

  async #calibrate(): Promise<void> {
    const { budgetMs } = this.#limits;
    const wall = this.#timingMethod === "wall";
    let repeats = 1;
    let ms = await this.#time(repeats);
    // Under the host clock a run may seem long only because the host waits: it is believed once more work took longer.
    const doubtful = () => wall && repeats === 1 && ms < budgetMs / 8;
    while ((ms < this.#sampleMs() || doubtful()) && repeats < MAX_REPEATS && this.#spentMs < budgetMs / 2) {
      repeats *= GROWTH;
      let longer = await this.#time(repeats);
      if (wall) {
        // The lower of two: a disturbance must not pass for a coarse clock, which would leave time for few samples.
        longer = Math.min(longer, await this.#time(repeats));
        // What more work did not lengthen is the clock's own step, or a wait for it: Deno polls the device every 10 ms.
        const step = ms === 0 ? longer : (GROWTH * ms - longer) / (GROWTH - 1);
        this.#grain.ms = Math.max(this.#grain.ms, step);
      }
      ms = longer;
    }
    this.#runMs = (ms > 0 ? ms : this.#sampleMs()) / repeats;
  }

  /** How long a sample must be: well above the clock's step, and short enough for three of them. */
  #sampleMs(): number {
    const { minSampleMs, minTimestampMs, budgetMs } = this.#limits;
    if (this.#timingMethod === "timestamp") return minTimestampMs;
    return Math.max(minSampleMs, Math.min(GRAINS_PER_SAMPLE * this.#grain.ms, budgetMs / 3));
  }

  async #time(repeats: number): Promise<number> {
    let ms = NaN;
    // Timestamps may run backwards once in a while, when the device's counter is reset: a second reading decides.
    for (let attempt = 0; attempt < 2 && !(ms >= 0 && Number.isFinite(ms)); attempt++) {
      const start = this.#limits.now();
      ms = await this.#ready().time(repeats);
      this.#spentMs += this.#limits.now() - start;
    }
    if (!(ms >= 0 && Number.isFinite(ms))) throw new Error(`its clock read ${ms} ms`);
    return ms;
  }

  #ready(): Trial<Out, Gradients> {
    if (this.#trial === null) throw new Error("the candidate is not ready");
    return this.#trial;
  }
}
