// Starts the examples as a user does, each in its runtime. Only under Deno's test run, which has all three to start.

import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { programOf, type Runtime, runtime, toJavaScript } from "./cache_runtime.ts";
import { type ChildProcess, spawn } from "node:child_process";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const PACKAGES = join(ROOT, "node_modules");

/** How an example ended. */
export interface Ended {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** How an example is started. */
export interface ExampleStart {
  /** What runs it. */
  readonly runtime: Runtime;
  /** Variables beside those of this process. */
  readonly env?: Record<string, string>;
  /** Arguments beside `--json`. */
  readonly args?: readonly string[];
  /** Sees the process as soon as it runs. */
  readonly onStart?: (child: ChildProcess) => void;
  /** Runs a copy that finds no npm package. */
  readonly withoutPackages?: boolean;
}

/** Why examples cannot be started in a runtime, or false. */
export function noExample(kind: Runtime): string | false {
  if (runtime !== "deno") return "examples are started from Deno's test run";
  if (programOf(kind) === null) return `needs ${kind} on PATH`;
  return kind === "deno" || existsSync(join(PACKAGES, "webgpu")) ? false : "needs webgpu in node_modules";
}

/** Runs `examples/NAME.ts --json` to its end. */
export async function runExample(name: string, start: ExampleStart): Promise<Ended> {
  const { withoutPackages = false, args = [] } = start;
  // Node 20 reads no TypeScript, and a folder that finds no packages has to be elsewhere.
  const compiled = start.runtime === "node" || withoutPackages;
  const script = compiled
    ? join(await (withoutPackages ? copies.withoutPackages() : copies.withPackages()), "examples", `${name}.js`)
    : join(ROOT, "examples", `${name}.ts`);
  const flags = start.runtime === "deno" ? ["run", "-A", "--quiet"] : [];
  return await ended(programOf(start.runtime)!, [...flags, script, "--json", ...args], start);
}

/** The object in the last line of an example's output. */
export function reportIn({ stdout, stderr }: Ended): Record<string, unknown> {
  const line = stdout.trimEnd().split("\n").at(-1)!;
  if (!line.startsWith("{")) throw new Error(`the last line is no JSON object:\n${stdout}${stderr}`);
  return JSON.parse(line);
}

function ended(program: string, args: readonly string[], { env, onStart }: ExampleStart): Promise<Ended> {
  const child = spawn(program, args, {
    cwd: ROOT,
    env: {
      ...process.env,
      NO_COLOR: "1",
      DENO_NO_UPDATE_CHECK: "1",
      // Bun would keep a cache of its own in XDG_CACHE_HOME, even a relative one.
      BUN_RUNTIME_TRANSPILER_CACHE_PATH: "0",
      FLASH_MLA_CACHE: "memory",
      FLASH_MLA_AUTOTUNE_POLICY: "heuristics",
      // Not the engine of the test run that starts it: only Deno has one of its own.
      FLASH_MLA_ENGINE: "",
      ...env,
    },
    stdio: ["ignore", "pipe", "pipe"],
  });
  let [stdout, stderr] = ["", ""];
  child.stdout.on("data", (chunk) => stdout += chunk);
  child.stderr.on("data", (chunk) => stderr += chunk);
  onStart?.(child);
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code) => resolve({ code, stdout, stderr }));
  });
}

const copies = {
  withPackages: once(() => javaScriptCopy((path) => symlinkSync(PACKAGES, path, "junction"))),
  // The folder has to be there: without one, Bun installs what it misses.
  withoutPackages: once(() => javaScriptCopy((path) => mkdirSync(path))),
};

function once<T>(make: () => T): () => T {
  let made: { readonly value: T } | undefined;
  return () => (made ??= { value: make() }).value;
}

/** Sources and examples as JavaScript, in a folder that goes with this process. */
async function javaScriptCopy(addPackages: (path: string) => void): Promise<string> {
  const folder = mkdtempSync(join(tmpdir(), "flash-mla-examples-"));
  process.on("exit", () => rmSync(folder, { recursive: true, force: true }));
  const names = (under: string, recursive: boolean) =>
    readdirSync(join(ROOT, under), { recursive }).map((name) => join(under, String(name)));
  const examples = ["examples", "examples/generate", "examples/layer", "examples/train"].flatMap((folder) =>
    names(folder, false)
  );
  for (const file of ["mod.ts", ...names("src", true), ...examples]) {
    const target = join(folder, file.replace(/\.ts$/, ".js"));
    mkdirSync(dirname(target), { recursive: true });
    if (file.endsWith(".txt")) copyFileSync(join(ROOT, file), target);
    if (!file.endsWith(".ts")) continue;
    writeFileSync(target, await toJavaScript(readFileSync(join(ROOT, file), "utf8")));
  }
  writeFileSync(join(folder, "package.json"), '{ "type": "module" }');
  addPackages(join(folder, "node_modules"));
  return folder;
}
