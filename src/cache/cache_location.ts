import { readEnvironment } from "../environment.ts";
import type { CacheEvent } from "./cache_event.ts";
import { denoRuntime } from "./deno_runtime.ts";
import { fileRuntime, operatingSystem } from "./file_runtime.ts";
import { detectKvStore } from "./kv_detection.ts";
import type { KvOpener } from "./kv_store.ts";

/** Where a persistent cache keeps its entries. */
export type CacheLocation =
  | {
    readonly kind: "store";
    /** A file's path or a database's name. */
    readonly path: string;
    readonly open: KvOpener;
    /** The path, or such as `IndexedDB "flash-mla"`. */
    readonly label: string;
  }
  | {
    /** In this process only. */
    readonly kind: "memory";
    /** Why, as a sentence. */
    readonly detail: string;
    /** What to tell the user, when this is not what they asked for and they can change it. */
    readonly event: CacheEvent | null;
  }
  | { readonly kind: "off" };

/** The variable that moves the cache: a path, `memory` or `off`. */
export const CACHE_VARIABLE = "FLASH_MLA_CACHE";

/** The name of the database where the store is IndexedDB. */
const DATABASE = "flash-mla";

/**
 * What the user wants of the cache: the option, else the environment.
 *
 * @param path The option.
 * @returns A path, `memory` or `off` however they were written, or undefined when nothing was said.
 */
export function wantedCache(path?: string): string | undefined {
  const wanted = path ?? readEnvironment(CACHE_VARIABLE)?.trim();
  const word = wanted?.trim().toLowerCase();
  return word === "memory" || word === "off" ? word : wanted || undefined;
}

/**
 * Decides where to keep entries, from the option, the environment and the permissions there are. Never prompts.
 *
 * @param path A path, `memory` or `off`. Default: `FLASH_MLA_CACHE`, else the user's cache directory.
 * @param open Opens the store; by default what the runtime has.
 * @returns The location.
 */
export async function locateCache(path?: string, open?: KvOpener): Promise<CacheLocation> {
  const wanted = wantedCache(path);
  if (wanted === "off") return { kind: "off" };
  if (wanted === "memory") return { kind: "memory", detail: "As asked for.", event: null };

  const found = open === undefined ? await detectKvStore() : { open };
  if (found.open === null) {
    if (!found.remediable) return { kind: "memory", detail: found.reason, event: null };
    return told("no-kv", `${found.reason} Set ${CACHE_VARIABLE}=memory if that is as it should be.`);
  }
  if (found.open.medium === "indexed-db") {
    const name = wanted ?? DATABASE;
    return { kind: "store", path: name, open: found.open, label: `IndexedDB "${name}"` };
  }
  const file = wanted ?? defaultPath();
  if (file === undefined) return told("no-directory", withoutDirectory());
  if (fileRuntime()?.mayUse(file, "read", "write") === false) {
    const directory = wanted === undefined ? parentOf(file) : file;
    return told("no-permission", `run with --allow-read=${directory} --allow-write=${directory}.`, ` in ${file}`);
  }
  return { kind: "store", path: file, open: found.open, label: file };
}

function told(code: CacheEvent["code"], reason: string, where: string = ""): CacheLocation {
  const message = `Tuned configurations are kept in memory only, not${where || " in a file"}: ${reason}`;
  return { kind: "memory", detail: reason, event: { code, message } };
}

/** The file in the user's cache directory, by each system's convention; XDG_CACHE_HOME goes first on all of them. */
function defaultPath(): string | undefined {
  const xdg = readEnvironment("XDG_CACHE_HOME");
  // The XDG specification has relative paths ignored.
  if (xdg && /^(\/|[A-Za-z]:[/\\])/.test(xdg)) return `${xdg}/flash-mla/configs.kv`;
  const home = readEnvironment(homeVariable());
  if (!home) return undefined;
  switch (operatingSystem()) {
    case "win32":
      return `${home}\\flash-mla\\configs.kv`;
    case "darwin":
      return `${home}/Library/Caches/flash-mla/configs.kv`;
    default:
      return `${home}/.cache/flash-mla/configs.kv`;
  }
}

function homeVariable(): string {
  return operatingSystem() === "win32" ? "LOCALAPPDATA" : "HOME";
}

function withoutDirectory(): string {
  const home = homeVariable();
  if (denoRuntime() === undefined) return `${home} is unset: set ${CACHE_VARIABLE} to a path.`;
  return `${home} is unset or may not be read: set ${CACHE_VARIABLE} to a path, or run with ` +
    `--allow-env=${CACHE_VARIABLE},XDG_CACHE_HOME,${home}.`;
}

function parentOf(file: string): string {
  return file.replace(/[/\\][^/\\]*$/, "");
}
