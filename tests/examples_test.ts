// The examples as a user starts them. Each checks its own result; the tests read what it says.

import { describe, test } from "node:test";
import { assert, assertEquals, assertMatch } from "@std/assert";
import { noDawn } from "./support/dawn.ts";
import { type Ended, noExample, reportIn, runExample } from "./support/example_process.ts";
import { skip as noGpu } from "./support/gpu.ts";

const timeout = 300_000;

/** What an example that ended well reports. */
function reportOf(ended: Ended): Record<string, unknown> {
  assertEquals(ended.code, 0, `${ended.stdout}${ended.stderr}`);
  return reportIn(ended);
}

function assertWithin(actual: unknown, least: number, most: number): void {
  assert(typeof actual === "number" && actual > least && actual < most, `${actual} is not in (${least}, ${most})`);
}

test("deno.ts agrees with the reference", { timeout, skip: noExample("deno") }, async () => {
  const report = reportOf(await runExample("deno", { runtime: "deno" }));
  assertEquals([report.ok, report.source, report.tokens], [true, "heuristic", 32]);
  if (noGpu === false) assertWithin(report.relL2, 0, 1e-5);
  else assertEquals(report.relL2, 0);
});

for (const runtime of ["bun", "node"] as const) {
  test(
    `${runtime}.ts agrees with the reference on 16-bit inputs`,
    { timeout, skip: noExample(runtime) || noDawn },
    async () => {
      const report = reportOf(await runExample(runtime, { runtime }));
      assertEquals([report.ok, report.tokens], [true, 32]);
      assert(report.dtype === "f16" || runtime === "node" && report.dtype === "bf16", String(report.dtype));
      assertMatch(String(report.engine), runtime === "bun" ? /Dawn .*Bun/ : /Dawn .*Node/);
      assertWithin(report.relL2, 0, 3e-3);
    },
  );

  for (const name of [runtime, "pipeline"]) {
    test(
      `${name}.ts says in ${runtime} that npm's webgpu is missing`,
      { timeout, skip: noExample(runtime) },
      async () => {
        const { code, stdout, stderr } = await runExample(name, { runtime, withoutPackages: true });
        assertEquals([code, stdout], [1, ""]);
        assertMatch(stderr, /^Cannot load WebGPU from "webgpu": .*npm install webgpu.*\n$/);
      },
    );
  }
}

describe("pipeline.ts keeps everything on the GPU and agrees with the reference", { skip: noGpu }, () => {
  const places = [
    { runtime: "deno", engine: "native", named: /^wgpu \(Deno/ },
    { runtime: "deno", engine: "dawn", named: /^Dawn .*Deno/ },
    { runtime: "bun", engine: "dawn", named: /^Dawn .*Bun/ },
    { runtime: "node", engine: "dawn", named: /^Dawn .*Node/ },
  ] as const;
  for (const { runtime, engine, named } of places) {
    test(
      `in ${runtime} on ${engine}`,
      { timeout, skip: noExample(runtime) || engine === "dawn" && noDawn },
      async () => {
        const report = reportOf(await runExample("pipeline", { runtime, env: { FLASH_MLA_ENGINE: engine } }));
        assertMatch(String(report.engine), named);
        assertEquals([report.ok, report.layers, report.promptTokens, report.steps], [true, 4, 20, 8]);
        // A submission for the prompt and for each step; one hidden state of 64 floats for each of 28 tokens.
        assertEquals([report.submissions, report.bytesReadBack], [9, 28 * 64 * 4]);
        assertWithin(report.relL2, 0, 1e-4);
        for (const time of [report.msPerStepGpu, report.msPerStepHost]) assertWithin(time, 0, 1e5);
      },
    );
  }
});
