import { describe, test } from "node:test";
import { assert, assertEquals, assertMatch, assertRejects, assertStringIncludes } from "@std/assert";
import { IDBFactory } from "fake-indexeddb";
import fc from "fast-check";
import { type IdbFactory, indexedDbOpener } from "../src/cache/indexed_db_store.ts";
import { detectKvStore } from "../src/cache/kv_detection.ts";
import { packKey } from "../src/cache/kv_key.ts";
import type { KvKey } from "../src/cache/kv_store.ts";
import { temporaryFolder } from "./support/cache_folder.ts";
import { noFile, open as openAnywhere, openKv } from "./support/cache_heard.ts";
import { TIMEOUT_MS } from "./support/cache_process.ts";
import { sampleKey, sampleRecord } from "./support/cache_sample.ts";

/** Opens the default database also where `FLASH_MLA_CACHE` says otherwise: an empty path is none, and goes first. */
const open: typeof openAnywhere = (options, name) => openAnywhere({ path: "", ...options }, name);

type Opening = ReturnType<IdbFactory["open"]>;

/** What this test needs of a factory beyond what the store uses. */
interface Factory extends IdbFactory {
  deleteDatabase(name: string): Opening;
}

function factory(): Factory {
  return new IDBFactory() as unknown as Factory;
}

const bytes = (text: string): Uint8Array<ArrayBuffer> => new TextEncoder().encode(text);

/** Opens or deletes a database as another page would. */
function asAnotherPage(request: Opening): Promise<Opening["result"]> {
  return new Promise((resolve, reject) => {
    request.addEventListener("success", () => resolve(request.result));
    request.addEventListener("error", () => reject(request.error));
    request.addEventListener("blocked", () => reject(new Error("blocked")));
  });
}

describe("indexedDbOpener()", () => {
  test("keeps what was set when it is opened again, in a database of its own for each name", async () => {
    const openDb = indexedDbOpener(factory());
    const store = await openDb("a");
    await store.set(["x", 1], bytes("one"));
    await store.set(["x", 1], bytes("two"));
    store.close();
    const again = await openDb("a");
    assertEquals(await again.get(["x", 1]), bytes("two"));
    assertEquals(await again.get(["x", 2]), null);
    await again.delete(["x", 1]);
    await again.delete(["never there"]);
    assertEquals(await again.get(["x", 1]), null);
    again.close();
    const other = await openDb("b");
    assertEquals(await other.list([]), []);
    other.close();
  });

  const part = fc.oneof(
    fc.string({ unit: "grapheme", maxLength: 4 }),
    fc.constantFrom("", "\0", "\0\xff", "a\0", "é", "🙂", "\uffff"),
    fc.integer(),
    fc.double({ noNaN: true }).map((number) => number + 0),
  );
  // Deno KV takes no empty key.
  const keys = fc.uniqueArray(fc.array(part, { minLength: 1, maxLength: 3 }), {
    minLength: 1,
    maxLength: 12,
    selector: (key) => packKey(key).join(),
  });

  test(
    "lists keys in the order of Deno KV, those below a prefix alone",
    { timeout: TIMEOUT_MS, skip: noFile },
    async () => {
      using folder = temporaryFolder();
      const kv = await openKv(folder.file("configs.kv"));
      const db = await indexedDbOpener(factory())("order");
      const clear = async (): Promise<void> => {
        for (const store of [kv, db]) for (const { key } of await store.list([])) await store.delete(key);
      };
      await fc.assert(
        fc.asyncProperty(keys, async (keys) => {
          await clear();
          for (const store of [kv, db]) {
            for (const key of keys) await store.set(key, bytes(JSON.stringify(key)));
          }
          for (const prefix of [[], keys[0]!, keys[0]!.slice(0, 1)]) {
            const listed = async (store: typeof kv): Promise<KvKey[]> =>
              (await store.list(prefix)).map(({ value }) => JSON.parse(new TextDecoder().decode(value)));
            assertEquals(await listed(db), await listed(kv));
          }
        }),
        { numRuns: 10 },
      );
      kv.close();
      db.close();
    },
  );

  test("lets go of a database that another page upgrades, and says that it is locked", async () => {
    const db = factory();
    const store = await indexedDbOpener(db)("a");
    await store.set(["x"], bytes("one"));
    (await asAnotherPage(db.open("a", 2))).close();
    await assertRejects(() => store.get(["x"]), Error, "database is locked: it was closed for another page");
    store.close();
    await assertRejects(() => indexedDbOpener(db)("a"), "VersionError");
  });

  test("says that it is locked when another page keeps an older version open, and upgrades nothing later", async () => {
    const db = factory();
    (await indexedDbOpener(db)("a")).close();
    const older = await asAnotherPage(db.open("a", 1));
    // What the store will do when it has a second version.
    const upgrading: IdbFactory = { open: (name) => db.open(name, 2) };
    await assertRejects(() => indexedDbOpener(upgrading)("a"), Error, "database is locked: another page or worker");
    older.close();
    // This would fail had the upgrade gone on, now that it can.
    (await asAnotherPage(db.open("a", 1))).close();
  });
});

describe("PersistentCache in IndexedDB", () => {
  test("get() in another cache finds what put() stored, and entries() and clear() keep to one name", async () => {
    const openDb = indexedDbOpener(factory());
    const { cache, events } = open({ open: openDb });
    assertEquals(await cache.get(sampleKey()), undefined);
    await cache.put(sampleKey(), sampleRecord(1));
    await cache.put(sampleKey(), sampleRecord(2));
    const other = open({ open: openDb }, "other");
    await other.cache.put(sampleKey("b"), sampleRecord(3));
    const later = open({ open: openDb });
    assertEquals(await later.cache.get(sampleKey()), sampleRecord(2));
    assertEquals(await later.cache.entries(), [[sampleKey(), sampleRecord(2)]]);
    await later.cache.clear();
    assertEquals(await cache.entries(), []);
    assertEquals(await other.cache.get(sampleKey("b")), sampleRecord(3));
    assertEquals([...events, ...later.events, ...other.events], []);
  });

  test("takes keys of any length and any characters", async () => {
    const { cache, events } = open({ open: indexedDbOpener(factory()) });
    for (const device of ["", "\0".repeat(1500), "é".repeat(985), "d".repeat(100_000)]) {
      await cache.put(sampleKey({ device }), sampleRecord(device.length));
      assertEquals((await cache.get(sampleKey({ device })))?.cfg.block, device.length);
    }
    assertEquals(events, []);
  });

  test("health() names the database: flash-mla, or the path that was given", async () => {
    const openDb = indexedDbOpener(factory());
    const detail = "Readable and writable; configurations held: 0.";
    const { cache } = open({ open: openDb });
    assertEquals(await cache.health(), { location: 'IndexedDB "flash-mla"', state: "ok", detail });
    const named = open({ path: "my site", open: openDb });
    assertEquals(await named.cache.health(), { location: 'IndexedDB "my site"', state: "ok", detail });
    assertEquals((await open({ path: "off", open: openDb }).cache.health()).state, "off");
  });

  test("many calls at once all succeed", async () => {
    const { cache, events } = open({ open: indexedDbOpener(factory()) });
    const blocks = Array.from({ length: 40 }, (_, block) => block);
    await Promise.all(blocks.map((block) => cache.put(sampleKey(`${block}`), sampleRecord(block))));
    const records = await Promise.all(blocks.map((block) => cache.get(sampleKey(`${block}`))));
    assertEquals(records.map((record) => record?.cfg.block), blocks);
    assertEquals(events, []);
  });

  test("leaves nothing open that another page would have to wait for", async () => {
    const db = factory();
    const { cache } = open({ open: indexedDbOpener(db) });
    await cache.put(sampleKey(), sampleRecord(1));
    await asAnotherPage(db.deleteDatabase("flash-mla"));
    assertEquals(await cache.get(sampleKey()), undefined);
  });

  test("goes on in memory where the page may store nothing, and says so once", async () => {
    const refusals: IdbFactory[] = [
      {
        open: () => {
          throw new DOMException("The operation is insecure.", "SecurityError");
        },
      },
      {
        open: () => {
          const error = new DOMException("A mutation operation was attempted", "InvalidStateError");
          const addEventListener = (type: string, listener: () => void): void => {
            if (type === "error") queueMicrotask(listener);
          };
          return { error, addEventListener } as unknown as Opening;
        },
      },
    ];
    for (const refusal of refusals) {
      const { cache, events } = open({ open: indexedDbOpener(refusal) });
      assertEquals(await cache.get(sampleKey()), undefined);
      await cache.put(sampleKey(), sampleRecord(1));
      assertEquals(await cache.get(sampleKey()), sampleRecord(1));
      assertEquals((await cache.health()).state, "unavailable");
      assertEquals(events.map(({ code }) => code), ["unavailable"]);
      assertMatch(
        events[0]!.message,
        /^The configuration cache IndexedDB "flash-mla" cannot be used: .*private windows/,
      );
    }
  });

  test("waits for another page until its patience ends, and then says that it is locked", async () => {
    const never: IdbFactory = {
      open: () => ({ addEventListener: () => {} }) as unknown as Opening,
    };
    const { cache, events } = open({ open: indexedDbOpener(never), patience: 50 });
    await cache.put(sampleKey(), sampleRecord(1));
    assertEquals(await cache.get(sampleKey()), sampleRecord(1));
    assertEquals(events.map(({ code }) => code), ["locked"]);
    assertStringIncludes(events[0]!.message, "Close the other pages of this site");
  });
});

describe("detectKvStore() in a browser", () => {
  /** Looks while the globals of a runtime are hidden and others stand in; looking reads them all at once. */
  function detectWith(globals: Record<string, PropertyDescriptor>): ReturnType<typeof detectKvStore> {
    const names = ["Deno", "process", "indexedDB"];
    const before = names.map((name) => Object.getOwnPropertyDescriptor(globalThis, name));
    try {
      for (const name of names) {
        Object.defineProperty(globalThis, name, { configurable: true, ...globals[name] ?? { value: undefined } });
      }
      return detectKvStore();
    } finally {
      names.forEach((name, i) => {
        if (before[i] !== undefined) Object.defineProperty(globalThis, name, before[i]);
        else delete (globalThis as Record<string, unknown>)[name];
      });
    }
  }

  test("opens its IndexedDB", async () => {
    const found = await detectWith({ indexedDB: { value: factory() } });
    assertEquals(found.open?.medium, "indexed-db");
    const store = await found.open!("a");
    await store.set(["x"], bytes("one"));
    assertEquals((await store.list([])).length, 1);
    store.close();
  });

  test("is content with memory where there is none, or none that it may look at", async () => {
    const forbidden = {
      get: () => {
        throw new DOMException("Forbidden", "SecurityError");
      },
    };
    for (const indexedDB of [{ value: undefined }, { value: null }, forbidden]) {
      const found = await detectWith({ indexedDB });
      assert(found.open === null);
      assertEquals(found.remediable, false);
      assertMatch(found.reason, /no IndexedDB/);
    }
  });
});
