// The doctor as a user starts it, and what it advises.

import { execFile } from "node:child_process";
import process from "node:process";
import { describe, test } from "node:test";
import { fileURLToPath } from "node:url";
import { assert, assertEquals } from "@std/assert";
import type { CacheHealth, Capabilities } from "../mod.ts";
import { currentRuntime } from "../src/environment.ts";
import { defaultLimits } from "../src/gpu/capabilities.ts";
import { hintsFor } from "../tools/doctor_hints.ts";
import { noDawn } from "./support/dawn.ts";
import { skip } from "./support/gpu.ts";

const { name: runtime, version } = currentRuntime();
/** Software adapters compile the small call's kernels for some seconds. */
const timeout = 120_000;

interface Report {
  readonly status: number;
  readonly text: string;
  // deno-lint-ignore no-explicit-any
  readonly json: any;
}

/** Runs the doctor in this test's own runtime. */
function doctor(environment: Record<string, string>): Promise<Report> {
  const args = [...runtime === "Deno" ? ["run", "-A"] : [], "tools/doctor.ts", "--json"];
  const options = {
    cwd: fileURLToPath(new URL("..", import.meta.url)),
    env: { ...process.env, NO_COLOR: "1", FLASH_MLA_CACHE: "memory", ...environment },
  };
  return new Promise((resolve, reject) => {
    const child = execFile(process.execPath, args, options, (_error, stdout, stderr) => {
      const status = child.exitCode;
      if (status === null) return reject(new Error(`the doctor ended by ${child.signalCode}: ${stderr}`));
      const lines = stdout.trimEnd().split("\n");
      resolve({ status, text: stdout, json: JSON.parse(lines[lines.length - 1]) });
    });
  });
}

function assertHealthy({ status, text, json }: Report, engine: string): void {
  assertEquals(status, 0, text);
  for (const key of ["runtime", "engine", "adapter", "capabilities", "cache", "platform", "ok", "hints"]) {
    assert(key in json, `no ${key} in ${text}`);
  }
  assertEquals([json.ok, json.platform, json.runtime], [true, "webgpu", `${runtime} ${version}`]);
  assertEquals([json.engine, json.capabilities.engine], [engine, engine]);
  assertEquals(json.adapter, json.capabilities.adapter);
  assert(json.check.relL2 > 0 && json.check.relL2 <= 1e-5, text);
  assertEquals(json.cache.state, "memory");
  assert(json.hints.some((hint: string) => hint.includes("in memory only")), text);
  assertEquals(json.hints.some((hint: string) => hint.includes("in software")), json.capabilities.software);
  assert(text.includes("relL2") && text.includes(json.adapter), text);
}

const notHere = runtime === "Node" ? "Node 20 runs no TypeScript" : false;

describe("the doctor, as a process,", { skip: notHere }, () => {
  test("finds the runtime's own engine healthy", {
    skip: skip || (runtime !== "Deno" && "needs an engine in the runtime"),
    timeout,
  }, async () => assertHealthy(await doctor({ FLASH_MLA_ENGINE: "native" }), `wgpu (Deno ${version})`));

  test("finds Dawn healthy", { skip: noDawn, timeout }, async () => {
    assertHealthy(await doctor({ FLASH_MLA_ENGINE: "dawn" }), `Dawn (webgpu 0.6.2, ${runtime} ${version})`);
  });

  test("says what is missing where there is no adapter, and fails", {
    skip: process.platform !== "linux" && "hides Vulkan's drivers as on Linux",
    timeout,
  }, async () => {
    const { status, text, json } = await doctor({
      VK_DRIVER_FILES: "/nowhere/icd.json",
      DENO_WEBGPU_BACKEND: "vulkan",
    });
    assertEquals([status, json.ok, json.platform], [1, false, "reference"], text);
    assertEquals([json.engine, json.adapter, json.capabilities, json.check], [null, null, null, null]);
    assert(json.hints[0].includes("no adapter was found") && json.hints[0].includes("lavapipe"), text);
    assert(text.includes("FAILED"), text);
  });

  test("names a wrong value of FLASH_MLA_ENGINE, and fails", { timeout }, async () => {
    const { status, text, json } = await doctor({ FLASH_MLA_ENGINE: "metal" });
    assertEquals([status, json.ok, json.platform], [1, false, null], text);
    assert(json.hints[0].includes("FLASH_MLA_ENGINE=metal"), text);
  });
});

describe("hintsFor()", () => {
  const capabilities: Capabilities = {
    engine: "wgpu (Deno 2.9.6)",
    adapter: "NVIDIA H100",
    software: false,
    f16: true,
    subgroups: { minSize: 32, maxSize: 32, directive: false },
    timestamps: "exact",
    subgroupMatrices: [],
    matrixUnits: null,
    limits: defaultLimits,
  };
  const cache: CacheHealth = { location: "/cache.kv", state: "ok", detail: "Readable and writable." };
  const hints = (change: Partial<Capabilities>) =>
    hintsFor({ runtime: "Deno", capabilities: { ...capabilities, ...change }, refusal: null, cache });

  test("has nothing to say where all is well", () => assertEquals(hints({}), []));

  const cases: Record<string, [Partial<Capabilities>, RegExp]> = {
    "a software adapter": [{ software: true }, /in software.*driver/],
    "no half precision": [{ f16: false }, /shader-f16/],
    "no half precision in Dawn on NVIDIA": [
      { f16: false, engine: "Dawn (webgpu 0.5.0, Bun 1.4.5)" },
      /switch.*0\.6\.2/,
    ],
    "no subgroups": [{ subgroups: null }, /subgroups.*workgroup memory/],
    "no timestamps": [{ timestamps: "none" }, /host's clock/],
    "rounded timestamps": [{ timestamps: "quantised" }, /rounded/],
    "OpenGL": [
      { adapter: "NVIDIA H100 over OpenGL", f16: false, subgroups: null },
      /OpenGL.*DENO_WEBGPU_BACKEND=vulkan/,
    ],
  };
  for (const [name, [change, pattern]] of Object.entries(cases)) {
    test(`has one hint for ${name}`, () => {
      const found = hints(change);
      assertEquals(found.length, 1, found.join("\n"));
      assert(pattern.test(found[0]), found[0]);
    });
  }

  const caches: Record<CacheHealth["state"], RegExp | null> = {
    ok: null,
    off: /cache is off/,
    memory: /in memory only.*The reason/,
    locked: /^The reason/,
    damaged: /^The reason/,
    "read-only": /^The reason/,
    unavailable: /^The reason/,
  };
  for (const [state, pattern] of Object.entries(caches)) {
    test(`of a cache that is ${state}: ${pattern === null ? "none" : "one"}`, () => {
      const health = { ...cache, state: state as CacheHealth["state"], detail: "The reason." };
      const found = hintsFor({ runtime: "Deno", capabilities, refusal: null, cache: health });
      assertEquals(found.length, pattern === null ? 0 : 1);
      if (pattern !== null) assert(pattern.test(found[0]), found[0]);
    });
  }

  test("passes on why there is no device", () => {
    const found = hintsFor({ runtime: "Bun", capabilities: null, refusal: "run `npm install webgpu`", cache });
    assertEquals(found, ["No GPU: run `npm install webgpu`."]);
  });
});
