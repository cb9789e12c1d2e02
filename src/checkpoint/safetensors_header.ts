// The header of a safetensors file, checked as strictly as the format's reference implementation does:
//
//   8 bytes   length N of the header, little-endian, at most 100,000,000
//   N bytes   JSON: { "__metadata__": { string: string }, NAME: { dtype, shape, data_offsets: [start, end] } … }
//   the rest  the tensors' bytes, without holes, overlaps or anything after the last; offsets count from here

import type { ByteSource } from "./byte_source.ts";
import { asObject, parseJsonObject } from "./json_object.ts";
import { cannotRead, shown } from "./refusal.ts";

/** Bits of an element, by the names of the format. */
const ELEMENT_BITS: ReadonlyMap<string, number> = new Map([
  ...["F4"].map((dtype) => [dtype, 4] as const),
  ...["F6_E2M3", "F6_E3M2"].map((dtype) => [dtype, 6] as const),
  ...["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"].map((d) => [d, 8] as const),
  ...["I16", "U16", "F16", "BF16"].map((dtype) => [dtype, 16] as const),
  ...["I32", "U32", "F32"].map((dtype) => [dtype, 32] as const),
  ...["I64", "U64", "F64", "C64"].map((dtype) => [dtype, 64] as const),
]);

const LENGTH_BYTES = 8;
const MAX_HEADER_BYTES = 100_000_000;

/** Where a tensor lies, and as what. */
export interface TensorPlace {
  /** Its name. */
  readonly name: string;
  /** Its element type, as the format names it. */
  readonly dtype: string;
  /** The axis lengths. */
  readonly shape: readonly number[];
  /** Its first byte, counted from the start of the file. */
  readonly start: number;
  /** One past its last byte. */
  readonly end: number;
}

/** What a header says. */
export interface SafetensorsHeader {
  /** Strings that the writer left, by name. */
  readonly metadata: Readonly<Record<string, string>>;
  /** The tensors by name, in the order of their bytes. */
  readonly tensors: ReadonlyMap<string, TensorPlace>;
}

/**
 * Reads and checks a header; of the rest of the file not a byte is read, unless its size is unknown.
 *
 * @param source The file.
 * @returns What the header says: every place in it lies within the file, and is as large as its tensor.
 * @throws {FlashMLAError} When the source is no safetensors file, or one that was damaged or cut short.
 */
export async function readHeader(source: ByteSource): Promise<SafetensorsHeader> {
  const { name, size = Infinity } = source;
  if (size < LENGTH_BYTES) cannotRead(name, `expected the 8 bytes of a header's length, got a source of ${size} bytes`);
  const head = await source.read(0, LENGTH_BYTES);
  const length = new DataView(head.buffer).getBigUint64(0, true);
  if (new TextDecoder().decode(head) === "version ") {
    cannotRead(name, "it begins with text, as the pointer does that Git leaves in place of a file of LFS");
  }
  if (length === 0n) cannotRead(name, "expected a header, got one of 0 bytes");
  if (length > MAX_HEADER_BYTES) {
    cannotRead(name, `expected a header of at most ${MAX_HEADER_BYTES} bytes, got a length of ${length}`);
  }
  const dataStart = LENGTH_BYTES + Number(length);
  if (dataStart > size) cannotRead(name, `expected a header of ${length} bytes, got a source of ${size} bytes in all`);

  const bytes = await source.read(LENGTH_BYTES, dataStart);
  if (bytes[0] !== 0x7b) cannotRead(name, `expected the header to begin with "{", got byte ${bytes[0]}`);
  const { metadata, places } = parsePlaces(name, parseJsonObject(name, "the header", bytes), dataStart);

  const end = places.length === 0 ? dataStart : places[places.length - 1].end;
  if (end > size) cannotRead(name, `expected ${end} bytes as its header says, got ${size}: it was cut short`);
  if (size !== Infinity && size > end) cannotRead(name, `expected ${end} bytes as its header says, got ${size}`);
  if (size === Infinity && end > dataStart) await source.read(end - 1, end);
  return { metadata, tensors: new Map(places.map((place) => [place.name, place])) };
}

function parsePlaces(source: string, header: Record<string, unknown>, dataStart: number) {
  let metadata: Record<string, string> = {};
  const places: TensorPlace[] = [];
  for (const [name, value] of Object.entries(header)) {
    if (name === "__metadata__") metadata = parseMetadata(source, value);
    else places.push(parsePlace(source, name, value, dataStart));
  }
  places.sort((a, b) => a.start - b.start || a.end - b.end);
  let used = dataStart;
  for (const { name, start, end } of places) {
    if (start !== used) {
      const what = start > used ? "a hole before it" : "an overlap with the one before";
      cannotRead(
        source,
        `expected ${shown(name)} at byte ${used - dataStart} of the data, got ${start - dataStart}: ${what}`,
      );
    }
    used = end;
  }
  return { metadata, places };
}

function parseMetadata(source: string, value: unknown): Record<string, string> {
  if (value === null) return {};
  const metadata = asObject(value) ?? cannotRead(source, `expected __metadata__ to be an object, got ${shown(value)}`);
  for (const [key, text] of Object.entries(metadata)) {
    if (typeof text !== "string") {
      cannotRead(source, `expected __metadata__ of strings, got ${shown(text)} for ${shown(key)}`);
    }
  }
  return metadata as Record<string, string>;
}

function parsePlace(source: string, name: string, value: unknown, dataStart: number): TensorPlace {
  const fail = (expected: string, got: unknown): never => {
    return cannotRead(source, `tensor ${shown(name)}: expected ${expected}, got ${shown(got)}`);
  };
  const { dtype, shape, data_offsets: offsets } = asObject(value) ?? fail("an object", value);
  if (typeof dtype !== "string") return fail("dtype to be a string", dtype);
  const bits = ELEMENT_BITS.get(dtype) ?? fail(`dtype to be one of ${[...ELEMENT_BITS.keys()].join(", ")}`, dtype);
  if (!Array.isArray(shape) || !shape.every(isSize)) return fail("shape to hold non-negative integers", shape);
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isSize)) {
    return fail("data_offsets to be two non-negative integers", offsets);
  }
  const [start, end] = offsets as [number, number];
  if (start > end) fail("data_offsets in order", offsets);
  let totalBits = bits;
  for (const axis of shape as number[]) {
    totalBits *= axis;
    // Multiplied in order as the reference does, so that a zero does not excuse what overflows before it.
    if (!Number.isSafeInteger(totalBits)) fail("a shape whose bits can be counted", shape);
  }
  if (totalBits !== (end - start) * 8) {
    fail(`data_offsets ${totalBits / 8} bytes apart, as ${dtype} of shape ${shown(shape)} needs`, offsets);
  }
  return { name, dtype, shape, start: dataStart + start, end: dataStart + end };
}

/** Whether a value of JSON is an integer from 0 on; -0 is none. */
function isSize(value: unknown): boolean {
  return Number.isSafeInteger(value) && (value as number) >= 0 && !Object.is(value, -0);
}
