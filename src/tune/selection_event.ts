// What the selector chain reports of its decisions.

import type { CacheKey, CandidateTiming } from "../cache/cache_record.ts";

/**
 * Where a chosen configuration came from:
 *
 * - `override`: the caller's explicit `cfg`.
 * - `overlay`: a scoped overlay.
 * - `memory`: this process chose it before.
 * - `persistent`: an earlier process measured it.
 * - `autotune`: it was measured just now.
 * - `heuristic`: a guess from the shapes.
 */
export type ConfigSource = "override" | "overlay" | "memory" | "persistent" | "autotune" | "heuristic";

/** Which call a {@link SelectionEvent} is about. */
export interface SelectionContext {
  /** Operation and version, such as `flash_mla@1`. */
  readonly op: string;
  /** The call key: shapes, dtypes and options. */
  readonly callKey: string;
  /** The key that configurations are cached under. */
  readonly key: CacheKey;
}

/** A level of the chain gave the configuration. */
export interface HitEvent<Cfg> {
  /** The level. */
  readonly type: "override" | "overlay_hit" | "persistent_hit" | "heuristic";
  /** The configuration. */
  readonly cfg: Cfg;
}

/** The memory cache gave the configuration. */
export interface MemoryHitEvent<Cfg> {
  /** The level. */
  readonly type: "memory_hit";
  /** The configuration. */
  readonly cfg: Cfg;
  /** Where it came from when it was first chosen. */
  readonly origin: "persistent" | "autotune" | "heuristic";
}

/** A level of the chain had nothing to give. */
export interface MissEvent {
  /** The level. */
  readonly type: "overlay_miss" | "memory_miss" | "persistent_miss";
}

/** A level gave a configuration that this device or problem cannot run; the chain went on. */
export interface RejectedEvent<Cfg> {
  /** Always `rejected`. */
  readonly type: "rejected";
  /** The level. */
  readonly source: "overlay" | "memory" | "persistent" | "autotune";
  /** The configuration. */
  readonly cfg: Cfg;
  /** Why it cannot run. */
  readonly reason: string;
}

/** Measuring begins. */
export interface AutotuneStartEvent {
  /** Always `autotune_start`. */
  readonly type: "autotune_start";
  /** How many configurations will be measured. */
  readonly candidates: number;
}

/** The call waits for another one that is measuring for the same key. */
export interface AutotuneJoinEvent {
  /** Always `autotune_join`. */
  readonly type: "autotune_join";
}

/** One candidate's result is known. */
export interface AutotuneCandidateEvent<Cfg> extends CandidateTiming<Cfg> {
  /** Always `autotune_candidate`. */
  readonly type: "autotune_candidate";
}

/** Measuring is over. */
export interface AutotuneFinishEvent<Cfg> {
  /** Always `autotune_finish`. */
  readonly type: "autotune_finish";
  /** The winner. */
  readonly cfg: Cfg;
  /** Its median time of one run in milliseconds. */
  readonly ms: number;
  /** Every candidate's result. */
  readonly timings: readonly CandidateTiming<Cfg>[];
  /** Why gradients that were asked for were neither timed nor checked: no candidate could compute them. */
  readonly withoutBackward?: string;
  /** Milliseconds that measuring took. */
  readonly elapsedMs: number;
}

/** Something failed: the chain went on where it could, and threw where nothing was left. */
export interface SelectionErrorEvent {
  /** Always `error`. */
  readonly type: "error";
  /** The level that failed. */
  readonly source: ConfigSource;
  /** What happened. */
  readonly reason: string;
  /** What was thrown. */
  readonly error: unknown;
}

/** One decision of the selector chain; `type` tells which. */
export type SelectionDetail<Cfg> =
  | HitEvent<Cfg>
  | MemoryHitEvent<Cfg>
  | MissEvent
  | RejectedEvent<Cfg>
  | AutotuneStartEvent
  | AutotuneJoinEvent
  | AutotuneCandidateEvent<Cfg>
  | AutotuneFinishEvent<Cfg>
  | SelectionErrorEvent;

/** One decision of the selector chain, and the call that it is about. */
export type SelectionEvent<Cfg> = SelectionContext & SelectionDetail<Cfg>;
