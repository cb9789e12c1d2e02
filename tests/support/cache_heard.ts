import type { CacheEvent } from "../../src/cache/cache_event.ts";
import { detectKvStore } from "../../src/cache/kv_detection.ts";
import type { KvOpener } from "../../src/cache/kv_store.ts";
import { PersistentCache, type PersistentCacheOptions } from "../../src/cache/persistent_cache.ts";
import type { SampleConfig } from "./cache_sample.ts";

/** A cache, and the events that it reported. */
export interface Heard {
  readonly cache: PersistentCache<SampleConfig>;
  readonly events: CacheEvent[];
}

/** A cache that waits for other processes longer than any test machine is slow. */
export function open(options: PersistentCacheOptions, name: string = "mla"): Heard {
  const events: CacheEvent[] = [];
  const onEvent = (event: CacheEvent): void => void events.push(event);
  return { cache: new PersistentCache(name, { patience: 30_000, onEvent, ...options }), events };
}

/** Deno KV, as the cache opens it. */
export const openKv: KvOpener = async (path) => await (await detectKvStore()).open!(path);

const detected = await detectKvStore();

/** Why the cache has no file in this runtime, or false when it has. */
export const noFile: string | false = detected.open === null ? detected.reason : false;
