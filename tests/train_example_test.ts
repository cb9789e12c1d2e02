// examples/train.ts as a user starts it, for a few steps on the reference: it runs in every runtime, and goes on where Ctrl-C
// ended it.

import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { assert, assertEquals, assertMatch } from "@std/assert";
import { type ExampleStart, noExample, reportIn, runExample } from "./support/example_process.ts";

const timeout = 300_000;

/** Runs with a folder for the example's files, which is gone afterwards. */
async function inFolder(work: (folder: string) => Promise<void>): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "flash-mla-train-example-"));
  try {
    await work(folder);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

function train(args: readonly string[], start: Partial<ExampleStart> = {}) {
  return runExample("train", { runtime: "deno", args: ["--platform=reference", ...args], ...start });
}

for (const runtime of ["deno", "bun", "node"] as const) {
  test(`train.ts takes a step in ${runtime}, and says that this is too little`, {
    timeout,
    skip: noExample(runtime),
  }, () =>
    inFolder(async (folder) => {
      const ended = await train(["--steps=1", `--out=${folder}`], { runtime });
      assertEquals(ended.code, 1, `${ended.stdout}${ended.stderr}`);
      const report = reportIn(ended);
      assertEquals([report.ok, report.stopped, report.platform, report.steps], [false, false, "reference", 1]);
      assert((report.firstLoss as number) > (report.unigramEntropy as number));
      assertMatch(ended.stdout, /^FAILED {3}the loss on text held out is not below the unigram entropy$/m);
      assertMatch(
        ended.stderr,
        /^ {2}0% {2}step 0\/1 {2}starting …\n100% {2}step 1\/1 {2}loss 4\.\d{3} {2}[\d,]+ tokens\/s {2}0:00 left\n$/,
      );
      assertEquals(readdirSync(folder).sort(), ["checkpoint.safetensors", "loss.svg"]);
      assertMatch(readFileSync(join(folder, "loss.svg"), "utf8"), /^<svg [\s\S]*<\/svg>\n$/);
    }));
}

test("train.ts writes a checkpoint at Ctrl-C, and goes on from it to the losses of a run that nobody stopped", {
  timeout,
  skip: noExample("deno") || process.platform === "win32" && "Windows has no SIGINT for another process",
}, () =>
  inFolder(async (folder) => {
    const [whole, parts] = [`--out=${join(folder, "whole")}`, `--out=${join(folder, "parts")}`];
    const expected = reportIn(await train(["--steps=12", whole]));
    const interrupted = await train(["--steps=12", parts], {
      // Not child.kill(): Deno then reports the signal, and no exit code.
      onStart({ stderr, pid }) {
        const listen = (text: unknown) => {
          if (!String(text).includes("step  1/12")) return;
          stderr!.off("data", listen);
          process.kill(pid!, "SIGINT");
        };
        stderr!.on("data", listen);
      },
    });
    assertEquals(interrupted.code, 130, interrupted.stderr);
    const { stopped, steps } = reportIn(interrupted);
    assert(stopped === true && (steps as number) >= 1 && (steps as number) < 12, `${steps}`);
    const resumed = await train(["--resume", parts]);
    assertMatch(resumed.stdout, new RegExp(`^resumed {2}after step ${steps} of 12$`, "m"));
    const { losses, heldOut } = reportIn(resumed);
    assertEquals({ losses, heldOut }, { losses: expected.losses, heldOut: expected.heldOut });
  }));

test(
  "train.ts says in a line what it cannot do",
  { timeout, skip: noExample("deno") },
  () =>
    inFolder(async (folder) => {
      const missing = await train(["--resume", `--out=${folder}`]);
      assertEquals([missing.code, missing.stdout], [1, ""]);
      assertEquals(missing.stderr, `Cannot resume from ${join(folder, "checkpoint.safetensors")}: there is none\n`);
      const unknown = await train(["--stepz=3"]);
      assertEquals([unknown.code, unknown.stdout], [2, ""]);
      assertMatch(unknown.stderr, /^Cannot train: unknown argument "--stepz=3"; known are .*\n$/);
      assert(!existsSync(join(folder, "loss.svg")));
    }),
);
