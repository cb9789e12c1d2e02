// The runtimes that tests of the cache start processes in, and the scripts that each of them can read.

import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

export type Runtime = "deno" | "bun" | "node";

/** What runs the tests. */
export const runtime: Runtime = "Deno" in globalThis ? "deno" : "Bun" in globalThis ? "bun" : "node";

/** Whether the tests run in Deno. */
export const isDeno = runtime === "deno";

// The tests may run from JavaScript that was compiled before: then so do the processes.
const EXTENSION = import.meta.url.endsWith(".ts") ? ".ts" : ".js";
const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const PACKAGES = nodeModules();

/** Whether a program is installed. */
export function isOnPath(program: string): boolean {
  return onPath(program) !== null;
}

/** The program of a runtime, or null when it is not installed. */
export function programOf(kind: Runtime): string | null {
  return kind === runtime ? process.execPath : onPath(kind);
}

function onPath(program: string): string | null {
  const name = process.platform === "win32" ? `${program}.exe` : program;
  const paths = (process.env.PATH ?? "").split(delimiter).map((folder) => join(folder, name));
  return paths.find((path) => existsSync(path)) ?? null;
}

/** Why a process of a runtime cannot keep a file, or false when it can. */
export function noRuntime(kind: Runtime): string | false {
  if (programOf(kind) === null) return `needs ${kind} on PATH`;
  return kind === "deno" || PACKAGES !== null ? false : "needs @deno/kv in node_modules";
}

/** The runtimes that can keep a file here. */
export const runtimes: readonly Runtime[] = (["deno", "bun", "node"] as const).filter((kind) => !noRuntime(kind));

/** The path of a script of this folder, in a form that a runtime reads. */
export async function scriptFor(
  kind: Runtime,
  name: string,
  { withPackages = true }: { readonly withPackages?: boolean } = {},
): Promise<string> {
  // Node 20 reads no TypeScript.
  const isReadable = withPackages && (EXTENSION === ".js" || kind !== "node");
  if (isReadable) return fileURLToPath(new URL(`${name}${EXTENSION}`, import.meta.url));
  const folder = await (withPackages ? copies.withPackages() : copies.withoutPackages());
  return join(folder, "tests", "support", `${name}.js`);
}

/** The folder of packages that scripts of this project find, when @deno/kv is in it. */
function nodeModules(): string | null {
  for (let folder = ROOT;; folder = dirname(folder)) {
    if (existsSync(join(folder, "node_modules", "@deno", "kv"))) return join(folder, "node_modules");
    if (folder === dirname(folder)) return null;
  }
}

const copies = {
  withPackages: once(() => javaScriptCopy((link) => symlinkSync(PACKAGES!, link, "junction"))),
  // The folder has to be there: without one, Bun installs what it misses.
  withoutPackages: once(() => javaScriptCopy((folder) => mkdirSync(folder))),
};

function once<T>(make: () => T): () => T {
  let made: { readonly value: T } | undefined;
  return () => (made ??= { value: make() }).value;
}

/** What the scripts consist of, as JavaScript in a folder that goes with this process. */
async function javaScriptCopy(addPackages: (path: string) => void): Promise<string> {
  const folder = realpathSync(mkdtempSync(join(tmpdir(), "flash-mla-scripts-")));
  process.on("exit", () => rmSync(folder, { recursive: true, force: true }));
  const cache = readdirSync(join(ROOT, "src", "cache")).filter((name) => name.endsWith(EXTENSION));
  const support = ["cache_worker", "cache_sample"].map((name) => join("tests", "support", name + EXTENSION));
  for (
    const file of [
      join("src", `environment${EXTENSION}`),
      ...cache.map((name) => join("src", "cache", name)),
      ...support,
    ]
  ) {
    const target = join(folder, file.replace(/\.ts$/, ".js"));
    const source = readFileSync(join(ROOT, file), "utf8");
    mkdirSync(dirname(target), { recursive: true });
    writeFileSync(target, EXTENSION === ".ts" ? await toJavaScript(source) : source);
  }
  writeFileSync(join(folder, "package.json"), '{ "type": "module" }');
  addPackages(join(folder, "node_modules"));
  return folder;
}

/** TypeScript as JavaScript that Node 20 runs; imports of `.ts` files become imports of `.js` files. */
export async function toJavaScript(source: string): Promise<string> {
  const { default: ts } = await import("typescript");
  const compilerOptions = {
    target: ts.ScriptTarget.ES2022,
    module: ts.ModuleKind.ESNext,
    verbatimModuleSyntax: true,
    rewriteRelativeImportExtensions: true,
  };
  return ts.transpileModule(source, { compilerOptions }).outputText;
}
