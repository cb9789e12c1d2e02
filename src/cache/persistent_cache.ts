import { type CacheEvent, warnOnce } from "./cache_event.ts";
import { CACHE_VARIABLE, type CacheLocation, locateCache, wantedCache } from "./cache_location.ts";
import { type CacheKey, cacheKeyText, type CacheRecord } from "./cache_record.ts";
import { ConfigCache, measuredConfig } from "./config_cache.ts";
import { cacheKeyOf, decodeRecord, encodeRecord, kvKey, kvPrefix, MAX_VALUE_BYTES } from "./kv_record.ts";
import { reasonOf, type StoreFault, storeFault, withKvStore } from "./kv_session.ts";
import type { KvOpener, KvStore } from "./kv_store.ts";

/** Where a persistent cache keeps its entries, and whom it tells when it cannot. */
export interface PersistentCacheOptions {
  /**
   * A path, `memory` or `off`; in browsers the name of an IndexedDB database. Default: the variable `FLASH_MLA_CACHE`,
   * else a file in the user's cache directory; in browsers the database `flash-mla`.
   */
  readonly path?: string;
  /** Told once of every thing that goes wrong. Default: a line on the console, once per process. */
  readonly onEvent?: (event: CacheEvent) => void;
  /** Opens the store at a path. Default: Deno KV, in Bun and Node by npm's `@deno/kv`; IndexedDB in browsers. */
  readonly open?: KvOpener;
  /** How long to wait for other processes that hold the file, in milliseconds. Default: 2000. */
  readonly patience?: number;
}

/** How a persistent cache is doing. */
export interface CacheHealth {
  /** The file, or such as `IndexedDB "flash-mla"`, or `memory` or `off`. */
  readonly location: string;
  /** `ok` reads and writes; `memory` and `off` have no store; the others say what is wrong with it. */
  readonly state: "ok" | "memory" | "off" | StoreFault;
  /** The state in a sentence. */
  readonly detail: string;
}

type StoreLocation = Extract<CacheLocation, { kind: "store" }>;

// After waiting for a lock in vain, look-ups are answered from memory for this long rather than wait again each.
const LOCKED_REST_MS = 10_000;

/**
 * Measured configurations that outlive the process, each under a key of its own, so that processes that tune at the
 * same time lose nothing of each other's. The store is a convenience: no method throws because of it. What cannot be
 * stored is kept in memory, and said once.
 */
export class PersistentCache<Cfg> {
  readonly #name: string;
  readonly #options: PersistentCacheOptions;
  readonly #kept = new ConfigCache<Cfg>();
  readonly #told = new Set<string>();
  readonly #pending = new Set<Promise<unknown>>();
  #location: Promise<CacheLocation> | undefined;
  #restUntil = 0;

  /**
   * Touches nothing yet: the file is found and opened when it is first needed.
   *
   * @param name Keeps the entries of one kind of configuration apart from others in the same file.
   * @param options Where the entries are kept.
   */
  constructor(name: string, options: PersistentCacheOptions = {}) {
    this.#name = name;
    this.#options = options;
  }

  /**
   * Looks a key up.
   *
   * @param key The key.
   * @returns The record, or undefined when there is none that can be read.
   */
  get(key: CacheKey): Promise<CacheRecord<Cfg> | undefined> {
    return this.#underWay(async () => {
      const kept = this.#kept.get(key)?.record;
      if (kept) return kept;
      if (performance.now() < this.#restUntil) return undefined;
      const id = await kvKey(this.#name, key);
      const value = await this.#withStore((store) => store.get(id));
      return value ? decodeRecord<Cfg>(value) : undefined;
    });
  }

  /**
   * Remembers a record, replacing what was there.
   *
   * @param key The key.
   * @param record The record.
   */
  put(key: CacheKey, record: CacheRecord<Cfg>): Promise<void> {
    return this.#underWay(async () => {
      if (wantedCache(this.#options.path) === "off") return;
      const entry = measuredConfig("autotune", record);
      this.#kept.put(key, entry);
      const value = encodeRecord(record);
      if (value === null) {
        const message =
          `The configuration for ${cacheKeyText(key)} is kept in memory only: as JSON it takes more than ` +
          `${MAX_VALUE_BYTES} bytes, or it is no JSON. Use plain numbers, strings and booleans in configurations.`;
        return this.#report({ code: "not-storable", message });
      }
      const id = await kvKey(this.#name, key);
      const stored = await this.#withStore(async (store) => {
        await store.set(id, value);
        return true;
      });
      // Unless a later put took its place meanwhile.
      if (stored && this.#kept.get(key) === entry) this.#kept.delete(key);
    });
  }

  /**
   * Every record that can be read.
   *
   * @returns Keys with their records. A key too long for the store has a hash in place of its long parts.
   */
  entries(): Promise<[CacheKey, CacheRecord<Cfg>][]> {
    return this.#underWay(async () => {
      const stored = await this.#withStore((store) => store.list(kvPrefix(this.#name))) ?? [];
      const found = new Map<string, [CacheKey, CacheRecord<Cfg>]>();
      for (const { key: id, value } of stored) {
        const key = cacheKeyOf(id);
        const record = decodeRecord<Cfg>(value);
        if (key !== null && record !== undefined) found.set(JSON.stringify(id), [key, record]);
      }
      for (const [key, { record }] of this.#kept.entries()) {
        if (record !== null) found.set(JSON.stringify(await kvKey(this.#name, key)), [key, record]);
      }
      return [...found.values()];
    });
  }

  /** Forgets everything under this cache's name, of every schema version. */
  clear(): Promise<void> {
    return this.#underWay(async () => {
      this.#kept.clear();
      await this.#withStore(async (store) => {
        for (const { key } of await store.list(kvPrefix(this.#name))) await store.delete(key);
      });
    });
  }

  /**
   * Tries the store out: writes, reads and removes an entry.
   *
   * @returns Where the entries are and whether they can be read and written.
   */
  health(): Promise<CacheHealth> {
    return this.#underWay(async () => {
      const location = await this.#locate();
      if (location.kind === "off") return { location: "off", state: "off", detail: "Switched off." };
      if (location.kind === "memory") return { location: "memory", state: "memory", detail: location.detail };
      const probe = [...kvPrefix(this.#name), "health"];
      try {
        const count = await this.#session(location, async (store) => {
          await store.set(probe, new Uint8Array([1]));
          await store.delete(probe);
          return (await store.list(kvPrefix(this.#name))).filter(({ key }) => cacheKeyOf(key) !== null).length;
        });
        return {
          location: location.label,
          state: "ok",
          detail: `Readable and writable; configurations held: ${count}.`,
        };
      } catch (error) {
        return { location: location.label, state: storeFault(error), detail: adviceOn(error, location).message };
      }
    });
  }

  /** Waits for the calls under way. Between calls nothing is open, and the cache can be used again afterwards. */
  async close(): Promise<void> {
    while (this.#pending.size > 0) await Promise.allSettled(this.#pending);
  }

  /** The same as {@link PersistentCache.close}, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** Has {@link PersistentCache.close} wait for a call. */
  #underWay<T>(call: () => Promise<T>): Promise<T> {
    const promise = call();
    const done = (): void => void this.#pending.delete(promise);
    this.#pending.add(promise);
    promise.then(done, done);
    return promise;
  }

  /** Does work on the store; undefined when there is none or it failed, which is reported. */
  async #withStore<T>(work: (store: KvStore) => Promise<T>): Promise<T | undefined> {
    const location = await this.#locate();
    if (location.kind !== "store") return undefined;
    try {
      const result = await this.#session(location, work);
      this.#restUntil = 0;
      return result;
    } catch (error) {
      const event = adviceOn(error, location);
      if (event.code === "locked") this.#restUntil = performance.now() + LOCKED_REST_MS;
      this.#report(event);
      return undefined;
    }
  }

  #session<T>(
    { path, open }: StoreLocation,
    work: (store: KvStore) => Promise<T>,
  ): Promise<T> {
    const onMovedAside = (aside: string, damage: unknown): void =>
      this.#report({
        code: "damaged",
        message: `The configuration cache ${path} was damaged (${reasonOf(damage)}). It was moved to ${aside} and a ` +
          `fresh one begun: configurations are measured again when they are needed. The old file can be deleted.`,
        cause: damage,
      });
    return withKvStore({ path, open, patience: this.#options.patience ?? 2000, onMovedAside }, work);
  }

  #locate(): Promise<CacheLocation> {
    return this.#location ??= locateCache(this.#options.path, this.#options.open).then((location) => {
      if (location.kind === "memory" && location.event !== null) this.#report(location.event);
      return location;
    });
  }

  #report(event: CacheEvent): void {
    // A lasting fault is told once, however its errors are worded; these two are about one file or one entry.
    const isSingular = event.code === "damaged" || event.code === "not-storable";
    const subject = isSingular ? event.message : event.code;
    if (this.#told.has(subject)) return;
    this.#told.add(subject);
    try {
      (this.#options.onEvent ?? warnOnce)(event);
    } catch {
      // A listener's failure is no reason to stop computing.
    }
  }
}

const FILE_ADVICE: Record<StoreFault, string> = {
  locked: "Another process holds it. If this repeats, end that process",
  damaged: "Delete the file",
  "read-only": "Make the file and its directory writable",
  unavailable: "Check that its directory exists, is writable and has space left",
};

/** What to tell the user about a store that failed. */
function adviceOn(error: unknown, { open, label }: StoreLocation): CacheEvent {
  const code = storeFault(error);
  // A page has no environment.
  const advice = open.medium !== "indexed-db"
    ? `${FILE_ADVICE[code]}, or set ${CACHE_VARIABLE} to another path, to "memory" or to "off".`
    : code === "locked"
    ? "Close the other pages of this site, and load this one again."
    : "Check that this page may store data, which private windows may not, and that there is space left.";
  const message =
    `The configuration cache ${label} cannot be used: ${reasonOf(error)}. What is measured now is kept in ` +
    `memory only. ${advice}`;
  return { code, message, cause: error };
}
