// A strict reader of safetensors files: u64 little-endian header length, JSON header, raw little-endian data.

/** The element types that the reader knows, and how their elements are held. */
const ARRAYS = {
  BOOL: Uint8Array,
  U8: Uint8Array,
  I8: Int8Array,
  I32: Int32Array,
  U32: Uint32Array,
  I64: BigInt64Array,
  F32: Float32Array,
  F64: Float64Array,
} as const;

/** Name of an element type. */
export type SafetensorsDtype = keyof typeof ARRAYS;

/** One tensor of a file, copied out of it. */
export interface SafetensorsEntry {
  /** Element type as the file names it. */
  readonly dtype: SafetensorsDtype;
  /** Axis lengths. */
  readonly shape: readonly number[];
  /** The elements, last axis fastest. */
  readonly data: InstanceType<(typeof ARRAYS)[SafetensorsDtype]>;
}

/** A parsed file. */
export interface Safetensors {
  /** The free-form strings under `__metadata__`. */
  readonly metadata: Readonly<Record<string, string>>;
  /** The tensors by name. */
  readonly tensors: ReadonlyMap<string, SafetensorsEntry>;
}

/**
 * Parses a safetensors file.
 *
 * @param bytes The whole file.
 * @returns Its metadata and tensors.
 * @throws {Error} When the file is truncated, an element type is unknown, a tensor's extent does not fit its shape, or the
 * tensors overlap or leave bytes unused.
 */
export function parseSafetensors(bytes: Uint8Array): Safetensors {
  if (bytes.length < 8) fail(`${bytes.length} bytes hold no header length`);
  const headerLength = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const dataStart = 8 + headerLength;
  if (dataStart > bytes.length) fail(`a header of ${headerLength} bytes in a file of ${bytes.length}`);
  const header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, dataStart)));
  const { __metadata__: metadata = {}, ...entries } = header as Record<string, RawEntry> & {
    __metadata__?: Record<string, string>;
  };

  const tensors = new Map<string, SafetensorsEntry>();
  const ordered = Object.entries(entries).sort(([, a], [, b]) => a.data_offsets[0] - b.data_offsets[0]);
  let used = 0;
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of ordered) {
    if (!Object.hasOwn(ARRAYS, dtype)) fail(`${name} has unknown element type ${dtype}`);
    const elements = ARRAYS[dtype as SafetensorsDtype];
    const size = shape.reduce((product, axis) => product * axis, elements.BYTES_PER_ELEMENT);
    if (start !== used || end - start !== size || dataStart + end > bytes.length) {
      fail(`${name} [${shape}] of ${dtype} cannot lie at bytes ${start} to ${end}, after ${used} used bytes`);
    }
    // A copy, since a view would need its offset in the file to be aligned. Not by slice(): Node's Buffer makes that a view.
    const data = new elements(new Uint8Array(bytes.subarray(dataStart + start, dataStart + end)).buffer);
    tensors.set(name, { dtype: dtype as SafetensorsDtype, shape, data });
    used = end;
  }
  if (dataStart + used !== bytes.length) fail(`${bytes.length - dataStart - used} bytes after the last tensor`);
  return { metadata, tensors };
}

interface RawEntry {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly data_offsets: readonly [number, number];
}

function fail(why: string): never {
  throw new Error(`Cannot read safetensors: ${why}`);
}
