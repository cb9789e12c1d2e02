// The file that a Deno KV database lives in: whether it is sound, who may touch it now, and moving it out of the way.

import { type DenoFile, denoRuntime, isGranted } from "./deno_runtime.ts";
import { sqliteDamage } from "./kv_file_check.ts";

/**
 * Makes the directory of a database file, where that is permitted.
 *
 * @param path The file.
 */
export async function makeDirectory(path: string): Promise<void> {
  const deno = denoRuntime();
  if (deno === undefined) return;
  const directory = path.replace(deno.build.os === "windows" ? /[/\\][^/\\]*$/ : /\/[^/]*$/, "");
  if (directory === path || directory === "" || !isGranted(deno, directory, "read", "write")) return;
  // What is in the way, if anything, shows when the file is opened.
  await deno.mkdir(directory, { recursive: true }).catch(() => {});
}

/**
 * Looks at a database file before it is opened.
 *
 * @param path The file.
 * @returns What is wrong with it, or null when it is sound, missing, in use, or not ours to read.
 */
export async function fileDamage(path: string): Promise<string | null> {
  const deno = denoRuntime();
  if (deno === undefined || !isGranted(deno, path, "read") || !isGranted(deno, `${path}-wal`, "read")) return null;
  // With a write-ahead log, the pages in the file are not the last word.
  if ((await deno.stat(`${path}-wal`).catch(() => null))?.size) return null;
  // What cannot be read, such as a directory, shows when it is opened.
  const file = await deno.readFile(path).catch(() => null);
  return file === null ? null : sqliteDamage(file);
}

/**
 * Works on a database file while holding the lock file beside it: shared to use it, exclusively to move it aside.
 * Without this, a process could move away the fresh file that another one has just put in the damaged one's place, or
 * delete that one's write-ahead log while closing. Costs 0.02 ms.
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
  const deno = denoRuntime();
  const lockPath = `${path}.lock`;
  let file: DenoFile | null = null;
  if (deno !== undefined && isGranted(deno, lockPath, "read", "write")) {
    file = await deno.open(lockPath, { write: true, create: true }).catch(() => null);
  }
  try {
    // A file system without locks rejects: then there is nothing to hold either.
    const isHeld = await file?.tryLock(mode === "exclusive").catch(() => true) ?? true;
    if (!isHeld) throw new Error("database is locked: another process is using it or moving it aside");
    return await work();
  } finally {
    file?.close();
  }
}

/**
 * Moves a database file aside, with its log and index. The log goes first: a fresh file must never meet the old log,
 * which SQLite would replay into it.
 *
 * @param path The file; the caller holds it exclusively.
 * @returns Where it is now.
 * @throws {Error} When the files may not be renamed.
 */
export async function moveAside(path: string): Promise<string> {
  const deno = denoRuntime();
  if (deno === undefined) throw new Error("only Deno can move the file aside");
  const aside = `${path}.damaged-${new Date().toISOString().replace(/\D/g, "")}`;
  for (const name of [path, `${path}-wal`, `${path}-shm`, aside, `${aside}-wal`, `${aside}-shm`]) {
    if (!isGranted(deno, name, "read", "write")) throw new Error(`no permission to write ${name}`);
  }
  for (const suffix of ["-wal", "-shm", ""]) {
    await deno.rename(path + suffix, aside + suffix).catch((error: Error) => {
      if (error.name !== "NotFound") throw error;
    });
  }
  return aside;
}
