// Waiting for a device.

import { currentRuntime } from "../environment.ts";
import { isDawnDevice } from "./dawn.ts";

/** Turns of the event loop before the thread begins to rest between them: what engines answer at once has come by then. */
const busyTurns = 8;

/** Milliseconds by which each rest is longer than the one before, and the longest: a quarter of the wait, and no more. */
const [restStep, longestRest] = [0.05, 0.5];

const resting = typeof SharedArrayBuffer === "undefined" ? null : new Int32Array(new SharedArrayBuffer(4));

/**
 * Waits for what a device has promised. Equal to awaiting it, but for Dawn in Deno.
 *
 * While anything is under way, npm's `webgpu` asks in every turn of the event loop, some 27,000 times a second, each time
 * with a new function, and Deno collects those in a time that grows with the square of their number: a wait for a kernel
 * of 4 ms took up to 1.6 s on an H100, in which the card slowed down, too. Bun has no such pauses. So the thread, which
 * would only ask, rests in between.
 *
 * @param device The device.
 * @param promise Its promise.
 */
export async function settled<Result>(device: GPUDevice, promise: Promise<Result>): Promise<Result> {
  const { setImmediate } = globalThis as { setImmediate?: (turn: () => void) => unknown };
  if (setImmediate === undefined || resting === null || currentRuntime().name !== "Deno" || !isDawnDevice(device)) {
    return await promise;
  }
  let waiting = true;
  const done = () => void (waiting = false);
  promise.then(done, done);
  for (let turn = 0; waiting; turn++) {
    await new Promise<void>((resolve) => setImmediate(resolve));
    const rests = turn - busyTurns;
    if (waiting && rests > 0) Atomics.wait(resting, 0, 0, Math.min(longestRest, rests * restStep));
  }
  return await promise;
}
