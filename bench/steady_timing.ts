// Times at a steady clock.

import type { GpuContext } from "../src/gpu/device.ts";
import { clockProbe } from "../src/gpu/timing.ts";

/** Runs some work so many times over; resolves to the milliseconds of all of them. */
export type Timed = (repeats: number) => Promise<number>;

/**
 * Keeps the device busy until its clock is steady: a card that idled needs seconds of load to reach full speed.
 *
 * @param context The device.
 * @param work Some 100 ms of work.
 * @param calm How many probes in a row must be as fast as the fastest.
 * @param deadlineMs When to go on regardless.
 */
export async function steadyClock(
  context: GpuContext,
  work: () => Promise<unknown>,
  calm: number = 5,
  deadlineMs: number = 8000,
): Promise<void> {
  let [steady, fastest] = [0, Infinity];
  const deadline = performance.now() + deadlineMs;
  while (steady < calm && performance.now() < deadline) {
    await work();
    const probe = await clockProbe(context) ?? 0;
    steady = probe > 0.98 * fastest ? steady + 1 : 0;
    fastest = Math.min(fastest, probe);
  }
}

/**
 * Times work at a steady clock; quickly, and at whatever clock, on a software adapter.
 *
 * @param context The device.
 * @param time The work.
 * @param sampleMs Milliseconds of one sample: long beside the pauses between submissions, in which a card slows down.
 * @param samples How many samples, an odd number.
 * @returns The median milliseconds, and how far the samples lie apart, relative to it.
 */
export async function measureSteadily(
  context: GpuContext,
  time: Timed,
  sampleMs: number,
  samples: number,
): Promise<[ms: number, spread: number]> {
  const quick = context.capabilities.software;
  await time(1);
  const repeats = Math.max(1, Math.ceil((quick ? 1 : sampleMs) / await time(1)));
  if (!quick) await steadyClock(context, () => time(4 * repeats));
  const times: number[] = [];
  for (let i = 0; i < (quick ? 3 : samples); i++) times.push(await time(repeats) / repeats);
  times.sort((a, b) => a - b);
  const median = times[Math.floor(times.length / 2)];
  return [median, (times[times.length - 1] - times[0]) / median];
}
