// The memory of calls that are being tuned: every candidate runs on the same copy of the caller's tensors.

import type { ResidentCall } from "./resident_call.ts";

/** Memory that is given back. */
export interface Held<Memory> {
  /** The memory. */
  readonly resident: Memory;
  /** Gives it back; calling it twice does no harm. */
  dispose(): void;
}

/** A call's memory, to be given back. */
export type CallMemory = Held<ResidentCall>;

/** Memory that one piece of work has for itself. */
export function ownCall(resident: ResidentCall): CallMemory {
  return { resident, dispose: () => resident.dispose() };
}

interface Shared {
  readonly resident: Promise<{ dispose(): void }>;
  users: number;
}

/** By what the users have in common, and by kind of memory. */
const sharedMemory = new WeakMap<object, Map<string, Shared>>();

/**
 * Memory that the trials of one call share, made by the first who asks and given back by the last.
 *
 * @param sharer What they have in common: the inputs that an invocation holds, which no other invocation has.
 * @param kind What the memory is for.
 * @param make Makes the memory.
 */
export async function sharedBy<Memory extends { dispose(): void }>(
  sharer: object,
  kind: "forward" | "backward" | "forward on matrix units" | "backward on matrix units" | "tensors",
  make: () => Promise<Memory>,
): Promise<Held<Memory>> {
  const kinds = sharedMemory.get(sharer) ?? new Map<string, Shared>();
  sharedMemory.set(sharer, kinds);
  const shared = kinds.get(kind) ?? { resident: make(), users: 0 };
  kinds.set(kind, shared);
  shared.users++;
  let disposed = false;
  const dispose = () => {
    if (disposed) return;
    disposed = true;
    if (--shared.users > 0) return;
    kinds.delete(kind);
    shared.resident.then((resident) => resident.dispose(), () => {});
  };
  try {
    return { resident: await shared.resident as Memory, dispose };
  } catch (error) {
    dispose();
    throw error;
  }
}
