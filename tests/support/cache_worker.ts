// A process that uses a persistent cache and says what came of it, for cache_process.ts. It needs no permission itself.

import process from "node:process";
import type { CacheEvent } from "../../src/cache/cache_event.ts";
import { PersistentCache } from "../../src/cache/persistent_cache.ts";
import type { WorkerReport, WorkerTask } from "./cache_process.ts";
import { sampleKey, sampleRecord } from "./cache_sample.ts";

const task: WorkerTask = JSON.parse(process.argv[2]!);
const events: Pick<CacheEvent, "code" | "message">[] = [];
const cache = new PersistentCache<{ block: number }>("worker", {
  path: task.path,
  patience: task.patience ?? 20_000,
  onEvent: task.silent ? undefined : ({ code, message }) => void events.push({ code, message }),
});

if (task.barrier) {
  console.log("ready");
  await new Promise((resolve) => process.stdin.once("data", resolve));
  process.stdin.destroy();
}
const got: Record<string, number | null> = {};
for (const [bucket, block] of task.put ?? []) await cache.put(sampleKey(bucket), sampleRecord(block));
for (const bucket of task.get ?? []) got[bucket] = (await cache.get(sampleKey(bucket)))?.cfg.block ?? null;
const entries = task.entries
  ? (await cache.entries()).map(([key, { cfg }]) => [key.bucket, cfg.block] as [string, number])
  : [];
const health = task.health ? await cache.health() : null;
// Never closed: the process has to end by itself all the same.
console.log(JSON.stringify({ got, entries, health, events } satisfies WorkerReport));
