// Runs every gate of the project, one after another, and says in the end which of them failed.
//
//   deno task test                       everything
//   deno task test tests/op_a_test.ts …  everything, but of the tests only these
//   deno task ok                         --quick: format, lints, Deno's types and the tests that need no GPU
//
// The last line is "N passed, N failed": gates and tests together, tests and steps as Deno's summaries count them.

import { existsSync } from "node:fs";
import process from "node:process";
import packageJson from "../package.json" with { type: "json" };

const { typescript } = packageJson.devDependencies;
const total = { passed: 0, failed: 0, ignored: 0 };
const failures: string[] = [];

Deno.chdir(new URL("..", import.meta.url));
const quick = Deno.args.includes("--quick");
const chosen = Deno.args.filter((argument) => !argument.startsWith("--"));

await gate("format", ["fmt", "--check"]);
await gate("lint", ["lint"]);
await gate("types: Deno", ["check", "--quiet"]);
if (!quick) {
  if (installsTypes()) await gate("types: install", ["install", "--node-modules-dir=auto", "--frozen", "--quiet"]);
  await gate("types: Bun", ["run", "-A", `npm:typescript@${typescript}/bin/tsc`, "-p", "tsconfig.bun.json"]);
  await gate("types: browsers", ["run", "-A", `npm:typescript@${typescript}/bin/tsc`, "-p", "tsconfig.dom.json"]);
  await gate("documentation", ["doc", "--lint", "mod.ts"]);
  await gate("package: deno publish --dry-run", ["publish", "--dry-run", "--allow-dirty"], /warning/i);
}
// What the tests tune is theirs: the file that the user's programs read stays as it is.
const env = { ...quick ? {} : await softwareAdapter(), FLASH_MLA_CACHE: "memory" };
if (!quick) {
  await tests("documentation examples", [
    "--doc",
    ...["mod.ts", "src", "README.md"].filter((path) => existsSync(path)),
  ]);
}
await tests("tests", chosen.length > 0 ? chosen : quick ? withoutGpu() : ["tests"]);

console.log();
if (quick) {
  console.log("Left out: GPU tests, documentation and package gates, TypeScript's own compiler (deno task test).");
}
if (total.ignored > 0) console.log(await skipped());
for (const name of failures) console.log(`FAILED: ${name}`);
console.log(`${total.passed} passed, ${total.failed} failed`);
Deno.exit(total.failed === 0 ? 0 : 1);

/** Runs Deno with `args`; what it writes is shown if it fails or writes what a gate `forbids`. */
async function gate(name: string, args: string[], forbids?: RegExp): Promise<void> {
  const started = performance.now();
  const { success, text } = await deno(args);
  const passed = success && !forbids?.test(text);
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  console.log(`${passed ? "ok    " : "FAILED"} ${name} (${seconds} s)`);
  if (passed) return void total.passed++;
  console.log(text);
  total.failed++;
  failures.push(name);
}

/** Runs `deno test`, showing what it writes, and counts by its summary. */
async function tests(name: string, args: string[]): Promise<void> {
  console.log(`\n── ${name} ──`);
  const { success, text } = await deno(["test", "-A", "--no-check", ...args], { env, show: true });
  const summary = text.match(/^(?:ok|FAILED) \| .*passed.* \| .*failed.*$/gm)?.at(-1) ?? "";
  const count = (what: string) => {
    const [, tests = 0, steps = 0] = summary.match(new RegExp(`(\\d+) ${what}(?: \\((\\d+) steps?\\))?`)) ?? [];
    return Number(tests) + Number(steps);
  };
  total.passed += count("passed");
  total.ignored += count("ignored");
  total.failed += Math.max(count("failed"), success ? 0 : 1); // a process that crashes has no summary
  if (!success) failures.push(name);
}

/** Runs Deno and collects its output, both streams in the order in which they come. */
async function deno(
  args: string[],
  { env = {}, show = false }: { env?: Record<string, string>; show?: boolean } = {},
): Promise<{ success: boolean; text: string }> {
  const child = new Deno.Command(Deno.execPath(), {
    args,
    env: { NO_COLOR: "1", ...env },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  let text = "";
  const collect = async (stream: ReadableStream<Uint8Array>) => {
    const decoder = new TextDecoder();
    for await (const bytes of stream) {
      const piece = decoder.decode(bytes, { stream: true });
      text += piece;
      if (show) process.stdout.write(piece);
    }
  };
  const [{ success }] = await Promise.all([child.status, collect(child.stdout), collect(child.stderr)]);
  return { success, text };
}

/** Whether node_modules, where TypeScript looks for types, is Deno's to fill: not if npm or Bun have filled it. */
function installsTypes(): boolean {
  return !existsSync("node_modules") || existsSync("node_modules/.deno");
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

/** Every test file but those that are about the GPU, or a browser. */
function withoutGpu(): string[] {
  const names = [...Deno.readDirSync("tests")].map(({ name }) => name);
  const chosen = names.filter((name) => name.endsWith("_test.ts") && !/^(gpu|browser)_/.test(name));
  return chosen.sort().map((name) => `tests/${name}`);
}

/** Says how many tests were skipped and, where there is no adapter, that this is why. */
async function skipped(): Promise<string> {
  const script = 'import { skip } from "./tests/support/gpu.ts"; console.log(skip || "");';
  const { text } = await deno(["eval", script], { env });
  const reason = text.trim();
  const count = `${total.ignored} tests or groups of tests`;
  return reason === ""
    ? `Skipped, as their files say: ${count}.`
    : `!! SKIPPED ${count}, those of the GPU among them: ${reason}`;
}
