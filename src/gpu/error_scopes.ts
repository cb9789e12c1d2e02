// Engines report what they refuse through error scopes, some time after the call that was refused.

import { FlashMLAError } from "../op/errors.ts";
import type { GpuContext } from "./device.ts";
import { settled } from "./settled.ts";

/**
 * Does one step between error scopes and turns what they caught into an error of ours.
 *
 * @param context The device.
 * @param step What the step does, after "could not".
 * @param work The step; it must not await, since other calls push scopes of theirs meanwhile.
 * @returns What `work` returned.
 * @throws {FlashMLAError} With code `device` and the engine's message; memory that lies idle is freed when memory was short.
 */
export async function inErrorScopes<Result>(context: GpuContext, step: string, work: () => Result): Promise<Result> {
  const { device } = context;
  device.pushErrorScope("out-of-memory");
  device.pushErrorScope("internal");
  device.pushErrorScope("validation");
  let scopes: Promise<GPUError | null>[] = [];
  let result: Result;
  try {
    result = work();
  } finally {
    scopes = [device.popErrorScope(), device.popErrorScope(), device.popErrorScope(), ...context.buffers.takeAnswers()];
    scopes.forEach((scope) => scope.catch(() => {}));
  }
  // What is refused for want of memory is invalid, and so is all that is done with it: the reason comes first.
  const errors = (await settled(device, Promise.all(scopes))).filter((error) => error !== null);
  const caught = errors.find(isOutOfMemory) ?? errors[0];
  if (caught) {
    // One of them may be what was refused.
    context.bindGroups.clear();
    // What lies idle may be what is missing, here or elsewhere.
    if (isOutOfMemory(caught)) {
      context.buffers.clear();
      throw new FlashMLAError("device", `The GPU is out of memory: it could not ${step} (${caught.message})`, {
        cause: caught,
      });
    }
    throw new FlashMLAError("device", `The GPU device could not ${step}: ${caught.message}`, { cause: caught });
  }
  return result;
}

/**
 * The error for tensors that a device cannot use though their sizes, offsets and usages are right: they are of another one.
 *
 * @param what What cannot be done, after "Cannot".
 * @param error What {@link inErrorScopes} threw.
 * @returns Null for an error of another kind.
 */
export function foreignBuffer(what: string, error: unknown): FlashMLAError | null {
  if (!(error instanceof FlashMLAError) || !/doesn't match|associated with/.test(error.message)) return null;
  return new FlashMLAError(
    "invalid-input",
    `Cannot ${what}: a tensor's buffer is not of the device that runs the call; pass that device as options.device, or ` +
      `tensors that name it. ${error.message}`,
    { cause: error },
  );
}

function isOutOfMemory(error: GPUError): boolean {
  return error.constructor.name === "GPUOutOfMemoryError" || /out of memory/i.test(error.message);
}
