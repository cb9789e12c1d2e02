// One piece of work on a store: hold the file, open, work, close. Repeated while others lock the file; a damaged file
// is replaced by a fresh one.
//
// The store is opened for each piece of work rather than kept. Measured with Deno 2.9.6 on a local disk: a get takes
// 1 to 5 ms in all and a put 2 to 20 ms, most of it opening (4 ms) and closing (10 ms after a write); on an open store
// they take 0.2 and up to 8 ms. That is paid once per key and process, next to compiling a kernel (tens of
// milliseconds) and tuning it (seconds), and buys this: no other process waits for an idle handle, none is left pointing
// at a file that was moved or deleted (where a set succeeds and is lost), and none trips the resource sanitizer of
// `deno test`.

import { holdingKvFile, kvFileState, makeDirectory, moveAside } from "./kv_file.ts";
import type { KvOpener, KvStore } from "./kv_store.ts";

/** What can be wrong with a store, as far as it calls for different answers. */
export type StoreFault = "locked" | "damaged" | "read-only" | "unavailable";

/**
 * Reads SQLite's mind from an error: its messages are all that Deno KV passes on. The IndexedDB store uses its words.
 *
 * @param error What a store threw.
 * @returns The kind of fault.
 */
export function storeFault(error: unknown): StoreFault {
  const message = reasonOf(error);
  if (/database( table| schema)? is (locked|busy)/i.test(message)) return "locked";
  if (/not a database|malformed/i.test(message)) return "damaged";
  if (/read-?only database/i.test(message)) return "read-only";
  return "unavailable";
}

/**
 * What a store says is wrong.
 *
 * @param error What it threw.
 * @returns The message, without the native stack trace that npm's `@deno/kv` writes below it.
 */
export function reasonOf(error: unknown): string {
  const message = error instanceof Error ? error.message || error.name : String(error);
  return message.split("\n")[0]!;
}

/** Where and how {@link withKvStore} works. */
export interface KvSession {
  /** The database file, or what else the opener takes. */
  readonly path: string;
  /** Opens it. */
  readonly open: KvOpener;
  /** How long to wait for other processes, in milliseconds. */
  readonly patience: number;
  /** Told when a damaged file was moved aside. */
  readonly onMovedAside: (aside: string, damage: unknown) => void;
}

/**
 * Does a piece of work on a store.
 *
 * @param session The store.
 * @param work What to do; it may be done again from its start.
 * @returns What `work` returned.
 * @throws {Error} What the store threw in the end; {@link storeFault} tells the kind.
 */
export async function withKvStore<T>(session: KvSession, work: (store: KvStore) => Promise<T>): Promise<T> {
  const deadline = performance.now() + session.patience;
  for (let pause = 5;; pause = Math.min(2 * pause, 200)) {
    try {
      return await before(deadline, session.patience, workOrReplace(session, work));
    } catch (error) {
      // Jitter, so that processes that ran into each other do not do so again.
      const wait = pause * (0.5 + Math.random());
      if (storeFault(error) !== "locked" || performance.now() + wait > deadline) throw error;
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

/** Works on the store; when it is damaged, moves it aside and works on a fresh one. */
async function workOrReplace<T>(session: KvSession, work: (store: KvStore) => Promise<T>): Promise<T> {
  // What is no file has no directory and no lock, and cannot be moved.
  if (session.open.medium === "indexed-db") return await workOnce(session, work);
  await makeDirectory(session.path);
  try {
    return await holdingKvFile(session.path, "shared", () => workOnce(session, work));
  } catch (error) {
    if (storeFault(error) !== "damaged") throw error;
  }
  return await holdingKvFile(session.path, "exclusive", async () => {
    const seen = await kvFileState(session.path);
    try {
      // Another process may have replaced the file by now.
      return await workOnce(session, work);
    } catch (error) {
      if (storeFault(error) !== "damaged") throw error;
      const aside = await moveAside(session.path, seen).catch((obstacle: Error) => {
        if (storeFault(obstacle) === "locked") throw obstacle;
        throw new Error(`${reasonOf(error)}, and it cannot be moved aside: ${obstacle.message}`, { cause: error });
      });
      session.onMovedAside(aside, error);
    }
    return await workOnce(session, work);
  });
}

async function workOnce<T>(session: KvSession, work: (store: KvStore) => Promise<T>): Promise<T> {
  const store = await session.open(session.path);
  try {
    return await work(store);
  } finally {
    store.close();
  }
}

/**
 * Gives up waiting at the deadline. Deno KV itself waits without end while another process is in the middle of a write;
 * what was begun then goes on behind the scenes, keeps the process from ending, and closes the store when it is done.
 * Closing it earlier would block the whole program until the lock is gone (measured).
 */
async function before<T>(deadline: number, patience: number, promise: Promise<T>): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const timeout = new Promise<never>((_, reject) => {
    const error = new Error(`database is locked: no answer within ${patience} ms`);
    timer = setTimeout(() => reject(error), Math.max(0, deadline - performance.now()));
  });
  try {
    return await Promise.race([promise, timeout]);
  } finally {
    clearTimeout(timer);
  }
}
