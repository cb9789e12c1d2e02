import { describe, test } from "node:test";
import { assertEquals } from "@std/assert";
import { overlayCache, overlayLookup } from "../src/cache/overlay_cache.ts";
import type { SampleConfig } from "./support/cache_sample.ts";
import { closedGate } from "./support/cache_gate.ts";

const lookup = (op: string = "flash_mla@1", callKey: string = "00aa"): SampleConfig | undefined =>
  overlayLookup<SampleConfig>(op, callKey);

describe("overlayCache()", () => {
  test("gives one configuration to every call until the block ends", () => {
    {
      using _ = overlayCache({ block: 1 });
      assertEquals(lookup(), { block: 1 });
      assertEquals(lookup("other@3", "ffff"), { block: 1 });
    }
    assertEquals(lookup(), undefined);
  });

  test("prefers a call's key to its operation, and a version to a bare name", () => {
    const entries = new Map([["flash_mla", { block: 1 }]]);
    const read = (): SampleConfig | undefined => overlayCache(entries, () => lookup());
    assertEquals(read(), { block: 1 });
    entries.set("flash_mla@1", { block: 2 });
    assertEquals(read(), { block: 2 });
    entries.set("00aa", { block: 3 });
    assertEquals(read(), { block: 3 });
    assertEquals(overlayCache(entries, () => lookup("flash_mla@2", "bb")), { block: 1 });
    assertEquals(overlayCache(entries, () => lookup("mla", "bb")), undefined);
  });

  test("falls through to the outer overlay when the inner one has no entry", () => {
    using _outer = overlayCache({ block: 1 });
    using _inner = overlayCache(new Map([["00aa", { block: 2 }]]));
    assertEquals(lookup(), { block: 2 });
    assertEquals(lookup("flash_mla@1", "00bb"), { block: 1 });
  });

  test("does not follow what the caller does to the map later", () => {
    const entries = new Map([["flash_mla", { block: 1 }]]);
    using _ = overlayCache(entries);
    entries.clear();
    assertEquals(lookup(), { block: 1 });
  });

  test("keeps overlapping callbacks apart", async () => {
    const gate = closedGate();
    const calls = [1, 2, 3].map((block) =>
      overlayCache({ block }, async () => {
        await gate.promise;
        return lookup()?.block;
      })
    );
    assertEquals(lookup(), undefined);
    gate.resolve();
    assertEquals(await Promise.all(calls), [1, 2, 3]);
    assertEquals(lookup(), undefined);
  });
});
