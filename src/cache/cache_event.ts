/**
 * Why configurations are not kept in a file or a browser's database, or not this one:
 *
 * - `no-kv`: Deno runs without its key-value store, or npm's `@deno/kv` is not installed in Bun or Node.
 * - `no-directory`: nothing says where the user's caches are.
 * - `no-permission`: the file may not be read and written.
 * - `locked`: another process kept the file locked for too long, or another page the database.
 * - `damaged`: the file was no sound database; it was moved aside and replaced.
 * - `read-only`: the file can be read, but not written.
 * - `unavailable`: the store cannot be used for another reason, such as a full disk.
 * - `not-storable`: the value is no JSON, or too large.
 */
export type CacheEventCode =
  | "no-kv"
  | "no-directory"
  | "no-permission"
  | "locked"
  | "damaged"
  | "read-only"
  | "unavailable"
  | "not-storable";

/** Something that the user of a persistent cache may want to know. The computation goes on regardless. */
export interface CacheEvent {
  /** The kind of event. */
  readonly code: CacheEventCode;
  /** What happened and what to do, for a person. */
  readonly message: string;
  /** The error behind it, if there was one. */
  readonly cause?: unknown;
}

const warned = new Set<string>();

/**
 * Writes an event to the console, each message once per process.
 *
 * @param event The event.
 */
export function warnOnce(event: CacheEvent): void {
  if (warned.has(event.message)) return;
  warned.add(event.message);
  console.warn(event.message);
}
