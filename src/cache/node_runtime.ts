// The part of Node that the persistent cache uses, which Bun has too. Browsers load this module as well, so nothing of
// node: is imported by name.

import type { FileRuntime } from "./file_runtime.ts";

interface NodeFs {
  mkdir(path: string): Promise<unknown>;
  stat(path: string): Promise<{ readonly size: number; readonly mtimeMs: number }>;
  readFile(path: string): Promise<Uint8Array>;
  writeFile(path: string, content: string, options: { flag: string }): Promise<void>;
  rename(from: string, to: string): Promise<void>;
  unlink(path: string): Promise<void>;
}

interface NodeProcess {
  readonly versions?: { readonly node?: string; readonly bun?: string };
  readonly getBuiltinModule?: (name: string) => unknown;
}

function nodeProcess(): NodeProcess | undefined {
  return (globalThis as { process?: NodeProcess }).process;
}

/**
 * Whether the runtime has Node's modules: Node and Bun, and also Deno, which has to be asked for first.
 *
 * @returns Whether it does.
 */
export function isNodeLike(): boolean {
  return nodeProcess()?.versions?.node !== undefined;
}

/**
 * Whether the runtime is Bun.
 *
 * @returns Whether it is.
 */
export function isBun(): boolean {
  return nodeProcess()?.versions?.bun !== undefined;
}

async function nodeFs(): Promise<NodeFs> {
  // Not a literal, which bundlers for browsers would stumble over. Node 20.16 and 22.3 brought getBuiltinModule().
  const name = ["node:fs", "promises"].join("/");
  return (nodeProcess()?.getBuiltinModule?.(name) ?? await import(name)) as NodeFs;
}

/** Node's own recursive mkdir never ends where a parent can be neither found nor made, as in /proc (Node 20.20). */
async function makeDirectory(path: string): Promise<void> {
  const fs = await nodeFs();
  try {
    await fs.mkdir(path);
  } catch (error) {
    const { code } = error as { code?: unknown };
    if (code === "EEXIST") return;
    const parent = path.replace(/[/\\][^/\\]*$/, "");
    if (code !== "ENOENT" || parent === path || parent === "") throw error;
    await makeDirectory(parent);
    // Another process may have been faster.
    await fs.mkdir(path).catch((error) => {
      if (error.code !== "EEXIST") throw error;
    });
  }
}

/**
 * The files of node:fs. It has no locks, and nothing in their place survives the end of a process as surely, so files
 * are used without: `kv_file.ts` says what keeps that safe.
 */
export const nodeFiles: FileRuntime = {
  mayUse: () => true,
  makeDirectory,
  async state(path) {
    const found = await (await nodeFs()).stat(path).catch(() => null);
    return found && { size: found.size, modified: found.mtimeMs };
  },
  readFile: async (path) => await (await nodeFs()).readFile(path),
  createNew: async (path) => await (await nodeFs()).writeFile(path, "", { flag: "wx" }),
  rename: async (from, to) => await (await nodeFs()).rename(from, to),
  remove: async (path) => await (await nodeFs()).unlink(path),
};
