import { describe, test } from "node:test";
import { assertEquals, assertThrows } from "@std/assert";
import { FlashMLAError } from "../src/op/errors.ts";
import type { Platform } from "../src/op/platform.ts";
import { KernelRegistry } from "../src/registry.ts";

function library(): KernelRegistry<string> {
  const registry = new KernelRegistry<string>();
  registry.register("flash_mla", "webgpu", "gpu", "kernels");
  registry.register("flash_mla", "reference", "any", "oracle");
  return registry;
}

describe("KernelRegistry.get()", () => {
  test("finds an implementation by platform", () => {
    assertEquals(library().get("flash_mla", { platform: "webgpu" }), "kernels");
    assertEquals(library().get("flash_mla", { platform: "reference" }), "oracle");
  });

  test("finds what is registered under reference as xla, and the other way round", () => {
    assertEquals(library().get("flash_mla", { platform: "xla" }), "oracle");
    const registry = new KernelRegistry<string>();
    registry.register("flash_mla", "xla", "any", "oracle");
    assertEquals(registry.get("flash_mla", { platform: "reference" }), "oracle");
  });

  test("prefers the highest priority, on any platform when none is named", () => {
    const registry = library();
    assertEquals(registry.get("flash_mla"), "kernels");
    registry.register("flash_mla", "reference", "any", "better oracle", { priority: 2 });
    registry.register("flash_mla", "reference", "any", "worse oracle", { priority: -1 });
    assertEquals(registry.get("flash_mla"), "better oracle");
    assertEquals(registry.get("flash_mla", { platform: "webgpu" }), "kernels");
  });

  test("matches a backend with its own implementations and those for any", () => {
    const registry = library();
    assertEquals(registry.get("flash_mla", { backend: "cpu" }), "oracle");
    assertEquals(registry.get("flash_mla", { platform: "reference", backend: "gpu" }), "oracle");
    registry.register("flash_mla", "reference", "cpu", "cpu oracle");
    assertEquals(registry.get("flash_mla", { backend: "cpu" }), "cpu oracle");
    assertEquals(registry.get("flash_mla", { platform: "reference", backend: "gpu" }), "oracle");
  });

  test("lists what is registered when nothing matches", () => {
    const message = (
      query: { platform?: Platform; backend?: "cpu" },
      algorithm = "flash_mla",
      registry = library(),
    ) => {
      const error = assertThrows(() => registry.get(algorithm, query), FlashMLAError);
      assertEquals(error.code, "unsupported-platform");
      return error.message;
    };
    assertEquals(
      message({ platform: "triton" as Platform }),
      'Cannot run "flash_mla" on platform "triton": registered are webgpu (gpu), reference = xla (any)',
    );
    assertEquals(
      message({ platform: "webgpu", backend: "cpu" }),
      'Cannot run "flash_mla" on platform "webgpu" with backend "cpu": registered are webgpu (gpu), reference = xla (any)',
    );
    assertEquals(message({}, "mha"), 'Cannot run "mha": no such algorithm; registered are flash_mla');
    assertEquals(message({}, "mha", new KernelRegistry<string>()), 'Cannot run "mha": nothing is registered');
  });
});

describe("KernelRegistry.register()", () => {
  test("refuses a place that is taken", () => {
    const registry = library();
    const error = assertThrows(
      () => registry.register("flash_mla", "xla", "any", "second"),
      FlashMLAError,
      'Cannot register "flash_mla" for reference = xla (any) with priority 0',
    );
    assertEquals(error.code, "invalid-input");
    assertEquals(registry.get("flash_mla", { platform: "xla" }), "oracle");
  });

  test("takes over a place with replace", () => {
    const registry = library();
    registry.register("flash_mla", "webgpu", "gpu", "mine", { replace: true });
    assertEquals(registry.get("flash_mla", { platform: "webgpu" }), "mine");
    assertEquals(registry.listImplementations("flash_mla").length, 3);
  });

  test("returns a function that takes out that implementation and no other", () => {
    const registry = new KernelRegistry<string>();
    const removeFirst = registry.register("flash_mla", "webgpu", "gpu", "first");
    const removeSecond = registry.register("flash_mla", "webgpu", "gpu", "second", { replace: true });
    removeFirst();
    assertEquals(registry.get("flash_mla"), "second");
    removeSecond();
    removeSecond();
    assertEquals(registry.listAlgorithms(), []);
  });
});

describe("KernelRegistry lists", () => {
  test("name each algorithm once, in order", () => {
    const registry = library();
    registry.register("mha", "reference", "any", "oracle");
    assertEquals(registry.listAlgorithms(), ["flash_mla", "mha"]);
  });

  test("show a reference implementation as xla too", () => {
    const registry = library();
    registry.register("mha", "webgpu", "gpu", "other");
    const shown = (algorithm?: string) =>
      registry.listImplementations(algorithm).map((found) => `${found.algorithm} ${found.platform} ${found.backend}`);
    assertEquals(shown("flash_mla"), ["flash_mla webgpu gpu", "flash_mla reference any", "flash_mla xla any"]);
    assertEquals(shown().length, 4);
  });
});
