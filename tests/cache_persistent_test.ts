import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { describe, test } from "node:test";
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { CACHE_SCHEMA } from "../src/cache/cache_record.ts";
import { kvKey } from "../src/cache/kv_record.ts";
import type { KvStore } from "../src/cache/kv_store.ts";
import { temporaryFolder } from "./support/cache_folder.ts";
import { noFile, open, openKv } from "./support/cache_heard.ts";
import { TIMEOUT_MS, work } from "./support/cache_process.ts";
import { isDeno, runtimes } from "./support/cache_runtime.ts";
import { sampleKey, sampleRecord } from "./support/cache_sample.ts";

async function inStore<T>(path: string, work: (store: KvStore) => Promise<T>): Promise<T> {
  const store = await openKv(path);
  try {
    return await work(store);
  } finally {
    store.close();
  }
}

describe("PersistentCache in a file", { skip: noFile }, () => {
  test("get() in another cache finds what put() stored, and the last put() wins", async () => {
    using folder = temporaryFolder();
    const path = folder.file("new", "folders", "configs.kv");
    const { cache, events } = open({ path });
    assertEquals(await cache.get(sampleKey()), undefined);
    await cache.put(sampleKey(), sampleRecord(1));
    await cache.put(sampleKey(), sampleRecord(2));
    const other = open({ path });
    assertEquals(await other.cache.get(sampleKey()), sampleRecord(2));
    for (const part of ["op", "device", "bucket", "candidates"]) {
      assertEquals(await other.cache.get(sampleKey({ [part]: "another" })), undefined);
    }
    assertEquals([...events, ...other.events], []);
  });

  test("entries() and clear() keep to one name", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    const [mla, other] = [open({ path }, "mla"), open({ path }, "other")];
    await mla.cache.put(sampleKey("a"), sampleRecord(1));
    await mla.cache.put(sampleKey("b"), sampleRecord(2));
    await other.cache.put(sampleKey("a"), sampleRecord(3));
    assertEquals(await mla.cache.entries(), [[sampleKey("a"), sampleRecord(1)], [sampleKey("b"), sampleRecord(2)]]);
    await mla.cache.clear();
    assertEquals(await mla.cache.entries(), []);
    assertEquals(await mla.cache.get(sampleKey("a")), undefined);
    assertEquals(await other.cache.get(sampleKey("a")), sampleRecord(3));
  });

  test("many calls at once all succeed", async () => {
    using folder = temporaryFolder();
    const { cache, events } = open({ path: folder.file("configs.kv") });
    const blocks = Array.from({ length: 40 }, (_, block) => block);
    await Promise.all(blocks.map((block) => cache.put(sampleKey(`${block}`), sampleRecord(block))));
    const records = await Promise.all(blocks.map((block) => cache.get(sampleKey(`${block}`))));
    assertEquals(records.map((record) => record?.cfg.block), blocks);
    assertEquals(events, []);
  });

  test("a value that is no record is a miss until put() replaces it", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    const { cache, events } = open({ path });
    const id = await kvKey("mla", sampleKey());
    for (const value of ["", "{", '{"cfg":{"block":1}}', "\u0000"]) {
      await inStore(path, (store) => store.set(id, new TextEncoder().encode(value)));
      assertEquals(await cache.get(sampleKey()), undefined);
      assertEquals(await cache.entries(), []);
      await cache.put(sampleKey(), sampleRecord(3));
      assertEquals(await cache.get(sampleKey()), sampleRecord(3));
    }
    assertEquals(events, []);
  });

  const onlyBytes = isDeno ? false : "@deno/kv is opened for bytes alone";
  test("another program's value of another type is a miss", { timeout: TIMEOUT_MS, skip: onlyBytes }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    const { cache, events } = open({ path });
    for (const name of ["mla", "worker"]) {
      const id = await kvKey(name, sampleKey("a"));
      await inStore(path, (store) => store.set(id, "text" as unknown as Uint8Array));
    }
    assertEquals(await cache.get(sampleKey("a")), undefined);
    assertEquals(events, []);
    for (const kind of runtimes) {
      const { got, entries, events } = await work({ path, get: ["a"], entries: true }, { runtime: kind });
      assertEquals([got, entries, events], [{ a: null }, [], []]);
    }
  });

  test("an entry of another schema version is not read, but cleared", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    const { cache } = open({ path });
    await cache.put(sampleKey(), sampleRecord(1));
    const [entry] = await inStore(path, (store) => store.list(["flash-mla"]));
    const later = entry!.key.map((part) => (part === CACHE_SCHEMA ? CACHE_SCHEMA + 1 : part));
    await inStore(path, async (store) => {
      await store.delete(entry!.key);
      await store.set(later, entry!.value);
    });
    assertEquals(await cache.get(sampleKey()), undefined);
    assertEquals(await cache.entries(), []);
    await cache.clear();
    assertEquals(await inStore(path, (store) => store.list(["flash-mla"])), []);
  });

  test("takes keys of any length and any characters", async () => {
    using folder = temporaryFolder();
    const { cache, events } = open({ path: folder.file("configs.kv") });
    // Around Deno KV's limit of 2,048 bytes, at which a key is hashed.
    const lengths = Array.from({ length: 12 }, (_, i) => 1970 + i);
    const devices = ["", "\0".repeat(990), "\0".repeat(1500), "é".repeat(985), "🙂".repeat(800), "d".repeat(100_000)];
    for (const device of [...lengths.map((length) => "d".repeat(length)), ...devices]) {
      const key = sampleKey({ device });
      await cache.put(key, sampleRecord(device.length));
      assertEquals((await cache.get(key))?.cfg.block, device.length);
    }
    assertEquals(events, []);
    for (const [key, record] of await cache.entries()) assertEquals(await cache.get(key), record);
    assertEquals((await cache.entries()).length, lengths.length + devices.length);
  });

  test("keeps a value that is too large in memory, and says so once", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    const { cache, events } = open({ path });
    const record = sampleRecord(1, "x".repeat(70_000));
    await cache.put(sampleKey(), record);
    await cache.put(sampleKey(), record);
    assertEquals(await cache.get(sampleKey()), record);
    assertEquals(await cache.entries(), [[sampleKey(), record]]);
    assertEquals(events.map(({ code }) => code), ["not-storable"]);
    assertStringIncludes(events[0]!.message, "more than 65536 bytes");
    assertEquals(await open({ path }).cache.get(sampleKey()), undefined);
  });

  test("health() counts what is there and leaves no trace", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    const { cache } = open({ path });
    await cache.put(sampleKey(), sampleRecord(1));
    const health = { location: path, state: "ok" as const, detail: "Readable and writable; configurations held: 1." };
    assertEquals(await cache.health(), health);
    assertEquals(await cache.health(), health);
    assertEquals((await inStore(path, (store) => store.list([]))).length, 1);
  });

  test("close() waits for calls under way", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    let putDone = false;
    {
      await using cache = open({ path }).cache;
      cache.put(sampleKey(), sampleRecord(1)).then(() => putDone = true);
    }
    await Promise.resolve();
    assert(putDone);
    assertEquals(await open({ path }).cache.get(sampleKey()), sampleRecord(1));
  });
});

describe("PersistentCache with a file that fails", { skip: noFile }, () => {
  test("begins afresh when the directory vanishes", async () => {
    using folder = temporaryFolder();
    const path = folder.file("sub", "configs.kv");
    const { cache, events } = open({ path });
    await cache.put(sampleKey("a"), sampleRecord(1));
    rmSync(folder.file("sub"), { recursive: true });
    assertEquals(await cache.get(sampleKey("a")), undefined);
    rmSync(folder.file("sub"), { recursive: true });
    await cache.put(sampleKey("b"), sampleRecord(2));
    assertEquals(await open({ path }).cache.get(sampleKey("b")), sampleRecord(2));
    assertEquals(events, []);
  });

  test("goes on in memory when there can be no file, and says so once", async () => {
    using folder = temporaryFolder();
    writeFileSync(folder.file("file"), "a file, not a directory");
    mkdirSync(folder.file("directory"));
    for (const path of [folder.file("file", "configs.kv"), folder.file("directory"), "/proc/none/configs.kv"]) {
      const { cache, events } = open({ path });
      assertEquals(await cache.get(sampleKey()), undefined);
      await cache.put(sampleKey(), sampleRecord(1));
      await cache.put(sampleKey("b"), sampleRecord(2));
      assertEquals(await cache.get(sampleKey()), sampleRecord(1));
      assertEquals((await cache.entries()).length, 2);
      assertEquals((await cache.health()).state, "unavailable");
      await cache.clear();
      assertEquals(await cache.get(sampleKey()), undefined);
      await cache.close();
      assertEquals(events.map(({ code }) => code), ["unavailable"]);
      assertStringIncludes(events[0]!.message, `cache ${path} cannot be used`);
      assertStringIncludes(events[0]!.message, "set FLASH_MLA_CACHE to another path");
    }
    assertEquals(readFileSync(folder.file("file"), "utf8"), "a file, not a directory");
  });

  test("tries again when the store says that it is locked", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    for (const where of ["open", "set"] as const) {
      let refusals = 3;
      const refuse = (): void => {
        if (refusals-- > 0) throw new Error("database is locked");
      };
      const { cache, events } = open({
        path,
        open: async (path) => {
          if (where === "open") refuse();
          const store = await openKv(path);
          return { ...store, set: async (key, value) => (where === "set" && refuse(), await store.set(key, value)) };
        },
      });
      await cache.put(sampleKey(where), sampleRecord(4));
      assert(refusals < 0);
      assertEquals(events, []);
      assertEquals(await open({ path }).cache.get(sampleKey(where)), sampleRecord(4));
    }
    assertEquals(readdirSync(folder.path).filter((name) => name.includes("damaged")), []);
  });

  test("gives up on a lock in the end, and then does not make every look-up wait", async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    let [isLocked, opened] = [true, 0];
    const { cache, events } = open({
      path,
      patience: 50,
      open: (path) => {
        opened++;
        return isLocked ? Promise.reject(new Error("database is locked")) : openKv(path);
      },
    });
    assertEquals(await cache.get(sampleKey("a")), undefined);
    const openedOnce = opened;
    assertEquals(await cache.get(sampleKey("b")), undefined);
    assertEquals(opened, openedOnce);
    assertEquals((await cache.health()).state, "locked");
    await cache.put(sampleKey("a"), sampleRecord(1));
    assertEquals(await cache.get(sampleKey("a")), sampleRecord(1));
    assertEquals(events.map(({ code }) => code), ["locked"]);
    // A put that gets through is stored, and ends the rest.
    isLocked = false;
    await cache.put(sampleKey("a"), sampleRecord(2));
    assertEquals(await open({ path }).cache.get(sampleKey("a")), sampleRecord(2));
    await open({ path }).cache.put(sampleKey("b"), sampleRecord(3));
    assertEquals(await cache.get(sampleKey("b")), sampleRecord(3));
  });

  test("does not mind a listener that throws", async () => {
    const { cache } = open({
      path: "/proc/none/configs.kv",
      onEvent: () => {
        throw new Error("from the listener");
      },
    });
    await cache.put(sampleKey(), sampleRecord(1));
    assertEquals(await cache.get(sampleKey()), sampleRecord(1));
  });
});

describe("PersistentCache without a file", () => {
  test("path memory remembers within one cache", async () => {
    const { cache, events } = open({ path: "memory" });
    await cache.put(sampleKey(), sampleRecord(1));
    assertEquals(await cache.get(sampleKey()), sampleRecord(1));
    assertEquals(await cache.entries(), [[sampleKey(), sampleRecord(1)]]);
    assertEquals(await cache.health(), { location: "memory", state: "memory", detail: "As asked for." });
    assertEquals(await open({ path: "memory" }).cache.get(sampleKey()), undefined);
    await cache.clear();
    assertEquals(await cache.get(sampleKey()), undefined);
    assertEquals(events, []);
  });

  test("path off remembers nothing", async () => {
    const { cache, events } = open({ path: "off" });
    await cache.put(sampleKey(), sampleRecord(1));
    assertEquals(await cache.get(sampleKey()), undefined);
    assertEquals(await cache.entries(), []);
    assertEquals(await cache.health(), { location: "off", state: "off", detail: "Switched off." });
    assertEquals(events, []);
  });
});
