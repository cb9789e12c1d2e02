// Runs cache_worker.ts and cache_lock_holder.ts as processes of their own, in this runtime or in another one.

import { spawn } from "node:child_process";
import process from "node:process";
import type { CacheEvent } from "../../src/cache/cache_event.ts";
import type { CacheHealth } from "../../src/cache/persistent_cache.ts";
import { noRuntime, programOf, type Runtime, runtime, scriptFor } from "./cache_runtime.ts";

/** What a worker does, in this order: waits for the others, puts, gets, lists, looks at the health. */
export interface WorkerTask {
  readonly path?: string;
  readonly patience?: number;
  /** Leaves events to the console. */
  readonly silent?: boolean;
  readonly barrier?: boolean;
  readonly put?: readonly (readonly [bucket: string, block: number])[];
  readonly get?: readonly string[];
  readonly entries?: boolean;
  readonly health?: boolean;
}

/** What a worker says in the end. */
export interface WorkerReport {
  readonly got: Record<string, number | null>;
  readonly entries: readonly (readonly [bucket: string, block: number])[];
  readonly health: CacheHealth | null;
  readonly events: readonly Pick<CacheEvent, "code" | "message">[];
}

/** How a worker is started. */
export interface WorkerStart {
  /** What runs it. Default: what runs the tests. */
  readonly runtime?: Runtime;
  /** Deno's flags. Default: all permissions and the key-value store. */
  readonly flags?: readonly string[];
  /** Its environment, in which only what the runtime itself needs is set otherwise. */
  readonly env?: Record<string, string>;
  /** Words to put before the command, such as a program that drops capabilities. */
  readonly before?: readonly string[];
  /** Runs a copy of the sources that finds no npm package. */
  readonly withoutPackages?: boolean;
}

/** What a test with processes may take, a busy machine included; Bun gives a test 5 seconds unless it asks for more. */
export const TIMEOUT_MS = 60_000;

/** A process under way. */
export interface Running {
  /** Resolves at the first output. */
  readonly ready: Promise<void>;
  /** Lets a process that waits go on. */
  go(): void;
  /** Its standard output and error, when it has ended with status 0; rejects with both otherwise. */
  readonly ended: Promise<{ readonly stdout: string; readonly stderr: string }>;
}

async function startScript(name: string, args: readonly string[], start: WorkerStart = {}): Promise<Running> {
  const kind = start.runtime ?? runtime;
  const script = await scriptFor(kind, name, { withPackages: !start.withoutPackages });
  const flags = start.flags ?? ["-A", "--unstable-kv"];
  const deno = kind === "deno" ? ["run", "--quiet", "--no-config", "--no-lock", ...flags] : [];
  const [program, ...rest] = [...start.before ?? [], programOf(kind)!, ...deno, script, ...args];
  return startProgram(program!, rest, start.env);
}

export function startProgram(program: string, args: readonly string[], env: Record<string, string> = {}): Running {
  const { PATH = "", DENO_DIR } = process.env;
  const base: Record<string, string> = { PATH, NO_COLOR: "1", DENO_NO_UPDATE_CHECK: "1" };
  // Bun would keep a cache of its own in XDG_CACHE_HOME, even a relative one.
  base.BUN_RUNTIME_TRANSPILER_CACHE_PATH = "0";
  if (DENO_DIR !== undefined) base.DENO_DIR = DENO_DIR;
  const child = spawn(program, args, {
    env: { ...base, ...env },
    stdio: ["pipe", "pipe", "pipe"],
    timeout: TIMEOUT_MS,
  });
  let stdout = "";
  let stderr = "";
  const ready = new Promise<void>((resolve) => {
    child.stdout.on("data", (chunk) => (stdout += chunk, resolve()));
    child.on("close", () => resolve());
  });
  const ended = new Promise<{ stdout: string; stderr: string }>((resolve, reject) => {
    child.stderr.on("data", (chunk) => stderr += chunk);
    child.on("error", reject);
    child.on("close", (code, signal) => {
      if (code === 0) resolve({ stdout, stderr });
      else reject(new Error(`${program} ended with ${code ?? signal}:\n${stdout}${stderr}`));
    });
  });
  return { ready, ended, go: () => void child.stdin.end("go\n") };
}

/** Runs one worker to its end. */
export async function work(task: WorkerTask, start: WorkerStart = {}): Promise<WorkerReport & { stderr: string }> {
  const { stdout, stderr } = await (await startScript("cache_worker", [JSON.stringify(task)], start)).ended;
  return { ...reportIn(stdout), stderr };
}

/** Runs workers side by side, the given runtimes taking turns: none begins before all have started. */
export async function workTogether(
  tasks: readonly WorkerTask[],
  runtimes: readonly Runtime[] = [runtime],
): Promise<WorkerReport[]> {
  const running = await Promise.all(tasks.map((task, i) => {
    const start = { runtime: runtimes[i % runtimes.length]! };
    return startScript("cache_worker", [JSON.stringify({ ...task, barrier: true })], start);
  }));
  const ended = Promise.all(running.map((worker) => worker.ended));
  await Promise.all(running.map((worker) => worker.ready));
  for (const worker of running) worker.go();
  return (await ended).map(({ stdout }) => reportIn(stdout));
}

/** Why no process can keep a file locked, or false: only Deno and Bun are sure to have node:sqlite. */
export const noLockHolder: string | false = noRuntime("deno") && noRuntime("bun") ? "needs Deno or Bun" : false;

/** A process that keeps a database file locked for writing until it is released. */
export async function holdLock(path: string): Promise<{ release(): Promise<void> }> {
  const holder = await startScript("cache_lock_holder", [path], { runtime: noRuntime("deno") ? "bun" : "deno" });
  await Promise.race([holder.ready, holder.ended]);
  return {
    release: async () => {
      holder.go();
      await holder.ended;
    },
  };
}

function reportIn(stdout: string): WorkerReport {
  return JSON.parse(stdout.trim().split("\n").at(-1)!);
}
