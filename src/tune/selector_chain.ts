// How a configuration is chosen: override → overlay → memory → persistent → autotune → heuristic → error.

import { ConfigCache, heuristicConfig, measuredConfig } from "../cache/config_cache.ts";
import { openOverlays, type OverlayEntries, overlayLookup } from "../cache/overlay_cache.ts";
import { FlashMLAError } from "../op/errors.ts";
import { AutotuneOnce, type ConfigStore } from "./autotune_once.ts";
import { Descent, messageOf } from "./descent.ts";
import type { Invocation } from "./invocation.ts";
import type { Kernel } from "./kernel.ts";
import { type AutotunePolicy, autotunePolicy, ScopedPolicy } from "./policy.ts";
import type { ConfigSource, SelectionEvent } from "./selection_event.ts";
import { Tuner } from "./tuner.ts";

/** The parts of a {@link ConfigSelectorChain}; all optional. */
export interface SelectorChainOptions<Cfg> {
  /** The memory cache. Default: a new one. */
  readonly cache?: ConfigCache<Cfg>;
  /** What may be done on a miss; fields left out have their defaults. */
  readonly policy?: Partial<AutotunePolicy>;
  /** What measures. Default: a {@link Tuner} with its defaults. */
  readonly tuner?: Tuner;
  /** What outlives the process, a `PersistentCache`. Default: nothing does. */
  readonly persistent?: ConfigStore<Cfg> | null;
  /** Hears of every decision. What it throws is ignored. */
  readonly onEvent?: (event: SelectionEvent<Cfg>) => void;
}

/** What one call asks of the chain. */
export interface ChooseOptions<Cfg> {
  /** The configuration to use, for this call only: it is checked and never stored. */
  readonly cfg?: Cfg;
  /** The policy in force when the call was made. Default: the one in force now. */
  readonly policy?: AutotunePolicy;
  /** The overlays in scope when the call was made, innermost first. Default: those in scope now. */
  readonly overlays?: readonly OverlayEntries<unknown>[];
}

/** A configuration, and the level of the chain that gave it. */
export interface Choice<Cfg> {
  /** The configuration. */
  readonly cfg: Cfg;
  /** The level. */
  readonly source: ConfigSource;
}

/**
 * Chooses configurations: the caller's own, else from the overlay, the memory cache, the persistent cache, by measuring,
 * or by the kernel's guess. A guess is kept in memory only, and measuring takes its place when the policy allows that.
 *
 * @typeParam Call The call's tensors and options.
 * @typeParam Cfg The configuration.
 * @typeParam Out The result.
 */
export class ConfigSelectorChain<Call, Cfg, Out> {
  /** The memory cache. */
  readonly cache: ConfigCache<Cfg>;
  /** The policy and its overrides; see {@link policyOverride}. */
  readonly scopedPolicy: ScopedPolicy;
  readonly #persistent: ConfigStore<Cfg> | null;
  readonly #autotune: AutotuneOnce<Cfg>;
  readonly #onEvent: (event: SelectionEvent<Cfg>) => unknown;

  /**
   * Makes a chain. Nothing is measured or opened before the first call.
   *
   * @param options The chain's parts.
   */
  constructor(options: SelectorChainOptions<Cfg> = {}) {
    const { cache = new ConfigCache<Cfg>(), tuner = new Tuner(), persistent = null, onEvent = () => {} } = options;
    this.cache = cache;
    this.scopedPolicy = new ScopedPolicy(autotunePolicy(options.policy));
    this.#persistent = persistent;
    this.#autotune = new AutotuneOnce(tuner, cache, persistent);
    this.#onEvent = onEvent;
  }

  /** The policy in force here. */
  get policy(): AutotunePolicy {
    return this.scopedPolicy.current;
  }

  /**
   * Chooses the configuration for a call.
   *
   * @param invocation The call.
   * @param kernel The operation.
   * @param options An explicit configuration, and the policy in force.
   * @returns The configuration and the level that gave it.
   * @throws {FlashMLAError} With code `invalid-config` when an explicit configuration cannot run, `no-config` when no level
   * had one.
   */
  async choose(
    invocation: Invocation<Call>,
    kernel: Kernel<Call, Cfg, Out>,
    options: ChooseOptions<Cfg> = {},
  ): Promise<Choice<Cfg>> {
    const { cfg, policy = this.policy, overlays = openOverlays() } = options;
    const call = await Descent.begin(kernel, invocation, policy, this.#onEvent);
    if (cfg !== undefined) return this.#override(call, cfg);
    const choice = this.#fromOverlay(call, overlays) ?? this.#fromMemory(call) ?? await this.#fromPersistent(call) ??
      await this.#fromAutotune(call) ?? this.#fromHeuristic(call);
    if (choice === null) throw call.exhausted();
    return choice;
  }

  #override(call: Descent<Call, Cfg, Out>, cfg: Cfg): Choice<Cfg> {
    try {
      call.kernel.checkCfg(call.invocation, cfg);
    } catch (error) {
      call.failed("override", error);
      if (error instanceof FlashMLAError && error.code === "invalid-config") throw error;
      throw new FlashMLAError("invalid-config", `Cannot use cfg: ${messageOf(error)}`, { cause: error });
    }
    call.emit({ type: "override", cfg });
    return { cfg, source: "override" };
  }

  #fromOverlay(
    call: Descent<Call, Cfg, Out>,
    overlays: readonly OverlayEntries<unknown>[],
  ): Choice<Cfg> | null {
    const cfg = overlayLookup<Cfg>(call.context.op, call.context.callKey, overlays);
    if (cfg === undefined) return call.missed("overlay");
    if (!call.accepts("overlay", cfg)) return null;
    call.emit({ type: "overlay_hit", cfg });
    return { cfg, source: "overlay" };
  }

  #fromMemory(call: Descent<Call, Cfg, Out>): Choice<Cfg> | null {
    const entry = this.cache.get(call.context.key);
    if (entry === undefined) return call.missed("memory");
    // A guess is good enough only where guessing is allowed and measuring is not.
    const enough = entry.source !== "heuristic" || call.policy.allowHeuristics && this.#autotune.whyNot(call) !== null;
    if (!enough) return call.missed("memory");
    if (!call.accepts("memory", entry.cfg)) return null;
    call.emit({ type: "memory_hit", cfg: entry.cfg, origin: entry.source });
    return { cfg: entry.cfg, source: "memory" };
  }

  async #fromPersistent(call: Descent<Call, Cfg, Out>): Promise<Choice<Cfg> | null> {
    if (this.#persistent === null) return call.passed("persistent", "none is set");
    const record = await this.#persistent.get(call.context.key);
    if (record === undefined) return call.missed("persistent");
    const { cfg } = record;
    if (!call.accepts("persistent", cfg)) return null;
    this.cache.put(call.context.key, measuredConfig("persistent", record));
    call.emit({ type: "persistent_hit", cfg });
    return { cfg, source: "persistent" };
  }

  async #fromAutotune(call: Descent<Call, Cfg, Out>): Promise<Choice<Cfg> | null> {
    const whyNot = this.#autotune.whyNot(call);
    if (whyNot !== null) return call.passed("autotune", whyNot);
    try {
      const { cfg } = await this.#autotune.measure(call);
      return call.accepts("autotune", cfg) ? { cfg, source: "autotune" } : null;
    } catch (error) {
      return call.failed("autotune", error);
    }
  }

  #fromHeuristic(call: Descent<Call, Cfg, Out>): Choice<Cfg> | null {
    if (!call.policy.allowHeuristics) return call.passed("heuristic", "the policy forbids it");
    try {
      const cfg = call.kernel.heuristicCfg(call.invocation);
      call.kernel.checkCfg(call.invocation, cfg);
      this.cache.put(call.context.key, heuristicConfig(cfg));
      call.emit({ type: "heuristic", cfg });
      return { cfg, source: "heuristic" };
    } catch (error) {
      return call.failed("heuristic", error);
    }
  }
}
