// What is remembered of a tuned configuration, and the key it is remembered under.

/**
 * Where a configuration is remembered: readable parts, most general first. Two calls share a key exactly when a
 * configuration tuned for one may be used for the other.
 */
export interface CacheKey {
  /** Operation and version, such as `flash_mla@1`. */
  readonly op: string;
  /** Device fingerprint: adapter, engine and version, features and limits that matter. */
  readonly device: string;
  /** Dtype, head dimensions, bucketed lengths, and the options that change the kernel. */
  readonly bucket: string;
  /** Hash of the candidate list: a library with other candidates must measure again. */
  readonly candidates: string;
}

/** How one candidate fared when it was tuned. */
export interface CandidateTiming<Cfg> {
  /** The candidate. */
  readonly cfg: Cfg;
  /** Median time of one run in milliseconds; null when the candidate was rejected. */
  readonly ms: number | null;
  /** How many timed samples the median is of. */
  readonly samples: number;
  /** Why the candidate was rejected, or null. */
  readonly rejected: string | null;
}

/** A measured winner, as it is stored: the configuration itself and the evidence for it. */
export interface CacheRecord<Cfg> {
  /** The winning configuration. */
  readonly cfg: Cfg;
  /** Every candidate's result. */
  readonly timings: readonly CandidateTiming<Cfg>[];
  /**
   * Why the candidates were timed and checked forward alone although their gradients were asked for: no candidate could
   * compute them. Absent otherwise.
   */
  readonly withoutBackward?: string;
  /** `timestamp` for GPU timestamp queries, `wall` for the host clock. */
  readonly timingMethod: "timestamp" | "wall";
  /** Version of the library that measured. */
  readonly libraryVersion: string;
  /** When it was measured, ISO 8601. */
  readonly date: string;
}

/** Version of the key's and the record's layout; entries of another version are never read. */
export const CACHE_SCHEMA = 1;

/** One string for a key, for maps and messages. */
export function cacheKeyText(key: CacheKey): string {
  return [key.op, key.device, key.bucket, key.candidates].join(" | ");
}
