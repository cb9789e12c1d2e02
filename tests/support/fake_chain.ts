// A selector chain over the made-up device of fake_kernel.ts, with everything that it says written down.

import { type CacheKey, cacheKeyText, type CacheRecord } from "../../src/cache/cache_record.ts";
import type { SelectionEvent } from "../../src/tune/selection_event.ts";
import { type ChooseOptions, ConfigSelectorChain, type SelectorChainOptions } from "../../src/tune/selector_chain.ts";
import { Tuner } from "../../src/tune/tuner.ts";
import { type FakeBehaviour, type FakeCall, type FakeCfg, FakeKernel } from "./fake_kernel.ts";

/** A store for later processes, over a map. */
export class FakeStore {
  readonly records: Map<string, CacheRecord<FakeCfg>> = new Map();
  get(key: CacheKey): Promise<CacheRecord<FakeCfg> | undefined> {
    return Promise.resolve(this.records.get(cacheKeyText(key)));
  }
  put(key: CacheKey, record: CacheRecord<FakeCfg>): Promise<void> {
    this.records.set(cacheKeyText(key), record);
    return Promise.resolve();
  }
}

/** The call that {@link setup} chooses for. */
export const call: FakeCall = { length: 100, value: 7 };

/** A chain with everything that it says written down. */
export function setup(
  behaviour: FakeBehaviour = {},
  options: SelectorChainOptions<FakeCfg> = {},
  tuner = (kernel: FakeKernel) => new Tuner({ now: () => kernel.now, iters: 3 }),
) {
  const kernel = new FakeKernel(behaviour);
  const events: SelectionEvent<FakeCfg>[] = [];
  const chain = new ConfigSelectorChain<FakeCall, FakeCfg, number>({
    tuner: tuner(kernel),
    policy: { cacheMissFallback: "autotune" },
    onEvent: (event) => events.push(event),
    ...options,
  });
  return {
    kernel,
    chain,
    choose: async (choice: ChooseOptions<FakeCfg> = {}, length = call.length) => {
      const { cfg, source } = await chain.choose(await kernel.prepare({ ...call, length }), kernel, choice);
      return `${cfg.tile} ${source}`;
    },
    /** The events since the last time, each as its type and its tile. */
    heard: () =>
      events.splice(0).map((event) => "cfg" in event ? `${event.type} ${event.cfg.tile}` : event.type).join(", "),
    events,
    /** Computes the hashes of calls, so that calls which start together reach the caches together. */
    hash: async (lengths: readonly number[]) => {
      for (const length of lengths) await (await kernel.prepare({ ...call, length })).callKey();
      await (await kernel.prepare(call)).cacheKey(kernel.candidateCfgs());
    },
    key: async () => (await kernel.prepare(call)).cacheKey(kernel.candidateCfgs()),
  };
}

/** A measured winner. */
export function record(tile: number): CacheRecord<FakeCfg> {
  const timings = [{ cfg: { tile }, ms: 1, samples: 3, rejected: null }];
  return { cfg: { tile }, timings, timingMethod: "timestamp", libraryVersion: "0", date: "2025-01-01T00:00:00Z" };
}
