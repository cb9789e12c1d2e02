// Deno, Bun and Node with one file: what one of them stores the others find, also when all write at once.

import { existsSync, readdirSync, writeFileSync } from "node:fs";
import { describe, test } from "node:test";
import { assertEquals, assertFalse, assertMatch } from "@std/assert";
import { temporaryFolder } from "./support/cache_folder.ts";
import { holdLock, noLockHolder, TIMEOUT_MS, work, workTogether } from "./support/cache_process.ts";
import { noRuntime, type Runtime, runtimes } from "./support/cache_runtime.ts";

const timeout = TIMEOUT_MS;
const ALL = ["deno", "bun", "node"] as const;
const alone = runtimes.length > 1 ? false : `needs two of Deno, Bun and Node, found ${runtimes.join() || "none"}`;

const range = (length: number): number[] => Array.from({ length }, (_, i) => i);
const inOrder = <T>(items: readonly T[]): T[] => [...items].sort();

describe("runtimes that share one file", () => {
  for (const writer of ALL) {
    for (const reader of ALL.filter((kind) => kind !== writer)) {
      const skip = noRuntime(writer) || noRuntime(reader);
      test(`${reader} finds what ${writer} stored`, { timeout, skip }, async () => {
        using folder = temporaryFolder();
        const path = folder.file("new", "configs.kv");
        const put = range(20).map((i): [string, number] => [`é\0${i}`, i]);
        const written = await work({ path, put, health: true }, { runtime: writer });
        assertEquals([written.health?.state, written.health?.location, written.events], ["ok", path, []]);
        const get = put.map(([bucket]) => bucket);
        const { got, entries, events } = await work({ path, get, entries: true }, { runtime: reader });
        assertEquals([got, events], [Object.fromEntries(put), []]);
        assertEquals(entries, (await work({ path, entries: true }, { runtime: writer })).entries);
        assertEquals(inOrder(entries), inOrder(put));
      });
    }
  }

  test("lose nothing of each other's when they write at the same time", { timeout, skip: alone }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("new", "configs.kv");
    const keys = range(6).map((worker) => range(8).map((i): [string, number] => [`${worker}/${i}`, 10 * worker + i]));
    const reports = await workTogether(keys.map((put) => ({ path, put })), runtimes);
    assertEquals(reports.flatMap(({ events }) => events), []);
    for (const runtime of runtimes) {
      assertEquals(inOrder((await work({ path, entries: true }, { runtime })).entries), inOrder(keys.flat()));
    }
  });

  test("replace a damaged file once, and lose nothing of what follows", { timeout, skip: alone }, async () => {
    using folder = temporaryFolder();
    const path = folder.file("configs.kv");
    writeFileSync(path, "This is not a database. ".repeat(500));
    const tasks = range(6).map((worker) => ({ path, put: [[`${worker}`, worker] as const] }));
    const reports = await workTogether(tasks, runtimes);
    assertEquals(reports.flatMap(({ events }) => events.map(({ code }) => code)), ["damaged"]);
    assertEquals(readdirSync(folder.path).filter((name) => name.includes(".damaged-")).length, 1);
    assertFalse(existsSync(`${path}.moving`));
    const { entries } = await work({ path, entries: true });
    assertEquals(inOrder(entries), range(6).map((worker) => [`${worker}`, worker] as const));
  });
});

for (const runtime of ["bun", "node"] satisfies Runtime[]) {
  describe(`a process of ${runtime}`, { skip: noRuntime(runtime) }, () => {
    const task = { put: [["a", 1]] as const, get: ["a", "b"], entries: true, health: true };

    test("goes on in memory when the lock is never released", { timeout, skip: noLockHolder }, async () => {
      using folder = temporaryFolder();
      const path = folder.file("configs.kv");
      await work({ path, put: [["c", 3]] });
      const holder = await holdLock(path);
      const working = work({ ...task, path, patience: 200 }, { runtime });
      // It stays until the lock is gone, as what it began cannot be called off.
      await new Promise((resolve) => setTimeout(resolve, 1500));
      await holder.release();
      const { got, events } = await working;
      assertEquals([got.a, events.map(({ code }) => code)], [1, ["locked"]]);
      assertEquals((await work({ path, get: ["c"] })).got, { c: 3 });
    });

    test("without @deno/kv keeps to memory and says once what to install", { timeout }, async () => {
      using folder = temporaryFolder();
      const env = { FLASH_MLA_CACHE: folder.file("configs.kv") };
      const { got, entries, health, events } = await work(task, { runtime, env, withoutPackages: true });
      assertEquals([got, entries, health?.state], [{ a: 1, b: null }, [["a", 1]], "memory"]);
      assertEquals(events.map(({ code }) => code), ["no-kv"]);
      assertMatch(events[0]!.message, /not in a file: .*(npm install|bun add) @deno\/kv\. Set FLASH_MLA_CACHE=memory/);
      assertFalse(existsSync(env.FLASH_MLA_CACHE));
      const { stderr } = await work({ ...task, silent: true }, { runtime, env, withoutPackages: true });
      assertEquals(stderr.match(/kept in memory only/g)?.length, 1);
      const content = { runtime, env: { FLASH_MLA_CACHE: "memory" }, withoutPackages: true };
      assertEquals((await work({ ...task, silent: true }, content)).stderr, "");
    });
  });
}
