// The index of a checkpoint in several files: which tensor is in which.

import { asObject, parseJsonObject } from "./json_object.ts";
import { cannotRead, shown } from "./refusal.ts";
import type { SafetensorsFile } from "./safetensors_file.ts";

/** An index as `model.safetensors.index.json` has it. */
export interface SafetensorsIndex {
  /** File names by the names of the tensors in them, relative to the index. */
  readonly weight_map: Readonly<Record<string, string>>;
  /** What the writer left, such as `total_size`. */
  readonly metadata?: Readonly<Record<string, unknown>>;
}

/** Where a checkpoint's tensors are: in one file, or in several that are opened when they are needed. */
export interface TensorFiles {
  /** What it is, for messages. */
  readonly name: string;
  /** The names of all tensors. */
  readonly names: readonly string[];
  /** Strings that the writer left, by name. */
  readonly metadata: Readonly<Record<string, string>>;
  /** The file that has a tensor, one of `names`. */
  fileOf(tensor: string): Promise<SafetensorsFile>;
  /** Closes every file. */
  close(): Promise<void>;
}

/** An index that was read, and can be trusted as far as names of files go. */
export interface CheckedIndex {
  /** What it is, for messages. */
  readonly name: string;
  /** File names by the names of the tensors in them. */
  readonly shards: ReadonlyMap<string, string>;
  /** What the writer left; numbers as text. */
  readonly metadata: Readonly<Record<string, string>>;
}

/** The largest index that is read: as much as a header may have. */
export const MAX_INDEX_BYTES = 100_000_000;

/**
 * Parses an index.
 *
 * @param name What it is, for messages.
 * @param bytes Its JSON.
 * @returns The index.
 * @throws {FlashMLAError} When it is none, or names a file outside of its folder.
 */
export function parseIndex(name: string, bytes: Uint8Array): CheckedIndex {
  return checkIndex(name, parseJsonObject(name, "the index", bytes));
}

/**
 * Checks an index.
 *
 * @param name What it is, for messages.
 * @param index The parsed JSON.
 * @returns The index.
 * @throws {FlashMLAError} When it is none, or names a file outside of its folder.
 */
export function checkIndex(name: string, index: object): CheckedIndex {
  const { weight_map: given, metadata: left } = index as Record<string, unknown>;
  const map = asObject(given) ??
    cannotRead(name, `expected weight_map to be an object of file names by tensor, got ${shown(given)}`);
  const shards = new Map<string, string>();
  for (const [tensor, shard] of Object.entries(map)) {
    if (typeof shard !== "string" || !staysInFolder(shard)) {
      cannotRead(name, `expected ${shown(tensor)} in a file of the index's folder, got ${shown(shard)}`);
    }
    shards.set(tensor, shard);
  }
  const metadata: Record<string, string> = {};
  for (const [key, value] of Object.entries(asObject(left) ?? {})) {
    if (["string", "number", "boolean"].includes(typeof value)) metadata[key] = String(value);
  }
  return { name, shards, metadata };
}

/** Whether a relative path names something below where it starts, on every operating system and in URLs. */
function staysInFolder(path: string): boolean {
  // Backslashes, drives and streams are Windows', control characters nobody's.
  // deno-lint-ignore no-control-regex
  if (/[\\:\x00-\x1f]/.test(path)) return false;
  return path.split("/").every((part) => part !== "" && part !== "." && part !== "..");
}

/**
 * The files of an index. Each is opened when the first of its tensors is asked for, and stays open.
 *
 * @param index The index.
 * @param open Opens a file by its name in the index.
 * @returns The files.
 */
export function shardedFiles(index: CheckedIndex, open: (shard: string) => Promise<SafetensorsFile>): TensorFiles {
  const opened = new Map<string, Promise<SafetensorsFile>>();
  return {
    name: index.name,
    names: [...index.shards.keys()],
    metadata: index.metadata,
    async fileOf(tensor) {
      const shard = index.shards.get(tensor)!;
      let opening = opened.get(shard);
      if (opening === undefined) {
        opening = open(shard);
        opened.set(shard, opening);
        // A file that could not be opened is tried again next time: a server may be back.
        opening.catch(() => opened.delete(shard));
      }
      const file = await opening;
      if (file.tensors.has(tensor)) return file;
      cannotRead(file.name, `expected ${shown(tensor)} in it, as ${index.name} says, got ${file.tensors.size} others`);
    },
    async close() {
      const files = await Promise.allSettled(opened.values());
      await Promise.all(files.map((file) => file.status === "fulfilled" ? file.value.close() : undefined));
    },
  };
}
