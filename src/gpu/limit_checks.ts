// Errors that name the limit of the device that a call would pass.

import { FlashMLAError } from "../op/errors.ts";
import type { GpuLimits } from "./capabilities.ts";
import type { BindingWindow } from "./operand_layout.ts";

/** A window that one binding can cover; throws otherwise. */
export function checkWindow(what: string, window: BindingWindow, limits: GpuLimits): BindingWindow {
  checkBinding(what, window.size, limits);
  return window;
}

/** Throws unless one binding can cover so many bytes. */
export function checkBinding(what: string, bytes: number, limits: GpuLimits): void {
  if (bytes > limits.maxStorageBufferBindingSize) {
    throw limitError(`${what} needs ${bytes} bytes`, "maxStorageBufferBindingSize", limits);
  }
}

/** The error for a call that passes a limit. */
export function limitError(what: string, limit: keyof GpuLimits, limits: GpuLimits): FlashMLAError {
  return new FlashMLAError("limit", `Cannot run MLA on this device: ${what}, ${limit} is ${limits[limit]}`);
}

/** The first of `most`, half of it and so on, rounded up, that fits; 1 where nothing does. */
export function halvedUntil(most: number, fits: (count: number) => boolean): number {
  let count = most;
  while (count > 1 && !fits(count)) count = Math.ceil(count / 2);
  return count;
}
