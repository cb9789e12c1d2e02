// Run by `deno test` with its strictest sanitizers: a cache that was used and never closed has to leave nothing behind.

import { PersistentCache } from "../../src/cache/persistent_cache.ts";
import { sampleKey, sampleRecord } from "./cache_sample.ts";

interface TestDefinition {
  name: string;
  sanitizeOps: boolean;
  sanitizeResources: boolean;
  fn(): Promise<void>;
}

const { Deno } = globalThis as unknown as { Deno: { test(definition: TestDefinition): void } };

Deno.test({
  name: "a cache that is not closed leaves nothing open",
  sanitizeOps: true,
  sanitizeResources: true,
  async fn() {
    const cache = new PersistentCache("sanitized");
    await cache.put(sampleKey(), sampleRecord(1));
    if ((await cache.get(sampleKey()))?.cfg === undefined) throw new Error("the record is not there");
  },
});
