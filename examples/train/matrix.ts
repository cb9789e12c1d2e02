// Matrix products in plain TypeScript over Float32Array, with sums in double precision.

/** The sizes of a product: `[rows, depth] · [depth, columns]`. */
export interface ProductSizes {
  readonly rows: number;
  readonly depth: number;
  readonly columns: number;
}

/** Which factors lie transposed in memory. */
export interface Transposed {
  /** `a` is stored as `[depth, rows]`. */
  readonly a?: boolean;
  /** `b` is stored as `[columns, depth]`. */
  readonly b?: boolean;
}

/**
 * `into = a · b`.
 *
 * @param a `[rows, depth]`, row by row.
 * @param b `[depth, columns]`.
 * @param sizes The three lengths.
 * @param transposed Which factors are stored the other way round.
 * @param into Where the product is written, `[rows, columns]`; a new array when absent.
 * @returns `into`.
 */
export function multiply(
  a: Float32Array,
  b: Float32Array,
  { rows, depth, columns }: ProductSizes,
  transposed: Transposed = {},
  into: Float32Array = new Float32Array(rows * columns),
): Float32Array {
  const [aRow, aDepth] = transposed.a ? [1, rows] : [depth, 1];
  const [bDepth, bColumn] = transposed.b ? [1, depth] : [columns, 1];
  if (rows < 4 || columns < 4) {
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < columns; j++) {
        let sum = 0;
        for (let k = 0; k < depth; k++) sum += a[i * aRow + k * aDepth] * b[k * bDepth + j * bColumn];
        into[i * columns + j] = sum;
      }
    }
    return into;
  }
  // Sixteen sums at a time: each number that is loaded serves four of them. The last tile of a row or column is moved back
  // to fit, and computes some elements again.
  for (let row = 0; row < rows; row += 4) {
    const i = Math.min(row, rows - 4);
    for (let column = 0; column < columns; column += 4) {
      const j = Math.min(column, columns - 4);
      let s00 = 0, s01 = 0, s02 = 0, s03 = 0;
      let s10 = 0, s11 = 0, s12 = 0, s13 = 0;
      let s20 = 0, s21 = 0, s22 = 0, s23 = 0;
      let s30 = 0, s31 = 0, s32 = 0, s33 = 0;
      let atA = i * aRow, atB = j * bColumn;
      for (let k = 0; k < depth; k++) {
        const a0 = a[atA], a1 = a[atA + aRow], a2 = a[atA + 2 * aRow], a3 = a[atA + 3 * aRow];
        const b0 = b[atB], b1 = b[atB + bColumn], b2 = b[atB + 2 * bColumn], b3 = b[atB + 3 * bColumn];
        s00 += a0 * b0, s01 += a0 * b1, s02 += a0 * b2, s03 += a0 * b3;
        s10 += a1 * b0, s11 += a1 * b1, s12 += a1 * b2, s13 += a1 * b3;
        s20 += a2 * b0, s21 += a2 * b1, s22 += a2 * b2, s23 += a2 * b3;
        s30 += a3 * b0, s31 += a3 * b1, s32 += a3 * b2, s33 += a3 * b3;
        atA += aDepth;
        atB += bDepth;
      }
      let at = i * columns + j;
      into[at] = s00, into[at + 1] = s01, into[at + 2] = s02, into[at + 3] = s03;
      at += columns;
      into[at] = s10, into[at + 1] = s11, into[at + 2] = s12, into[at + 3] = s13;
      at += columns;
      into[at] = s20, into[at + 1] = s21, into[at + 2] = s22, into[at + 3] = s23;
      at += columns;
      into[at] = s30, into[at + 1] = s31, into[at + 2] = s32, into[at + 3] = s33;
    }
  }
  return into;
}
