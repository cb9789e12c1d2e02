// Every test that computes on a GPU, on this machine's real one: every property and every golden, under each engine, with the
// units that the card has. It writes adapter, date, commit, counts and largest errors to bench/results/.
//
//   deno task test:gpu                         both engines, as far as they are there
//   deno task test:gpu --engine=dawn           one of them: native or dawn
//   deno task test:gpu tests/gpu_a_test.ts …   only these files
//   deno task test:gpu --out=FOLDER            writes the results there
//   deno task test:gpu --software              on an adapter that runs on the CPU, too: to try this program
//
// The last line is "N passed, N failed".

import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { run } from "./child_process.ts";
import { readJUnit } from "./junit.ts";

/** Files whose tests open a GPU; the others are the same on every machine. */
const onGpu =
  /^(gpu|matrix|lse|merge|vjp|prefill)_.*_test\.ts$|^(lse|vjp|layer(_golden|_kernels|_property)?)_test\.ts$/;

/** A row that takes longer, in seconds, hangs. */
const rowLimit = 1800;

const scratch = ".build/gpu";

Deno.chdir(new URL("..", import.meta.url));
const argument = (name: string) => Deno.args.find((given) => given.startsWith(`--${name}=`))?.slice(name.length + 3);
const folder = argument("out") ?? "bench/results";
const named = Deno.args.filter((given) => !given.startsWith("--"));
const files = named.length > 0
  ? named
  : readdirSync("tests").filter((name) => onGpu.test(name)).sort().map((name) => `tests/${name}`);
const engines = (argument("engine") ?? "native,dawn").split(",");
const head = await run("git", ["rev-parse", "--short", "HEAD"]);
const commit = head.success ? head.text.trim() : "unknown";
const changed = (await run("git", ["status", "--porcelain", "--untracked-files=no"])).text.trim() !== "";
mkdirSync(scratch, { recursive: true });
mkdirSync(folder, { recursive: true });
let [passed, failed] = [0, 0];

for (const engine of engines) {
  const env = { FLASH_MLA_ENGINE: engine, FLASH_MLA_CACHE: "memory", FLASH_MLA_ERRORS: `${scratch}/${engine}.errors` };
  const said = await run(Deno.execPath(), ["run", "-A", "--no-check", "tests/support/say_adapter.ts"], {
    env,
    limit: 120,
  });
  const answer = JSON.parse(said.text.match(/^\{.*\}$/m)?.[0] ?? '{ "missing": "it did not answer" }') as Record<
    string,
    string
  >;
  if (answer.missing !== undefined) {
    console.log(`${engine}: not run, ${answer.missing}`);
    continue;
  }
  if (/llvmpipe|lavapipe|swiftshader/i.test(answer.adapter) && !Deno.args.includes("--software")) {
    console.log(`${engine}: not run, ${answer.adapter} runs on the CPU (deno task test covers it)`);
    continue;
  }
  console.log(`\n── ${engine}: ${answer.adapter}, ${answer.engine} ──`);
  const report = `${scratch}/${engine}.xml`;
  for (const path of [report, env.FLASH_MLA_ERRORS]) rmSync(path, { force: true });
  const started = performance.now();
  const ended = await run(Deno.execPath(), ["test", "-A", "--no-check", `--junit-path=${report}`, ...files], {
    ...{ env, show: true, limit: rowLimit },
  });
  const outcomes = existsSync(report) ? readJUnit(readFileSync(report, "utf8"), { filesAreSuites: true }) : [];
  const count = (state: string) => outcomes.filter((outcome) => outcome.state === state).length;
  const faults = ended.success || count("failed") > 0 ? 0 : 1;
  passed += count("passed");
  failed += count("failed") + faults;
  const result = {
    adapter: answer.adapter,
    engine: answer.engine,
    date: new Date().toISOString(),
    commit: changed ? `${commit} with changes` : commit,
    seconds: Math.round((performance.now() - started) / 1000),
    passed: count("passed"),
    failed: count("failed") + faults,
    skipped: count("skipped"),
    failures: outcomes.filter(({ state }) => state === "failed").map(({ name }) => name),
    largestErrors: largestErrors(env.FLASH_MLA_ERRORS),
  };
  const path = `${folder}/test-gpu-${nameOf(answer.adapter)}-${engine}.json`;
  writeFileSync(path, `${JSON.stringify(result, null, 2)}\n`);
  console.log(`${engine}: ${result.passed} passed, ${result.failed} failed, ${result.skipped} skipped; ${path}`);
  for (const [bound, error] of Object.entries(result.largestErrors)) {
    console.log(`  ${bound}: at most ${error.toExponential(2)}`);
  }
}
console.log(`${passed} passed, ${failed} failed`);
Deno.exit(failed === 0 && passed > 0 ? 0 : 1);

/** The largest error of each bound, over all processes of a row. */
function largestErrors(path: string): Record<string, number> {
  const largest: Record<string, number> = {};
  for (const line of existsSync(path) ? readFileSync(path, "utf8").trim().split("\n") : []) {
    const { key, value } = JSON.parse(line) as { key: string; value: number };
    largest[key] = Math.max(largest[key] ?? 0, value);
  }
  return Object.fromEntries(Object.entries(largest).sort(([a], [b]) => a < b ? -1 : 1));
}

/** An adapter's name fit for a file's. */
function nameOf(adapter: string): string {
  return adapter.toLowerCase().replaceAll(/\(.*?\)/g, "").replaceAll(/[^a-z0-9]+/g, "-").replaceAll(/^-|-$/g, "");
}
