// How records look in the store. Key: ["flash-mla", cache name, schema version, op, device, bucket, candidates].
// Value: the record as JSON in UTF-8, so that stores that only know bytes can hold it and other runtimes read it.

import { CACHE_SCHEMA, type CacheKey, type CacheRecord, type CandidateTiming } from "./cache_record.ts";
import { packKey } from "./kv_key.ts";
import type { KvKey } from "./kv_store.ts";

/** The most bytes that Deno KV takes for a key, as {@link packKey} encodes it. */
export const MAX_KEY_BYTES = 2048;
/** The most bytes that Deno KV takes for a value. */
export const MAX_VALUE_BYTES = 65536;

/**
 * The beginning of the keys of one cache.
 *
 * @param name The cache's name.
 * @returns The parts that all its keys begin with, whatever the schema.
 */
export function kvPrefix(name: string): KvKey {
  return ["flash-mla", name];
}

/**
 * The key of a record. Parts of a key that would be too long are replaced by their SHA-256, the longest first.
 *
 * @param name The cache's name.
 * @param key The cache key.
 * @returns The store's key.
 */
export async function kvKey(name: string, key: CacheKey): Promise<KvKey> {
  const parts = [key.op, key.device, key.bucket, key.candidates];
  const whole = (): KvKey => [...kvPrefix(name), CACHE_SCHEMA, ...parts];
  for (let hashed = 0; hashed < parts.length && packKey(whole()).length > MAX_KEY_BYTES; hashed++) {
    const longest = parts.reduce(
      (best, part, i) => (packKey([part]).length > packKey([parts[best]!]).length ? i : best),
      0,
    );
    parts[longest] = await sha256(parts[longest]!);
  }
  return whole();
}

/**
 * The cache key of a stored record. Where a part was hashed the hash stands in its place, and finds the same record.
 *
 * @param key The store's key.
 * @returns The cache key, or null when the key is none of this schema.
 */
export function cacheKeyOf(key: KvKey): CacheKey | null {
  const [, , schema, ...parts] = key;
  if (schema !== CACHE_SCHEMA || parts.length !== 4 || !parts.every((part) => typeof part === "string")) return null;
  const [op, device, bucket, candidates] = parts as [string, string, string, string];
  return { op, device, bucket, candidates };
}

async function sha256(text: string): Promise<string> {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return "sha256:" + Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * The value of a record. One that would be too large gives up details of its timings until it fits: reasons of
 * rejection first, then the rejected candidates, then the slower half of the rest, again and again.
 *
 * @param record The record.
 * @returns The bytes, or null when the record is no JSON or its configuration alone is too large.
 */
export function encodeRecord<Cfg>(record: CacheRecord<Cfg>): Uint8Array | null {
  let bytes = encodeJson(record);
  if (bytes === null || bytes.length <= MAX_VALUE_BYTES) return bytes;
  const withoutBackward = record.withoutBackward?.slice(0, 80);
  let timings: readonly CandidateTiming<Cfg>[] = record.timings.map((timing) => ({
    ...timing,
    rejected: timing.rejected === null ? null : timing.rejected.slice(0, 80),
  }));
  for (;;) {
    bytes = encodeJson({ ...record, withoutBackward, timings });
    if (bytes === null || bytes.length <= MAX_VALUE_BYTES) return bytes;
    if (timings.length === 0) return null;
    const measured = timings.filter((timing) => timing.ms !== null).sort((a, b) => a.ms! - b.ms!);
    timings = measured.length < timings.length ? measured : measured.slice(0, measured.length >> 1);
  }
}

function encodeJson(record: unknown): Uint8Array | null {
  try {
    return new TextEncoder().encode(JSON.stringify(record));
  } catch {
    return null;
  }
}

/**
 * The record in a value.
 *
 * @param value The bytes.
 * @returns The record, or undefined when they are no record: a miss, which the next measurement overwrites.
 */
export function decodeRecord<Cfg>(value: Uint8Array): CacheRecord<Cfg> | undefined {
  let record: unknown;
  try {
    record = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(value));
  } catch {
    return undefined;
  }
  return isRecord<Cfg>(record) ? record : undefined;
}

function isRecord<Cfg>(value: unknown): value is CacheRecord<Cfg> {
  if (!isObject(value) || !isConfig(value.cfg) || !Array.isArray(value.timings)) return false;
  return value.timings.every(isTiming) &&
    (value.timingMethod === "timestamp" || value.timingMethod === "wall") &&
    (value.withoutBackward === undefined || typeof value.withoutBackward === "string") &&
    typeof value.libraryVersion === "string" && typeof value.date === "string";
}

function isTiming(value: unknown): boolean {
  return isObject(value) && isConfig(value.cfg) && typeof value.samples === "number" &&
    (value.ms === null || typeof value.ms === "number") &&
    (value.rejected === null || typeof value.rejected === "string");
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isConfig(value: unknown): boolean {
  return value !== undefined && value !== null;
}
