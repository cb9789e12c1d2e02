// The part of Deno that the persistent cache uses, under types of its own: the sources also type-check where Deno is
// not declared, and `openKv` is declared only with the unstable flag.

/** An open file, for holding a lock. */
export interface DenoFile {
  /** Locks the file if that needs no waiting; the lock goes with the handle. */
  tryLock(exclusive: boolean): Promise<boolean>;
  /** Closes it. */
  close(): void;
}

/** A Deno KV database. */
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

/** The `Deno` namespace, as far as it is used. */
export interface DenoRuntime {
  /** What it was built for. */
  readonly build: { readonly os: string };
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
  /** Looks at a file. */
  stat(path: string): Promise<{ readonly size: number }>;
  /** Reads a file. */
  readFile(path: string): Promise<Uint8Array>;
  /** Opens a file. */
  open(path: string, options: { write: boolean; create: boolean }): Promise<DenoFile>;
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
 * Whether every one of some permissions is granted already. Nothing here may prompt: a library that stops a program to
 * ask for its cache is worse than one without a cache.
 *
 * @param deno The runtime.
 * @param path The path, and whatever lies below it.
 * @param names The permissions.
 * @returns Whether all are granted.
 */
export function isGranted(deno: DenoRuntime, path: string, ...names: ("read" | "write")[]): boolean {
  return names.every((name) => deno.permissions.querySync({ name, path }).state === "granted");
}
