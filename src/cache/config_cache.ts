import { type CacheKey, cacheKeyText, type CacheRecord } from "./cache_record.ts";

/**
 * A configuration with where it came from. A measured one carries its evidence; a heuristic's guess has none, so it
 * cannot be handed to {@link CacheRecord}-keeping stores by mistake.
 */
export type CachedConfig<Cfg> =
  | { readonly source: "persistent" | "autotune"; readonly cfg: Cfg; readonly record: CacheRecord<Cfg> }
  | { readonly source: "heuristic"; readonly cfg: Cfg; readonly record: null };

/**
 * Wraps a measured record for {@link ConfigCache.put}.
 *
 * @param source `persistent` when it was read from a store, `autotune` when it was measured just now.
 * @param record The record.
 * @returns The entry.
 */
export function measuredConfig<Cfg>(source: "persistent" | "autotune", record: CacheRecord<Cfg>): CachedConfig<Cfg> {
  return { source, cfg: record.cfg, record };
}

/**
 * Wraps a heuristic's guess for {@link ConfigCache.put}: remembered for speed, never as if it were measured.
 *
 * @param cfg The guess.
 * @returns The entry.
 */
export function heuristicConfig<Cfg>(cfg: Cfg): CachedConfig<Cfg> {
  return { source: "heuristic", cfg, record: null };
}

/** The configurations that this process has met, the least recently used ones dropped first. */
export class ConfigCache<Cfg> {
  readonly #capacity: number;
  // A Map iterates in insertion order: the first entry is the least recently used, since every hit is re-inserted.
  readonly #entries = new Map<string, readonly [CacheKey, CachedConfig<Cfg>]>();

  /**
   * Makes an empty cache.
   *
   * @param capacity How many entries are kept, at least 1.
   * @throws {RangeError} When the capacity is not a positive integer.
   */
  constructor(capacity: number = 1024) {
    if (!Number.isInteger(capacity) || capacity < 1) {
      throw new RangeError(`Cannot make a ConfigCache: capacity must be a positive integer, got ${capacity}`);
    }
    this.#capacity = capacity;
  }

  /** How many entries are held. */
  get size(): number {
    return this.#entries.size;
  }

  /**
   * Looks a key up and marks it as just used.
   *
   * @param key The key.
   * @returns The entry, or undefined.
   */
  get(key: CacheKey): CachedConfig<Cfg> | undefined {
    const text = cacheKeyText(key);
    const found = this.#entries.get(text);
    if (found === undefined) return undefined;
    this.#entries.delete(text);
    this.#entries.set(text, found);
    return found[1];
  }

  /**
   * Remembers a configuration, dropping the least recently used one when full. A guess never replaces a measurement:
   * a call under a policy without tuning may finish after one that tuned.
   *
   * @param key The key.
   * @param config The entry, as {@link measuredConfig} or {@link heuristicConfig} makes it.
   */
  put(key: CacheKey, config: CachedConfig<Cfg>): void {
    const text = cacheKeyText(key);
    const held = this.#entries.get(text)?.[1];
    if (config.source === "heuristic" && held !== undefined && held.source !== "heuristic") return;
    this.#entries.delete(text);
    this.#entries.set(text, [key, config]);
    for (const oldest of this.#entries.keys()) {
      if (this.#entries.size <= this.#capacity) break;
      this.#entries.delete(oldest);
    }
  }

  /**
   * Forgets one key.
   *
   * @param key The key.
   * @returns Whether it was held.
   */
  delete(key: CacheKey): boolean {
    return this.#entries.delete(cacheKeyText(key));
  }

  /** Forgets everything. */
  clear(): void {
    this.#entries.clear();
  }

  /**
   * Everything held, least recently used first. Looking does not count as use.
   *
   * @returns Keys with their entries.
   */
  entries(): (readonly [CacheKey, CachedConfig<Cfg>])[] {
    return [...this.#entries.values()];
  }
}
