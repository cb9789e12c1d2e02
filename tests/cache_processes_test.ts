import { spawnSync } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, readdirSync, writeFileSync } from "node:fs";
import process from "node:process";
import { describe, test } from "node:test";
import { assert, assertEquals, assertFalse, assertMatch, assertStringIncludes } from "@std/assert";
import type { CacheEvent } from "../src/cache/cache_event.ts";
import { PersistentCache } from "../src/cache/persistent_cache.ts";
import { temporaryFolder } from "./support/cache_folder.ts";
import { noFile } from "./support/cache_heard.ts";
import { holdLock, noLockHolder, startProgram, TIMEOUT_MS, work, workTogether } from "./support/cache_process.ts";
import { isDeno, isOnPath, runtimes, scriptFor } from "./support/cache_runtime.ts";
import { sampleKey, sampleRecord } from "./support/cache_sample.ts";

const noDeno = isDeno ? false : "is about Deno";
const timeout = TIMEOUT_MS;
const KV = "--unstable-kv";
// Deno's child_process adds --allow-all to a `deno run` without any flag about permissions.
const NONE = "--deny-net";

/** Words that make a program obey file modes even when the user is root; null when nothing here can. */
function withoutOverride(): readonly string[] | null {
  if (process.platform === "win32") return null;
  if (process.getuid?.() !== 0) return [];
  const words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"];
  return spawnSync(words[0]!, [words[1]!, "true"]).status === 0 ? words : null;
}

const range = (length: number): number[] => Array.from({ length }, (_, i) => i);
const inOrder = <T>(items: readonly T[]): T[] => [...items].sort();

describe("processes that share one file", { skip: noFile }, () => {
  test("lose nothing of each other's when they write at the same time", { timeout }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("new", "configs.kv");
    const keys = range(6).map((worker) => range(8).map((i): [string, number] => [`${worker}/${i}`, 10 * worker + i]));
    const reports = await workTogether(keys.map((put) => ({ path, put })));
    assertEquals(reports.flatMap(({ events }) => events), []);
    const { entries } = await work({ path, entries: true });
    assertEquals(inOrder(entries), inOrder(keys.flat()));
  });

  test("replace a damaged file once, and lose nothing of what follows", { timeout }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    writeFileSync(path, "This is not a database. ".repeat(500));
    const reports = await workTogether(range(6).map((worker) => ({ path, put: [[`${worker}`, worker] as const] })));
    assertEquals(reports.flatMap(({ events }) => events.map(({ code }) => code)), ["damaged"]);
    assertEquals(readdirSync(folder.path).filter((name) => name.includes("damaged")).length, 1);
    const { entries } = await work({ path, entries: true });
    assertEquals(inOrder(entries), range(6).map((worker) => [`${worker}`, worker] as const));
  });

  test("wait while one of them holds the lock", { timeout, skip: noLockHolder }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    await work({ path, put: [["a", 1]] });
    const holder = await holdLock(path);
    const events: CacheEvent[] = [];
    const cache = new PersistentCache("worker", {
      path,
      patience: 30_000,
      onEvent: (event) => void events.push(event),
    });
    let isStored = false;
    const put = cache.put(sampleKey("b"), sampleRecord(2)).then(() => isStored = true);
    await new Promise((resolve) => setTimeout(resolve, 200));
    assertFalse(isStored);
    await holder.release();
    await put;
    assertEquals(events, []);
    assertEquals((await work({ path, entries: true })).entries, [["a", 1], ["b", 2]]);
  });

  test(
    "go on in memory when the lock is never released, without calling the file damaged",
    { skip: noLockHolder },
    async () => {
      using folder = temporaryFolder();
      const path = folder.file("configs.kv");
      await work({ path, put: [["a", 1]] });
      const holder = await holdLock(path);
      const events: CacheEvent[] = [];
      const cache = new PersistentCache("worker", { path, patience: 200, onEvent: (event) => void events.push(event) });
      await cache.put(sampleKey("b"), sampleRecord(2));
      assertEquals((await cache.get(sampleKey("b")))?.cfg, { block: 2 });
      assertEquals((await cache.health()).state, "locked");
      assertEquals(events.map(({ code }) => code), ["locked"]);
      assertStringIncludes(events[0]!.message, "Another process holds it");
      await holder.release();
      assertEquals(readdirSync(folder.path).filter((name) => name.includes("damaged")), []);
      const { got, health } = await work({ path, get: ["a"], health: true });
      assertEquals([got.a, health?.state], [1, "ok"]);
    },
  );
});

describe("a process that never closes its cache", { skip: noFile }, () => {
  test("ends by itself, and what it stored is there", { timeout }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    assertEquals((await work({ path, put: [["a", 1]] })).events, []);
    assertEquals((await work({ path, get: ["a"] })).got, { a: 1 });
  });

  test("leaves nothing open in the eyes of deno test", { timeout, skip: noDeno }, async () => {
    using folder = temporaryFolder();
    const script = await scriptFor("deno", "cache_sanitized");
    const args = ["test", "--no-config", "--no-lock", "--no-check", "-A", KV, script];
    const { stdout } = await startProgram(process.execPath, args, { FLASH_MLA_CACHE: folder.file("a.kv") }).ended;
    assertStringIncludes(stdout, "1 passed");
    assert(existsSync(folder.file("a.kv")));
  });
});

describe("where the file is", { skip: noFile }, () => {
  const conventional = process.platform === "darwin" ? ["Library", "Caches"] : [".cache"];
  const onWindows = process.platform === "win32" ? "looks at the places of Unix" : false;
  const task = { put: [["a", 1]] as const, health: true };

  for (const runtime of runtimes) {
    test(
      `follows FLASH_MLA_CACHE, then XDG_CACHE_HOME, then HOME in ${runtime}`,
      { timeout, skip: onWindows },
      async () => {
        using folder = temporaryFolder();
        const HOME = folder.file("home");
        const XDG_CACHE_HOME = folder.file("xdg");
        const home = folder.file("home", ...conventional, "flash-mla", "configs.kv");
        const cases: [Record<string, string>, string][] = [
          [{ HOME }, home],
          [{ HOME, XDG_CACHE_HOME: "relative", DENO_DIR: folder.file("deno") }, home],
          [{ HOME, XDG_CACHE_HOME: "" }, home],
          [{ HOME, XDG_CACHE_HOME }, folder.file("xdg", "flash-mla", "configs.kv")],
          [{ HOME, XDG_CACHE_HOME, FLASH_MLA_CACHE: folder.file("own.kv") }, folder.file("own.kv")],
          [{ HOME, XDG_CACHE_HOME, FLASH_MLA_CACHE: "" }, folder.file("xdg", "flash-mla", "configs.kv")],
          [{ HOME, FLASH_MLA_CACHE: "memory" }, "memory"],
          [{ HOME, FLASH_MLA_CACHE: " Off " }, "off"],
        ];
        for (const [env, location] of cases) {
          const { health, events } = await work(task, { env, runtime });
          assertEquals([health?.location, events], [location, []]);
          assertEquals(existsSync(location), location.startsWith("/"));
        }
      },
    );
  }

  test("is rather what the program says", { timeout }, async () => {
    using folder = temporaryFolder();
    const env = { FLASH_MLA_CACHE: "off" };
    assertEquals((await work({ ...task, path: folder.file("option.kv") }, { env })).health?.state, "ok");
  });

  test("is nowhere without HOME, which is said once", { timeout, skip: onWindows }, async () => {
    for (const runtime of runtimes) {
      const { health, events } = await work({ ...task, get: ["a", "b"] }, { runtime });
      assertEquals(health?.state, "memory");
      assertEquals(events.map(({ code }) => code), ["no-directory"]);
      assertStringIncludes(events[0]!.message, "set FLASH_MLA_CACHE to a path");
    }
  });
});

describe("a process that may not use the file", { skip: noDeno }, () => {
  const task = { put: [["a", 1]] as const, get: ["a", "b"], entries: true, health: true };

  test("goes on in memory and says once which permission or flag it lacks", { timeout }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("cache", "configs.kv");
    const env = { FLASH_MLA_CACHE: path };
    const cases: [flags: string[], code: CacheEvent["code"], hint: RegExp][] = [
      [[KV, NONE], "no-directory", /--allow-env=FLASH_MLA_CACHE,/],
      [[KV, "--allow-env"], "no-permission", /--allow-read=\S+ --allow-write=\S+/],
      [[KV, "--allow-env", "--allow-read"], "no-permission", /--allow-write=/],
      [[KV, "-A", `--deny-write=${folder.path}`], "no-permission", /--allow-write=/],
      [["-A"], "no-kv", /"unstable": \["kv"\].*--unstable-kv/],
    ];
    for (const [flags, code, hint] of cases) {
      const { got, entries, health, events } = await work(task, { flags, env });
      assertEquals([got, entries], [{ a: 1, b: null }, [["a", 1]]]);
      assertEquals(health?.state, "memory");
      assertEquals(events.map((event) => event.code), [code]);
      assertMatch(events[0]!.message, hint);
    }
    assertFalse(existsSync(folder.file("cache")));
  });

  test("is content with permission for the file alone", { timeout }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    const flags = [KV, `--allow-read=${path}`, `--allow-write=${path}`];
    const { got, health, events } = await work({ ...task, path }, { flags });
    assertEquals([got, health?.state, events], [{ a: 1, b: null }, "ok", []]);
    // It may not move a damaged file aside, though.
    writeFileSync(path, "This is not a database. ".repeat(50));
    const damaged = await work({ ...task, path }, { flags });
    assertEquals([damaged.got, damaged.health?.state], [{ a: 1, b: null }, "damaged"]);
    assertEquals(damaged.events.map(({ code }) => code), ["damaged"]);
    assertMatch(damaged.events[0]!.message, /cannot be moved aside: no permission .* Delete the file/);
  });

  test("warns on the console, once, when nobody listens", { timeout }, async () => {
    const { stderr } = await work({ ...task, silent: true }, { flags: [KV, NONE] });
    assertEquals(stderr.match(/kept in memory only/g)?.length, 1);
  });

  const noTerminal = process.platform === "linux" && isOnPath("script") ? false : "needs util-linux script";
  test("is never asked for permission on a terminal", { timeout, skip: noTerminal }, async () => {
    using folder = temporaryFolder();
    for (const flags of [[KV], [KV, "--allow-env"], [KV, "--allow-env", "--allow-read"]]) {
      const worker = await scriptFor("deno", "cache_worker");
      const words = [process.execPath, "run", "--no-config", "--no-lock", ...flags, worker, JSON.stringify(task)];
      const command = words.map((word) => `'${word}'`).join(" ");
      // A prompt would wait for an answer until the time is up.
      const program = startProgram("script", ["-qec", command, "/dev/null"], { FLASH_MLA_CACHE: folder.file("a.kv") });
      const { stdout } = await program.ended;
      assertStringIncludes(stdout, '"state":"memory"');
      assertFalse(/\bAllow\b|requests/.test(stdout));
    }
  });
});

describe("a process on a file system that refuses", { skip: noFile }, () => {
  const before = withoutOverride();
  const noModes = before === null ? "needs file modes that bind this user" : false;
  const task = { put: [["a", 2], ["b", 3]] as const, get: ["a", "b"], entries: true, health: true };

  test("goes on in memory when the directory is read-only", { timeout, skip: noModes }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("sub", "configs.kv");
    for (const exists of [false, true]) {
      if (exists) await work({ path, put: [["a", 1]] });
      else mkdirSync(folder.file("sub"));
      chmodSync(folder.file("sub"), 0o555);
      const { got, health, events } = await work({ ...task, path }, { before: before! });
      chmodSync(folder.file("sub"), 0o755);
      assertEquals(got, { a: 2, b: 3 });
      assertEquals(health?.state, exists ? "read-only" : "unavailable");
      assertEquals(events.map(({ code }) => code), [health?.state as string]);
      assertStringIncludes(events[0]!.message, "writable");
    }
    assertEquals((await work({ path, entries: true })).entries, [["a", 1]]);
  });

  test("reads a read-only file and keeps the rest in memory", { timeout, skip: noModes }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    await work({ path, put: [["a", 1]] });
    await work({ path, put: [["c", 4]] });
    chmodSync(path, 0o444);
    const { got, entries, health, events } = await work({ ...task, get: ["a", "b", "c"], path }, { before: before! });
    assertEquals(got, { a: 2, b: 3, c: 4 });
    assertEquals(inOrder(entries), [["a", 2], ["b", 3], ["c", 4]]);
    assertEquals([health?.state, ...events.map(({ code }) => code)], ["read-only", "read-only"]);
    assertEquals(readdirSync(folder.path).filter((name) => name.includes("damaged")), []);
  });

  // With the signal ignored, a write past the limit fails as one to a full disk does: in the middle of a transaction.
  const noLimit = process.platform === "win32" ? "needs ulimit" : false;
  test("loses nothing that was stored before the disk was full", { timeout, skip: noLimit }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    const put = range(300).map((i): [string, number] => [`${i}`, i]);
    // 160 blocks of 512 bytes: enough to create the file, too little for 300 entries.
    const full = ["sh", "-c", `trap '' XFSZ; ulimit -f 160; exec "$@"`, "sh"];
    const get = put.map(([bucket]) => bucket);
    const { got, health, events } = await work({ path, put, get, health: true }, { before: full });
    assertEquals(got, Object.fromEntries(put));
    assertEquals(health?.state, "unavailable");
    assertEquals(events.map(({ code }) => code), ["unavailable"]);
    const { entries, events: after } = await work({ path, put: [["new", 1000]], entries: true });
    assertEquals(after, []);
    assert(entries.length > 1 && entries.length < put.length);
    for (const [bucket, block] of entries) assertEquals(block, bucket === "new" ? 1000 : Number(bucket));
  });
});
