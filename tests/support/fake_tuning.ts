// Tuning on the made-up device of fake_kernel.ts.

import type { CacheRecord, CandidateTiming } from "../../src/cache/cache_record.ts";
import { Tuner, type TunerOptions } from "../../src/tune/tuner.ts";
import type { FakeCfg, FakeKernel } from "./fake_kernel.ts";

const call = { length: 100, value: 7 };

/** Tunes a made-up kernel by its own clock. */
export async function tune(kernel: FakeKernel, options: TunerOptions = {}, heard: CandidateTiming<FakeCfg>[] = []) {
  const invocation = await kernel.prepare(call);
  const tuner = new Tuner({ now: () => kernel.now, ...options });
  return await tuner.tune(kernel, invocation, kernel.candidateCfgs(), (timing) => heard.push(timing));
}

/** Why each tile was rejected, or null. */
export function reasons(record: CacheRecord<FakeCfg>): Record<number, string | null> {
  return Object.fromEntries(record.timings.map(({ cfg, rejected }) => [cfg.tile, rejected]));
}
