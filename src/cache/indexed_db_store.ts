// The store of browsers: IndexedDB, in pages and in workers. One database with one object store; an entry lies under
// the bytes of its key, which sort as in Deno KV, and holds the key itself beside the value.

import { packKey } from "./kv_key.ts";
import type { KvEntry, KvKey, KvOpener, KvStore } from "./kv_store.ts";

// The part of IndexedDB that is used, under types of its own: the sources also type-check without the DOM.

/** Opens databases: `indexedDB`. */
export interface IdbFactory {
  /** Opens a database, creating it when it is missing. */
  open(name: string, version: number): IdbOpening;
}

interface IdbTarget {
  addEventListener(type: string, listener: () => void): void;
}

interface IdbRequest<T> extends IdbTarget {
  readonly result: T;
  readonly error: Error | null;
}

interface IdbOpening extends IdbRequest<IdbDatabase> {
  readonly transaction: IdbTransaction | null;
}

interface IdbDatabase extends IdbTarget {
  createObjectStore(name: string): unknown;
  transaction(storeName: string, mode: "readonly" | "readwrite"): IdbTransaction;
  close(): void;
}

interface IdbTransaction extends IdbTarget {
  readonly error: Error | null;
  objectStore(name: string): IdbObjectStore;
  abort(): void;
}

interface IdbObjectStore {
  get(key: Uint8Array<ArrayBuffer>): IdbRequest<unknown>;
  getAll(): IdbRequest<unknown[]>;
  put(value: KvEntry, key: Uint8Array<ArrayBuffer>): IdbRequest<unknown>;
  delete(key: Uint8Array<ArrayBuffer>): IdbRequest<unknown>;
}

const VERSION = 1;
const ENTRIES = "entries";

/**
 * The IndexedDB of the page or worker.
 *
 * @returns The factory, or undefined where there is none or the page may not use it.
 */
export function globalIndexedDb(): IdbFactory | undefined {
  try {
    return (globalThis as { indexedDB?: IdbFactory | null }).indexedDB ?? undefined;
  } catch {
    // Some browsers throw where a page may not store anything.
    return undefined;
  }
}

/**
 * Opens IndexedDB databases as stores.
 *
 * @param factory `indexedDB`, or what stands in for it.
 * @returns The opener; its path is the database's name.
 */
export function indexedDbOpener(factory: IdbFactory): KvOpener {
  return Object.assign(async (name: string) => storeIn(await openDatabase(factory, name)), {
    medium: "indexed-db" as const,
  });
}

function openDatabase(factory: IdbFactory, name: string): Promise<IdbDatabase> {
  return new Promise((resolve, reject) => {
    const request = factory.open(name, VERSION);
    let isGivenUp = false;
    request.addEventListener("upgradeneeded", () => {
      if (isGivenUp) request.transaction!.abort();
      else request.result.createObjectStore(ENTRIES);
    });
    request.addEventListener("blocked", () => {
      // It would open once the others have closed: the caller tries again until its patience ends.
      isGivenUp = true;
      reject(new Error("database is locked: another page or worker has an older version of it open"));
    });
    request.addEventListener("error", () => reject(request.error));
    request.addEventListener("success", () => {
      if (isGivenUp) return request.result.close();
      // Another page wants to upgrade or delete it, and waits until everyone has let go.
      request.result.addEventListener("versionchange", () => request.result.close());
      resolve(request.result);
    });
  });
}

function storeIn(database: IdbDatabase): KvStore {
  return {
    async get(key) {
      return entryOrNull(await inTransaction(database, "readonly", (store) => store.get(packKey(key))))?.value ?? null;
    },
    async set(key, value) {
      await inTransaction(database, "readwrite", (store) => store.put({ key: [...key], value }, packKey(key)));
    },
    async list(prefix) {
      // All of them, which is what a cache's prefix comes to: a range would need IDBKeyRange of the factory's own kind.
      const all = await inTransaction(database, "readonly", (store) => store.getAll());
      return all.map(entryOrNull).filter((entry) => entry !== null).filter(({ key }) => isBelow(prefix, key));
    },
    async delete(key) {
      await inTransaction(database, "readwrite", (store) => store.delete(packKey(key)));
    },
    close: () => database.close(),
  };
}

/** Makes one request, and waits until the transaction around it is complete: only then is a value stored. */
function inTransaction<T>(
  database: IdbDatabase,
  mode: "readonly" | "readwrite",
  request: (store: IdbObjectStore) => IdbRequest<T>,
): Promise<T> {
  return new Promise((resolve, reject) => {
    const transaction = begin(database, mode);
    const made = request(transaction.objectStore(ENTRIES));
    transaction.addEventListener("complete", () => resolve(made.result));
    // A request that fails aborts its transaction, and so does a full disk.
    transaction.addEventListener("abort", () => reject(transaction.error ?? made.error ?? new Error("it was aborted")));
  });
}

function begin(database: IdbDatabase, mode: "readonly" | "readwrite"): IdbTransaction {
  try {
    return database.transaction(ENTRIES, mode);
  } catch (error) {
    if ((error as Error).name !== "InvalidStateError") throw error;
    throw new Error("database is locked: it was closed for another page, which upgrades or deletes it");
  }
}

/** Someone else's entry is as good as none. */
function entryOrNull(entry: unknown): KvEntry | null {
  const { key, value } = (entry ?? {}) as Partial<KvEntry>;
  return Array.isArray(key) && value instanceof Uint8Array ? { key, value } : null;
}

function isBelow(prefix: KvKey, key: KvKey): boolean {
  return key.length > prefix.length && prefix.every((part, i) => part === key[i]);
}
