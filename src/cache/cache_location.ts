import { readEnvironment } from "../environment.ts";
import type { CacheEvent } from "./cache_event.ts";
import { denoRuntime, isGranted } from "./deno_runtime.ts";
import { detectKvStore, type KvOpener } from "./kv_store.ts";

/** Where a persistent cache keeps its entries. */
export type CacheLocation =
  | { readonly kind: "file"; readonly path: string; readonly open: KvOpener }
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

/**
 * Decides where to keep entries, from the option, the environment and the permissions there are. Never prompts.
 *
 * @param path A path, `memory` or `off`. Default: `FLASH_MLA_CACHE`, else the user's cache directory.
 * @param open Opens the store; by default what the runtime has.
 * @returns The location.
 */
export function locateCache(path?: string, open?: KvOpener): CacheLocation {
  const wanted = path ?? (readEnvironment(CACHE_VARIABLE) || undefined);
  if (wanted === "off") return { kind: "off" };
  if (wanted === "memory") return { kind: "memory", detail: "As asked for.", event: null };

  const found = open === undefined ? detectKvStore() : { open };
  if (found.open === null) {
    return found.remediable ? told("no-kv", found.reason) : { kind: "memory", detail: found.reason, event: null };
  }
  const file = wanted ?? defaultPath();
  if (file === undefined) {
    const home = denoRuntime()?.build.os === "windows" ? "LOCALAPPDATA" : "HOME";
    return told(
      "no-directory",
      `${home} is unset or may not be read: set ${CACHE_VARIABLE} to a path, or run with ` +
        `--allow-env=${CACHE_VARIABLE},XDG_CACHE_HOME,${home}.`,
    );
  }
  const deno = denoRuntime();
  if (deno !== undefined && !isGranted(deno, file, "read", "write")) {
    const directory = wanted === undefined ? parentOf(file) : file;
    return told("no-permission", `run with --allow-read=${directory} --allow-write=${directory}.`, ` in ${file}`);
  }
  return { kind: "file", path: file, open: found.open };
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
  const os = denoRuntime()?.build.os;
  if (os === "windows") {
    const local = readEnvironment("LOCALAPPDATA");
    return local ? `${local}\\flash-mla\\configs.kv` : undefined;
  }
  const home = readEnvironment("HOME");
  if (!home) return undefined;
  return os === "darwin" ? `${home}/Library/Caches/flash-mla/configs.kv` : `${home}/.cache/flash-mla/configs.kv`;
}

function parentOf(file: string): string {
  return file.replace(/[/\\][^/\\]*$/, "");
}
