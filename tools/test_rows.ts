// The runtimes and engines that the one test suite runs under, and how each is started.

import packageJson from "../package.json" with { type: "json" };
import { buildForNode, compiled } from "./build_for_node.ts";
import { run } from "./child_process.ts";

/** A runtime with a WebGPU engine. */
export interface Row {
  /** How the command line names it. */
  readonly id: string;
  /** How the matrix names it. */
  readonly title: string;
  /** What `FLASH_MLA_ENGINE` is for it. */
  readonly engine: "native" | "dawn";
  /** Whether the outermost suites of its reports are files. */
  readonly filesAreSuites: boolean;
  /** Whether its reports leave out groups that are skipped. */
  readonly hidesSkippedGroups?: boolean;
  /** Makes it ready; a string says why it cannot run here. */
  prepare(): Promise<Runner | string>;
}

/** A runtime that is there. */
export interface Runner {
  readonly command: string;
  /** The arguments that run a module of the project. */
  module(path: string): string[];
  /** The arguments that run test files and write a report. */
  tests(paths: readonly string[], report: string): string[];
}

/** All rows, in the order in which they run. */
export const rows: readonly Row[] = [
  { id: "deno", title: "Deno", engine: "native", filesAreSuites: true, prepare: deno },
  { id: "deno-dawn", title: "Deno on Dawn", engine: "dawn", filesAreSuites: true, prepare: deno },
  { id: "bun", title: "Bun", engine: "dawn", filesAreSuites: true, hidesSkippedGroups: true, prepare: bun },
  { id: "node", title: "Node", engine: "dawn", filesAreSuites: false, prepare: node },
];

function deno(): Promise<Runner> {
  return Promise.resolve({
    command: Deno.execPath(),
    module: (path) => ["run", "-A", "--no-check", path],
    tests: (paths, report) => ["test", "-A", "--no-check", `--junit-path=${report}`, ...paths],
  });
}

let foundBun: Promise<string | { readonly missing: string }> | undefined;

/** The program of Bun: the one on the PATH, else the one that npm has. */
export function bunProgram(): Promise<string | { readonly missing: string }> {
  return foundBun ??= (async () => {
    if ((await run("bun", ["--version"])).success) return "bun";
    const package_ = `bun@${packageJson.devDependencies["@types/bun"]}`;
    const { success, text, how } = await run("npx", ["-y", "-p", package_, "-c", "command -v bun"], { limit: 300 });
    const program = text.match(/^\/.*bun$/m)?.[0]; // npx talks of itself, too
    return success && program !== undefined ? program : { missing: `no bun on the PATH, and npx ${package_} ${how}` };
  })();
}

async function bun(): Promise<Runner | string> {
  const command = await bunProgram();
  if (typeof command !== "string") return command.missing;
  return {
    command,
    module: (path) => ["run", path],
    tests: (paths, report) => [
      "test",
      "--reporter=junit",
      `--reporter-outfile=${report}`,
      ...paths.map((path) => `./${path}`),
    ],
  };
}

/** Node as installed, with the project compiled for it. */
async function node(): Promise<Runner | string> {
  const found = await run("node", ["--version"]);
  if (!found.success) return "no node on the PATH";
  const version = found.text.trim();
  if (Number(version.match(/^v(\d+)/)?.[1]) < 20) return `${version} is too old: Node 20 is needed`;
  const { success, text, how } = await buildForNode();
  if (!success) throw new Error(`Cannot compile for Node: the compiler ${how}\n${text}`);
  const flags = ["--enable-source-maps"];
  return {
    command: "node",
    module: (path) => [...flags, compiled(path)],
    tests: (paths, report) => [
      ...flags,
      "--test",
      "--test-concurrency=1", // files share the adapter, and the software one takes all cores
      "--test-reporter=spec",
      "--test-reporter-destination=stdout",
      "--test-reporter=junit",
      `--test-reporter-destination=${report}`,
      ...paths.map(compiled),
    ],
  };
}
