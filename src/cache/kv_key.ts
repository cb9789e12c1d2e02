// Keys as bytes, in Deno KV's encoding, which is FoundationDB's of tuples: the order of the bytes is the order of the
// keys, and the bytes of a key begin with those of its first parts. Strings sort before numbers.

import type { KvKey } from "./kv_store.ts";

const STRING = 0x02;
const NUMBER = 0x21;

/**
 * Encodes a key. A string takes 2 bytes more than its UTF-8 and one more for each NUL in it, a number takes 9.
 *
 * @param key The key.
 * @returns Its bytes, whose order is that of the keys.
 */
export function packKey(key: KvKey): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(key.flatMap((part) => (typeof part === "string" ? packString(part) : packNumber(part))));
}

/** NUL ends a string; one inside is followed by 0xff, which nothing else begins with. */
function packString(text: string): number[] {
  const bytes = [STRING];
  for (const byte of new TextEncoder().encode(text)) {
    bytes.push(byte);
    if (byte === 0) bytes.push(0xff);
  }
  bytes.push(0);
  return bytes;
}

/** Big-endian, with the sign turned over, and all bits of negative numbers, for which larger bits are smaller numbers. */
function packNumber(number: number): number[] {
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, number);
  const flip = view.getUint8(0) & 0x80 ? 0xff : 0;
  const bytes = Array.from(new Uint8Array(view.buffer), (byte) => byte ^ flip);
  if (flip === 0) bytes[0]! |= 0x80;
  return [NUMBER, ...bytes];
}
