// Runs every gate of the project, one after another, and says in the end which of them failed.
//
//   deno task test                       everything; the tests under every runtime and engine of test_rows.ts
//   deno task test tests/op_a_test.ts …  everything, but of the tests only these
//   deno task test --engine=bun          everything, but the tests in this row only
//   deno task ok                         --quick: format, lints, Deno's types and the tests that need no GPU
//
// The last line is "N passed, N failed": gates, documentation examples, and the tests of all rows together.

import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { delimiter, dirname } from "node:path";
import packageJson from "../package.json" with { type: "json" };
import { type Ended, run, type RunOptions } from "./child_process.ts";
import { type Outcome, readJUnit } from "./junit.ts";
import { countRows, type RowCount, table } from "./test_matrix.ts";
import { bunProgram, type Row, rows } from "./test_rows.ts";

/** What a row has done, before it is compared with the others. */
interface RowResult {
  readonly row: Row;
  readonly outcomes: readonly Outcome[];
  readonly seconds: number;
  /** The adapter and engine, or why there is none. */
  readonly adapter: string;
  /** What went wrong beside failing tests. */
  readonly faults: readonly string[];
}

/** A row that takes longer, in seconds, hangs. On 2 cores that have compiled no kernel yet, compiling takes most of it. */
const rowLimit = 3000;

const reports = ".build/reports";
const total = { passed: 0, failed: 0 };
const failures: string[] = [];

Deno.chdir(new URL("..", import.meta.url));
const quick = Deno.args.includes("--quick");
const files = testFiles(Deno.args.filter((argument) => !argument.startsWith("--")));
const chosenRows = rowsFor(Deno.args);
mkdirSync(reports, { recursive: true });

await gate("format", deno("fmt", "--check"));
await gate("lint", deno("lint"));
await gate("types: Deno", deno("check", "--quiet"));
if (!quick) {
  const tsc = ["run", "-A", `npm:typescript@${packageJson.devDependencies.typescript}/bin/tsc`, "-p"];
  await gate("packages", installPackages());
  await gate("types: Bun", deno(...tsc, "tsconfig.bun.json"));
  await gate("types: browsers", deno(...tsc, "tsconfig.dom.json"));
  await gate("documentation", deno("doc", "--lint", "mod.ts"));
  // Optional packages are imported by names that only the running program knows; any other warning counts.
  const warning = /warning(?!\[unanalyzable-dynamic-import\])/i;
  await gate("package: deno publish --dry-run", deno("publish", "--dry-run", "--allow-dirty"), warning);
}
// What the tests tune is theirs: the file that the user's programs read stays as it is.
const env = { ...quick ? {} : { ...await softwareAdapter(), PATH: await searchPath() }, FLASH_MLA_CACHE: "memory" };
if (!quick) await examples();

const results: RowResult[] = [];
const absent: [Row, string][] = [];
for (const row of chosenRows) await runRow(row);
const matrix = summary();

console.log(`\n── ${quick ? "summary" : "what ran where"} ──\n${matrix}\n`);
if (quick) {
  console.log(
    "Left out: tests of GPU, browser, demo and examples, other runtimes, TypeScript's own compiler, documentation, package",
  );
  console.log("(deno task test).");
}
for (const name of failures) console.log(`FAILED: ${name}`);
console.log(`${total.passed} passed, ${total.failed} failed`);
Deno.exit(total.failed === 0 ? 0 : 1);

/** Awaits `work`; what it wrote is shown if it failed or wrote what a gate `forbids`. */
async function gate(name: string, work: Promise<Ended>, forbids?: RegExp): Promise<void> {
  const started = performance.now();
  const { success, text, how } = await work;
  const passed = success && !forbids?.test(text);
  console.log(`${passed ? "ok    " : "FAILED"} ${name} (${secondsSince(started).toFixed(1)} s)`);
  if (passed) return void total.passed++;
  console.log(text || how);
  fail(name);
}

/** Runs the examples in the documentation. */
async function examples(): Promise<void> {
  const name = "documentation examples";
  console.log(`\n── ${name} ──`);
  const report = newReport("examples");
  const paths = ["mod.ts", "src", "README.md"].filter((path) => existsSync(path));
  const args = ["test", "-A", "--no-check", "--doc", `--junit-path=${report}`, ...paths];
  const { success, how } = await run(Deno.execPath(), args, { env, show: true, limit: rowLimit });
  const [count] = countRows([{ outcomes: read(report, true), hidesSkippedGroups: false }]);
  add(name, count, success || count.failed > 0 ? [] : [`the process ${how}`]);
}

/** Runs the test files in one row, which counts in {@link summary}. */
async function runRow(row: Row): Promise<void> {
  const started = performance.now();
  const runner = await row.prepare().catch((error: Error) => error);
  if (typeof runner === "string") return void absent.push([row, runner]);
  console.log(`\n── tests: ${row.title} ──`);
  if (runner instanceof Error) {
    console.log(runner.message);
    const faults = [runner.message.split("\n")[0]];
    return void results.push({ row, outcomes: [], seconds: secondsSince(started), adapter: "", faults });
  }

  const faults: string[] = [];
  const options: RunOptions = { env: { ...env, FLASH_MLA_ENGINE: row.engine } };
  const said = await run(runner.command, runner.module("tests/support/say_adapter.ts"), { ...options, limit: 120 });
  const answer = said.text.match(/^\{.*\}$/m)?.[0] ?? '{ "missing": "unknown" }';
  const { adapter, engine, missing } = JSON.parse(answer) as Record<string, string | undefined>;
  if (!said.success) {
    console.log(said.text);
    faults.push(`a process that only opens a device ${said.how}`);
  }

  const report = newReport(row.id);
  const { success, how } = await run(runner.command, runner.tests(files, report), {
    ...options,
    show: true,
    limit: rowLimit,
  });
  const outcomes = read(report, row.filesAreSuites);
  if (outcomes.length === 0) faults.push(`no test has run: the process ${how}`);
  else if (!success && !outcomes.some(({ state }) => state === "failed")) faults.push(`the process ${how}`);
  const seconds = secondsSince(started);
  results.push({ row, outcomes, seconds, adapter: missing ? `none: ${missing}` : `${adapter}, ${engine}`, faults });
}

/** Counts the rows against each other and puts them into a table. */
function summary(): string {
  const counts = countRows(results.map(({ row, outcomes }) => ({
    outcomes,
    hidesSkippedGroups: row.hidesSkippedGroups ?? false,
  })));
  const lines = [["", "passed", "failed", "skipped", "seconds", "adapter and engine"]];
  for (const [i, { row, seconds, adapter, faults }] of results.entries()) {
    const count = counts[i];
    const lost = count.lost.map((name) => `did not run: ${name}`);
    const failed = add(row.title, count, faults.length > 0 ? faults : lost);
    lines.push([row.title, `${count.passed}`, `${failed}`, `${count.skipped}`, seconds.toFixed(0), adapter]);
  }
  for (const [row, reason] of absent) lines.push([row.title, "–", "–", "–", "–", `not run: ${reason}`]);
  return table(lines);
}

/** Adds a row to the total and gives the number of its failures, `faults` among them. */
function add(name: string, { passed, failed, failures: names }: RowCount, faults: readonly string[]): number {
  total.passed += passed;
  total.failed += failed + faults.length;
  failures.push(...[...names, ...faults].map((failure) => `${name}: ${failure}`));
  return failed + faults.length;
}

function fail(name: string): void {
  total.failed++;
  failures.push(name);
}

function deno(...args: string[]): Promise<Ended> {
  return run(Deno.execPath(), args);
}

/** The test files to run: those that were asked for, else all, or in a quick run all but those of GPU, browser, demo and
 * examples. */
function testFiles(chosen: readonly string[]): string[] {
  if (chosen.length > 0) return [...chosen];
  const names = readdirSync("tests").filter((name) =>
    name.endsWith("_test.ts") &&
    !(quick &&
      /^(gpu|matrix|lse|merge|browser|demo|examples|train_example|generate_example|layer_example|layer_kernels|prefill)_/
        .test(name))
  );
  return names.sort().map((name) => `tests/${name}`);
}

/** The rows that the arguments ask for: all, unless some are named. */
function rowsFor(args: readonly string[]): readonly Row[] {
  if (quick) return rows.slice(0, 1);
  const ids = args.flatMap((argument) => argument.startsWith("--engine=") ? argument.slice(9).split(",") : []);
  const unknown = ids.find((id) => !rows.some((row) => row.id === id));
  if (unknown !== undefined) {
    console.error(`Cannot run row "${unknown}": there are ${rows.map(({ id }) => id).join(", ")}`);
    Deno.exit(2);
  }
  return ids.length === 0 ? rows : rows.filter(({ id }) => ids.includes(id));
}

/**
 * Fills `node_modules`, from which Bun, Node and TypeScript's compiler take packages; Deno does not. Where npm or Bun have
 * filled it, it stays theirs, and has to be up to date.
 */
async function installPackages(): Promise<Ended> {
  if (!existsSync("node_modules") || existsSync("node_modules/.deno")) {
    return await deno("install", "--node-modules-dir=auto", "--frozen", "--quiet");
  }
  const stale = Object.entries(packageJson.devDependencies).filter(([name, version]) => {
    const manifest = `node_modules/${name}/package.json`;
    return !existsSync(manifest) || JSON.parse(readFileSync(manifest, "utf8")).version !== version;
  });
  const text = `node_modules lacks ${stale.map(([name, version]) => `${name}@${version}`).join(", ")}: ` +
    "run npm install (or bun install) again, or delete node_modules";
  return { success: stale.length === 0, text, how: "ended" };
}

/** The environment that gives a machine without a GPU a software adapter. */
async function softwareAdapter(): Promise<Record<string, string>> {
  if (Deno.build.os !== "linux") return {};
  const args = ["-c", ". tools/software_vulkan.sh; env -0"];
  const bash = new Deno.Command("bash", { args, stdin: "null", stderr: "inherit" });
  const { stdout } = await bash.output().catch(() => ({ stdout: new Uint8Array() })); // there may be no bash
  const lines = new TextDecoder().decode(stdout).split("\0").filter((line) => line.includes("="));
  return Object.fromEntries(lines.map((line) => [line.slice(0, line.indexOf("=")), line.slice(line.indexOf("=") + 1)]));
}

/** Where tests that start other runtimes find them: Deno and Bun may have come from npm for this run. */
async function searchPath(): Promise<string> {
  const programs = [Deno.execPath(), await bunProgram()].filter((program) => typeof program === "string");
  const folders = programs.map((program) => dirname(program)).filter((folder) => folder !== ".");
  return [Deno.env.get("PATH") ?? "", ...folders].join(delimiter);
}

/** A path for a report; what an earlier run has left there is gone. */
function newReport(name: string): string {
  rmSync(`${reports}/${name}.xml`, { force: true });
  return `${reports}/${name}.xml`;
}

/** The outcomes in a report; none where the process ended before it wrote one. */
function read(report: string, filesAreSuites: boolean): Outcome[] {
  return existsSync(report) ? readJUnit(readFileSync(report, "utf8"), { filesAreSuites }) : [];
}

function secondsSince(started: number): number {
  return (performance.now() - started) / 1000;
}
