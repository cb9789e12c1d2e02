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
  /** Every entry whose key begins with `prefix` and has more parts, in the order of Deno KV. */
  list(prefix: KvKey): Promise<KvEntry[]>;
  /** Removes a key; a missing one is no error. */
  delete(key: KvKey): Promise<void>;
  /** Frees the store. */
  close(): void;
}

/** Opens the store at a path, creating it when it is missing. Rejects with what the engine throws. */
export interface KvOpener {
  (path: string): Promise<KvStore>;
  /**
   * What a path is: that of a file, which is looked after (its directory made, moved aside when it is damaged), or the
   * name of an IndexedDB database. Default: `file`.
   */
  readonly medium?: "file" | "indexed-db";
}
