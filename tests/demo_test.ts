// The main job as a user starts it: two processes, one cache file.

import { execFile } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { promisify } from "node:util";
import { assert, assertEquals } from "@std/assert";
import { skip } from "./support/gpu.ts";

const deno = (globalThis as { Deno?: { execPath(): string } }).Deno?.execPath();

async function demo(environment: Record<string, string>): Promise<Record<string, unknown>> {
  const { stdout } = await promisify(execFile)(deno!, ["task", "demo", "--json"], {
    cwd: new URL("..", import.meta.url),
    env: { ...process.env, NO_COLOR: "1", ...environment },
    maxBuffer: 2 ** 20,
  });
  const lines = stdout.trimEnd().split("\n");
  return JSON.parse(lines[lines.length - 1]);
}

test("the demo tunes in its first process and remembers in its second", {
  // Minutes on a software adapter that has compiled nothing yet; one engine is enough.
  skip: deno === undefined
    ? "needs Deno"
    : process.env.FLASH_MLA_ENGINE === "dawn"
    ? "runs with the runtime's own engine"
    : false,
}, async () => {
  const folder = mkdtempSync(join(tmpdir(), "flash-mla-demo-"));
  try {
    const environment = { FLASH_MLA_CACHE: join(folder, "configs.kv"), FLASH_MLA_AUTOTUNE_POLICY: "autotune" };
    const sources: unknown[] = [];
    for (let process = 0; process < 2; process++) {
      const result = await demo(environment);
      assertEquals(Object.keys(result).slice(0, 8), [
        "platform",
        "adapter",
        "config",
        "source",
        "ms",
        "relError",
        "tolerance",
        "ok",
      ]);
      assertEquals(result.platform, skip === false ? "webgpu" : "reference");
      assertEquals(result.ok, true);
      assert(
        Number(result.relError) > 0 && Number(result.relError) <= Number(result.tolerance),
        String(result.relError),
      );
      sources.push(result.source);
    }
    assertEquals(sources, skip === false ? ["autotune", "persistent"] : ["heuristic", "heuristic"]);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
