import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects, assertStringIncludes } from "@std/assert";
import { heuristicConfig } from "../src/cache/config_cache.ts";
import { PersistentCache } from "../src/cache/persistent_cache.ts";
import { FlashMLAError } from "../src/op/errors.ts";
import type { AutotunePolicy } from "../src/tune/policy.ts";
import { call, FakeStore, setup } from "./support/fake_chain.ts";
import { Tuner } from "../src/tune/tuner.ts";
import type { FakeCfg, FakeKernel } from "./support/fake_kernel.ts";

describe("A heuristic's guess", () => {
  const guessing: Partial<AutotunePolicy> = { allowAutotune: false };

  test("is remembered in memory, and never persisted", async () => {
    const persistent = new FakeStore();
    const { choose, heard } = setup({}, { persistent, policy: guessing });
    assertEquals(await choose(), "1 heuristic");
    assertEquals(persistent.records.size, 0);
    heard();
    assertEquals(await choose(), "1 memory");
    assertEquals(heard(), "overlay_miss, memory_hit 1");
  });

  test("says in memory what it is", async () => {
    const { choose, events } = setup({}, { policy: guessing });
    await choose();
    await choose();
    const hit = events.find((event) => event.type === "memory_hit");
    assertEquals(hit?.origin, "heuristic");
  });

  test("gives way to measuring as soon as the policy allows it", async () => {
    const { chain, choose } = setup({ tiles: [4, 2, 1] }, { policy: guessing });
    assertEquals(await choose(), "4 heuristic");
    assertEquals(await choose({ policy: { ...chain.policy, allowAutotune: true } }), "1 autotune");
    assertEquals(await choose(), "1 memory");
  });

  test("is not used from memory where guessing is forbidden", async () => {
    const { chain, choose, key } = setup({}, { policy: { allowAutotune: false, allowHeuristics: false } });
    chain.cache.put(await key(), heuristicConfig({ tile: 4 }));
    assertEquals((await assertRejects(() => choose(), FlashMLAError)).code, "no-config");
  });

  test("is used at once when misses fall back to heuristics", async () => {
    const { kernel, choose } = setup({}, { policy: { cacheMissFallback: "heuristics" } });
    assertEquals(await choose(), "1 heuristic");
    assertEquals(kernel.log, []);
  });

  test("is used without measuring when it is the only candidate", async () => {
    const { kernel, choose } = setup({ tiles: [8] });
    assertEquals(await choose(), "8 heuristic");
    assertEquals(await choose(), "8 memory");
    assertEquals(kernel.log, []);
  });

  test("must fit the device", async () => {
    const { choose } = setup({ tiles: [8], limit: () => 4 });
    const error = await assertRejects(() => choose(), FlashMLAError, "heuristic: tile is 8, the limit 4");
    assertEquals(error.code, "no-config");
  });
});

describe("Measuring", () => {
  test("outlives the chain in the persistent cache", async () => {
    const persistent = new FakeStore();
    const first = setup({ tiles: [4, 2, 1] }, { persistent });
    assertEquals(await first.choose(), "1 autotune");
    const [stored] = persistent.records.values();
    assertEquals(stored.cfg, { tile: 1 });
    assertEquals(stored.timings.map(({ cfg, ms }) => [cfg.tile, ms]), [[4, 4], [2, 2], [1, 1]]);

    const second = setup({ tiles: [4, 2, 1] }, { persistent });
    assertEquals(await second.choose(), "1 persistent");
    assertEquals(await second.choose(), "1 memory");
    assertEquals(second.events.at(-1)?.type, "memory_hit");
    assertEquals(second.kernel.log, []);

    const otherCandidates = setup({ tiles: [4, 2] }, { persistent });
    assertEquals(await otherCandidates.choose(), "2 autotune");
  });

  test("outlives the chain in a PersistentCache", async () => {
    const persistent = new PersistentCache<FakeCfg>("test", { path: "memory" });
    assertEquals(await setup({ tiles: [4, 2, 1] }, { persistent }).choose(), "1 autotune");
    const later = setup({ tiles: [4, 2, 1] }, { persistent });
    assertEquals(await later.choose(), "1 persistent");
    assertEquals(later.heard(), "overlay_miss, memory_miss, persistent_hit 1");
  });

  test("is shared by the lengths of a bucket", async () => {
    const { choose } = setup();
    assertEquals(await choose({}, 100), "1 autotune");
    assertEquals(await choose({}, 128), "1 memory");
    assertEquals(await choose({}, 129), "1 autotune");
  });

  test("happens once for calls that overlap", async () => {
    const { kernel, choose, hash, heard } = setup({ tiles: [4, 2, 1] }, { persistent: new FakeStore() });
    await hash([99, 100, 200]);
    const choices = await Promise.all([choose(), choose({}, 99), choose(), choose({}, 200)]);
    assertEquals(choices, ["1 autotune", "1 autotune", "1 autotune", "1 autotune"]);
    assertEquals(kernel.did("compile").sort(), [1, 1, 2, 2, 4, 4]);
    assertEquals(heard().match(/autotune_join/g)?.length, 2);
    assertEquals(await choose(), "1 memory");
  });

  test("happens once for calls that waited for the persistent cache while another measured", async () => {
    const persistent = new FakeStore();
    const { kernel, choose } = setup({}, { persistent });
    let answer = () => {};
    const asked = new Promise<void>((resolve) => {
      persistent.get = () => {
        resolve();
        return new Promise((answered) => answer = () => answered(undefined));
      };
    });
    const slow = choose();
    await asked;
    persistent.get = () => Promise.resolve(undefined);
    assertEquals(await choose(), "1 autotune");
    answer();
    assertEquals(await slow, "1 autotune");
    assertEquals(kernel.did("compile").sort(), [1, 2, 4]);
  });

  test("reports what it is about and how every candidate fared", async () => {
    const { kernel, choose, events, key } = setup({ tiles: [4, 1, 2], output: (tile) => tile === 2 ? 0 : 7 });
    await choose();
    const context = { op: "fake@1", callKey: await (await kernel.prepare(call)).callKey(), key: await key() };
    for (const { op, callKey, key } of events) assertEquals({ op, callKey, key }, context);
    const about = events.filter((event) => event.type === "autotune_start" || event.type === "autotune_candidate");
    assertEquals(
      about.map((event) => ({ ...event, op: "", callKey: "", key: null })) as unknown[],
      [
        { type: "autotune_start", candidates: 3 },
        { type: "autotune_candidate", cfg: { tile: 2 }, ms: null, samples: 0, rejected: "wrong output: 0 is not 7" },
        { type: "autotune_candidate", cfg: { tile: 4 }, ms: 4, samples: 2, rejected: null },
        { type: "autotune_candidate", cfg: { tile: 1 }, ms: 1, samples: 3, rejected: null },
      ].map((event) => ({ ...event, op: "", callKey: "", key: null })),
    );
    const finish = events.at(-1);
    assert(finish?.type === "autotune_finish");
    assertEquals([finish.cfg, finish.ms, finish.timings.length], [{ tile: 1 }, 1, 3]);
    assert(finish.elapsedMs >= 0);
  });

  test("that fails altogether gives way to the heuristic, and is not tried again", async () => {
    const trouble = () => {
      throw new Error("no");
    };
    const persistent = new FakeStore();
    const { kernel, choose, heard, events } = setup({ trouble }, { persistent });
    assertEquals(await choose(), "1 heuristic");
    const error = events.find((event) => event.type === "error");
    assertEquals(error?.reason, "Cannot tune fake@1: all 3 candidates were rejected: no");
    assertStringIncludes(heard(), "autotune_candidate 4, error, heuristic 1");
    assertEquals(await choose(), "1 memory");
    assertEquals(kernel.did("compile"), [1, 2, 4]);
    assertEquals(persistent.records.size, 0);
  });

  test("that fails where guessing is forbidden is an error with the reasons", async () => {
    const trouble = () => {
      throw new Error("no");
    };
    const { choose } = setup({ trouble }, { policy: { allowHeuristics: false, cacheMissFallback: "autotune" } });
    for (const reason of ["autotune: Cannot tune fake@1: all", "autotune: failed before: Cannot tune fake@1: all"]) {
      const error = await assertRejects(() => choose(), FlashMLAError, reason);
      assertEquals(error.code, "no-config");
      assertStringIncludes(error.message, "heuristic: the policy forbids it");
    }
  });

  test("is tried again after the device was lost", async () => {
    let lost = true;
    const trouble = () => {
      if (lost) throw new FlashMLAError("device", "the device is lost");
    };
    const { choose, chain } = setup({ trouble });
    assertEquals(await choose(), "1 heuristic");
    assertEquals(chain.cache.entries().map(([, { source }]) => source), ["heuristic"]);
    lost = false;
    assertEquals(await choose(), "1 autotune");
  });

  test("takes place for a single candidate where guessing is forbidden", async () => {
    const { choose } = setup({ tiles: [8] }, { policy: { allowHeuristics: false, cacheMissFallback: "autotune" } });
    assertEquals(await choose(), "8 autotune");
  });

  test("is persisted when there was no time for a second candidate, with that on record", async () => {
    const persistent = new FakeStore();
    const { choose } = setup({ tiles: [1, 2], cost: () => 4000 }, { persistent });
    assertEquals(await choose(), "1 autotune");
    assertEquals([...persistent.records.values()][0].timings[1].rejected, "time budget");
    assertEquals(await choose(), "1 memory");
  });

  test("is persisted when two candidates were compared before time was up", async () => {
    const persistent = new FakeStore();
    const tuner = (kernel: FakeKernel) =>
      new Tuner({ now: () => kernel.now, parallelTrials: 1, totalBudgetMs: 2500, iters: 3 });
    const { choose } = setup({ tiles: [4, 2, 1], compileMs: 1000 }, { persistent }, tuner);
    assertEquals(await choose(), "2 autotune");
    assertEquals([...persistent.records.values()][0].timings[2].rejected, "time budget");
  });

  test("is persisted when every other candidate failed", async () => {
    const persistent = new FakeStore();
    const { choose } = setup({ tiles: [1, 2], output: (tile) => tile === 2 ? 0 : 7 }, { persistent });
    assertEquals(await choose(), "1 autotune");
    assertEquals(persistent.records.size, 1);
  });
});
