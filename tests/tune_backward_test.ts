import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects } from "@std/assert";
import { heuristicConfig } from "../src/cache/config_cache.ts";
import { FlashMLAError } from "../src/op/errors.ts";
import { Executor } from "../src/tune/executor.ts";
import { policyOverride } from "../src/tune/policy.ts";
import { Tuner } from "../src/tune/tuner.ts";
import { call, FakeStore, setup } from "./support/fake_chain.ts";
import { type FakeBehaviour, FakeKernel } from "./support/fake_kernel.ts";
import { reasons } from "./support/fake_tuning.ts";

// Forward 4 is the slowest tile and 1 the fastest; backward it is the other way round, and by more.
const behaviour: FakeBehaviour = { tiles: [4, 2, 1], gradient: () => 5, backwardCost: (tile) => 8 / tile };

async function tune(kernel: FakeKernel, options: { readonly validateBackward?: boolean } = {}) {
  const tuner = new Tuner({ now: () => kernel.now });
  return await tuner.tune(kernel, await kernel.prepare(call), kernel.candidateCfgs(), () => {}, options);
}

describe("Tuner.tune() with gradients", () => {
  test("times candidates forward and backward", async () => {
    const record = await tune(new FakeKernel(behaviour));
    assertEquals(record.timings.map(({ cfg, ms }) => [cfg.tile, ms]), [[4, 6], [2, 6], [1, 9]]);
    assertEquals(record.cfg, { tile: 4 });
    assertEquals("withoutBackward" in record, false);
  });

  test("times them forward alone when gradients are not asked for", async () => {
    const kernel = new FakeKernel(behaviour);
    const record = await tune(kernel, { validateBackward: false });
    assertEquals(record.timings.map(({ cfg, ms }) => [cfg.tile, ms]), [[4, 4], [2, 2], [1, 1]]);
    assertEquals([...kernel.did("differentiate"), ...kernel.did("gradients")], []);
    assertEquals("withoutBackward" in record, false);
  });

  test("does nothing of the kind for a kernel that has none", async () => {
    const kernel = new FakeKernel({ tiles: [4, 2, 1] });
    assertEquals((await tune(kernel, { validateBackward: true })).cfg, { tile: 1 });
    assertEquals([...kernel.did("differentiate"), ...kernel.did("gradients")], []);
  });

  test("rejects wrong gradients, each with its reason, before it times anything", async () => {
    const kernel: FakeKernel = new FakeKernel({
      tiles: [8, 4, 2, 1, 3],
      gradient: (tile) => tile === 1 ? 6 : 5,
      output: (tile) => tile === 2 ? 0 : 7,
      trouble: (step, tile) => {
        if (step === "gradients" && tile === 4) throw new Error("out of memory");
      },
    });
    const record = await tune(kernel);
    assertEquals(reasons(record), {
      8: null,
      4: "out of memory",
      2: "wrong output: 0 is not 7",
      1: "wrong gradients: 6 is not 5",
      3: null,
    });
    assertEquals(record.cfg, { tile: 3 });
    assertEquals(kernel.did("gradients"), [8, 4, 1, 3]);
    assertEquals([...new Set(kernel.did("time"))].sort(), [3, 8]);
    assertEquals(kernel.open, 0);
  });

  test("rejects what cannot run backward where another can", async () => {
    const kernel = new FakeKernel({
      ...behaviour,
      trouble: (step, tile) => {
        if (step === "differentiate" && tile !== 2) throw new FlashMLAError("limit", "workgroup memory is full");
      },
    });
    const record = await tune(kernel);
    assertEquals(reasons(record), { 4: "workgroup memory is full", 2: null, 1: "workgroup memory is full" });
    assertEquals(record.cfg, { tile: 2 });
    assertEquals("withoutBackward" in record, false);
  });

  for (const step of ["differentiate", "gradients"] as const) {
    test(`tunes forward and says why when no candidate can do the step "${step}"`, async () => {
      const heard: [number, number | null][] = [];
      const kernel = new FakeKernel({
        ...behaviour,
        trouble: (at, tile) => {
          if (at === step) throw new FlashMLAError("device", `no kernel for tile ${tile & 1}`);
        },
      });
      const tuner = new Tuner({ now: () => kernel.now });
      const record = await tuner.tune(
        kernel,
        await kernel.prepare(call),
        kernel.candidateCfgs(),
        ({ cfg, ms }) => heard.push([cfg.tile, ms]),
      );
      assertEquals(record.cfg, { tile: 1 });
      assertEquals(record.timings.map(({ ms }) => ms), [4, 2, 1]);
      assertEquals(record.withoutBackward, "no kernel for tile 0; no kernel for tile 1");
      // Nobody hears of the attempt: each candidate's result is told once.
      assertEquals(heard.sort(), [[1, 1], [2, 2], [4, 4]]);
      assertEquals(kernel.open, 0);
    });
  }

  test("throws what went wrong forward when nothing runs forward either", async () => {
    const kernel = new FakeKernel({
      ...behaviour,
      trouble: (step) => {
        if (step === "compile") throw new Error("does not compile");
      },
    });
    const error = await assertRejects(() => tune(kernel), FlashMLAError, "rejected: does not compile");
    assertEquals(error.code, "no-config");
    assertEquals(kernel.open, 0);
  });

  test("still calls a lost device lost", async () => {
    const trouble = () => {
      throw new FlashMLAError("device", "the device was lost");
    };
    const error = await assertRejects(() => tune(new FakeKernel({ ...behaviour, trouble })), FlashMLAError);
    assertEquals(error.code, "device");
  });

  test("rejects a kernel's trials that promise gradients and have none, and tunes forward", async () => {
    class Forgetful extends FakeKernel {
      override async trial(...[invocation, cfg]: Parameters<FakeKernel["trial"]>) {
        return await super.trial(invocation, cfg);
      }
    }
    const record = await tune(new Forgetful(behaviour));
    assertEquals([record.cfg.tile, record.withoutBackward], [1, "its trial has no gradients"]);
  });
});

describe("AutotunePolicy.validateBackward", () => {
  test("decides how candidates are measured, and is on by default", async () => {
    const made = setup(behaviour);
    assertEquals(await made.choose(), "4 autotune");
    const off = setup(behaviour, { policy: { cacheMissFallback: "autotune", validateBackward: false } });
    assertEquals(await off.choose(), "1 autotune");
  });

  test("keeps apart in every cache what won with and without it", async () => {
    const persistent = new FakeStore();
    const made = setup(behaviour, { persistent });
    const without = { ...made.chain.policy, validateBackward: false };
    assertEquals(await made.choose(), "4 autotune");
    assertEquals(await made.choose({ policy: without }), "1 autotune");
    assertEquals(await made.choose(), "4 memory");
    assertEquals(await made.choose({ policy: without }), "1 memory");

    const later = setup(behaviour, { persistent });
    assertEquals(await later.choose({ policy: without }), "1 persistent");
    assertEquals(await later.choose(), "4 persistent");
    const buckets = made.events.flatMap((event) => event.type === "autotune_start" ? [event.key.bucket] : []);
    assertEquals(buckets, ["length ≤ 128", "length ≤ 128, forward only"]);
  });

  test("measures once for each meaning, however many calls ask", async () => {
    const made = setup(behaviour);
    await made.hash([100]);
    const without = { ...made.chain.policy, validateBackward: false };
    const calls = [{}, { policy: without }, {}, { policy: without }];
    const chosen = await Promise.all(calls.map((options) => made.choose(options)));
    assertEquals(chosen.map((choice) => choice.split(" ")[0]), ["4", "1", "4", "1"]);
    const starts = made.events.filter(({ type }) => type === "autotune_start");
    assertEquals(starts.length, 2);
    assertEquals(made.events.filter(({ type }) => type === "autotune_join").length, 2);
  });

  test("is nothing to a kernel without gradients", async () => {
    const made = setup({ tiles: [4, 2, 1] });
    const without = { ...made.chain.policy, validateBackward: false };
    assertEquals(await made.choose(), "1 autotune");
    assertEquals(await made.choose({ policy: without }), "1 memory");
  });

  test("keeps guesses apart too: a guess for one meaning does not answer for the other", async () => {
    const made = setup(behaviour);
    made.chain.cache.put(await made.key(), heuristicConfig({ tile: 2 }));
    const without = { ...made.chain.policy, validateBackward: false, allowAutotune: false };
    assertEquals(await made.choose({ policy: without }), "4 heuristic");
  });

  test("is remembered as the reason why a device measured forward alone", async () => {
    const persistent = new FakeStore();
    const made = setup({
      ...behaviour,
      trouble: (step) => {
        if (step === "differentiate") throw new FlashMLAError("limit", "no memory for gradients");
      },
    }, { persistent });
    assertEquals(await made.choose(), "1 autotune");
    const [record] = persistent.records.values();
    assertEquals(record.withoutBackward, "no memory for gradients");
    const finish = made.events.find((event) => event.type === "autotune_finish");
    assertEquals(finish?.withoutBackward, "no memory for gradients");
    assertEquals(await made.choose(), "1 memory");
  });

  test("can be turned off for a scope", async () => {
    const made = setup(behaviour);
    const executor = new Executor(made.chain);
    const choose = () => executor.choose(made.kernel, call);
    assertEquals((await policyOverride(made.chain, { validateBackward: false }, choose)).cfg, { tile: 1 });
    assertEquals((await choose()).cfg, { tile: 4 });
  });
});

describe("Executor.vjp()", () => {
  function executor(does: FakeBehaviour = behaviour) {
    const made = setup(does);
    return { ...made, executor: new Executor(made.chain) };
  }

  test("runs under the configuration that the chain chooses, forward and backward", async () => {
    const { executor: runs, kernel } = executor();
    const { output, residuals, vjp } = await runs.vjp(kernel, call);
    assertEquals([output, residuals], [7, 7]);
    assertEquals(await Promise.all([vjp(2), vjp(3)]), [14, 21]);
    assertEquals([kernel.did("forward"), kernel.did("backward"), kernel.did("run")], [[4], [4, 4], []]);
  });

  test("tunes backward where others are tuned forward only, since gradients are slow to compile", async () => {
    const { executor: runs, kernel } = executor();
    kernel.tunesBackward = () => false;
    assertEquals((await runs.choose(kernel, call)).cfg, { tile: 1 });
    assertEquals([...kernel.did("differentiate"), ...kernel.did("gradients")], []);
    const { vjp } = await runs.vjp(kernel, call);
    await vjp(1);
    assertEquals(kernel.did("backward"), [4]);
  });

  test("runs under an explicit configuration", async () => {
    const { executor: runs, kernel } = executor();
    const { vjp } = await runs.vjp(kernel, call, { cfg: { tile: 3 } });
    await vjp(1);
    assertEquals([kernel.did("forward"), kernel.did("backward")], [[3], [3]]);
    assertEquals(kernel.did("compile"), []);
  });

  test("refuses gradients once they are disposed of, and says so", async () => {
    const { executor: runs, kernel } = executor();
    const made = await runs.vjp(kernel, call, { cfg: { tile: 3 } });
    const underWay = made.vjp(2);
    made.dispose();
    made.dispose();
    assertEquals(await underWay, 14);
    const error = await assertRejects(() => made.vjp(2), FlashMLAError, "dispose() has freed its residuals");
    assertEquals(error.code, "invalid-input");
    assertEquals(made.output, 7);
  });

  test("disposes by `using`", async () => {
    const { executor: runs, kernel } = executor();
    let escaped: ((gradOutput: number) => Promise<number>) | undefined;
    {
      using made = await runs.vjp(kernel, call, { cfg: { tile: 3 } });
      escaped = made.vjp;
    }
    await assertRejects(() => escaped(1), FlashMLAError, "freed its residuals");
  });

  test("refuses a kernel without gradients by name", async () => {
    const { executor: runs, kernel } = executor({ tiles: [1] });
    const error = await assertRejects(() => runs.vjp(kernel, call), FlashMLAError);
    assertEquals(error.message, "Cannot differentiate fake@1: it has no gradients");
    assertEquals(error.code, "invalid-input");
    await assertRejects(
      async () => kernel.vjp(await kernel.prepare(call), { tile: 1 }, 1, 1),
      FlashMLAError,
      "it has no gradients",
    );
    assert(!kernel.hasGradients);
  });
});
