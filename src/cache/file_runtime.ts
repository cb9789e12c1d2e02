// Files, as the persistent cache needs them: one interface over Deno's own and over node:fs, which Bun and Node have.

import { denoFiles, denoRuntime } from "./deno_runtime.ts";
import { isNodeLike, nodeFiles } from "./node_runtime.ts";

/** What tells whether a file was written to. */
export interface FileState {
  /** Its size in bytes. */
  readonly size: number;
  /** When it was last written, in milliseconds since 1970. */
  readonly modified: number;
}

/** Files and what the process may do with them. Methods reject with the runtime's errors. */
export interface FileRuntime {
  /** Whether a path may be used without a prompt, as far as the runtime knows: file modes show only when it is used. */
  mayUse(path: string, ...names: ("read" | "write")[]): boolean;
  /** Makes a directory and those above it. */
  makeDirectory(path: string): Promise<void>;
  /** Looks at a file; null when it is missing or cannot be looked at. */
  state(path: string): Promise<FileState | null>;
  /** Reads a file. */
  readFile(path: string): Promise<Uint8Array>;
  /** Makes an empty file; rejects when there is one already. */
  createNew(path: string): Promise<void>;
  /** Renames a file. */
  rename(from: string, to: string): Promise<void>;
  /** Removes a file. */
  remove(path: string): Promise<void>;
  /**
   * Locks a file, which is made when it is missing, if that needs no waiting. Null where there is nothing to lock:
   * there can be no file, or its file system knows no locks. Rejects with `database is locked` when others hold it.
   * Missing where the runtime has no file locks, as node:fs.
   */
  readonly lock?: (path: string, exclusive: boolean) => Promise<{ release(): void } | null>;
}

/**
 * The files of this runtime.
 *
 * @returns Deno's, else those of node:fs, or undefined in browsers.
 */
export function fileRuntime(): FileRuntime | undefined {
  const deno = denoRuntime();
  if (deno !== undefined) return denoFiles(deno);
  return isNodeLike() ? nodeFiles : undefined;
}

/**
 * The operating system, as `process.platform` names it.
 *
 * @returns `linux`, `darwin`, `win32` and so on, or undefined in browsers.
 */
export function operatingSystem(): string | undefined {
  return (globalThis as { process?: { platform?: string } }).process?.platform;
}

/**
 * Whether an error says that a file is not there.
 *
 * @param error What a method of {@link FileRuntime} rejected with.
 * @returns Whether it does.
 */
export function isMissing(error: unknown): boolean {
  return hasNameOrCode(error, "NotFound", "ENOENT");
}

/**
 * Whether an error says that a file is there already.
 *
 * @param error What a method of {@link FileRuntime} rejected with.
 * @returns Whether it does.
 */
export function isThereAlready(error: unknown): boolean {
  return hasNameOrCode(error, "AlreadyExists", "EEXIST");
}

/** Deno's errors have a name of their own, those of node:fs a code. */
function hasNameOrCode(error: unknown, name: string, code: string): boolean {
  const { name: itsName, code: itsCode } = error as { name?: unknown; code?: unknown };
  return itsName === name || itsCode === code;
}
