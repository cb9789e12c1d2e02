// The file format safetensors: the header's length as u64, a header in JSON, then the arrays, all little-endian.

/** An array of a file. */
export type Elements = Float32Array<ArrayBuffer> | Float64Array<ArrayBuffer> | Uint32Array<ArrayBuffer>;

/** What a file holds. */
export interface Safetensors {
  /** Strings by name, beside the arrays. */
  readonly metadata: Readonly<Record<string, string>>;
  /** Arrays by name, with their shapes. */
  readonly tensors: ReadonlyMap<string, { readonly data: Elements; readonly shape: readonly number[] }>;
}

const elementTypes = { F32: Float32Array, F64: Float64Array, U32: Uint32Array } as const;

/** Writes a file's bytes. */
export function toSafetensors({ metadata, tensors }: Safetensors): Uint8Array<ArrayBuffer> {
  const header: Record<string, unknown> = { __metadata__: metadata };
  let end = 0;
  for (const [name, { data, shape }] of tensors) {
    const dtype = Object.entries(elementTypes).find(([, type]) => data instanceof type)![0];
    header[name] = { dtype, shape, data_offsets: [end, end += data.byteLength] };
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  // The format asks for blanks behind the header, up to a multiple of 8.
  const start = 8 + Math.ceil(text.length / 8) * 8;
  const bytes = new Uint8Array(start + end).fill(0x20, 8, start);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(start - 8), true);
  bytes.set(text, 8);
  let at = start;
  for (const { data } of tensors.values()) {
    bytes.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  }
  return bytes;
}

/**
 * Reads a file's bytes; the arrays are copies.
 *
 * @throws {Error} Saying what is wrong, when they are no such file.
 */
export function fromSafetensors(bytes: Uint8Array): Safetensors {
  const fail = (why: string): never => {
    throw new Error(why);
  };
  if (bytes.length < 8) fail(`it has ${bytes.length} bytes, too few for a header`);
  const headerLength = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const start = 8 + headerLength;
  if (start > bytes.length) fail("it is no safetensors file, or was cut short");
  let header: Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, start)));
  } catch {
    return fail("its header is no JSON");
  }
  if (typeof header !== "object" || header === null) fail("its header is no JSON object");
  const { __metadata__: metadata, ...entries } = header;
  const tensors = new Map<string, { data: Elements; shape: readonly number[] }>();
  let used = 0;
  for (const [name, entry] of Object.entries(entries)) {
    const { dtype, shape, data_offsets: range } = entry ?? {};
    if (!Object.hasOwn(elementTypes, dtype) || !Array.isArray(shape) || !Array.isArray(range)) {
      fail(`its header describes ${name} in a way that is not known here`);
    }
    const type = elementTypes[dtype as keyof typeof elementTypes];
    const size = shape.reduce((product, axis) => product * axis, type.BYTES_PER_ELEMENT);
    if (range[0] !== used || range[1] !== used + size) fail(`${name} does not lie where its shape [${shape}] needs it`);
    used += size;
    if (start + used > bytes.length) fail(`it ends within ${name}`);
    // Copied first: a view would have to begin at a multiple of its element's size.
    const copy = new Uint8Array(bytes.subarray(start + range[0], start + range[1]));
    tensors.set(name, { data: new type(copy.buffer), shape });
  }
  if (start + used !== bytes.length) fail(`${bytes.length - start - used} bytes follow the last array`);
  return { metadata: (metadata ?? {}) as unknown as Record<string, string>, tensors };
}
