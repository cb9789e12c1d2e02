// Bytes that are read by ranges: in memory, in a Blob, or wherever a caller's function gets them from.

import { cannotRead, failedToRead, shown } from "./refusal.ts";

/** Bytes that a caller's function fetches, range by range: an archive, a cache, a server with rules of its own. */
export interface RangeReader {
  /** How many bytes there are. When it is left out, the byte that has to be the last one is read to see whether it is there. */
  readonly size?: number;
  /**
   * Reads a range; the bytes are copied out of what it returns.
   *
   * @param start The first byte.
   * @param end One past the last byte.
   * @returns Exactly `end - start` bytes.
   */
  read(start: number, end: number): Promise<Uint8Array>;
}

/** What all sources become. */
export interface ByteSource {
  /** What it is, for messages. */
  readonly name: string;
  /** How many bytes there are; undefined where a caller's function has not said. */
  readonly size: number | undefined;
  /** Reads a range of at least one byte, which lies within `size`, into new memory of exactly that length. */
  read(start: number, end: number): Promise<Uint8Array<ArrayBuffer>>;
  /** Gives back what reading needs, such as an open file. */
  close(): Promise<void>;
}

/**
 * Memory for a range.
 *
 * @param source The source in words.
 * @param bytes How many, already known to be there.
 * @returns Zeros.
 * @throws {FlashMLAError} When the runtime has no array of that size.
 */
export function allocate(source: string, bytes: number): Uint8Array<ArrayBuffer> {
  try {
    return new Uint8Array(bytes);
  } catch (cause) {
    cannotRead(source, `${bytes} bytes at once are more than this runtime can hold`, cause);
  }
}

/**
 * Bytes in memory.
 *
 * @param bytes The bytes, which are not copied before they are read.
 * @param name What they are, for messages.
 * @returns The source.
 */
export function bytesSource(bytes: Uint8Array, name: string = `${bytes.length} bytes`): ByteSource {
  return {
    name,
    size: bytes.length,
    read(start, end) {
      // Not by slice(): Node's Buffer makes that a view, and memory may be shared with other threads.
      const copy = allocate(name, end - start);
      copy.set(bytes.subarray(start, end));
      return Promise.resolve(copy);
    },
    close: () => Promise.resolve(),
  };
}

/**
 * A Blob or a File, from which only the ranges asked for are read.
 *
 * @param blob The blob.
 * @returns The source.
 */
export function blobSource(blob: Blob): ByteSource {
  const { name: fileName } = blob as { name?: unknown };
  const name = typeof fileName === "string" ? `the file ${shown(fileName)}` : `a Blob of ${blob.size} bytes`;
  return {
    name,
    size: blob.size,
    async read(start, end) {
      const bytes = new Uint8Array(await blob.slice(start, end).arrayBuffer().catch((why) => failedToRead(name, why)));
      return checkedLength(name, bytes, start, end);
    },
    close: () => Promise.resolve(),
  };
}

/**
 * What a caller's function reads.
 *
 * @param reader The function, and the size if it is known.
 * @returns The source.
 * @throws {FlashMLAError} When the size is no size.
 */
export function readerSource(reader: RangeReader): ByteSource {
  const { size } = reader;
  const name = size === undefined ? "a range reader" : `a range reader of ${shown(size)} bytes`;
  if (size !== undefined && (!Number.isSafeInteger(size) || size < 0)) {
    cannotRead(name, `size must be a non-negative integer, got ${shown(size)}`);
  }
  return {
    name,
    size,
    async read(start, end) {
      let bytes: Uint8Array;
      try {
        bytes = await reader.read(start, end);
      } catch (cause) {
        cannotRead(
          name,
          `reading bytes ${start} to ${end} failed: ${(cause as Error)?.message ?? shown(cause)}`,
          cause,
        );
      }
      if (!(bytes instanceof Uint8Array)) cannotRead(name, `read() must return a Uint8Array, got ${shown(bytes)}`);
      return new Uint8Array(checkedLength(name, bytes, start, end));
    },
    close: () => Promise.resolve(),
  };
}

/** Throws unless a range came as long as it was asked for. */
function checkedLength<Bytes extends Uint8Array>(name: string, bytes: Bytes, start: number, end: number): Bytes {
  if (bytes.length === end - start) return bytes;
  cannotRead(name, `expected ${end - start} bytes at ${start}, got ${bytes.length}`);
}
