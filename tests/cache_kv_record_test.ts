import { describe, test } from "node:test";
import { assert, assertEquals, assertExists, assertNotEquals } from "@std/assert";
import fc from "fast-check";
import { CACHE_SCHEMA, type CacheRecord } from "../src/cache/cache_record.ts";
import { cacheKeyOf, decodeRecord, encodeRecord, kvKey, MAX_VALUE_BYTES } from "../src/cache/kv_record.ts";
import { type SampleConfig, sampleKey, sampleRecord } from "./support/cache_sample.ts";

const utf8 = (text: string): Uint8Array => new TextEncoder().encode(text);

function withTimings(count: number, reason: string): CacheRecord<SampleConfig> {
  const timings = Array.from({ length: count }, (_, i) => ({
    cfg: { block: i },
    ms: i % 3 === 0 ? null : count - i,
    samples: 5,
    rejected: i % 3 === 0 ? reason : null,
  }));
  return { ...sampleRecord(1), timings };
}

describe("kvKey()", () => {
  test("keeps short keys readable, and cacheKeyOf() gives them back", async () => {
    assertEquals(
      await kvKey("mla", sampleKey()),
      ["flash-mla", "mla", CACHE_SCHEMA, "flash_mla@1", "test device", "f32 B1", "0123456789abcdef"],
    );
    const part = fc.string({ maxLength: 60, unit: "grapheme" });
    await fc.assert(fc.asyncProperty(part, part, part, part, async (op, device, bucket, candidates) => {
      const key = { op, device, bucket, candidates };
      assertEquals(cacheKeyOf(await kvKey("mla", key)), key);
    }));
  });

  test("hashes the longest parts of a long key, and no others", async () => {
    const key = sampleKey({ device: "d".repeat(3000), bucket: "b".repeat(1500) });
    const [, , , op, device, bucket] = await kvKey("mla", key);
    assertEquals([op, bucket], [key.op, key.bucket]);
    assert(/^sha256:[0-9a-f]{64}$/.test(`${device}`));
    const found = cacheKeyOf(await kvKey("mla", key))!;
    assertEquals(await kvKey("mla", found), await kvKey("mla", key));
    const other = sampleKey({ device: "d".repeat(2999) + "e", bucket: key.bucket });
    assertNotEquals(await kvKey("mla", other), await kvKey("mla", key));
  });

  test("cacheKeyOf() refuses keys of another schema or shape", () => {
    assertEquals(cacheKeyOf(["flash-mla", "mla", CACHE_SCHEMA + 1, "op", "device", "bucket", "candidates"]), null);
    assertEquals(cacheKeyOf(["flash-mla", "mla", CACHE_SCHEMA, "op", "device", "bucket"]), null);
    assertEquals(cacheKeyOf(["flash-mla", "mla", CACHE_SCHEMA, "op", "device", 3, "candidates"]), null);
  });
});

describe("encodeRecord()", () => {
  test("gives back what decodeRecord() reads", () => {
    const record = sampleRecord(7, "Ω 🙂");
    assertEquals(decodeRecord<SampleConfig>(encodeRecord(record)!), record);
  });

  test("keeps why gradients were not measured, its beginning if need be", () => {
    const told = { ...sampleRecord(1), withoutBackward: "no kernel" };
    assertEquals(decodeRecord(encodeRecord(told)!), told);
    const long = { ...told, withoutBackward: "no kernel ".repeat(10_000) };
    assertEquals(decodeRecord(encodeRecord(long)!)?.withoutBackward, "no kernel ".repeat(8));
  });

  test("gives up the details of timings, least useful first, until the value fits", () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 4000 }), fc.integer({ min: 0, max: 300 }), (count, length) => {
        const record = withTimings(count, "x".repeat(length));
        const value = encodeRecord(record);
        assertExists(value);
        assert(value.length <= MAX_VALUE_BYTES);
        const read = decodeRecord<SampleConfig>(value)!;
        assertEquals(read.cfg, record.cfg);
        if (JSON.stringify(record).length <= MAX_VALUE_BYTES) return assertEquals(read, record);
        const measured = record.timings.filter((timing) => timing.ms !== null).map((timing) => timing.ms!);
        const kept = read.timings.flatMap((timing) => timing.ms ?? []);
        assertEquals(kept.toSorted((a, b) => a - b), measured.toSorted((a, b) => a - b).slice(0, kept.length));
        if (read.timings.length < count) assertEquals(read.timings.length, kept.length);
        assert(kept.length > 0 || measured.length === 0);
      }),
      { numRuns: 40 },
    );
  });

  test("returns null when the configuration alone is too large, or is no JSON", () => {
    assertEquals(encodeRecord(sampleRecord(1, "x".repeat(MAX_VALUE_BYTES))), null);
    assertEquals(encodeRecord<unknown>({ ...sampleRecord(1), cfg: { block: 1n } }), null);
  });
});

describe("decodeRecord()", () => {
  test("returns undefined for anything but a record", () => {
    const good = sampleRecord(1);
    const wrong: unknown[] = [
      null,
      1,
      [],
      {},
      { ...good, cfg: undefined },
      { ...good, cfg: null },
      { ...good, timings: undefined },
      { ...good, timings: {} },
      { ...good, timings: [null] },
      { ...good, timings: [{ ...good.timings[0], ms: "1" }] },
      { ...good, timings: [{ ...good.timings[0], samples: null }] },
      { ...good, timings: [{ ...good.timings[0], rejected: 4 }] },
      { ...good, timingMethod: "sundial" },
      { ...good, libraryVersion: 1 },
      { ...good, date: null },
      { ...good, withoutBackward: null },
    ];
    for (const value of wrong) assertEquals(decodeRecord(utf8(JSON.stringify(value))), undefined);
    assertEquals(decodeRecord(utf8(JSON.stringify(good).slice(1))), undefined);
    assertEquals(decodeRecord(new Uint8Array()), undefined);
    assertEquals(decodeRecord(new Uint8Array([0xff, 0xfe])), undefined);
  });

  test("never throws", () => {
    fc.assert(fc.property(fc.uint8Array(), (bytes) => {
      decodeRecord(bytes);
    }));
  });
});
