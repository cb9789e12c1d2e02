import { describe, test } from "node:test";
import { assert, assertAlmostEquals, assertEquals, assertLess, assertRejects } from "@std/assert";
import fc from "fast-check";
import type { CandidateTiming } from "../src/cache/cache_record.ts";
import { FlashMLAError } from "../src/op/errors.ts";
import { median } from "../src/tune/clock_probe.ts";
import { type FakeCfg, FakeKernel } from "./support/fake_kernel.ts";
import { reasons, tune } from "./support/fake_tuning.ts";

/** A generator of numbers from 0 to 1 that is the same every time. */
function noise(seed: number): () => number {
  return () => (seed = (seed * 1103515245 + 12345) % 2 ** 31) / 2 ** 31;
}

describe("median()", () => {
  test("is the middle value, or the mean of the two in the middle", () => {
    assertEquals(median([3, 1, 2]), 2);
    assertEquals(median([10, 1, 2, 4]), 3);
    assertEquals(median([]), NaN);
  });
});

describe("Tuner.tune()", () => {
  test("picks the fastest and records every candidate", async () => {
    const kernel = new FakeKernel({ tiles: [3, 1, 2] });
    const heard: CandidateTiming<FakeCfg>[] = [];
    const record = await tune(kernel, {}, heard);
    assertEquals(record.cfg, { tile: 1 });
    assertEquals(record.timings.map(({ cfg, ms }) => [cfg.tile, ms]), [[3, 3], [1, 1], [2, 2]]);
    assert(record.timings.every(({ samples, rejected }) => samples >= 2 && rejected === null));
    assertEquals(record.timingMethod, "timestamp");
    assertEquals(record.libraryVersion, JSON.parse(await readText("../deno.json")).version);
    assert(!Number.isNaN(Date.parse(record.date)));
    assertEquals(heard.map(({ cfg }) => cfg.tile).sort(), [1, 2, 3]);
    assertEquals(heard.find(({ cfg }) => cfg.tile === 1), record.timings[1]);
  });

  test("measures the heuristic's candidate first, once, and adds it when it is missing", async () => {
    const among = new FakeKernel({ tiles: [1, 2, 4], heuristic: 4 });
    assertEquals((await tune(among)).timings.map(({ cfg }) => cfg.tile), [4, 1, 2]);
    assertEquals(among.did("compile")[0], 4);
    assertEquals(among.did("output"), [4, 1, 2]);
    const missing = new FakeKernel({ tiles: [1, 2, 2], heuristic: 8 });
    assertEquals((await tune(missing)).timings.map(({ cfg }) => cfg.tile), [8, 1, 2]);
  });

  test("keeps the heuristic's candidate when another is exactly as fast", async () => {
    const kernel = new FakeKernel({ tiles: [1, 2, 4], heuristic: 2, cost: () => 1 });
    assertEquals((await tune(kernel)).cfg, { tile: 2 });
  });

  test("rotates the order of each round, so that no candidate always follows the same one", async () => {
    const kernel = new FakeKernel({ tiles: [1, 2, 3], cost: (tile) => 10 + tile / 10 });
    await tune(kernel, { warmup: 0, iters: 3 });
    // One run calibrates each candidate, then three rounds follow.
    assertEquals(kernel.did("time"), [1, 2, 3, 1, 2, 3, 2, 3, 1, 3, 1, 2]);
  });

  test("finds the fastest under noise", async () => {
    await fc.assert(
      fc.asyncProperty(fc.integer({ min: 1, max: 2 ** 31 - 1 }), async (seed) => {
        const random = noise(seed);
        const kernel = new FakeKernel({
          tiles: [1, 2, 3, 4],
          cost: (tile) => [1.2, 1.1, 1, 1.15][tile - 1],
          // Every reading is up to 6 % too long, and one in five is disturbed.
          read: (ms) => ms * (1 + 0.06 * random()) * (random() < 0.2 ? 1.8 : 1),
        });
        assertEquals((await tune(kernel)).cfg, { tile: 3 });
      }),
      { numRuns: 50 },
    );
  });

  test("compares candidates at one clock while the clock drifts, by the probe", async () => {
    // The clock rises for 0.6 s and falls for 0.2 s, between 345 and 1980 MHz.
    const speed = (now: number) => {
      const phase = now % 800;
      return 0.174 + 0.826 * (phase < 600 ? phase / 600 : (800 - phase) / 200);
    };
    const costs = [1.04, 1.03, 1, 1.02, 1.03];
    /** How far the measured costs are from the true ones at worst, relative to the cheapest. */
    const worst = async (offset: number, probe: boolean) => {
      const drifting = { cost: (tile: number) => costs[tile], speed: (now: number) => speed(now + offset), probe };
      const { cfg, timings } = await tune(new FakeKernel({ tiles: [0, 1, 2, 3, 4], ...drifting }), { iters: 20 });
      if (probe) assertEquals(cfg, { tile: 2 });
      const [a, b, cheapest, d, e] = timings.map(({ ms }) => ms ?? NaN);
      return Math.max(...[a, b, cheapest, d, e].map((ms, i) => Math.abs(ms / cheapest - costs[i])));
    };
    const offsets = [0, 150, 300, 450, 600, 750];
    for (const offset of offsets) assertLess(await worst(offset, true), 0.005);
    const blind = await Promise.all(offsets.map((offset) => worst(offset, false)));
    assert(Math.max(...blind) > 0.02, "the drift is too weak to mislead: this test shows nothing");
  });

  test("repeats short runs until a sample outlasts the clock's step", async () => {
    // A host clock that is read when the device is polled, every 10 ms.
    const kernel = new FakeKernel({
      tiles: [1, 2, 3],
      timingMethod: "wall",
      cost: (tile) => [0.14, 0.1, 0.13][tile - 1],
      read: (ms) => 10 * Math.ceil(ms / 10),
    });
    const record = await tune(kernel);
    assertEquals(record.cfg, { tile: 2 });
    assertAlmostEquals(record.timings[1].ms ?? NaN, 0.1, 0.01);
  });

  test("makes wall-clock samples at least minSampleMs long and timestamp samples minTimestampMs", async () => {
    for (const [timingMethod, least] of [["wall", 5], ["timestamp", 2]] as const) {
      const lengths: number[] = [];
      const read = (ms: number) => (lengths.push(ms), ms);
      const kernel = new FakeKernel({ tiles: [1, 2], cost: (tile) => 0.01 * tile, timingMethod, read });
      assertEquals((await tune(kernel, { iters: 4 })).timingMethod, timingMethod);
      assert(lengths.slice(-4).every((ms) => ms >= least - 1e-6 && ms < 1.5 * least), lengths.join(" "));
    }
  });

  test("rejects what does not compile, run, agree or tell the time, each with its reason", async () => {
    const kernel: FakeKernel = new FakeKernel({
      tiles: [8, 1, 2, 3, 4, 5, 6],
      limit: () => 8,
      output: (tile) => tile === 3 ? 6 : 7,
      read: (ms) => ms === 4 ? NaN : ms,
      trouble: (step, tile) => {
        if (step === "compile" && tile === 1) throw new FlashMLAError("device", "workgroup memory is full");
        if (step === "output" && tile === 2) throw new Error("out of memory");
        // After it was warmed up and sampled a few times.
        if (step === "time" && tile === 5 && kernel.did("time").filter((other) => other === 5).length > 8) {
          throw new FlashMLAError("device", "timed out");
        }
      },
    });
    const record = await tune(kernel);
    assertEquals(reasons(record), {
      1: "workgroup memory is full",
      2: "out of memory",
      3: "wrong output: 6 is not 7",
      4: "its clock read NaN ms",
      5: "timed out",
      6: null,
      8: null,
    });
    assertEquals(record.timings.filter(({ ms }) => ms !== null).map(({ cfg }) => cfg.tile), [8, 6]);
    assertEquals(record.cfg, { tile: 6 });
    assertEquals(kernel.open, 0);
  });

  test("reads the clock again when it ran backwards once", async () => {
    let readings = 0;
    const kernel = new FakeKernel({ tiles: [2, 1], read: (ms) => readings++ % 5 === 4 ? -ms : ms });
    const record = await tune(kernel);
    assertEquals(record.timings.map(({ ms }) => ms), [2, 1]);
  });

  test("ends with a clock that stands still, on the heuristic's candidate", async () => {
    const record = await tune(new FakeKernel({ tiles: [2, 1], cost: () => 0.01, read: () => 0 }));
    assertEquals(record.cfg, { tile: 2 });
  });

  test("rejects a candidate that the device cannot run without compiling it", async () => {
    const kernel = new FakeKernel({ tiles: [1, 2, 4], limit: () => 2 });
    assertEquals(reasons(await tune(kernel)), { 1: null, 2: null, 4: "tile is 4, the limit 2" });
    assertEquals(kernel.did("compile").sort(), [1, 2]);
  });

  test("checks against the baseline, so that the heuristic's candidate may be the one that is wrong", async () => {
    const kernel = new FakeKernel({ tiles: [1, 2, 4], baseline: 4, output: (tile) => tile === 1 ? 6 : 7 });
    const record = await tune(kernel);
    assertEquals(reasons(record), { 1: "wrong output: 6 is not 7", 2: null, 4: null });
    assertEquals(record.cfg, { tile: 2 });
    assertEquals(record.timings.map(({ cfg }) => cfg.tile), [1, 2, 4]);
  });

  test("checks gradients against the baseline's too, and without time to spare measures the heuristic's candidate", async () => {
    const wrong = new FakeKernel({ tiles: [1, 2, 4], baseline: 4, gradient: (tile) => tile === 1 ? 6 : 7 });
    assertEquals(reasons(await tune(wrong)), { 1: "wrong gradients: 6 is not 7", 2: null, 4: null });
    const late = new FakeKernel({ tiles: [1, 2, 4], baseline: 4 });
    assertEquals((await tune(late, { totalBudgetMs: 9 })).cfg, { tile: 1 });
  });

  test("measures a baseline that is no candidate", async () => {
    const record = await tune(new FakeKernel({ tiles: [2, 4], baseline: 1, output: (tile) => tile === 4 ? 6 : 7 }));
    assertEquals(reasons(record), { 1: null, 2: null, 4: "wrong output: 6 is not 7" });
  });

  test("checks against the next candidate when the heuristic's does not run", async () => {
    const kernel = new FakeKernel({
      tiles: [1, 2, 3, 4],
      output: (tile) => tile === 3 ? 1 : 7,
      trouble: (step, tile) => {
        if (step === "compile" && tile === 1) throw new Error("no");
      },
    });
    const record = await tune(kernel);
    assertEquals(record.cfg, { tile: 2 });
    assertEquals(reasons(record), { 1: "no", 2: null, 3: "wrong output: 1 is not 7", 4: null });
  });

  test("lets slow candidates drop out after two samples, and releases them at once", async () => {
    const kernel = new FakeKernel({ tiles: [1, 5, 2] });
    const record = await tune(kernel, { warmup: 1, iters: 30 });
    assertEquals(record.timings.map(({ samples }) => samples), [8, 2, 8]);
    assert(kernel.log.indexOf("dispose 5") < kernel.log.lastIndexOf("time 1"));
  });

  test("disposes every trial once, whatever happens", async () => {
    for (const failing of ["compile", "output", "time", "none"]) {
      const kernel = new FakeKernel({
        trouble: (step) => {
          if (step === failing) throw new Error("no");
        },
      });
      const outcome = tune(kernel);
      if (failing === "none") await outcome;
      else await assertRejects(() => outcome, FlashMLAError, "Cannot tune fake@1: all 3 candidates were rejected: no");
      assertEquals(kernel.open, 0);
      const made = failing === "compile" ? [] : [1, 2, 4];
      assertEquals(kernel.did("dispose").sort(), made);
    }
  });
});

async function readText(path: string): Promise<string> {
  const { readFile } = await import("node:fs/promises");
  return await readFile(new URL(path, import.meta.url), "utf8");
}
