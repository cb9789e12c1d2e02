// Eight-bit floats, as DeepSeek-V3 ships its weights:
//
//   weight[r, c] = e4m3(bits[r, c]) · scale[⌊r / blockRows⌋, ⌊c / blockColumns⌋]
//
// e4m3 is float8_e4m3fn: a sign, four bits of exponent with a bias of 7, three bits of fraction. It has no infinities, which
// leaves ±448 as the largest values and all ones as the only NaN. The scale's name ends with `_scale_inv`: it is the inverse
// of what the weights were multiplied with.

/** How scales lie over a tensor: axes before the last two have one for each entry. */
export interface BlockScales {
  /** The scales, last axis fastest: one for each block, or a single one for the whole tensor. */
  readonly data: Float32Array;
  /** Rows and columns of a block. */
  readonly block: readonly [rows: number, columns: number];
}

/**
 * The float32 value of e4m3 bits. Exact.
 *
 * @param bits The byte.
 * @returns Its value.
 */
export function e4m3ToFloat(bits: number): number {
  const sign = bits & 0x80 ? -1 : 1;
  const exponent = (bits >> 3) & 0xf;
  const fraction = bits & 7;
  if (exponent === 15 && fraction === 7) return NaN;
  return exponent === 0 ? sign * fraction * 2 ** -9 : sign * (1 + fraction / 8) * 2 ** (exponent - 7);
}

let table: Float32Array | undefined;

/**
 * The shape that the block scales of a tensor have.
 *
 * @param shape The tensor's shape.
 * @param block Rows and columns of a block.
 * @returns The scales' shape, or undefined where the tensor has no rows and columns.
 */
export function scalesShape(shape: readonly number[], block: BlockScales["block"]): number[] | undefined {
  if (shape.length < 2) return undefined;
  const [rows, columns] = shape.slice(-2);
  return [...shape.slice(0, -2), Math.ceil(rows / block[0]), Math.ceil(columns / block[1])];
}

/**
 * Decodes e4m3 elements.
 *
 * @param bits The elements, one byte each.
 * @param shape The axis lengths.
 * @param scales What to multiply them with, if anything.
 * @returns The elements in float32.
 */
export function fromE4m3(bits: Uint8Array, shape: readonly number[], scales?: BlockScales): Float32Array<ArrayBuffer> {
  const values = table ??= Float32Array.from({ length: 256 }, (_, byte) => e4m3ToFloat(byte));
  const floats = new Float32Array(bits.length);
  if (scales === undefined) {
    for (let i = 0; i < bits.length; i++) floats[i] = values[bits[i]];
    return floats;
  }
  const { data, block } = scales;
  if (data.length === 1) {
    for (let i = 0; i < bits.length; i++) floats[i] = values[bits[i]] * data[0];
    return floats;
  }
  const [rows, columns] = shape.slice(-2);
  const [blockRows, blockColumns] = block;
  const scaleColumns = Math.ceil(columns / blockColumns);
  const scaleRows = Math.ceil(rows / blockRows);
  for (let row = 0, at = 0; at < bits.length; row++) {
    // Entries of the axes before are matrices below one another, each of which begins a block of its own.
    const scaleRow = Math.floor(row / rows) * scaleRows + Math.floor((row % rows) / blockRows);
    for (let column = 0; column < columns;) {
      const scale = data[scaleRow * scaleColumns + column / blockColumns];
      for (const end = Math.min(columns, column + blockColumns); column < end; column++, at++) {
        floats[at] = values[bits[at]] * scale;
      }
    }
  }
  return floats;
}
