// One tuning: every candidate made ready and checked, then timed against the others in rounds.

import type { CacheRecord, CandidateTiming } from "../cache/cache_record.ts";
import { FlashMLAError } from "../op/errors.ts";
import { ClockProbe } from "./clock_probe.ts";
import { type ClockGrain, Contender, type TimingLimits } from "./contender.ts";
import { messageOf } from "./descent.ts";
import type { Invocation } from "./invocation.ts";
import type { Kernel } from "./kernel.ts";
import { LIBRARY_VERSION } from "./library_version.ts";

/** The bounds of one tuning. */
export interface TuningLimits extends TimingLimits {
  /** Milliseconds for all candidates together, compilation included. */
  readonly totalBudgetMs: number;
  /** How many candidates compile at the same time. */
  readonly parallelTrials: number;
  /** Whether gradients are checked, and timed with the rest. */
  readonly backward: boolean;
}

/** The reason recorded for a candidate that there was no time for. */
export const TIME_BUDGET = "time budget";

// New candidates are admitted during this part of the total budget; what is left is for timing those that were.
const ADMISSION_SHARE = 0.7;
// A batch of candidates is not begun when it would probably compile past this part: engines that compile one kernel after
// another take seconds for a batch, and then nothing was left for timing.
const COMPILING_SHARE = 0.9;
// A candidate leaves the race once the shortest of so many samples is so many times the best median: the shortest, since a
// single disturbance must not cost a good candidate its place.
const DROP_RULES = [{ samples: 2, ratio: 2 }, { samples: 8, ratio: 1.25 }];
// One candidate left over has nobody to be compared with: a few samples give its time.
const SAMPLES_ALONE = 3;

/** The configurations of a tuning. */
export interface Candidates<Cfg> {
  /** All of them, the heuristic's first: where time runs out, it is what is left. */
  readonly ordered: readonly Cfg[];
  /** One of them, against whose results the others are checked. */
  readonly baseline: Cfg;
}

/** The result that others are checked against, where it is from, and how long it took to compute. */
interface Reference<Cfg, Out, Gradients> {
  readonly cfg: Cfg;
  readonly output: Out;
  /** Null when gradients are not checked. */
  readonly gradients: Gradients | null;
  readonly tookMs: number;
}

/** One tuning of one kernel for one invocation. */
export class TuningRun<Call, Cfg, Out, Gradients> {
  readonly #kernel: Kernel<Call, Cfg, Out, unknown, Gradients>;
  readonly #invocation: Invocation<Call>;
  readonly #limits: TuningLimits;
  readonly #report: (timing: CandidateTiming<Cfg>) => void;
  readonly #baseline: Cfg;
  readonly #enter: () => Contender<Cfg, Out, Gradients>[];
  readonly #reported: Set<Contender<Cfg, Out, Gradients>> = new Set();
  readonly #probe: ClockProbe;
  readonly #start: number;
  #all: readonly Contender<Cfg, Out, Gradients>[];
  #racing: Contender<Cfg, Out, Gradients>[] = [];
  #backward: boolean;
  #withoutBackward: string | null = null;

  /**
   * Begins a tuning; its time counts from here.
   *
   * @param kernel The operation.
   * @param invocation The call that is tuned for.
   * @param candidates The configurations.
   * @param limits The bounds.
   * @param report Hears of every candidate once, when its result is known.
   */
  constructor(
    kernel: Kernel<Call, Cfg, Out, unknown, Gradients>,
    invocation: Invocation<Call>,
    { ordered, baseline }: Candidates<Cfg>,
    limits: TuningLimits,
    report: (timing: CandidateTiming<Cfg>) => void,
  ) {
    const grain: ClockGrain = { ms: 0 };
    this.#kernel = kernel;
    this.#invocation = invocation;
    this.#limits = limits;
    this.#report = report;
    this.#baseline = baseline;
    this.#enter = () => ordered.map((cfg) => new Contender<Cfg, Out, Gradients>(cfg, limits, grain));
    this.#all = this.#enter();
    this.#backward = limits.backward;
    this.#probe = new ClockProbe(() => kernel.probe(invocation));
    this.#start = limits.now();
  }

  /** Why gradients that were to be measured were not, or null. */
  get withoutBackward(): string | null {
    return this.#withoutBackward;
  }

  /**
   * Tunes.
   *
   * @returns The winner and how every candidate fared.
   * @throws {FlashMLAError} With code `device` when the device is lost, `no-config` when every candidate was rejected.
   */
  async record(): Promise<CacheRecord<Cfg>> {
    try {
      await this.#admit();
      if (this.#racing.length === 0 && this.#backward) await this.#admitForward();
      await this.#warmUp();
      await this.#timeInRounds();
      for (const contender of this.#all) this.#finish(contender);
    } finally {
      for (const contender of this.#all) contender.release();
    }
    const timings = this.#all.map((contender) => contender.timing(this.#probe));
    const timed = this.#all.filter((contender) => contender.samples > 0);
    if (timed.length === 0) throw this.#nothingRan();
    const winner = timed.reduce((best, next) => next.medianMs(this.#probe) < best.medianMs(this.#probe) ? next : best);
    return {
      cfg: winner.cfg,
      timings,
      ...(this.#withoutBackward !== null && { withoutBackward: this.#withoutBackward }),
      timingMethod: winner.timingMethod,
      libraryVersion: LIBRARY_VERSION,
      date: new Date().toISOString(),
    };
  }

  /**
   * Compiles the candidates, a few at a time, and checks each one's results against those of the first that runs: the
   * baseline's, unless it does not.
   */
  async #admit(): Promise<void> {
    const { totalBudgetMs, parallelTrials } = this.#limits;
    const options = { backward: this.#backward };
    let reference: Reference<Cfg, Out, Gradients> | null = null;
    const isBaseline = ({ cfg }: Contender<Cfg, Out, Gradients>) => cfg === this.#baseline;
    const queue = [...this.#all.filter(isBaseline), ...this.#all.filter((contender) => !isBaseline(contender))];
    const admitted = new Set<Contender<Cfg, Out, Gradients>>();
    let longestBatchMs = 0;
    for (let next = 0; next < queue.length; next += parallelTrials) {
      const batch = queue.slice(next, next + parallelTrials);
      const started = this.#elapsed();
      const inTime = started < totalBudgetMs * ADMISSION_SHARE &&
        started + longestBatchMs < totalBudgetMs * COMPILING_SHARE;
      if (reference === null || inTime) {
        await Promise.all(batch.map((contender) => contender.prepare(this.#kernel, this.#invocation, options)));
      } else {
        batch.forEach((contender) => contender.reject(TIME_BUDGET));
      }
      longestBatchMs = Math.max(longestBatchMs, this.#elapsed() - started);
      for (const contender of batch) {
        // Checked only if the check will probably be over in time: on a software adapter it takes seconds.
        if (reference !== null && this.#elapsed() + reference.tookMs >= totalBudgetMs) contender.reject(TIME_BUDGET);
        if (contender.rejected === null) reference = await this.#check(contender, reference);
        if (contender.rejected === null) admitted.add(contender);
        else contender.release();
        // Before one can compute its gradients it is open whether any can: those that cannot may still run forward.
        if (admitted.size > 0 || !this.#backward) this.#finishRejected();
      }
    }
    this.#racing = this.#all.filter((contender) => admitted.has(contender));
  }

  /** No candidate could compute its gradients: those that ran forward compete in that. */
  async #admitForward(): Promise<void> {
    const failed = this.#all;
    this.#all = this.#enter();
    this.#backward = false;
    await this.#admit();
    if (this.#racing.length > 0) this.#withoutBackward = reasonsOf(failed);
  }

  #finishRejected(): void {
    for (const contender of this.#all) if (contender.rejected !== null) this.#finish(contender);
  }

  /** Checks a candidate's output and gradients; the first one that has them becomes the reference. */
  async #check(
    contender: Contender<Cfg, Out, Gradients>,
    reference: Reference<Cfg, Out, Gradients> | null,
  ): Promise<Reference<Cfg, Out, Gradients> | null> {
    const start = this.#elapsed();
    try {
      const output = await contender.output();
      const cfgs = reference === null ? [] : [contender.cfg, reference.cfg];
      const check = reference && this.#kernel.compare(output, reference.output, this.#invocation, cfgs);
      if (check?.ok === false) {
        contender.reject(`wrong output: ${check.detail}`);
        return reference;
      }
      const gradients = this.#backward ? await contender.gradients() : null;
      if (reference === null) return { cfg: contender.cfg, output, gradients, tookMs: this.#elapsed() - start };
      if (gradients === null || reference.gradients === null) return reference;
      const { ok, detail } = this.#kernel.compareGradients(this.#invocation, gradients, reference.gradients, cfgs);
      if (!ok) contender.reject(`wrong gradients: ${detail}`);
    } catch (error) {
      contender.fail(error);
    }
    return reference;
  }

  async #warmUp(): Promise<void> {
    for (const contender of [...this.#racing]) {
      if (this.#late(contender)) this.#leave(contender, TIME_BUDGET);
      else await this.#attempt(contender, () => contender.warmUp());
    }
  }

  /** Each round takes one sample of every candidate, starting one further on, so that none always follows the same one. */
  async #timeInRounds(): Promise<void> {
    await this.#probe.read();
    for (let round = 0;; round++) {
      const due = this.#racing.filter((contender) => !contender.done);
      if (due.length === 0) break;
      if (this.#racing.length === 1 && due[0].samples >= SAMPLES_ALONE) break;
      const first = round % due.length;
      for (const contender of [...due.slice(first), ...due.slice(0, first)]) {
        if (this.#late(contender)) break;
        await this.#attempt(contender, () => contender.sample(this.#probe));
      }
      if (this.#elapsed() >= this.#limits.totalBudgetMs) break;
      this.#dropSlow();
    }
    for (const contender of [...this.#racing]) {
      if (contender.samples === 0) this.#leave(contender, TIME_BUDGET);
    }
  }

  /** Whether the total budget is spent. The leading candidate is always given its first sample. */
  #late(contender: Contender<Cfg, Out, Gradients>): boolean {
    const owed = contender === this.#racing[0] && contender.samples === 0;
    return !owed && this.#elapsed() >= this.#limits.totalBudgetMs;
  }

  #dropSlow(): void {
    const best = Math.min(...this.#racing.map((contender) => contender.medianMs(this.#probe)));
    for (const contender of [...this.#racing]) {
      const shortest = contender.shortestMs(this.#probe);
      const slow = DROP_RULES.some(({ samples, ratio }) => contender.samples >= samples && shortest > ratio * best);
      if (slow) this.#leave(contender);
    }
  }

  /** Runs a step of a candidate; what it throws rejects the candidate, unless no other can run either. */
  async #attempt(contender: Contender<Cfg, Out, Gradients>, step: () => Promise<void>): Promise<void> {
    try {
      await step();
    } catch (error) {
      if (isDeviceError(error)) await this.#checkDevice(contender, error);
      contender.fail(error);
      this.#leave(contender);
    }
  }

  async #checkDevice(failed: Contender<Cfg, Out, Gradients>, error: unknown): Promise<void> {
    const other = this.#racing.find((contender) => contender !== failed) ?? failed;
    await other.output().catch(() => {
      throw new FlashMLAError("device", `Cannot tune ${this.#invocation.op}: ${messageOf(error)}`, { cause: error });
    });
  }

  #leave(contender: Contender<Cfg, Out, Gradients>, reason?: string): void {
    if (reason !== undefined) contender.reject(reason);
    this.#racing = this.#racing.filter((other) => other !== contender);
    this.#finish(contender);
  }

  #finish(contender: Contender<Cfg, Out, Gradients>): void {
    contender.release();
    if (this.#reported.has(contender)) return;
    this.#reported.add(contender);
    this.#report(contender.timing(this.#probe));
  }

  #nothingRan(): FlashMLAError {
    const failed = this.#all.filter((contender) => contender.rejected !== TIME_BUDGET);
    const lost = failed.length > 0 && failed.every((contender) => isDeviceError(contender.failure));
    const message = `Cannot tune ${this.#invocation.op}: all ${this.#all.length} candidates were rejected: ` +
      reasonsOf(this.#all);
    return new FlashMLAError(lost ? "device" : "no-config", message, { cause: failed[0]?.failure });
  }

  #elapsed(): number {
    return this.#limits.now() - this.#start;
  }
}

/** Why candidates were rejected, each reason once. */
function reasonsOf(contenders: readonly { readonly rejected: string | null }[]): string {
  return [...new Set(contenders.map(({ rejected }) => rejected))].join("; ");
}

function isDeviceError(error: unknown): boolean {
  return error instanceof FlashMLAError && error.code === "device";
}
