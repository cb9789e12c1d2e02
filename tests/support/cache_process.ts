// Runs cache_worker.ts and cache_lock_holder.ts as processes of their own.

import { spawn } from "node:child_process";
import process from "node:process";
import { fileURLToPath } from "node:url";
import type { CacheEvent } from "../../src/cache/cache_event.ts";
import type { CacheHealth } from "../../src/cache/persistent_cache.ts";

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
  /** Deno's flags. Default: all permissions and the key-value store. */
  readonly flags?: readonly string[];
  /** Its environment, in which only what Deno itself needs is set otherwise. */
  readonly env?: Record<string, string>;
  /** Words to put before the command, such as a program that drops capabilities. */
  readonly before?: readonly string[];
}

/** Whether the tests run in Deno; workers always do. */
export const isDeno = "Deno" in globalThis;

const TIMEOUT_MS = 60_000;

/** A process under way. */
export interface Running {
  /** Resolves at the first output. */
  readonly ready: Promise<void>;
  /** Lets a process that waits go on. */
  go(): void;
  /** Its standard output and error, when it has ended with status 0; rejects with both otherwise. */
  readonly ended: Promise<{ readonly stdout: string; readonly stderr: string }>;
}

export function startScript(name: string, args: readonly string[], start: WorkerStart = {}): Running {
  const script = fileURLToPath(new URL(name, import.meta.url));
  const flags = start.flags ?? ["-A", "--unstable-kv"];
  const command = [...start.before ?? [], process.execPath, "run", "--quiet", "--no-config", "--no-lock"];
  const [program, ...rest] = [...command, ...flags, script, ...args];
  return startProgram(program!, rest, start.env);
}

export function startProgram(program: string, args: readonly string[], env: Record<string, string> = {}): Running {
  const { PATH = "", DENO_DIR } = process.env;
  const base: Record<string, string> = { PATH, NO_COLOR: "1", DENO_NO_UPDATE_CHECK: "1" };
  if (DENO_DIR !== undefined) base.DENO_DIR = DENO_DIR;
  const child = spawn(program, args, {
    env: { ...base, ...env },
    stdio: ["pipe", "pipe", "pipe"],
    timeout: TIMEOUT_MS,
  });
  let stdout = "";
  let stderr = "";
  const ended = Promise.withResolvers<{ stdout: string; stderr: string }>();
  const ready = Promise.withResolvers<void>();
  child.stdout.on("data", (chunk) => (stdout += chunk, ready.resolve()));
  child.stderr.on("data", (chunk) => stderr += chunk);
  child.on("error", ended.reject);
  child.on("close", (code, signal) => {
    ready.resolve();
    if (code === 0) ended.resolve({ stdout, stderr });
    else ended.reject(new Error(`${program} ended with ${code ?? signal}:\n${stdout}${stderr}`));
  });
  return { ready: ready.promise, ended: ended.promise, go: () => void child.stdin.end("go\n") };
}

/** Runs one worker to its end. */
export async function work(task: WorkerTask, start: WorkerStart = {}): Promise<WorkerReport & { stderr: string }> {
  const { stdout, stderr } = await startScript("cache_worker.ts", [JSON.stringify(task)], start).ended;
  return { ...reportIn(stdout), stderr };
}

/** Runs workers side by side: none begins before all have started. */
export async function workTogether(tasks: readonly WorkerTask[]): Promise<WorkerReport[]> {
  const running = tasks.map((task) => startScript("cache_worker.ts", [JSON.stringify({ ...task, barrier: true })]));
  const ended = Promise.all(running.map((worker) => worker.ended));
  await Promise.all(running.map((worker) => worker.ready));
  for (const worker of running) worker.go();
  return (await ended).map(({ stdout }) => reportIn(stdout));
}

/** A process that keeps a database file locked for writing until it is released. */
export async function holdLock(path: string): Promise<{ release(): Promise<void> }> {
  const holder = startScript("cache_lock_holder.ts", [path]);
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
