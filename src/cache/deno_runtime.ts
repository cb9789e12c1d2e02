// The part of Deno that the persistent cache uses, under types of its own: the sources also type-check where Deno is not
// declared, and `openKv` is declared only with the unstable flag.

/** An open file, for holding a lock. */
export interface DenoFile {
  tryLock(exclusive: boolean): Promise<boolean>;
  close(): void;
}

/** A Deno KV database. */
export interface DenoKv {
  get(key: readonly (string | number)[]): Promise<{ readonly value: unknown }>;
  set(key: readonly (string | number)[], value: Uint8Array): Promise<unknown>;
  list(selector: { prefix: readonly (string | number)[] }): AsyncIterable<{
    readonly key: readonly unknown[];
    readonly value: unknown;
  }>;
  delete(key: readonly (string | number)[]): Promise<void>;
  close(): void;
}

/** The `Deno` namespace, as far as it is used. */
export interface DenoRuntime {
  readonly build: { readonly os: string };
  readonly permissions: {
    querySync(descriptor: { name: "read" | "write"; path: string }): { readonly state: string };
  };
  readonly openKv?: (path: string) => Promise<DenoKv>;
  mkdir(path: string, options: { recursive: boolean }): Promise<void>;
  rename(from: string, to: string): Promise<void>;
  stat(path: string): Promise<{ readonly size: number }>;
  readFile(path: string): Promise<Uint8Array>;
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
