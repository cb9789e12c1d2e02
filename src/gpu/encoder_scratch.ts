// Scratch of calls that are recorded into one encoder. They run one after another and each writes its expanded keys and
// values before it reads them, so that one pair of buffers serves a whole model's layers.

import type { GpuContext } from "./device.ts";

/** The scratch of a call. */
export interface Scratch {
  /** A buffer of at least so many bytes for expanded keys or values. */
  lend(side: "keys" | "values", bytes: number): GPUBuffer;
  /** Gives the buffers back, when no other call needs them; calling it twice does no harm. */
  dispose(): void;
  /** The same after a failure: any of the buffers may be one that the device refused. */
  discard(): void;
}

interface SharedScratch {
  readonly lent: { readonly side: "keys" | "values"; readonly buffer: GPUBuffer }[];
  users: number;
  doubtful: boolean;
}

const shared = new WeakMap<GPUCommandEncoder, SharedScratch>();

/**
 * The scratch that a call shares with the others of its encoder.
 *
 * @param context The device.
 * @param encoder The encoder; without one the call has its scratch for itself.
 */
export function scratchFor(context: GpuContext, encoder?: GPUCommandEncoder): Scratch {
  const own = encoder && shared.get(encoder) || { lent: [], users: 0, doubtful: false };
  if (encoder !== undefined) shared.set(encoder, own);
  own.users++;
  let disposed = false;
  const dispose = () => {
    if (disposed) return;
    disposed = true;
    if (--own.users > 0) return;
    if (encoder !== undefined && shared.get(encoder) === own) shared.delete(encoder);
    for (const { buffer } of own.lent.splice(0)) {
      if (own.doubtful) context.buffers.discard(buffer);
      else context.buffers.release("storage", buffer);
    }
  };
  return {
    lend(side, bytes) {
      const found = own.lent.find((lent) => lent.side === side && lent.buffer.size >= bytes);
      if (found !== undefined) return found.buffer;
      const buffer = context.buffers.acquire("storage", bytes);
      own.lent.push({ side, buffer });
      return buffer;
    },
    dispose,
    discard() {
      // Calls recorded before keep what they have; later ones start afresh.
      own.doubtful = true;
      if (encoder !== undefined) shared.delete(encoder);
      dispose();
    },
  };
}
