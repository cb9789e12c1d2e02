import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects, assertStringIncludes } from "@std/assert";
import { cacheKeyText } from "../src/cache/cache_record.ts";
import { ConfigCache, measuredConfig } from "../src/cache/config_cache.ts";
import { overlayCache } from "../src/cache/overlay_cache.ts";
import { FlashMLAError } from "../src/op/errors.ts";
import type { AutotunePolicy } from "../src/tune/policy.ts";
import type { ChooseOptions } from "../src/tune/selector_chain.ts";
import { call, FakeStore, record, setup } from "./support/fake_chain.ts";
import type { FakeCfg } from "./support/fake_kernel.ts";

const TUNED = "autotune_start, autotune_candidate 4, autotune_candidate 2, autotune_candidate 1, autotune_finish 1";

describe("ConfigSelectorChain.choose() takes the first level that has a configuration", () => {
  /** A chain in which every level has an answer of its own, from `first` on. */
  async function from(first: "overlay" | "memory" | "persistent" | "autotune" | "heuristic") {
    const levels = ["overlay", "memory", "persistent", "autotune", "heuristic"];
    const has = (level: string) => levels.indexOf(level) >= levels.indexOf(first);
    const persistent = new FakeStore();
    const policy: Partial<AutotunePolicy> = { cacheMissFallback: has("autotune") ? "autotune" : "heuristics" };
    const made = setup({ tiles: [2, 1, 4], heuristic: 4 }, { persistent, policy });
    if (has("memory")) made.chain.cache.put(await made.key(), measuredConfig("autotune", record(20)));
    if (has("persistent")) await persistent.put(await made.key(), record(30));
    const choose = has("overlay")
      ? (options?: ChooseOptions<FakeCfg>) => overlayCache({ tile: 10 }, () => made.choose(options))
      : made.choose;
    return { ...made, choose, persistent };
  }

  test("the override", async () => {
    const { choose, heard, kernel } = await from("overlay");
    assertEquals(await choose({ cfg: { tile: 5 } }), "5 override");
    assertEquals(heard(), "override 5");
    assertEquals(kernel.log, []);
  });

  test("the overlay", async () => {
    const { choose, heard } = await from("overlay");
    assertEquals(await choose(), "10 overlay");
    assertEquals(heard(), "overlay_hit 10");
  });

  test("the memory cache", async () => {
    const { choose, heard } = await from("memory");
    assertEquals(await choose(), "20 memory");
    assertEquals(heard(), "overlay_miss, memory_hit 20");
  });

  test("the persistent cache", async () => {
    const { choose, heard, kernel } = await from("persistent");
    assertEquals(await choose(), "30 persistent");
    assertEquals(heard(), "overlay_miss, memory_miss, persistent_hit 30");
    assertEquals(kernel.log, []);
  });

  test("measuring", async () => {
    const { choose, heard, persistent } = await from("autotune");
    assertEquals(await choose(), "1 autotune");
    assertEquals(heard(), `overlay_miss, memory_miss, persistent_miss, ${TUNED}`);
    assertEquals(persistent.records.size, 1);
  });

  test("the heuristic", async () => {
    const { choose, heard, kernel } = await from("heuristic");
    assertEquals(await choose(), "4 heuristic");
    assertEquals(heard(), "overlay_miss, memory_miss, persistent_miss, heuristic 4");
    assertEquals(kernel.log, []);
  });

  test("else an error that says what each level had to say", async () => {
    const { choose, heard } = setup({}, { policy: { allowAutotune: false, allowHeuristics: false } });
    const error = await assertRejects(() => choose(), FlashMLAError);
    assertEquals(error.code, "no-config");
    assertEquals(
      error.message,
      "Cannot choose a configuration for fake@1 (length ≤ 128): overlay: nothing; memory: nothing; " +
        "persistent: none is set; autotune: the policy forbids it; heuristic: the policy forbids it",
    );
    assertEquals(heard(), "overlay_miss, memory_miss");
  });
});

describe("An override", () => {
  test("is used for its call only", async () => {
    const persistent = new FakeStore();
    const { choose, chain } = setup({}, { persistent });
    assertEquals(await choose({ cfg: { tile: 5 } }), "5 override");
    assertEquals([chain.cache.size, persistent.records.size], [0, 0]);
    assertEquals(await choose(), "1 autotune");
    assertEquals(await choose({ cfg: { tile: 5 } }), "5 override");
    assertEquals(await choose(), "1 memory");
  });

  test("that cannot run is refused", async () => {
    const { choose, heard } = setup({ limit: () => 4 });
    const error = await assertRejects(() => choose({ cfg: { tile: 5 } }), FlashMLAError);
    assertEquals([error.code, error.message], ["invalid-config", "tile is 5, the limit 4"]);
    assertEquals(heard(), "error");
  });

  test("is refused with the code invalid-config whatever the check throws", async () => {
    const { kernel, chain } = setup();
    kernel.checkCfg = () => {
      throw new FlashMLAError("limit", "too large");
    };
    const invocation = await kernel.prepare(call);
    const error = await assertRejects(() => chain.choose(invocation, kernel, { cfg: { tile: 5 } }), FlashMLAError);
    assertEquals([error.code, error.message], ["invalid-config", "Cannot use cfg: too large"]);
  });

  test("works where the kernel has no candidates", async () => {
    const { kernel, choose } = setup();
    kernel.candidateCfgs = () => {
      throw new Error("nothing fits");
    };
    assertEquals(await choose({ cfg: { tile: 5 } }), "5 override");
    assertEquals(await choose(), "1 heuristic");
  });
});

describe("A configuration that this device cannot run", () => {
  test("is passed over in the overlay, in memory and in the persistent cache", async () => {
    const persistent = new FakeStore();
    const { chain, choose, key, heard, events } = setup({ tiles: [4, 2, 1], limit: () => 8 }, { persistent });
    chain.cache.put(await key(), measuredConfig("autotune", record(20)));
    await persistent.put(await key(), record(30));
    assertEquals(await overlayCache({ tile: 10 }, () => choose()), "1 autotune");
    const { reason } = events.find((event) => event.type === "rejected") ?? {};
    assertEquals(reason, "tile is 10, the limit 8");
    assertEquals(heard(), `rejected 10, rejected 20, rejected 30, ${TUNED}`);
    // What was measured took the place of what could not run.
    assertEquals(await choose(), "1 memory");
    assertEquals(persistent.records.get(cacheKeyText(await key()))?.cfg, { tile: 1 });
  });

  test("is named in the error when nothing else is left", async () => {
    const { choose } = setup({ limit: () => 8 }, { policy: { allowAutotune: false, allowHeuristics: false } });
    const error = await assertRejects(() => overlayCache({ tile: 10 }, () => choose()), FlashMLAError);
    assertStringIncludes(error.message, "overlay: tile is 10, the limit 8");
  });

  test("is not forced on a call that joined the measuring of another length", async () => {
    const limit = (length: number) => length > 100 ? 1 : 8;
    const { choose, hash } = setup({ tiles: [1, 2, 4], cost: (tile) => 8 / tile, limit });
    await hash([100, 101]);
    assertEquals(await Promise.all([choose({}, 100), choose({}, 101)]), ["4 autotune", "1 heuristic"]);
  });
});

describe("A listener", () => {
  test("that throws, at once or later, changes nothing", async () => {
    const throwing = setup({}, {
      onEvent: () => {
        throw new Error("from the listener");
      },
    });
    assertEquals(await throwing.choose(), "1 autotune");
    let handled = true;
    const rejecting = setup({}, {
      onEvent: () => {
        const rejected = Promise.reject(new Error("from the listener"));
        let caught = false;
        const then = rejected.then.bind(rejected);
        rejected.then = (onFulfilled, onRejected) => {
          caught = typeof onRejected === "function";
          return then(onFulfilled, onRejected);
        };
        queueMicrotask(() => handled &&= caught);
        return rejected;
      },
    });
    assertEquals(await rejecting.choose(), "1 autotune");
    assert(handled, "an unhandled rejection ends the process");
  });
});

describe("ConfigSelectorChain", () => {
  test("asks a kernel for its candidates once per shape", async () => {
    const { kernel, choose } = setup();
    let asked = 0;
    kernel.candidateCfgs = () => (asked++, [{ tile: 1 }]);
    for (const length of [100, 100, 101, 100]) await choose({}, length);
    assertEquals(asked, 2);
  });

  test("shares a memory cache that it is given", async () => {
    const cache = new ConfigCache<FakeCfg>();
    assertEquals(await setup({}, { cache }).choose(), "1 autotune");
    assertEquals(await setup({}, { cache }).choose(), "1 memory");
  });
});
