// One open safetensors file: its header, and the bytes of its tensors in as few ranges as hold nothing else.

import type { ByteSource } from "./byte_source.ts";
import { readHeader, type SafetensorsHeader, type TensorPlace } from "./safetensors_header.ts";

/** Neighbours are read together up to this size: their range is copied out of, so that it is held twice for a moment. */
const RANGE_BYTES = 64 * 2 ** 20;

/** A file. */
export interface SafetensorsFile extends SafetensorsHeader {
  /** What it is, for messages. */
  readonly name: string;
  /** Reads tensors' bytes, each into memory of its own. */
  read(places: readonly TensorPlace[]): Promise<Map<string, Uint8Array<ArrayBuffer>>>;
  /** Gives back what reading needs. */
  close(): Promise<void>;
}

/**
 * Opens a file; a source that turns out to be none is closed.
 *
 * @param source Its bytes.
 * @returns The file.
 * @throws {FlashMLAError} When it is no safetensors file, or one that was damaged or cut short.
 */
export async function openFile(source: ByteSource): Promise<SafetensorsFile> {
  let header: SafetensorsHeader;
  try {
    header = await readHeader(source);
  } catch (error) {
    await source.close();
    throw error;
  }
  return {
    ...header,
    name: source.name,
    async read(places) {
      const bytes = new Map<string, Uint8Array<ArrayBuffer>>();
      for (const range of neighbours(places)) {
        const { start } = range[0];
        const { end } = range[range.length - 1];
        const read = start === end ? new Uint8Array(0) : await source.read(start, end);
        for (const place of range) {
          bytes.set(place.name, range.length === 1 ? read : read.slice(place.start - start, place.end - start));
        }
      }
      return bytes;
    },
    close: () => source.close(),
  };
}

/** The places in the order of the file, those together that follow one another. */
function neighbours(places: readonly TensorPlace[]): TensorPlace[][] {
  const ranges: TensorPlace[][] = [];
  for (const place of [...places].sort((a, b) => a.start - b.start || a.end - b.end)) {
    const range = ranges[ranges.length - 1];
    if (range?.[range.length - 1].end === place.start && place.end - range[0].start <= RANGE_BYTES) range.push(place);
    else ranges.push([place]);
  }
  return ranges;
}
