// Safetensors files for tests, good and bad, as bytes.

import { assertInstanceOf, assertRejects, assertStringIncludes } from "@std/assert";
import { FlashMLAError } from "../../src/op/errors.ts";

/** A tensor of a file: its bytes as they are. */
export interface RawTensor {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly data: ArrayBufferView;
}

/** A file of tensors, one after the other, in the order given. */
export function safetensorsBytes(
  tensors: Readonly<Record<string, RawTensor>>,
  metadata?: Readonly<Record<string, string>>,
): Uint8Array<ArrayBuffer> {
  const header: Record<string, unknown> = metadata === undefined ? {} : { __metadata__: metadata };
  const parts: Uint8Array[] = [];
  let end = 0;
  for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
    header[name] = { dtype, shape, data_offsets: [end, end += data.byteLength] };
    parts.push(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  }
  const bytes = withHeader(JSON.stringify(header), end);
  let at = bytes.length - end;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

/** A file of any header, well formed or not, and so many zeros after it. */
export function withHeader(header: string | Uint8Array, dataBytes: number, length?: bigint): Uint8Array<ArrayBuffer> {
  const text = typeof header === "string" ? new TextEncoder().encode(header) : header;
  const bytes = new Uint8Array(8 + text.length + dataBytes);
  new DataView(bytes.buffer).setBigUint64(0, length ?? BigInt(text.length), true);
  bytes.set(text, 8);
  return bytes;
}

/** Bytes behind a function that remembers what was read of them. */
export interface CountingReader {
  /** How many bytes there are. */
  readonly size: number;
  /** Reads a range. */
  read(start: number, end: number): Promise<Uint8Array>;
  /** The ranges that were read. */
  readonly ranges: [start: number, end: number][];
}

export function countingReader(bytes: Uint8Array): CountingReader {
  const ranges: [number, number][] = [];
  return {
    size: bytes.length,
    ranges,
    read(start, end) {
      ranges.push([start, end]);
      return Promise.resolve(bytes.subarray(start, end));
    },
  };
}

/** Fails unless the work is refused as input, with a message that has all the texts. */
export async function assertRefused(work: () => Promise<unknown>, ...texts: string[]): Promise<void> {
  const error = await assertRejects(work);
  assertInstanceOf(error, FlashMLAError, String(error));
  if (error.code !== "invalid-input") throw new Error(`code ${error.code}: ${error.message}`);
  for (const text of texts) assertStringIncludes(error.message, text);
}
