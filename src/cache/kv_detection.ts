import { denoKvOpener } from "./deno_kv_store.ts";
import { denoRuntime } from "./deno_runtime.ts";
import { globalIndexedDb, indexedDbOpener } from "./indexed_db_store.ts";
import type { KvOpener } from "./kv_store.ts";
import { isBun, isNodeLike } from "./node_runtime.ts";
import { npmKvOpener } from "./npm_kv.ts";

/** How this runtime opens a store, or why it cannot. */
export type KvDetection =
  | { readonly open: KvOpener }
  | {
    readonly open: null;
    /** Why, as a sentence. */
    readonly reason: string;
    /** Whether the user can change it, and so should be told. */
    readonly remediable: boolean;
  };

/**
 * Looks for a key-value store: Deno's own, npm's `@deno/kv` in Bun and Node, IndexedDB in browsers.
 *
 * @returns The way to open it, or why there is none.
 */
export async function detectKvStore(): Promise<KvDetection> {
  const deno = denoRuntime();
  if (deno !== undefined) {
    if (deno.openKv !== undefined) return { open: denoKvOpener((path) => deno.openKv!(path)) };
    const reason =
      'Deno runs without its key-value store: add "unstable": ["kv"] to deno.json or run with --unstable-kv.';
    return { open: null, reason, remediable: true };
  }
  const indexedDb = globalIndexedDb();
  if (isNodeLike()) {
    const found = await npmKv();
    // Electron's pages have both.
    if (found.open !== null || indexedDb === undefined) return found;
  }
  if (indexedDb !== undefined) return { open: indexedDbOpener(indexedDb) };
  return { open: null, reason: "This runtime has no IndexedDB, or does not let this page use it.", remediable: false };
}

async function npmKv(): Promise<KvDetection> {
  const install = isBun() ? "bun add @deno/kv" : "npm install @deno/kv";
  try {
    const open = await npmKvOpener();
    if (open !== null) return { open };
    return { open: null, reason: `npm's @deno/kv is not installed: run ${install}.`, remediable: true };
  } catch (error) {
    const problem = error instanceof Error ? error.message : String(error);
    return { open: null, reason: `npm's @deno/kv cannot be loaded: ${problem}.`, remediable: true };
  }
}
