// The file that a Deno KV database lives in: whether it is sound, who may touch it now, and moving it out of the way.
//
// Moving it is the dangerous part: a process must not move away the fresh file that another one has just put in the
// damaged one's place, nor a file that only looked damaged while another one wrote to it, nor may a process with the
// old file still open delete the fresh one's write-ahead log while closing. Three things stand against that:
//
//   lock file  `.lock`    held shared to use the file, exclusively to move it. In Deno only: node:fs has no file locks.
//   claim      `.moving`  made by the one process, of whatever runtime, that may move the file now
//   rest                  the file is moved when it was found damaged twice and nobody wrote to it for 0.1 s
//
// So a process of Bun or Node is not seen while it uses the file, which takes it 2 to 20 ms at a time. What is left:
// one that was suspended in the middle of that, for longer than the rest, writes to the file that was moved.

import {
  type FileRuntime,
  fileRuntime,
  type FileState,
  isMissing,
  isThereAlready,
  operatingSystem,
} from "./file_runtime.ts";
import { sqliteDamage } from "./kv_file_check.ts";

// Clocks of file systems tick every 1 to 10 ms.
const REST_MS = 100;
// A claim is held for some 0.2 s: one as old as this belongs to a process that ended meanwhile.
const CLAIM_ENDS_MS = 10_000;

/** What changes when a database is written to: the file and its write-ahead log. */
export interface KvFileState {
  /** The file, null when it is missing. */
  readonly file: FileState | null;
  /** The log, null when it is missing or empty. */
  readonly log: FileState | null;
}

/**
 * Makes the directory of a database file, where that is permitted.
 *
 * @param path The file.
 */
export async function makeDirectory(path: string): Promise<void> {
  const files = fileRuntime();
  if (files === undefined) return;
  const directory = path.replace(operatingSystem() === "win32" ? /[/\\][^/\\]*$/ : /\/[^/]*$/, "");
  if (directory === path || directory === "" || !files.mayUse(directory, "read", "write")) return;
  // What is in the way, if anything, shows when the file is opened.
  await files.makeDirectory(directory).catch(() => {});
}

/**
 * Looks at a database file before it is opened.
 *
 * @param path The file.
 * @returns What is wrong with it, or null when it is sound, missing, in use, or not ours to read.
 */
export async function fileDamage(path: string): Promise<string | null> {
  const files = fileRuntime();
  if (files === undefined || !files.mayUse(path, "read") || !files.mayUse(`${path}-wal`, "read")) return null;
  const before = await kvFileState(path);
  // With a write-ahead log, the pages in the file are not the last word.
  if (before.log !== null) return null;
  // What cannot be read, such as a directory, shows when it is opened.
  const file = await files.readFile(path).catch(() => null);
  const damage = file === null ? null : sqliteDamage(file);
  if (damage === null) return null;
  // Half of what another process is writing looks like damage.
  return isSameState(before, await kvFileState(path)) ? damage : null;
}

/**
 * Looks whether a database is being written to.
 *
 * @param path The file.
 * @returns Its state, for {@link moveAside}.
 */
export async function kvFileState(path: string): Promise<KvFileState> {
  const state = (name: string): Promise<FileState | null> => fileRuntime()?.state(name) ?? Promise.resolve(null);
  const log = await state(`${path}-wal`);
  return { file: await state(path), log: log?.size ? log : null };
}

function isSameState(a: KvFileState, b: KvFileState): boolean {
  return (["file", "log"] as const).every((name) =>
    a[name]?.size === b[name]?.size && a[name]?.modified === b[name]?.modified
  );
}

/**
 * Works on a database file while holding the lock file beside it, shared to use it, exclusively to move it aside; for
 * the latter the claim to do so, too. The lock costs 0.02 ms.
 *
 * @param path The database file.
 * @param mode Whether others may hold it meanwhile.
 * @param work What to do. Where there can be no lock file, such as in a read-only directory, it is done without.
 * @returns What `work` returned.
 * @throws {Error} `database is locked`, when others hold it.
 */
export async function holdingKvFile<T>(
  path: string,
  mode: "shared" | "exclusive",
  work: () => Promise<T>,
): Promise<T> {
  const files = fileRuntime();
  if (files === undefined) return await work();
  const lockPath = `${path}.lock`;
  const lock = files.mayUse(lockPath, "read", "write") ? await files.lock?.(lockPath, mode === "exclusive") : null;
  try {
    return mode === "shared" ? await work() : await claiming(files, `${path}.moving`, work);
  } finally {
    lock?.release();
  }
}

/** Works while a file exists that only one process can have made. */
async function claiming<T>(files: FileRuntime, claim: string, work: () => Promise<T>): Promise<T> {
  const isClaimed = files.mayUse(claim, "read", "write") && await tryToClaim(files, claim);
  try {
    return await work();
  } finally {
    if (isClaimed) await files.remove(claim).catch(() => {});
  }
}

/** False where there can be no such file: then nothing can be moved there either. */
async function tryToClaim(files: FileRuntime, claim: string): Promise<boolean> {
  try {
    await files.createNew(claim);
    return true;
  } catch (error) {
    if (!isThereAlready(error)) return false;
  }
  const held = await files.state(claim);
  if (held !== null && Date.now() - held.modified > CLAIM_ENDS_MS) await files.remove(claim).catch(() => {});
  throw new Error("database is locked: another process is moving it aside");
}

/**
 * Moves a database file aside, with its log and index, after a rest in which nobody wrote to it. The log goes first: a
 * fresh file must never meet the old log, which SQLite would replay into it.
 *
 * @param path The file; the caller holds it exclusively.
 * @param seen What it was like before it was found damaged. Default: what it is like now.
 * @returns Where it is now.
 * @throws {Error} When the files may not be renamed; `database is locked`, when another process wrote to it.
 */
export async function moveAside(path: string, seen?: KvFileState): Promise<string> {
  const files = fileRuntime();
  if (files === undefined) throw new Error("this runtime has no files");
  const aside = `${path}.damaged-${new Date().toISOString().replace(/\D/g, "")}`;
  for (const name of [path, `${path}-wal`, `${path}-shm`, aside, `${aside}-wal`, `${aside}-shm`]) {
    if (!files.mayUse(name, "read", "write")) throw new Error(`no permission to write ${name}`);
  }
  const before = seen ?? await kvFileState(path);
  await new Promise((resolve) => setTimeout(resolve, REST_MS));
  if (!isSameState(before, await kvFileState(path))) {
    throw new Error("database is locked: another process is writing to it");
  }
  for (const suffix of ["-wal", "-shm", ""]) {
    await files.rename(path + suffix, aside + suffix).catch((error) => {
      if (!isMissing(error)) throw error;
    });
  }
  return aside;
}
