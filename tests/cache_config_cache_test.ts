import { describe, test } from "node:test";
import { assertEquals, assertThrows } from "@std/assert";
import fc from "fast-check";
import { cacheKeyText } from "../src/cache/cache_record.ts";
import { type CachedConfig, ConfigCache, heuristicConfig, measuredConfig } from "../src/cache/config_cache.ts";
import { type SampleConfig, sampleKey, sampleRecord } from "./support/cache_sample.ts";

type Step =
  | { readonly do: "put"; readonly bucket: string; readonly config: CachedConfig<SampleConfig> }
  | { readonly do: "get"; readonly bucket: string }
  | { readonly do: "delete"; readonly bucket: string }
  | { readonly do: "clear" };

const bucket = fc.constantFrom("a", "b", "c", "d", "e");
const config = fc.nat(9).chain((block): fc.Arbitrary<CachedConfig<SampleConfig>> =>
  fc.constantFrom(
    heuristicConfig<SampleConfig>({ block }),
    measuredConfig("persistent", sampleRecord(block)),
    measuredConfig("autotune", sampleRecord(block)),
  )
);
const step: fc.Arbitrary<Step> = fc.oneof(
  { weight: 8, arbitrary: fc.record({ do: fc.constant("put" as const), bucket, config }) },
  { weight: 6, arbitrary: fc.record({ do: fc.constant("get" as const), bucket }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constant("delete" as const), bucket }) },
  { weight: 1, arbitrary: fc.constant({ do: "clear" as const }) },
);

describe("ConfigCache", () => {
  test("agrees with a list kept in order of use", () => {
    fc.assert(fc.property(fc.integer({ min: 1, max: 4 }), fc.array(step, { maxLength: 60 }), (capacity, steps) => {
      const cache = new ConfigCache<SampleConfig>(capacity);
      let model: [string, CachedConfig<SampleConfig>][] = [];
      for (const step of steps) {
        if (step.do === "clear") {
          cache.clear();
          model = [];
          continue;
        }
        const held = model.find(([name]) => name === step.bucket);
        const others = model.filter((entry) => entry !== held);
        if (step.do === "get") {
          assertEquals(cache.get(sampleKey(step.bucket)), held?.[1]);
          if (held) model = [...others, held];
        } else if (step.do === "delete") {
          assertEquals(cache.delete(sampleKey(step.bucket)), held !== undefined);
          model = others;
        } else {
          cache.put(sampleKey(step.bucket), step.config);
          const isGuess = step.config.source === "heuristic";
          if (!isGuess || held === undefined || held[1].source === "heuristic") {
            model = [...others, [step.bucket, step.config] as [string, CachedConfig<SampleConfig>]].slice(-capacity);
          }
        }
        assertEquals(cache.size, model.length);
        assertEquals(cache.entries().map(([key, entry]) => [key.bucket, entry]), model);
      }
    }));
  });

  test("put() never lets a guess take a measurement's place", () => {
    const cache = new ConfigCache<SampleConfig>();
    cache.put(sampleKey(), heuristicConfig({ block: 1 }));
    assertEquals(cache.get(sampleKey()), { source: "heuristic", cfg: { block: 1 }, record: null });
    cache.put(sampleKey(), measuredConfig("autotune", sampleRecord(2)));
    cache.put(sampleKey(), heuristicConfig({ block: 3 }));
    assertEquals(cache.get(sampleKey())?.cfg, { block: 2 });
    assertEquals(cache.get(sampleKey())?.source, "autotune");
  });

  test("get() tells keys apart that differ in any one part", () => {
    const cache = new ConfigCache<SampleConfig>();
    const keys = ["op", "device", "bucket", "candidates"].map((part) => sampleKey({ [part]: "other" }));
    keys.forEach((key, block) => cache.put(key, heuristicConfig({ block })));
    assertEquals(keys.map((key) => cache.get(key)?.cfg.block), [0, 1, 2, 3]);
    assertEquals(new Set(keys.map(cacheKeyText)).size, 4);
  });

  test("holds 1024 entries when nothing is said", () => {
    const cache = new ConfigCache<SampleConfig>();
    for (let block = 0; block < 1030; block++) cache.put(sampleKey(`${block}`), heuristicConfig({ block }));
    assertEquals(cache.size, 1024);
    assertEquals(cache.get(sampleKey("5")), undefined);
    assertEquals(cache.get(sampleKey("6"))?.cfg, { block: 6 });
  });

  test("throws when the capacity is no positive integer", () => {
    for (const capacity of [0, -1, 1.5, NaN]) {
      assertThrows(() => new ConfigCache(capacity), RangeError, `got ${capacity}`);
    }
  });
});
