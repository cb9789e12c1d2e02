// Deno KV for Bun and Node: the npm package @deno/kv, which is loaded when it is there and never required.

import { type DenoKv, denoKvOpener } from "./deno_kv_store.ts";
import type { KvOpener } from "./kv_store.ts";

interface NpmKv {
  openKv(path: string, options: V8Coding): Promise<DenoKv>;
}

interface V8Coding {
  readonly encodeV8: (value: unknown) => Uint8Array;
  readonly decodeV8: (bytes: Uint8Array) => unknown;
}

// KV stores bytes as they are, and everything else in V8's serialisation, for which Bun has to be given these two and
// Node would take node:v8. The cache writes nothing but bytes; what another program stored otherwise reads as nothing.
const BYTES_ONLY: V8Coding = {
  encodeV8: () => {
    throw new TypeError("Cannot store a value that is no Uint8Array");
  },
  decodeV8: () => undefined,
};

/**
 * Loads the package.
 *
 * @returns The way to open a file with it, or null when it is not installed.
 * @throws {Error} When it is installed and cannot be loaded.
 */
export async function npmKvOpener(): Promise<KvOpener | null> {
  // Not a literal: the package must stay out of the module graph.
  const name = ["@deno", "kv"].join("/");
  let npm: NpmKv;
  try {
    npm = await import(name);
  } catch (error) {
    if ((error as { code?: unknown }).code === "ERR_MODULE_NOT_FOUND") return null;
    throw error;
  }
  return denoKvOpener(async (path) => {
    try {
      return await npm.openKv(path, BYTES_ONLY);
    } catch (error) {
      throw withoutBinary(error) ?? error;
    }
  });
}

/** The package's own words for this speak to those who bring a binary of their own. */
function withoutBinary(error: unknown): Error | null {
  const { message, cause } = error as Error;
  if (!message?.startsWith("No default napi interface")) return null;
  const reason = cause instanceof Error ? `: ${cause.message}` : "";
  return new Error(`@deno/kv has no binary for this system, or it is not installed${reason}`, { cause: error });
}
