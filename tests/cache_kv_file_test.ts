import { appendFileSync, existsSync, readdirSync, readFileSync, utimesSync, writeFileSync } from "node:fs";
import { describe, test } from "node:test";
import { assert, assertEquals, assertFalse, assertRejects } from "@std/assert";
import { fileDamage, holdingKvFile, kvFileState, moveAside } from "../src/cache/kv_file.ts";
import { temporaryFolder } from "./support/cache_folder.ts";
import { noFile, open } from "./support/cache_heard.ts";
import { isDeno } from "./support/cache_runtime.ts";
import { sampleKey, sampleRecord } from "./support/cache_sample.ts";

const DAMAGED = "This is not a database. ".repeat(50);
const noLocks = isDeno ? false : "needs file locks, which node:fs has not";

const done = (): Promise<string> => Promise.resolve("done");

function assertRefused(path: string, mode: "shared" | "exclusive"): Promise<Error> {
  return assertRejects(() => holdingKvFile(path, mode, done), Error, "database is locked");
}

function movedIn(folder: string): number {
  return readdirSync(folder).filter((name) => name.includes("damaged")).length;
}

describe("holdingKvFile()", () => {
  test("lets many use a file, and one alone move it", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    await holdingKvFile(path, "shared", async () => {
      assertEquals(await holdingKvFile(path, "shared", done), "done");
    });
    await holdingKvFile(path, "exclusive", async () => {
      await assertRefused(path, "exclusive");
    });
    await assertRejects(() => holdingKvFile(path, "exclusive", () => Promise.reject(new Error("from inside"))), Error);
    assertEquals(await holdingKvFile(path, "exclusive", done), "done");
  });

  test("lets nobody move a file that is used, nor use one that is moved", { skip: noLocks }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    await holdingKvFile(path, "shared", () => assertRefused(path, "exclusive"));
    await holdingKvFile(path, "exclusive", () => assertRefused(path, "shared"));
  });

  test("takes the claim of a process that has ended for what it is", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    writeFileSync(`${path}.moving`, "");
    await assertRefused(path, "exclusive");
    assert(existsSync(`${path}.moving`));
    const longAgo = new Date(Date.now() - 60_000);
    utimesSync(`${path}.moving`, longAgo, longAgo);
    await assertRefused(path, "exclusive");
    assertEquals(await holdingKvFile(path, "exclusive", done), "done");
    assertFalse(existsSync(`${path}.moving`));
  });

  test("works without a lock where there can be no lock file", async () => {
    const path = "/proc/none/configs.kv";
    const inner = (): Promise<string> => holdingKvFile(path, "exclusive", () => Promise.resolve("done"));
    assertEquals(await holdingKvFile(path, "exclusive", inner), "done");
  });
});

describe("a damaged file", { skip: noFile }, () => {
  test("stays in place while another process uses it", { skip: noLocks }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    writeFileSync(path, DAMAGED);
    const { cache, events } = open({ path, patience: 100 });
    await holdingKvFile(path, "shared", () => cache.put(sampleKey(), sampleRecord(1)));
    assertEquals(events.map(({ code }) => code), ["locked"]);
    assertEquals(readFileSync(path, "utf8"), DAMAGED);
    const later = open({ path });
    await later.cache.put(sampleKey(), sampleRecord(2));
    assertEquals((await later.cache.get(sampleKey()))?.cfg, { block: 2 });
    assertEquals(later.events.map(({ code }) => code), ["damaged"]);
    assertEquals(movedIn(folder.path), 1);
  });

  test("stays in place while another process writes to it, whether that one holds a lock or not", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    writeFileSync(path, DAMAGED);
    const { cache, events } = open({ path, patience: 600 });
    const writer = setInterval(() => appendFileSync(path, "more"), 10);
    await cache.put(sampleKey(), sampleRecord(1));
    clearInterval(writer);
    assertEquals(events.map(({ code }) => code), ["locked"]);
    assertEquals(movedIn(folder.path), 0);
    // What is stored later gets through, and the file is replaced.
    const later = open({ path });
    await later.cache.put(sampleKey(), sampleRecord(2));
    assertEquals(later.events.map(({ code }) => code), ["damaged"]);
    assertEquals(movedIn(folder.path), 1);
  });
});

describe("fileDamage()", () => {
  test("does not judge a file that has a write-ahead log, or none that it can read", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    assertEquals(await fileDamage(path), null);
    assertEquals(await fileDamage(folder.path), null);
    writeFileSync(path, DAMAGED);
    assertEquals(await fileDamage(path), "the file has no SQLite header");
    writeFileSync(`${path}-wal`, "");
    assertEquals(await fileDamage(path), "the file has no SQLite header");
    writeFileSync(`${path}-wal`, "pages");
    assertEquals(await fileDamage(path), null);
  });
});

describe("moveAside()", () => {
  test("moves the write-ahead log and its index along", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    for (const suffix of ["", "-wal", "-shm"]) writeFileSync(path + suffix, `content of ${suffix}`);
    const aside = await moveAside(path);
    for (const suffix of ["", "-wal", "-shm"]) {
      assertEquals(readFileSync(aside + suffix, "utf8"), `content of ${suffix}`);
      assert(!existsSync(path + suffix));
    }
  });

  test("refuses when the file or its log was written to since it was looked at", async () => {
    using folder = temporaryFolder();
    for (const suffix of ["", "-wal"]) {
      const path = folder.file(`configs${suffix}.kv`);
      writeFileSync(path, DAMAGED);
      const seen = await kvFileState(path);
      appendFileSync(path + suffix, "more");
      await assertRejects(() => moveAside(path, seen), Error, "database is locked");
      assert(existsSync(path));
      assertEquals(movedIn(folder.path), 0);
    }
  });
});
