import type { CacheRecord, CandidateTiming } from "../cache/cache_record.ts";
import { readEnvironment } from "../environment.ts";
import { FlashMLAError } from "../op/errors.ts";
import { hashJson, type Invocation } from "./invocation.ts";
import type { Kernel } from "./kernel.ts";
import { timingLines } from "./timing_lines.ts";
import { type TuningLimits, TuningRun } from "./tuning_run.ts";

/** The bounds of a {@link Tuner}; all optional. */
export interface TunerOptions {
  /** At most this many single runs of each candidate before it is timed. Default 5. */
  readonly warmup?: number;
  /** At most this many samples of each candidate. Default 100. */
  readonly iters?: number;
  /** Milliseconds that each candidate may take to warm up and be timed. Default 300. */
  readonly budgetMs?: number;
  /** Milliseconds that all candidates may take together, compilation included. Default 5000. */
  readonly totalBudgetMs?: number;
  /** Shortest sample under the host clock, in milliseconds; a coarse clock makes it longer. Default 5. */
  readonly minSampleMs?: number;
  /** Shortest sample under timestamp queries, in milliseconds: browsers round them to 0.066 ms. Default 2. */
  readonly minTimestampMs?: number;
  /** How many candidates compile at the same time. Default 4. */
  readonly parallelTrials?: number;
  /** The clock that budgets are kept by, in milliseconds. Default `performance.now`. */
  readonly now?: () => number;
}

/** How one tuning measures. */
export interface TuneOptions {
  /** The policy's field of that name; nothing to a kernel without gradients. Default `true`. */
  readonly validateBackward?: boolean;
}

/**
 * Finds the fastest configuration by measuring. Every candidate is compiled, its output checked against that of the
 * kernel's baseline, warmed up, and timed in rounds with the others, so that a change of the card's clock meets all of them
 * alike. Where an operation has gradients they are checked and timed too; if no candidate can compute them, the forward run
 * alone.
 *
 * The first call of a new shape pays for this: about `totalBudgetMs`, and longer where the
 * candidates being compiled or a single run take longer than that: neither is interrupted. What there is no time for is recorded as rejected.
 */
export class Tuner {
  readonly #limits: Omit<TuningLimits, "backward">;

  /**
   * Makes a tuner.
   *
   * @param options The bounds.
   * @throws {FlashMLAError} With code `invalid-input` when a bound is not a number in its range.
   */
  constructor(options: TunerOptions = {}) {
    this.#limits = {
      warmup: bound("warmup", options.warmup ?? 5, 0),
      iters: bound("iters", options.iters ?? 100, 1),
      budgetMs: bound("budgetMs", options.budgetMs ?? 300, 1),
      totalBudgetMs: bound("totalBudgetMs", options.totalBudgetMs ?? 5000, 1),
      minSampleMs: bound("minSampleMs", options.minSampleMs ?? 5, 0),
      minTimestampMs: bound("minTimestampMs", options.minTimestampMs ?? 2, 0),
      parallelTrials: bound("parallelTrials", options.parallelTrials ?? 4, 1),
      now: options.now ?? (() => performance.now()),
    };
  }

  /**
   * Measures candidates on the caller's own inputs. With `FLASH_MLA_LOG_AUTOTUNE=1` in the environment, prints how each
   * one fared on standard error.
   *
   * @param kernel The operation.
   * @param invocation The call to tune for.
   * @param candidates The configurations; the heuristic's is measured first, and added when it is not among them.
   * @param onCandidate Hears of every candidate once, when its result is known.
   * @param options Whether gradients are measured too.
   * @returns The winner and how every candidate fared.
   * @throws {FlashMLAError} With code `device` when the device is lost, `no-config` when every candidate was rejected.
   */
  async tune<Call, Cfg, Out>(
    kernel: Kernel<Call, Cfg, Out>,
    invocation: Invocation<Call>,
    candidates: readonly Cfg[],
    onCandidate: (timing: CandidateTiming<Cfg>) => void = () => {},
    options: TuneOptions = {},
  ): Promise<CacheRecord<Cfg>> {
    const results: CandidateTiming<Cfg>[] = [];
    const baseline = kernel.baselineCfg(invocation);
    const ordered = await distinct([kernel.heuristicCfg(invocation), ...candidates, baseline]);
    const limits = { ...this.#limits, backward: kernel.hasGradients && (options.validateBackward ?? true) };
    const run = new TuningRun(kernel, invocation, { ordered, baseline }, limits, (timing) => {
      results.push(timing);
      onCandidate(timing);
    });
    try {
      const record = await run.record();
      results.splice(0, results.length, ...record.timings);
      return record;
    } finally {
      if (readEnvironment("FLASH_MLA_LOG_AUTOTUNE") === "1") {
        for (const line of timingLines(invocation.op, results)) console.error(line);
        if (run.withoutBackward !== null) console.error(`${invocation.op}   forward only: ${run.withoutBackward}`);
      }
    }
  }
}

/** Each configuration once, at its first place: of those that are equal, the last object. */
async function distinct<Cfg>(candidates: readonly Cfg[]): Promise<Cfg[]> {
  const byHash = new Map<string, Cfg>();
  for (const cfg of candidates) byHash.set(await hashJson(cfg), cfg);
  return [...byHash.values()];
}

function bound(name: string, value: number, least: number): number {
  const whole = name.endsWith("Ms") || Number.isInteger(value);
  if (typeof value === "number" && value >= least && whole) return value;
  const kind = name.endsWith("Ms") ? "number" : "whole number";
  throw new FlashMLAError(
    "invalid-input",
    `Cannot make a Tuner: ${name} must be a ${kind} from ${least}, got ${value}`,
  );
}
