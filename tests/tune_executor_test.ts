import { describe, test } from "node:test";
import { assertEquals, assertRejects } from "@std/assert";
import { FlashMLAError } from "../src/op/errors.ts";
import { Executor } from "../src/tune/executor.ts";
import { ConfigSelectorChain } from "../src/tune/selector_chain.ts";
import { Tuner } from "../src/tune/tuner.ts";
import { type FakeBehaviour, type FakeCall, type FakeCfg, FakeKernel } from "./support/fake_kernel.ts";

function setup(behaviour: FakeBehaviour = { tiles: [4, 2, 1] }) {
  const kernel = new FakeKernel(behaviour);
  const chain = new ConfigSelectorChain<FakeCall, FakeCfg, number>({
    tuner: new Tuner({ now: () => kernel.now, iters: 3 }),
    policy: { cacheMissFallback: "autotune" },
  });
  return { kernel, executor: new Executor(chain), call: { length: 100, value: 7 } };
}

describe("Executor.run()", () => {
  test("runs under the configuration that the chain chooses", async () => {
    const { kernel, executor, call } = setup();
    assertEquals(await executor.run(kernel, call), 7);
    assertEquals(await executor.run(kernel, { ...call, value: 8 }), 8);
    assertEquals(kernel.did("run"), [1, 1]);
    assertEquals(kernel.did("compile").length, 3);
  });

  test("runs under an explicit configuration for that call only", async () => {
    const { kernel, executor, call } = setup();
    await executor.run(kernel, call, { cfg: { tile: 3 } });
    await executor.run(kernel, call);
    assertEquals(kernel.did("run"), [3, 1]);
  });

  test("rejects a malformed call before choosing anything", async () => {
    const { kernel, executor } = setup();
    await assertRejects(() => executor.run(kernel, { length: -1, value: 7 }), FlashMLAError, "length is -1");
    assertEquals(kernel.log, []);
  });

  test("rejects an explicit configuration that cannot run", async () => {
    const { kernel, executor, call } = setup({ limit: () => 4 });
    const error = await assertRejects(() => executor.run(kernel, call, { cfg: { tile: 9 } }), FlashMLAError);
    assertEquals(error.code, "invalid-config");
    assertEquals(kernel.log, []);
  });
});

describe("Executor.choose()", () => {
  test("chooses and runs nothing", async () => {
    const { kernel, executor, call } = setup();
    assertEquals(await executor.choose(kernel, call), { cfg: { tile: 1 }, source: "autotune" });
    assertEquals(await executor.choose(kernel, call), { cfg: { tile: 1 }, source: "memory" });
    assertEquals(await executor.choose(kernel, call, { cfg: { tile: 3 } }), { cfg: { tile: 3 }, source: "override" });
    assertEquals(kernel.did("run"), []);
  });
});

describe("Executor.compile()", () => {
  test("chooses once, also when the chain would choose otherwise later", async () => {
    const { kernel, executor, call } = setup();
    const compiled = await executor.compile(kernel, call);
    executor.chain.cache.clear();
    kernel.log.length = 0;
    assertEquals(await compiled({ ...call, value: 8 }), 8);
    assertEquals(await compiled({ ...call, value: 9 }), 9);
    assertEquals(kernel.log, ["run 1", "run 1"]);
  });

  test("keeps an explicit configuration, and stores it nowhere", async () => {
    const { kernel, executor, call } = setup();
    const compiled = await executor.compile(kernel, call, { cfg: { tile: 3 } });
    await compiled(call);
    assertEquals(kernel.did("run"), [3]);
    assertEquals(executor.chain.cache.size, 0);
  });

  test("runs a call of another shape where the configuration can, and says why where it cannot", async () => {
    const { kernel, executor, call } = setup({ limit: (length) => length > 300 ? 2 : 8 });
    const compiled = await executor.compile(kernel, call, { cfg: { tile: 4 } });
    assertEquals(await compiled({ length: 300, value: 5 }), 5);
    const error = await assertRejects(() => compiled({ length: 301, value: 5 }), FlashMLAError);
    assertEquals(error.code, "invalid-config");
    assertEquals(
      error.message,
      "Cannot run a call of length ≤ 512 under the configuration compiled for length ≤ 128: tile is 4, the limit 2",
    );
    assertEquals(kernel.did("run"), [4]);
  });

  test("validates each call", async () => {
    const { kernel, executor, call } = setup();
    const compiled = await executor.compile(kernel, call);
    await assertRejects(() => compiled({ length: -1, value: 7 }), FlashMLAError, "length is -1");
    await assertRejects(() => executor.compile(kernel, { length: -1, value: 7 }), FlashMLAError, "length is -1");
  });
});
