import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { describe, test } from "node:test";
import { assertEquals, assertStringIncludes } from "@std/assert";
import { temporaryFolder } from "./support/cache_folder.ts";
import { noFile, open, openKv } from "./support/cache_heard.ts";
import { sampleKey, sampleRecord } from "./support/cache_sample.ts";

describe("PersistentCache with a damaged file", { skip: noFile }, () => {
  const soundFile = async (path: string): Promise<Uint8Array> => {
    const { cache } = open({ path });
    for (let i = 0; i < 60; i++) await cache.put(sampleKey(`${i}`), sampleRecord(i, "x".repeat(500)));
    return new Uint8Array(readFileSync(path));
  };
  const noise = (length: number): Uint8Array => Uint8Array.from({ length }, (_, i) => (i * 167 + 43) % 251);
  const damages: Record<string, (file: Uint8Array) => Uint8Array> = {
    "noise for a header": (file) => (file.set(noise(64)), file),
    "nothing but text": () => new TextEncoder().encode("This is not a database. ".repeat(200)),
    "only ten bytes": (file) => file.subarray(0, 10),
    "only its header": (file) => file.subarray(0, 100),
    "its second half missing": (file) => file.subarray(0, file.length >> 1),
    "its last byte missing": (file) => file.subarray(0, -1),
    "zeros behind the first page": (file) => (file.fill(0, 4096), file),
    "noise among its entries": (file) => (file.set(noise(file.length - 9 * 4096), 9 * 4096), file),
  };

  for (const [name, damage] of Object.entries(damages)) {
    test(`moves aside a file with ${name}, says so and begins afresh`, async () => {
      using folder = temporaryFolder();
      const path = folder.file("configs.kv");
      const damaged = damage(await soundFile(path));
      writeFileSync(path, damaged);
      const { cache, events } = open({ path });
      assertEquals(await cache.entries(), []);
      await cache.put(sampleKey("new"), sampleRecord(1));
      assertEquals(await cache.get(sampleKey("new")), sampleRecord(1));
      assertEquals((await cache.health()).state, "ok");
      assertEquals(events.map(({ code }) => code), ["damaged"]);
      const aside = readdirSync(folder.path).filter((name) => name.startsWith("configs.kv.damaged-"));
      assertEquals(aside.length, 1);
      assertStringIncludes(events[0]!.message, folder.file(aside[0]!));
      assertEquals(new Uint8Array(readFileSync(folder.file(aside[0]!))), damaged.slice());
      const next = open({ path });
      assertEquals(await next.cache.get(sampleKey("new")), sampleRecord(1));
      assertEquals(next.events, []);
    });
  }

  test("fills an empty file without a word", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    writeFileSync(path, "");
    const { cache, events } = open({ path });
    await cache.put(sampleKey(), sampleRecord(1));
    assertEquals(await open({ path }).cache.get(sampleKey()), sampleRecord(1));
    assertEquals(events, []);
    assertEquals(readdirSync(folder.path).filter((name) => name.includes("damaged")), []);
  });

  test("leaves a file alone that another process has put right meanwhile", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    await open({ path }).cache.put(sampleKey(), sampleRecord(1));
    let opened = 0;
    const { cache, events } = open({
      path,
      // What a process sees that opened the damaged file just before another one replaced it.
      open: (path) => opened++ === 0 ? Promise.reject(new Error("file is not a database")) : openKv(path),
    });
    assertEquals(await cache.get(sampleKey()), sampleRecord(1));
    assertEquals(events, []);
    assertEquals(readdirSync(folder.path).filter((name) => name.includes("damaged")), []);
  });
});
