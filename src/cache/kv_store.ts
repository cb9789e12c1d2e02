import { denoRuntime } from "./deno_runtime.ts";
import { fileDamage } from "./kv_file.ts";

/** A key: parts from general to specific. All keys that begin with the same parts can be listed. */
export type KvKey = readonly (string | number)[];

/** One stored entry. */
export interface KvEntry {
  /** The key. */
  readonly key: KvKey;
  /** The value. */
  readonly value: Uint8Array;
}

/** What the persistent cache needs of a key-value store. Methods reject with what the engine throws. */
export interface KvStore {
  /** The value under a key, or null. */
  get(key: KvKey): Promise<Uint8Array | null>;
  /** Stores a value, replacing an earlier one. */
  set(key: KvKey, value: Uint8Array): Promise<void>;
  /** Every entry whose key begins with `prefix`, in key order. */
  list(prefix: KvKey): Promise<KvEntry[]>;
  /** Removes a key; a missing one is no error. */
  delete(key: KvKey): Promise<void>;
  /** Frees the store. */
  close(): void;
}

/** Opens the store at a path, creating it when it is missing. Rejects with what the engine throws. */
export type KvOpener = (path: string) => Promise<KvStore>;

/** How this runtime opens a store, or why it cannot. */
export type KvDetection =
  | { readonly open: KvOpener }
  | {
    readonly open: null;
    /** Why, as a sentence. */
    readonly reason: string;
    /** Whether the user can change it, and so should be told. */
    readonly remediable: boolean;
  };

/**
 * Looks for a key-value store: Deno's own for now.
 *
 * @returns The way to open it, or why there is none.
 */
export function detectKvStore(): KvDetection {
  const deno = denoRuntime();
  if (deno === undefined) {
    return { open: null, reason: "This runtime has no key-value store built in.", remediable: false };
  }
  if (deno.openKv === undefined) {
    const reason =
      'Deno runs without its key-value store: add "unstable": ["kv"] to deno.json or run with --unstable-kv.';
    return { open: null, reason, remediable: true };
  }
  return { open: openDenoKv };
}

/** Opens a Deno KV file whose directory exists. */
async function openDenoKv(path: string): Promise<KvStore> {
  const damage = await fileDamage(path);
  if (damage !== null) throw new Error(`database disk image is malformed: ${damage}`);
  const kv = await denoRuntime()!.openKv!(path);
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
}

/** Someone else's value of another type is as good as none. */
function bytesOrNull(value: unknown): Uint8Array | null {
  return value instanceof Uint8Array ? value : null;
}
