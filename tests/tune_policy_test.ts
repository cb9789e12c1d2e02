import { describe, test } from "node:test";
import { assertEquals, assertRejects, assertThrows } from "@std/assert";
import { autotunePolicy, policyOverride } from "../src/tune/policy.ts";
import { ConfigSelectorChain } from "../src/tune/selector_chain.ts";
import { Executor } from "../src/tune/executor.ts";
import { Tuner } from "../src/tune/tuner.ts";
import { type FakeCall, type FakeCfg, FakeKernel } from "./support/fake_kernel.ts";

const defaults = { allowAutotune: true, allowHeuristics: true, cacheMissFallback: "autotune", validateBackward: true };

function fallback(variables: Record<string, string>, warnings: string[] = []): string {
  const surroundings = {
    environment: (name: string) => variables[name],
    warn: (message: string) => void warnings.push(message),
  };
  return autotunePolicy({}, surroundings).cacheMissFallback;
}

function chain() {
  return new ConfigSelectorChain<FakeCall, FakeCfg, number>({ policy: { cacheMissFallback: "autotune" } });
}

describe("autotunePolicy()", () => {
  test("allows everything and measures by default", () => {
    assertEquals(autotunePolicy({}, { environment: () => undefined }) as unknown, defaults);
    assertEquals(autotunePolicy({ allowAutotune: undefined }, { environment: () => undefined }) as unknown, defaults);
  });

  test("takes the fallback from the environment, our own variable first", () => {
    assertEquals(fallback({ FLASH_MLA_AUTOTUNE_POLICY: "heuristics" }), "heuristics");
    assertEquals(fallback({ EJKERNEL_AUTOTUNE_POLICY: "heuristics" }), "heuristics");
    const both = { FLASH_MLA_AUTOTUNE_POLICY: "autotune", EJKERNEL_AUTOTUNE_POLICY: "heuristics" };
    assertEquals(fallback(both), "autotune");
    assertEquals(fallback({ FLASH_MLA_AUTOTUNE_POLICY: "" }), "autotune");
  });

  test("lets an explicit fallback win over the environment", () => {
    const environment = () => "heuristics";
    assertEquals(autotunePolicy({ cacheMissFallback: "autotune" }, { environment }).cacheMissFallback, "autotune");
  });

  test("warns once of a value that it does not know, and goes on", () => {
    const warnings: string[] = [];
    const variables = { FLASH_MLA_AUTOTUNE_POLICY: "fast", EJKERNEL_AUTOTUNE_POLICY: "heuristics" };
    assertEquals(fallback(variables, warnings), "heuristics");
    assertEquals(fallback(variables, warnings), "heuristics");
    assertEquals(warnings, ['FLASH_MLA_AUTOTUNE_POLICY must be "autotune" or "heuristics", got "fast": ignored']);
  });
});

describe("policyOverride()", () => {
  test("changes fields until the block ends, and nests", () => {
    const owner = chain();
    {
      using _outer = policyOverride(owner, { allowAutotune: false });
      {
        using _inner = policyOverride(owner, { cacheMissFallback: "heuristics", allowAutotune: undefined });
        assertEquals(owner.policy as unknown, { ...defaults, allowAutotune: false, cacheMissFallback: "heuristics" });
      }
      assertEquals(owner.policy as unknown, { ...defaults, allowAutotune: false });
    }
    assertEquals(owner.policy as unknown, defaults);
  });

  test("changes fields while a function runs, and returns what it returns", () => {
    const owner = chain();
    assertEquals(policyOverride(owner, { allowHeuristics: false }, () => owner.policy.allowHeuristics), false);
    assertEquals(owner.policy as unknown, defaults);
  });

  test("ends when the function throws or its promise rejects", async () => {
    const owner = chain();
    const fail = () => {
      throw new Error("no");
    };
    assertThrows(() => policyOverride(owner, { allowAutotune: false }, fail), Error, "no");
    assertEquals(owner.policy as unknown, defaults);
    const reject = () => Promise.reject(new Error("no"));
    await assertRejects(() => policyOverride(owner, { allowAutotune: false }, reject), Error, "no");
    assertEquals(owner.policy as unknown, defaults);
  });

  test("changes one chain only", () => {
    const [one, other] = [chain(), chain()];
    using _ = policyOverride(one, { allowAutotune: false });
    assertEquals([one.policy.allowAutotune, other.policy.allowAutotune], [false, true]);
  });

  test("keeps calls that overlap apart", async () => {
    const kernel = new FakeKernel({ tiles: [4, 2, 1] });
    const owner = new ConfigSelectorChain<FakeCall, FakeCfg, number>({
      tuner: new Tuner({ now: () => kernel.now, iters: 3 }),
      policy: { cacheMissFallback: "autotune" },
    });
    const executor = new Executor(owner);
    const choose = async (length: number) => {
      for (let i = 0; i < length; i++) await Promise.resolve();
      return (await executor.choose(kernel, { length, value: 7 })).source;
    };
    const sources = await Promise.all([
      policyOverride(owner, { cacheMissFallback: "heuristics" }, () => choose(10)),
      policyOverride(owner, { allowAutotune: true }, () => choose(20)),
      choose(40),
      policyOverride(owner, { allowAutotune: false }, () => choose(80)),
    ]);
    assertEquals(sources, ["heuristic", "autotune", "autotune", "heuristic"]);
  });

  test("holds for a call that was made before the block ended", async () => {
    const kernel = new FakeKernel();
    const executor = new Executor(chain());
    const made = () => {
      using _ = policyOverride(executor.chain, { allowAutotune: false });
      return executor.choose(kernel, { length: 100, value: 7 });
    };
    assertEquals((await made()).source, "heuristic");
  });
});
