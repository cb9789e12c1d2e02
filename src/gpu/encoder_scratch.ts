// Scratch of calls that are recorded into one encoder. They run one after another and each writes its scratch before it
// reads it, so that one set of buffers serves a whole model's layers.

import type { PooledUsage } from "./buffers.ts";
import type { GpuContext } from "./device.ts";
import type { ScratchName } from "./dispatch_plan.ts";

/** The scratch of a call. */
export interface Scratch {
  /** A buffer of at least so many bytes. */
  lend(name: ScratchName, bytes: number): GPUBuffer;
  /** Gives the buffers back, when no other call needs them; calling it twice does no harm. */
  dispose(): void;
  /** The same after a failure: any of the buffers may be one that the device refused. */
  discard(): void;
}

interface SharedScratch {
  readonly lent: { readonly name: ScratchName; readonly buffer: GPUBuffer }[];
  users: number;
  doubtful: boolean;
}

/** Sinks are written by one kernel and bound as a uniform by another. */
function usageOf(name: ScratchName): PooledUsage {
  return name === "sinks" ? "storageAndUniform" : "storage";
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
    for (const { name, buffer } of own.lent.splice(0)) {
      if (own.doubtful) context.buffers.discard(buffer);
      else context.buffers.release(usageOf(name), buffer);
    }
  };
  return {
    lend(name, bytes) {
      const found = own.lent.find((lent) => lent.name === name && lent.buffer.size >= bytes);
      if (found !== undefined) return found.buffer;
      const buffer = context.buffers.acquire(usageOf(name), bytes);
      own.lent.push({ name, buffer });
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
