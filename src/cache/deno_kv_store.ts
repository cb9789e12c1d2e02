// A Deno KV database as a KvStore: Deno's own, or that of npm's @deno/kv in Bun and Node. Both are the same engine,
// denokv_sqlite, and share a file.

import { fileDamage } from "./kv_file.ts";
import type { KvEntry, KvKey, KvOpener } from "./kv_store.ts";

/** A Deno KV database, as far as it is used. */
export interface DenoKv {
  /** The value under a key. */
  get(key: readonly (string | number)[]): Promise<{ readonly value: unknown }>;
  /** Stores a value. */
  set(key: readonly (string | number)[], value: Uint8Array): Promise<unknown>;
  /** The entries whose keys begin with `prefix`. */
  list(selector: { prefix: readonly (string | number)[] }): AsyncIterable<{
    readonly key: readonly unknown[];
    readonly value: unknown;
  }>;
  /** Removes a key. */
  delete(key: readonly (string | number)[]): Promise<void>;
  /** Closes it. */
  close(): void;
}

/**
 * Opens Deno KV files whose directory exists, when they are sound.
 *
 * @param openKv Opens a database.
 * @returns The opener.
 */
export function denoKvOpener(openKv: (path: string) => Promise<DenoKv>): KvOpener {
  return async (path) => {
    const damage = await fileDamage(path);
    if (damage !== null) throw new Error(`database disk image is malformed: ${damage}`);
    const kv = await openKv(path);
    return {
      async get(key) {
        return bytesOrNull((await kv.get(key)).value);
      },
      async set(key, value) {
        await kv.set(key, value);
      },
      async list(prefix) {
        const entries: KvEntry[] = [];
        for await (const { key, value } of kv.list({ prefix })) {
          entries.push({ key: key as KvKey, value: bytesOrNull(value) ?? new Uint8Array() });
        }
        return entries;
      },
      delete: (key) => kv.delete(key),
      close: () => kv.close(),
    };
  };
}

/** Someone else's value of another type is as good as none. */
function bytesOrNull(value: unknown): Uint8Array | null {
  return value instanceof Uint8Array ? value : null;
}
