// examples/generate.ts as a user starts it, for a few tokens on the reference: the same ones come out three ways, and the
// pages of one way are shuffled.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { assert, assertEquals, assertMatch, assertNotEquals } from "@std/assert";
import { type ExampleStart, noExample, reportIn, runExample } from "./support/example_process.ts";

const timeout = 300_000;

/** What generating with a cache, in one of two ways, reports of its pages. */
type Pages = number[][];

/** What the second and third way report. */
interface Compared {
  readonly ok: boolean;
  readonly tokens: number;
  readonly same: number;
  readonly logitDifference: number;
  readonly pages: Pages;
}

function generate(args: readonly string[], start: Partial<ExampleStart> = {}) {
  return runExample("generate", { runtime: "deno", args: ["--platform=reference", ...args], ...start });
}

for (const runtime of ["deno", "bun", "node"] as const) {
  test(
    `generate.ts gives the same tokens three ways in ${runtime}`,
    { timeout, skip: noExample(runtime) },
    async () => {
      const ended = await generate(["--tokens=8"], { runtime });
      assertEquals(ended.code, 0, `${ended.stdout}${ended.stderr}`);
      const report = reportIn(ended);
      assertEquals([report.ok, report.platform, report.trained], [true, "reference", false]);
      assertEquals([report.cacheBytesPerToken, report.multiHeadBytesPerToken], [320, 1280]);
      assertEquals([(report.tokens as number[]).length, (report.text as string).length], [8, 8]);

      const [shuffled, recomputed] = [report.shuffled, report.recomputed] as Compared[];
      for (const { ok, tokens, same } of [shuffled, recomputed]) assertEquals([ok, tokens, same], [true, 8, 8]);
      // Where pages lie changes no operation; recomputing rounds elsewhere.
      assertEquals(shuffled.logitDifference, 0);
      assert(recomputed.logitDifference < 1e-5, `${recomputed.logitDifference}`);

      // 45 tokens of the prompt and 7 more, in pages of 16, in each of two layers.
      const [pages, others] = [(report.pages as Pages).flat(), shuffled.pages.flat()];
      const ascending = [...pages.keys()];
      assertEquals(pages.length, 8);
      for (const all of [pages, others]) assertEquals(all.toSorted((a, b) => a - b), ascending);
      assertNotEquals(others, ascending);
      assertNotEquals(others, pages);

      assertMatch(ended.stdout, /^ok {7}the same tokens come out three ways$/m);
      const ways = ["compiling", "with the cache", "with its pages shuffled", "recomputing everything"];
      const shown = ended.stderr.split("\n").filter((line) => line.endsWith("starting …"));
      assertEquals(shown, ways.map((way) => `${way.padEnd(23)}  starting …`));
      assertMatch(ended.stderr, /^recomputing everything {3}8\/8 tokens {2}[\d.]+ tokens\/s$/m);
    },
  );
}

test("generate.ts draws by its seed, from the weights that train.ts has saved", {
  timeout,
  skip: noExample("deno"),
}, async () => {
  const folder = mkdtempSync(join(tmpdir(), "flash-mla-generate-example-"));
  try {
    const args = ["--platform=reference", "--steps=1", `--out=${folder}`];
    const { checkpoint } = reportIn(await runExample("train", { runtime: "deno", args }));
    const tokens = async (...args: string[]) => {
      const report = reportIn(await generate([`--checkpoint=${checkpoint}`, "--tokens=4", "--prompt=It is", ...args]));
      assertEquals([report.ok, report.trained, report.prompt], [true, true, "It is"]);
      return report.tokens;
    };
    assertEquals(await tokens("--seed=5"), await tokens("--seed=5"));
    assertNotEquals(await tokens("--seed=5"), await tokens("--seed=6"));
    assertEquals(await tokens("--temperature=0", "--seed=5"), await tokens("--temperature=0", "--seed=6"));
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("generate.ts says in a line what it cannot do", { timeout, skip: noExample("deno") }, async () => {
  const missing = join(tmpdir(), "flash-mla-no-such-file");
  const mistakes = [
    [2, "--tokens=1", '--tokens must be an integer from 2, got "1"'],
    [2, "--token=3", 'unknown argument "--token=3"; --help lists those that are known'],
    [2, "--temperature=hot", '--temperature must be a number from 0, got "hot"'],
    [2, "--prompt=Ü", 'the model knows no "Ü"; --prompt may use '],
    [1, `--checkpoint=${missing}`, `${missing}: there is none`],
  ] as const;
  for (const [code, argument, why] of mistakes) {
    const ended = await generate([argument]);
    assertEquals([ended.code, ended.stdout], [code, ""]);
    assertMatch(ended.stderr, /^Cannot .*\n$/);
    assert(ended.stderr.includes(why), ended.stderr);
  }
  const { code, stdout, stderr } = await generate(["--help"]);
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^Generates text .*--checkpoint=PATH/s);
});
