import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { describe, test } from "node:test";
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import type { CacheEvent } from "../src/cache/cache_event.ts";
import { CACHE_SCHEMA } from "../src/cache/cache_record.ts";
import { moveAside } from "../src/cache/kv_file.ts";
import { kvKey } from "../src/cache/kv_record.ts";
import { detectKvStore, type KvOpener, type KvStore } from "../src/cache/kv_store.ts";
import { PersistentCache, type PersistentCacheOptions } from "../src/cache/persistent_cache.ts";
import { temporaryFolder } from "./support/cache_folder.ts";
import { isDeno } from "./support/cache_process.ts";
import { type SampleConfig, sampleKey, sampleRecord } from "./support/cache_sample.ts";

const skip = isDeno ? false : "needs Deno KV";

interface Heard {
  readonly cache: PersistentCache<SampleConfig>;
  readonly events: CacheEvent[];
}

function open(options: PersistentCacheOptions, name: string = "mla"): Heard {
  const events: CacheEvent[] = [];
  const onEvent = (event: CacheEvent): void => void events.push(event);
  return { cache: new PersistentCache(name, { patience: 30_000, onEvent, ...options }), events };
}

const openKv: KvOpener = (path) => detectKvStore().open!(path);

async function inStore<T>(path: string, work: (store: KvStore) => Promise<T>): Promise<T> {
  const store = await openKv(path);
  try {
    return await work(store);
  } finally {
    store.close();
  }
}

describe("PersistentCache in a file", { skip }, () => {
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
    // Not even bytes: another program's entry under our key.
    await inStore(path, (store) => store.set(id, "text" as unknown as Uint8Array));
    assertEquals(await cache.get(sampleKey()), undefined);
    assertEquals(events, []);
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
    const health = { location: path, state: "ok" as const, detail: "1 configurations, readable and writable." };
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
      // A put begins with work of its own before it reaches the store.
      while (!existsSync(path)) await new Promise((resolve) => setTimeout(resolve, 1));
    }
    await Promise.resolve();
    assert(putDone);
    assertEquals(await open({ path }).cache.get(sampleKey()), sampleRecord(1));
  });
});

describe("PersistentCache with a file that fails", { skip }, () => {
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

describe("PersistentCache with a damaged file", { skip }, () => {
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

  test("keeps to memory without a word outside Deno", { skip: isDeno ? "runs in Deno" : false }, async () => {
    const { cache, events } = open({});
    await cache.put(sampleKey(), sampleRecord(1));
    assertEquals(await cache.get(sampleKey()), sampleRecord(1));
    assertEquals((await cache.health()).state, "memory");
    assertEquals(events, []);
  });
});
