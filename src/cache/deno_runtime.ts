// The part of Deno that the persistent cache uses, under types of its own: the sources also type-check where Deno is
// not declared, and `openKv` is declared only with the unstable flag.

import type { FileRuntime } from "./file_runtime.ts";
import type { DenoKv } from "./deno_kv_store.ts";

/** An open file, for holding a lock. */
export interface DenoFile {
  /** Locks the file if that needs no waiting; the lock goes with the handle. */
  tryLock(exclusive: boolean): Promise<boolean>;
  /** Closes it. */
  close(): void;
}

/** The `Deno` namespace, as far as it is used. */
export interface DenoRuntime {
  /** What it may do. */
  readonly permissions: {
    querySync(descriptor: { name: "read" | "write"; path: string }): { readonly state: string };
  };
  /** Opens a database; missing without the unstable flag. */
  readonly openKv?: (path: string) => Promise<DenoKv>;
  /** Makes a directory. */
  mkdir(path: string, options: { recursive: boolean }): Promise<void>;
  /** Renames a file. */
  rename(from: string, to: string): Promise<void>;
  /** Removes a file. */
  remove(path: string): Promise<void>;
  /** Looks at a file. */
  stat(path: string): Promise<{ readonly size: number; readonly mtime: Date | null }>;
  /** Reads a file. */
  readFile(path: string): Promise<Uint8Array>;
  /** Opens a file. */
  open(path: string, options: { write: boolean; create?: boolean; createNew?: boolean }): Promise<DenoFile>;
}

/**
 * The runtime, when it is Deno.
 *
 * @returns The `Deno` namespace, or undefined elsewhere.
 */
export function denoRuntime(): DenoRuntime | undefined {
  return (globalThis as { Deno?: DenoRuntime }).Deno;
}

/**
 * Deno's files. Nothing here may prompt: a library that stops a program to ask for its cache is worse than one without
 * a cache. So callers ask `mayUse()` first.
 *
 * @param deno The runtime.
 * @returns Its files.
 */
export function denoFiles(deno: DenoRuntime): FileRuntime {
  return {
    mayUse: (path, ...names) => names.every((name) => deno.permissions.querySync({ name, path }).state === "granted"),
    makeDirectory: (path) => deno.mkdir(path, { recursive: true }),
    async state(path) {
      const found = await deno.stat(path).catch(() => null);
      return found && { size: found.size, modified: found.mtime?.getTime() ?? 0 };
    },
    readFile: (path) => deno.readFile(path),
    createNew: async (path) => (await deno.open(path, { write: true, createNew: true })).close(),
    rename: (from, to) => deno.rename(from, to),
    remove: (path) => deno.remove(path),
    async lock(path, exclusive) {
      const file = await deno.open(path, { write: true, create: true }).catch(() => null);
      // A file system without locks rejects: then there is nothing to hold.
      const isHeld = await file?.tryLock(exclusive).catch(() => null) ?? null;
      if (isHeld !== true) file?.close();
      if (isHeld === false) throw new Error("database is locked: another process is using it or moving it aside");
      return isHeld === null ? null : { release: () => file!.close() };
    },
  };
}
