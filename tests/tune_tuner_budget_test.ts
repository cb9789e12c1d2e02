import { describe, test } from "node:test";
import { assert, assertEquals, assertLess, assertRejects, assertThrows } from "@std/assert";
import fc from "fast-check";
import { FlashMLAError } from "../src/op/errors.ts";
import { Tuner } from "../src/tune/tuner.ts";
import { reasons, tune } from "./support/fake_tuning.ts";
import { FakeKernel } from "./support/fake_kernel.ts";

describe("Tuner.tune() under a budget", () => {
  test("stops a candidate at its samples or at its time, whichever comes first", async () => {
    const quick = await tune(new FakeKernel({ tiles: [1, 2], cost: () => 2 }), { iters: 7 });
    assertEquals(quick.timings.map(({ samples }) => samples), [7, 7]);
    const slow = new FakeKernel({ tiles: [1, 2], cost: () => 10 });
    const record = await tune(slow, { iters: 1000, budgetMs: 300 });
    assert(record.timings.every(({ samples }) => samples >= 10 && samples <= 30));
    assertLess(slow.now, 2 * 300 + 100);
  });

  test("admits candidates in the kernel's order while there is time to compile them", async () => {
    const kernel = new FakeKernel({ tiles: [4, 3, 2, 1], compileMs: 1000 });
    const record = await tune(kernel, { totalBudgetMs: 2500, parallelTrials: 1 });
    assertEquals(kernel.did("compile"), [4, 3]);
    assertEquals(record.cfg, { tile: 3 });
    assertEquals(reasons(record), { 4: null, 3: null, 2: "time budget", 1: "time budget" });
  });

  test("does not begin to compile what would leave no time for timing", async () => {
    const kernel = new FakeKernel({ tiles: [4, 3, 2, 1], compileMs: 1300 });
    const record = await tune(kernel, { totalBudgetMs: 2500, parallelTrials: 1 });
    assertEquals(kernel.did("compile"), [4]);
    assertEquals(reasons(record), { 4: null, 3: "time budget", 2: "time budget", 1: "time budget" });
    assert(record.timings[0].samples >= 3);
  });

  test("never takes much longer than its total budget", async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(fc.double({ min: 0.001, max: 400, noNaN: true }), { minLength: 1 }), async (costs) => {
        const kernel = new FakeKernel({ tiles: costs.map((_, i) => i), cost: (tile) => costs[tile], compileMs: 10 });
        const record = await tune(kernel, { totalBudgetMs: 1000 });
        // Past the budget, at most a candidate's calibration and the leader's one sample.
        assertLess(kernel.now, 1000 + 4 * 400);
        assert(record.timings[0].samples >= 1);
        assert(record.timings.every(({ ms, rejected }) => (ms === null) !== (rejected === null)));
        assertEquals(kernel.open, 0);
      }),
      { numRuns: 50 },
    );
  });

  test("stops in the middle of a round when its total budget is spent", async () => {
    const tiles = Array.from({ length: 40 }, (_, i) => i);
    const kernel = new FakeKernel({ tiles, cost: () => 5.3 });
    const record = await tune(kernel, { totalBudgetMs: 1000, warmup: 0 });
    assertLess(kernel.now, 1000 + 5.3);
    assertEquals([...new Set(record.timings.map(({ samples }) => samples))].sort(), [2, 3]);
  });

  test("records candidates that there was no time to sample", async () => {
    const kernel = new FakeKernel({ tiles: [1, 2, 3, 4], cost: () => 60 });
    // Four outputs and four calibrations, then two samples.
    const record = await tune(kernel, { totalBudgetMs: 9 * 60 + 1, warmup: 0 });
    assertEquals(reasons(record), { 1: null, 2: null, 3: "time budget", 4: "time budget" });
  });

  test("measures only the heuristic's candidate, briefly, when one run alone takes seconds", async () => {
    const kernel = new FakeKernel({ tiles: [3, 1, 2], cost: (tile) => 3000 + tile, timingMethod: "wall" });
    const record = await tune(kernel, { totalBudgetMs: 3000 });
    assertEquals(record.cfg, { tile: 3 });
    assertEquals(record.timings.map(({ samples }) => samples), [1, 0, 0]);
    assertEquals(reasons(record), { 3: null, 1: "time budget", 2: "time budget" });
    assertEquals(kernel.did("output").length + kernel.did("time").length, 2);
  });

  test("compiles a few candidates at a time", async () => {
    const kernel = new FakeKernel({ tiles: [1, 2, 3, 4, 5] });
    await tune(kernel, { parallelTrials: 2 });
    const steps = kernel.log.filter((line) => /^(compile|output)/.test(line));
    assertEquals(
      steps.join(", "),
      "compile 1, compile 2, output 1, output 2, compile 3, compile 4, output 3, output 4, " +
        "compile 5, output 5",
    );
  });
});

describe("Tuner.tune() on a lost device", () => {
  for (const [when, at] of [["from the start", 0], ["between two candidates", 12], ["while timing", 60]] as const) {
    test(`rejects when it is lost ${when}`, async () => {
      const kernel = new FakeKernel({
        tiles: [5, 1, 2, 4],
        trouble: (_step, _tile, now) => {
          if (now >= at) throw new FlashMLAError("device", "the device is lost");
        },
      });
      const error = await assertRejects(() => tune(kernel, { iters: 50 }), FlashMLAError, "the device is lost");
      assertEquals(error.code, "device");
      assertEquals(kernel.open, 0);
    });
  }

  test("does not fall back on a slow candidate that was timed before", async () => {
    const kernel: FakeKernel = new FakeKernel({
      tiles: [50, 1, 2],
      trouble: () => {
        if (kernel.did("dispose").includes(50)) throw new FlashMLAError("device", "the device is lost");
      },
    });
    assertEquals((await assertRejects(() => tune(kernel), FlashMLAError, "the device is lost")).code, "device");
    assertEquals(kernel.did("dispose")[0], 50);
  });

  test("rejects with no-config when candidates fail for other reasons too", async () => {
    const kernel = new FakeKernel({
      trouble: (_step, tile) => {
        throw tile === 1 ? new FlashMLAError("device", "lost") : new Error("no");
      },
    });
    const error = await assertRejects(() => tune(kernel), FlashMLAError, "lost; no");
    assertEquals(error.code, "no-config");
  });
});

describe("Tuner", () => {
  test("refuses bounds out of range", () => {
    for (const options of [{ iters: 0 }, { warmup: -1 }, { iters: 1.5 }, { budgetMs: NaN }, { totalBudgetMs: 0 }]) {
      const error = assertThrows(() => new Tuner(options), FlashMLAError, "Cannot make a Tuner: ");
      assertEquals(error.code, "invalid-input");
    }
    new Tuner({ totalBudgetMs: Infinity, warmup: 0 });
  });

  test("prints every candidate with FLASH_MLA_LOG_AUTOTUNE=1, and nothing without", async () => {
    const lines: string[] = [];
    const original = console.error;
    const { env } = (globalThis as unknown as { process: { env: Record<string, string | undefined> } }).process;
    const before = env.FLASH_MLA_LOG_AUTOTUNE;
    console.error = (line: string) => lines.push(line);
    try {
      delete env.FLASH_MLA_LOG_AUTOTUNE;
      await tune(new FakeKernel());
      assertEquals(lines, []);
      env.FLASH_MLA_LOG_AUTOTUNE = "1";
      await tune(new FakeKernel({ tiles: [12, 4, 2], limit: () => 10, heuristic: 4, cost: (tile) => 2 + tile / 10 }), {
        iters: 10,
      });
    } finally {
      console.error = original;
      if (before === undefined) delete env.FLASH_MLA_LOG_AUTOTUNE;
      else env.FLASH_MLA_LOG_AUTOTUNE = before;
    }
    assertEquals(lines, [
      "fake@1   2.4000 ms  10 samples  tile=4",
      "fake@1        - ms   0 samples  tile=12  rejected: tile is 12, the limit 10",
      "fake@1 * 2.2000 ms  10 samples  tile=2",
    ]);
  });
});
