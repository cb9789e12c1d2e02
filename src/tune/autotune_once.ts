import { cacheKeyText, type CacheRecord, type CandidateTiming } from "../cache/cache_record.ts";
import { type ConfigCache, measuredConfig } from "../cache/config_cache.ts";
import type { PersistentCache } from "../cache/persistent_cache.ts";
import { FlashMLAError } from "../op/errors.ts";
import { type Descent, messageOf } from "./descent.ts";
import type { Tuner } from "./tuner.ts";

/** What of a {@link PersistentCache} the chain needs; it never throws. */
export type ConfigStore<Cfg> = Pick<PersistentCache<Cfg>, "get" | "put">;

/** The chain's measuring level: measures each key once, however many calls ask for it, and stores the winner. */
export class AutotuneOnce<Cfg> {
  readonly #tuner: Tuner;
  readonly #cache: ConfigCache<Cfg>;
  readonly #persistent: ConfigStore<Cfg> | null;
  readonly #inFlight: Map<string, Promise<CacheRecord<Cfg>>> = new Map();
  // Keys that could not be measured, with the reason: every call would otherwise wait for the same failures again.
  readonly #unmeasurable: Map<string, string> = new Map();

  /**
   * Starts with nothing measured.
   *
   * @param tuner What measures.
   * @param cache Where winners are kept for this process.
   * @param persistent Where winners are kept for later ones, or null.
   */
  constructor(tuner: Tuner, cache: ConfigCache<Cfg>, persistent: ConfigStore<Cfg> | null) {
    this.#tuner = tuner;
    this.#cache = cache;
    this.#persistent = persistent;
  }

  /** Why a call's candidates are not to be measured, or null when they are. */
  whyNot<Call, Out>({ policy, candidates, context }: Descent<Call, Cfg, Out>): string | null {
    if (!policy.allowAutotune) return "the policy forbids it";
    if (policy.cacheMissFallback === "heuristics") return "the policy falls back to heuristics";
    if (candidates.length === 0) return "there are no candidates";
    // One candidate has nothing to be compared with; it is measured only where a guess would not do.
    if (candidates.length === 1 && policy.allowHeuristics) return "there is a single candidate";
    return this.#unmeasurable.get(cacheKeyText(context.key)) ?? null;
  }

  /**
   * Measures, or waits for the call that is measuring for the same key.
   *
   * @param call The call.
   * @returns The winner.
   * @throws {FlashMLAError} When nothing could be measured.
   */
  async measure<Call, Out>(call: Descent<Call, Cfg, Out>): Promise<CacheRecord<Cfg>> {
    const text = cacheKeyText(call.context.key);
    const running = this.#inFlight.get(text);
    if (running !== undefined) {
      call.emit({ type: "autotune_join" });
      return await running;
    }
    // Another call may have measured while this one waited for the persistent cache.
    const entry = this.#cache.get(call.context.key);
    if (entry !== undefined && entry.source !== "heuristic" && !call.hasRefused(entry.cfg)) return entry.record;
    const measuring = this.#measureNow(call).finally(() => this.#inFlight.delete(text));
    this.#inFlight.set(text, measuring);
    return await measuring;
  }

  async #measureNow<Call, Out>(call: Descent<Call, Cfg, Out>): Promise<CacheRecord<Cfg>> {
    const { kernel, invocation, candidates, context, policy } = call;
    const start = performance.now();
    call.emit({ type: "autotune_start", candidates: candidates.length });
    try {
      const onCandidate = (timing: CandidateTiming<Cfg>) => call.emit({ type: "autotune_candidate", ...timing });
      const { validateBackward } = policy;
      const record = await this.#tuner.tune(kernel, invocation, candidates, onCandidate, { validateBackward });
      this.#cache.put(context.key, measuredConfig("autotune", record));
      // Also when there was no time for a rival: each process on a slow device would spend the same budget again.
      await this.#persistent?.put(context.key, record);
      const { cfg, timings, withoutBackward } = record;
      const ms = Math.min(...timings.map((timing) => timing.ms ?? Infinity));
      const elapsedMs = performance.now() - start;
      call.emit({ type: "autotune_finish", cfg, ms, timings, elapsedMs, ...(withoutBackward && { withoutBackward }) });
      return record;
    } catch (error) {
      // A lost device says nothing about the candidates.
      const lost = error instanceof FlashMLAError && error.code === "device";
      if (!lost) this.#unmeasurable.set(cacheKeyText(context.key), `failed before: ${messageOf(error)}`);
      throw error;
    }
  }
}
