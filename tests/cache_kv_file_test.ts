import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects } from "@std/assert";
import { holdingKvFile, moveAside } from "../src/cache/kv_file.ts";
import { PersistentCache } from "../src/cache/persistent_cache.ts";
import { temporaryFolder } from "./support/cache_folder.ts";
import { isDeno } from "./support/cache_process.ts";
import { sampleKey, sampleRecord } from "./support/cache_sample.ts";

const skip = isDeno ? false : "needs Deno KV";

describe("holdingKvFile()", { skip }, () => {
  test("lets many use a file, and one alone move it", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    const done = (): Promise<string> => Promise.resolve("done");
    const isRefused = (mode: "shared" | "exclusive"): Promise<Error> =>
      assertRejects(() => holdingKvFile(path, mode, done), Error, "database is locked");
    await holdingKvFile(path, "shared", async () => {
      assertEquals(await holdingKvFile(path, "shared", done), "done");
      await isRefused("exclusive");
    });
    await holdingKvFile(path, "exclusive", async () => {
      await isRefused("exclusive");
      await isRefused("shared");
    });
    await assertRejects(() => holdingKvFile(path, "exclusive", () => Promise.reject(new Error("from inside"))), Error);
    assertEquals(await holdingKvFile(path, "exclusive", done), "done");
  });

  test("works without a lock where there can be no lock file", async () => {
    const path = "/proc/none/configs.kv";
    const inner = (): Promise<string> => holdingKvFile(path, "exclusive", () => Promise.resolve("done"));
    assertEquals(await holdingKvFile(path, "exclusive", inner), "done");
  });

  test("keeps a damaged file in place while another process uses it", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    const damaged = "This is not a database. ".repeat(50);
    writeFileSync(path, damaged);
    const codes: string[] = [];
    const cache = new PersistentCache("mla", { path, patience: 100, onEvent: ({ code }) => void codes.push(code) });
    await holdingKvFile(path, "shared", () => cache.put(sampleKey(), sampleRecord(1)));
    assertEquals(codes, ["locked"]);
    assertEquals(readFileSync(path, "utf8"), damaged);
    const later = new PersistentCache("mla", { path, patience: 30_000, onEvent: ({ code }) => void codes.push(code) });
    await later.put(sampleKey(), sampleRecord(2));
    assertEquals((await later.get(sampleKey()))?.cfg, { block: 2 });
    assertEquals(codes, ["locked", "damaged"]);
    assertEquals(readdirSync(folder.path).filter((name) => name.includes("damaged")).length, 1);
  });
});

describe("moveAside()", { skip }, () => {
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
});
