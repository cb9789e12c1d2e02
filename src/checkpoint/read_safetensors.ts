// Hugging Face checkpoints: where tensors come from into this library.

import { FlashMLAError } from "../op/errors.ts";
import { kindOf } from "../op/tensor.ts";
import type { ByteSource, RangeReader } from "./byte_source.ts";
import { type Checkpoint, checkpointOf } from "./checkpoint.ts";
import type { FetchRange } from "./http_source.ts";
import { openSource } from "./open_source.ts";
import { cannotRead, shown } from "./refusal.ts";
import { openFile, type SafetensorsFile } from "./safetensors_file.ts";
import {
  checkIndex,
  MAX_INDEX_BYTES,
  parseIndex,
  type SafetensorsIndex,
  shardedFiles,
  type TensorFiles,
} from "./sharded_index.ts";

/**
 * Where a checkpoint is:
 *
 * - a `Uint8Array` of a file's bytes, which must not change until the checkpoint is closed;
 * - a `Blob` or `File`;
 * - a path or a URL of `file:`: of a safetensors file, of an index (`….index.json`), or of a folder with
 *   `model.safetensors` or else `model.safetensors.index.json`; not in browsers;
 * - a URL of `http:` or `https:`, of a safetensors file or of an index, on a server that knows ranges;
 * - `{ size, read }`, which reads ranges in a way of its own;
 * - the parsed JSON of an index, with the option `shard`.
 */
export type SafetensorsSource = Uint8Array | Blob | string | URL | RangeReader | SafetensorsIndex;

/** Where one file of a checkpoint is: any {@link SafetensorsSource} but an index. */
export type ShardSource = Exclude<SafetensorsSource, SafetensorsIndex>;

/** How a checkpoint is read. */
export interface SafetensorsOptions {
  /** Rows and columns of an `F8_E4M3` tensor that share a scale, in one number if they are equal. Default 128. */
  readonly blockSize?: number | readonly [rows: number, columns: number];
  /** Finds a file that an index names, by its name there. Default: in the index's own folder. */
  readonly shard?: (name: string) => ShardSource | Promise<ShardSource>;
  /** Sends the requests for URLs, with headers of the caller's beside the given ones. Default: `fetch`. */
  readonly fetch?: FetchRange;
}

/**
 * Opens a checkpoint in the safetensors format, as Hugging Face's models come in: one file, or several under an index.
 *
 * Only headers are read, and later the tensors that are asked for. A header is believed only after it was checked against
 * the size of the file, so a damaged one costs no more memory than itself.
 *
 * @param source Where the checkpoint is.
 * @param options How it is read.
 * @returns The checkpoint; close it when it was opened by a path.
 * @throws {FlashMLAError} Of code `invalid-input`: when the source is missing, cannot be read, was cut short, or is no
 * safetensors file; when its tensors overlap, leave holes or do not have the sizes of their shapes; when an index names
 * files outside of its folder; when a server would send a large file whole; when an option does not fit.
 *
 * @example
 * ```ts
 * import { readSafetensors } from "@flash-mla/webgpu";
 *
 * // A file of one tensor: the length of the header, the header, two halves.
 * const header = `{"kv_a_proj":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]}}`;
 * const bytes = new Uint8Array(8 + header.length + 4);
 * bytes[0] = header.length;
 * bytes.set(new TextEncoder().encode(header), 8);
 * bytes.set([0x00, 0x3c, 0x00, 0xc0], 8 + header.length);
 *
 * const checkpoint = await readSafetensors(bytes);
 * console.log(checkpoint.names, await checkpoint.info("kv_a_proj"));
 * const { data, shape, dtype } = await checkpoint.tensor("kv_a_proj");
 * console.log(data, shape, dtype); // 1 and -2, [1, 2], f16
 * await checkpoint.close();
 * ```
 */
export async function readSafetensors(
  source: SafetensorsSource,
  options: SafetensorsOptions = {},
): Promise<Checkpoint> {
  const { blockSize = 128, shard, fetch: fetchRange = (url, init) => fetch(url, init) } = options;
  const block: readonly number[] = typeof blockSize === "number" ? [blockSize, blockSize] : blockSize;
  if (!Array.isArray(block) || block.length !== 2 || !block.every((size) => Number.isSafeInteger(size) && size > 0)) {
    refuseOption(`blockSize must be a positive integer or two, got ${shown(blockSize)}`);
  }
  if (shard !== undefined && typeof shard !== "function") {
    refuseOption(`shard must be a function, got ${kindOf(shard)}`);
  }
  if (typeof fetchRange !== "function") refuseOption(`fetch must be a function, got ${kindOf(fetchRange)}`);
  const files = await openFiles(source, { shard, fetchRange });
  return checkpointOf(files, block as [number, number]);
}

interface Opening {
  readonly shard: SafetensorsOptions["shard"];
  readonly fetchRange: FetchRange;
}

async function openFiles(given: SafetensorsSource, opening: Opening): Promise<TensorFiles> {
  if (isIndexObject(given)) return shardsOf(checkIndex("the index", given), opening);
  const { source, isIndex, beside } = await openSource(given, opening.fetchRange);
  if (isIndex) return shardsOf(parseIndex(source.name, await wholeIndex(source)), opening, beside);
  const file = await openFile(source);
  return {
    name: file.name,
    names: [...file.tensors.keys()],
    metadata: file.metadata,
    fileOf: () => Promise.resolve(file),
    close: () => file.close(),
  };
}

function shardsOf(
  index: ReturnType<typeof checkIndex>,
  { shard, fetchRange }: Opening,
  beside?: (name: string) => Promise<ByteSource>,
): TensorFiles {
  if (shard === undefined && beside === undefined) {
    cannotRead(index.name, "the option shard has to say where its files are, since the index has no folder");
  }
  return shardedFiles(index, async (name): Promise<SafetensorsFile> => {
    if (shard === undefined) return await openFile(await beside!(name));
    const given: SafetensorsSource = await shard(name);
    if (isIndexObject(given)) cannotRead(index.name, `shard(${shown(name)}) must give a file, got an index`);
    return await openFile((await openSource(given, fetchRange)).source);
  });
}

async function wholeIndex(source: ByteSource): Promise<Uint8Array> {
  const { name, size = 0 } = source;
  try {
    if (size === 0) cannotRead(name, "the index is empty");
    if (size > MAX_INDEX_BYTES) cannotRead(name, `expected an index of at most ${MAX_INDEX_BYTES} bytes, got ${size}`);
    return await source.read(0, size);
  } finally {
    await source.close();
  }
}

function isIndexObject(source: SafetensorsSource): source is SafetensorsIndex {
  return typeof source === "object" && source !== null && "weight_map" in source;
}

function refuseOption(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot read safetensors: ${why}`);
}
