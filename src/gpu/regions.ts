// Regions behind each other in one buffer, each where a binding may begin.

/** Alignment of regions, WebGPU's strictest of a binding's offset. */
export const regionAlignment = 256;

/** One region of a buffer. */
export interface Region {
  /** Bytes from the buffer's start. */
  readonly offset: number;
  /** Bytes. */
  readonly size: number;
}

/**
 * Lays regions out in order.
 *
 * @param sizes Bytes of each; one of few bytes still takes 16, that there is something to bind.
 */
export function regions(sizes: readonly number[]): Region[] {
  let end = 0;
  return sizes.map((bytes) => {
    const offset = Math.ceil(end / regionAlignment) * regionAlignment;
    const size = Math.max(16, bytes);
    end = offset + size;
    return { offset, size };
  });
}
