// Several pieces of work timed in turns, so that a change of the card's clock meets all of them alike, with a probe of the
// clock beside every sample.

import type { GpuContext } from "../src/gpu/device.ts";
import { clockProbe } from "../src/gpu/timing.ts";
import { median } from "../src/tune/clock_probe.ts";
import { steadyClock, type Timed } from "./steady_timing.ts";

/** The samples of one piece of work. */
export interface Samples {
  /** The median, in milliseconds of one run. */
  readonly ms: number;
  /** (slowest − fastest) / median. */
  readonly spread: number;
  /** Milliseconds of one run, in the order in which they were taken. */
  readonly samples: readonly number[];
  /** Milliseconds of the clock probe behind each sample; null without timestamps. */
  readonly probes: readonly (number | null)[];
  /** Runs of one sample. */
  readonly repeats: number;
}

interface Contender {
  readonly time: Timed;
  readonly samples: number[];
  readonly probes: (number | null)[];
  repeats: number;
  error: Error | null;
}

/**
 * Warms up until the clock is steady, then takes rounds of one sample of each piece, beginning one further on every time.
 *
 * @param context The device.
 * @param works What to time. One that fails is left out from there on.
 * @param options Milliseconds of a sample, and how many rounds, an odd number. Fewer and shorter on a software adapter.
 * @returns The samples of each piece, or why there are none.
 */
export async function sampleInterleaved(
  context: GpuContext,
  works: readonly Timed[],
  { sampleMs, rounds }: { readonly sampleMs: number; readonly rounds: number },
): Promise<(Samples | Error)[]> {
  const { software } = context.capabilities;
  const contenders = works.map((time): Contender => ({ time, samples: [], probes: [], repeats: 1, error: null }));
  const attempt = async (contender: Contender, work: () => Promise<void>) => {
    if (contender.error !== null) return;
    try {
      await work();
    } catch (error) {
      contender.error = error instanceof Error ? error : new Error(String(error));
    }
  };
  const settleRepeats = async () => {
    for (const contender of contenders) {
      await attempt(contender, async () => {
        const ms = await contender.time(contender.repeats) / contender.repeats;
        contender.repeats = Math.max(1, Math.ceil((software ? 1 : sampleMs) / Math.max(ms, 1e-3)));
      });
    }
  };
  const runAll = async () => {
    const start = performance.now();
    do {
      for (const contender of contenders) {
        await attempt(contender, async () => void await contender.time(contender.repeats));
      }
    } while (performance.now() - start < 100 && contenders.some(({ error }) => error === null));
  };
  // A run before any is timed: it compiles, and fills what lies on the way.
  for (const contender of contenders) await attempt(contender, async () => void await contender.time(1));
  await settleRepeats();
  if (!software) {
    await steadyClock(context, runAll, 3, 6000);
    await settleRepeats();
  }
  for (let round = 0; round < (software ? 3 : rounds); round++) {
    const first = round % Math.max(1, contenders.length);
    for (const contender of [...contenders.slice(first), ...contenders.slice(0, first)]) {
      await attempt(contender, async () => {
        contender.samples.push(await contender.time(contender.repeats) / contender.repeats);
        contender.probes.push(await clockProbe(context));
      });
    }
  }
  return contenders.map(({ error, samples, probes, repeats }) => {
    if (error !== null) return error;
    const ms = median(samples);
    return { ms, spread: (Math.max(...samples) - Math.min(...samples)) / ms, samples, probes, repeats };
  });
}
