import { readFileSync, writeFileSync } from "node:fs";
import { describe, test } from "node:test";
import { assert, assertEquals, assertMatch } from "@std/assert";
import { sqliteDamage } from "../src/cache/kv_file_check.ts";
import { PersistentCache } from "../src/cache/persistent_cache.ts";
import { temporaryFolder } from "./support/cache_folder.ts";
import { noFile } from "./support/cache_heard.ts";
import { TIMEOUT_MS, work } from "./support/cache_process.ts";
import { sampleKey, sampleRecord } from "./support/cache_sample.ts";

const PAGE = 4096;

async function soundFile(path: string, entries: number = 20): Promise<Uint8Array> {
  const cache = new PersistentCache("worker", { path, patience: 30_000 });
  for (let i = 0; i < entries; i++) await cache.put(sampleKey(`${i}`), sampleRecord(i));
  return new Uint8Array(readFileSync(path));
}

function changed(file: Uint8Array, at: number, ...bytes: number[]): Uint8Array {
  const copy = file.slice();
  copy.set(bytes, at);
  return copy;
}

describe("sqliteDamage()", { skip: noFile }, () => {
  test("finds nothing wrong with what Deno KV writes, nor with an empty file", async () => {
    using folder = temporaryFolder();
    assertEquals(sqliteDamage(new Uint8Array()), null);
    assertEquals(sqliteDamage(await soundFile(folder.file("small.kv"), 1)), null);
    assertEquals(sqliteDamage(await soundFile(folder.file("larger.kv"), 100)), null);
  });

  test("finds a cut, a foreign header, and pages that are none", async () => {
    using folder = temporaryFolder();
    const file = await soundFile(folder.file("configs.kv"));
    assertMatch(sqliteDamage(file.subarray(0, 60))!, /only 60 bytes/);
    for (let size = 100; size < file.length; size += 511) {
      assertMatch(sqliteDamage(file.subarray(0, size))!, /the file has/);
    }
    assertMatch(sqliteDamage(changed(file, 0, 0x50))!, /no SQLite header/);
    assertMatch(sqliteDamage(changed(file, 16, 0x0f, 0xff))!, /4095 bytes to a page/);
    for (let page = 1; page < file.length / PAGE; page++) {
      const at = page * PAGE;
      assertEquals(sqliteDamage(changed(file, at, ...new Uint8Array(PAGE))), `page ${page + 1} is not a SQLite page`);
      assertEquals(sqliteDamage(changed(file, at, 0xaa)), `page ${page + 1} is not a SQLite page`);
      assertEquals(sqliteDamage(changed(file, at, 13, 0, 0, 0xff, 0xff)), `page ${page + 1} is not a SQLite page`);
    }
  });

  test("keeps a runtime from opening a file that would end the process", { timeout: TIMEOUT_MS }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    const file = await soundFile(path);
    // Pages 5 to 8 are the roots of KV's queue tables, which a clean-up thread of Deno reads; it panics on them.
    for (const page of [5, 6, 7, 8]) {
      writeFileSync(path, changed(file, (page - 1) * PAGE, ...new Uint8Array(PAGE)));
      const { events, got } = await work({ path, put: [["a", page]], get: ["a", "1"] });
      assertEquals(got, { a: page, 1: null });
      assertEquals(events.map(({ code }) => code), ["damaged"]);
      assert(events[0]!.message.includes(`page ${page} is not a SQLite page`));
    }
  });
});
