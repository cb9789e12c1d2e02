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
export async function checked<Result>(context: GpuContext, step: string, work: () => Result): Promise<Result> {
  const { device } = context;
  device.pushErrorScope("out-of-memory");
  device.pushErrorScope("internal");
  device.pushErrorScope("validation");
  let scopes: Promise<GPUError | null>[] = [];
  let result: Result;
  try {
    result = work();
  } finally {
    scopes = [device.popErrorScope(), device.popErrorScope(), device.popErrorScope()];
    scopes.forEach((scope) => scope.catch(() => {}));
  }
  // What is refused for want of memory is invalid, and so is all that is done with it: the reason comes first.
  const errors = (await settled(device, Promise.all(scopes))).filter((error) => error !== null);
  const caught = errors.find(isOutOfMemory) ?? errors[0];
  if (caught) {
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

function isOutOfMemory(error: GPUError): boolean {
  return error.constructor.name === "GPUOutOfMemoryError" || /out of memory/i.test(error.message);
}
