// Files, by node:fs, which Deno and Bun have too. Browsers load this module as well, so nothing of node: is imported by name.

import { currentRuntime, type Runtime } from "../environment.ts";
import { allocate, type ByteSource } from "./byte_source.ts";
import { cannotRead, failedToRead, shown } from "./refusal.ts";

interface FileStat {
  readonly size: number;
  isFile(): boolean;
  isDirectory(): boolean;
}

interface FileHandle {
  stat(): Promise<FileStat>;
  read(into: Uint8Array, offset: number, length: number, position: number): Promise<{ readonly bytesRead: number }>;
  close(): Promise<void>;
}

interface NodeFs {
  stat(path: string): Promise<FileStat>;
  open(path: string, flags: "r"): Promise<FileHandle>;
}

interface NodePath {
  dirname(path: string): string;
  join(...parts: string[]): string;
}

interface NodeUrl {
  fileURLToPath(url: URL): string;
}

/** Node reads less than 2 GiB at once. */
const CHUNK_BYTES = 2 ** 30;

/** What a folder's weights are called, in the order in which Hugging Face's transformers looks for them. */
const FOLDER_FILES = ["model.safetensors", "model.safetensors.index.json"];

async function nodeModule<Module>(...parts: string[]): Promise<Module> {
  // Not a literal, which bundlers for browsers would stumble over. Node 20.16 and 22.3 brought getBuiltinModule().
  const name = `node:${parts.join("/")}`;
  const { process } = globalThis as { process?: { getBuiltinModule?(name: string): unknown } };
  return (process?.getBuiltinModule?.(name) ?? await import(name)) as Module;
}

/**
 * The path of a file or folder that a caller names.
 *
 * @param location A path, or a URL of `file:`.
 * @param runtime What runs this program.
 * @returns The path.
 * @throws {FlashMLAError} In browsers, which have no paths; for a URL that is none of this machine.
 */
export async function filePath(
  location: string | URL,
  runtime: Runtime["name"] = currentRuntime().name,
): Promise<string> {
  if (runtime === "browser") {
    cannotRead(
      shown(String(location)),
      "a browser opens no paths; pass a Blob or File, bytes in a Uint8Array, a URL of http or https, or { read }",
    );
  }
  if (typeof location === "string") return location;
  try {
    return (await nodeModule<NodeUrl>("url")).fileURLToPath(location);
  } catch (cause) {
    failedToRead(location.href, cause);
  }
}

/**
 * The file that a path means: itself, or for a folder the weights or the index in it.
 *
 * @param path The path of a file or folder.
 * @returns The path of a file.
 * @throws {FlashMLAError} When there is none.
 */
export async function fileOrWeightsIn(path: string): Promise<string> {
  const fs = await nodeModule<NodeFs>("fs", "promises");
  const found = await fs.stat(path).catch((cause) => notFound(path, cause));
  if (!found.isDirectory()) return path;
  for (const name of FOLDER_FILES) {
    const file = (await nodeModule<NodePath>("path")).join(path, name);
    if ((await fs.stat(file).catch(() => null))?.isFile()) return file;
  }
  cannotRead(path, `the folder has neither ${FOLDER_FILES.join(" nor ")}`);
}

/**
 * The path of a file in the folder of another one.
 *
 * @param path The other file.
 * @param name The file, relative to the folder, with `/` between its parts.
 * @returns Its path.
 */
export async function pathBeside(path: string, name: string): Promise<string> {
  const { dirname, join } = await nodeModule<NodePath>("path");
  return join(dirname(path), ...name.split("/"));
}

/**
 * Opens a file; it stays open until the source is closed.
 *
 * @param path Its path.
 * @returns The source.
 * @throws {FlashMLAError} When it is missing, may not be read, or is no ordinary file.
 */
export async function fileSource(path: string): Promise<ByteSource> {
  const fs = await nodeModule<NodeFs>("fs", "promises");
  // Asked before it is opened: opening a pipe would wait for somebody to write to it.
  const found = await fs.stat(path).catch((cause) => notFound(path, cause));
  if (!found.isFile()) cannotRead(path, "it is no ordinary file");
  const file = await fs.open(path, "r").catch((cause) => notFound(path, cause));
  let size: number;
  try {
    ({ size } = await file.stat());
  } catch (cause) {
    await file.close();
    failedToRead(path, cause);
  }
  // One read after the other: with Deno's node:fs, a read at a position moves the place that all reads share.
  let turn: Promise<unknown> = Promise.resolve();
  return {
    name: path,
    size,
    read(start, end) {
      const reading = turn.then(() => readRange(path, file, start, end));
      turn = reading.catch(() => {});
      return reading;
    },
    close: async () => {
      await turn;
      await file.close();
    },
  };
}

async function readRange(path: string, file: FileHandle, start: number, end: number): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = allocate(path, end - start);
  let filled = 0;
  try {
    while (filled < bytes.length) {
      const length = Math.min(CHUNK_BYTES, bytes.length - filled);
      const { bytesRead } = await file.read(bytes, filled, length, start + filled);
      if (bytesRead === 0) break;
      filled += bytesRead;
    }
  } catch (cause) {
    failedToRead(path, cause);
  }
  if (filled === bytes.length) return bytes;
  cannotRead(path, `expected ${bytes.length} bytes at ${start}, got ${filled}: it was cut short`);
}

function notFound(path: string, cause: unknown): never {
  if ((cause as { code?: unknown }).code !== "ENOENT") failedToRead(path, cause);
  cannotRead(path === "" ? '""' : path, "there is no such file or folder", cause);
}
