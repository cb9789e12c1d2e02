// Waiting for a device.

import { currentRuntime } from "../environment.ts";
import { isDawnDevice } from "./dawn.ts";

/**
 * Waits for what a device has promised. Equal to awaiting it, but for Dawn in Deno: there a promise of a GPU that is busy
 * for longer than some milliseconds now and then settles up to 1.5 s late (measured on an H100; never in Bun), and the
 * card slows down meanwhile. Turning the event loop until the promise has settled keeps the delay below 2 ms.
 *
 * @param device The device.
 * @param promise Its promise.
 */
export async function settled<Result>(device: GPUDevice, promise: Promise<Result>): Promise<Result> {
  const { setImmediate } = globalThis as { setImmediate?: (turn: () => void) => unknown };
  if (setImmediate === undefined || currentRuntime().name !== "Deno" || !isDawnDevice(device)) return await promise;
  let waiting = true;
  const done = () => void (waiting = false);
  promise.then(done, done);
  while (waiting) await new Promise<void>((resolve) => setImmediate(resolve));
  return await promise;
}
