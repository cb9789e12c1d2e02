// examples/layer.ts as a user starts it, with a few tokens on the reference: it writes a checkpoint, or reads one, and agrees
// with itself.

import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { assert, assertEquals, assertMatch } from "@std/assert";
import { readSafetensors } from "../mod.ts";
import { writeSmallCheckpoint } from "../examples/layer/small_checkpoint.ts";
import { type ExampleStart, noExample, reportIn, runExample } from "./support/example_process.ts";

const timeout = 300_000;

function layer(args: readonly string[], start: Partial<ExampleStart> = {}) {
  return runExample("layer", { runtime: "deno", args: ["--platform=reference", ...args], ...start });
}

for (const runtime of ["deno", "bun", "node"] as const) {
  test(`layer.ts runs the layer that it has written in ${runtime}`, { timeout, skip: noExample(runtime) }, async () => {
    const ended = await layer(["--prompt=9", "--steps=5", "--dtype=f16"], { runtime });
    assertEquals(ended.code, 0, `${ended.stdout}${ended.stderr}`);
    const report = reportIn(ended);
    assertEquals([report.ok, report.platform, report.modelType], [true, "reference", "deepseek_v3"]);
    assertEquals([report.prompt, report.steps, report.compared], [9, 5, 14]);
    // L + R = 64 + 16 halves, and H · (P + R + V) = 8 · (32 + 16 + 32) of them.
    assertEquals([report.cacheBytesPerToken, report.multiHeadBytesPerToken], [160, 1280]);
    assert((report.relL2 as number) < 3e-3);
    const { prefill, decode } = report.tokensPerSecond as { prefill: number; decode: number };
    assert(prefill > 0 && decode > 0);
    assertMatch(ended.stdout, /^ok {7}the layer agrees with the reference$/m);
    const started = ended.stderr.split("\n").filter((line) => line.endsWith("starting …"));
    assertEquals(started.map((line) => line.split(" ")[0]), ["compiling", "layer", "reference"]);
    assertMatch(ended.stderr, /^layer {20}14\/14 tokens {2}[\d.]+ tokens\/s$/m);
  });
}

test("layer.ts reads a layer of a checkpoint on disk, of whose others it says the numbers", {
  timeout,
  skip: noExample("deno"),
}, async () => {
  const folder = mkdtempSync(join(tmpdir(), "flash-mla-layer-example-"));
  try {
    writeSmallCheckpoint(folder, 5);
    const checkpoint = await readSafetensors(folder);
    assertEquals([checkpoint.names.length, checkpoint.metadata.format], [7, "pt"]);
    await checkpoint.close();
    const args = ["--prompt=3", "--steps=1"];
    for (const path of [folder, join(folder, "model.safetensors")]) {
      assertEquals(reportIn(await layer([`--checkpoint=${path}`, ...args])).ok, true);
    }
    const missing = await layer([`--checkpoint=${folder}`, "--layer=3", ...args]);
    assertEquals([missing.code, missing.stdout], [1, ""]);
    assertMatch(missing.stderr, /it has no tensors of layers\.3\.self_attn; there are layers 0 to 0\n$/);
    const config = JSON.parse(readFileSync(join(folder, "config.json"), "utf8"));
    writeFileSync(join(folder, "config.json"), JSON.stringify({ ...config, q_lora_rank: 95 }));
    const misshapen = await layer([`--checkpoint=${folder}`, ...args]);
    assertEquals([misshapen.code, misshapen.stdout], [1, ""]);
    const why = "layers.0.self_attn.q_a_proj.weight has shape [96,256], expected [95,256] by the config";
    assert(misshapen.stderr.includes(why), misshapen.stderr);
    rmSync(join(folder, "config.json"));
    assertMatch(
      (await layer([`--checkpoint=${folder}`])).stderr,
      /config\.json is missing, which says what model it is\n$/,
    );
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("layer.ts says in a line what it cannot do", { timeout, skip: noExample("deno") }, async () => {
  const missing = join(tmpdir(), "flash-mla-no-such-folder");
  const mistakes = [
    [2, "--steps=0", '--steps must be an integer from 1, got "0"'],
    [2, "--dtype=f8", '--dtype must be f32 or f16, got "f8"'],
    [2, "--step=3", 'unknown argument "--step=3"; --help lists those that are known'],
    [1, `--checkpoint=${missing}`, `${missing}: there is none`],
  ] as const;
  for (const [code, argument, why] of mistakes) {
    const ended = await layer([argument]);
    assertEquals([ended.code, ended.stdout], [code, ""]);
    assertMatch(ended.stderr, /^Cannot .*\n$/);
    assert(ended.stderr.includes(why), ended.stderr);
  }
  const { code, stdout, stderr } = await layer(["--help"]);
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^Runs the attention layer of a checkpoint.*--checkpoint=PATH/s);
});
