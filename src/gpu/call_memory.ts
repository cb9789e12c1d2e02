// The memory of calls that are being tuned: every candidate runs on the same copy of the caller's tensors.

import type { MlaInputs } from "../op/mla_problem.ts";
import type { ResidentCall } from "./resident_call.ts";

/** A call's memory, to be given back. */
export interface CallMemory {
  /** The memory. */
  readonly resident: ResidentCall;
  /** Gives it back; calling it twice does no harm. */
  dispose(): void;
}

/** Memory that one piece of work has for itself. */
export function ownCall(resident: ResidentCall): CallMemory {
  return { resident, dispose: () => resident.dispose() };
}

interface SharedCall {
  readonly resident: Promise<ResidentCall>;
  users: number;
}

/** By the inputs that an invocation holds: no other invocation has the same object. */
const sharedCalls = new WeakMap<MlaInputs, SharedCall>();

/**
 * The memory of one invocation's call, made by the first who asks and given back by the last.
 *
 * @param inputs The inputs that the invocation holds.
 * @param make Makes the memory.
 */
export async function sharedCall(inputs: MlaInputs, make: () => Promise<ResidentCall>): Promise<CallMemory> {
  const shared = sharedCalls.get(inputs) ?? { resident: make(), users: 0 };
  sharedCalls.set(inputs, shared);
  shared.users++;
  let disposed = false;
  const dispose = () => {
    if (disposed) return;
    disposed = true;
    if (--shared.users > 0) return;
    sharedCalls.delete(inputs);
    shared.resident.then((resident) => resident.dispose(), () => {});
  };
  try {
    return { resident: await shared.resident, dispose };
  } catch (error) {
    dispose();
    throw error;
  }
}
