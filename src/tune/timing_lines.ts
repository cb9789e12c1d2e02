import type { CandidateTiming } from "../cache/cache_record.ts";

/**
 * Formats how candidates fared, one line each, aligned; the fastest is marked.
 *
 * @param op Operation and version, which start each line.
 * @param timings The candidates' results.
 * @returns The lines.
 *
 * @example
 * ```ts
 * import { timingLines } from "./timing_lines.ts";
 *
 * console.log(timingLines("flash_mla@1", [{ cfg: { blockQ: 64 }, ms: 0.25, samples: 60, rejected: null }]));
 * // ["flash_mla@1 * 0.2500 ms  60 samples  blockQ=64"]
 * ```
 */
export function timingLines<Cfg>(op: string, timings: readonly CandidateTiming<Cfg>[]): string[] {
  const fastest = Math.min(...timings.map(({ ms }) => ms ?? Infinity));
  const times = timings.map(({ ms }) => ms === null ? "-" : ms.toFixed(4));
  const counts = timings.map(({ samples }) => String(samples));
  return timings.map(({ cfg, ms, rejected }, i) => {
    const mark = ms === fastest ? "*" : " ";
    const time = `${times[i].padStart(widest(times))} ms  ${counts[i].padStart(widest(counts))} samples`;
    return `${op} ${mark} ${time}  ${compact(cfg)}${rejected === null ? "" : `  rejected: ${rejected}`}`;
  });
}

function widest(texts: readonly string[]): number {
  return Math.max(...texts.map((text) => text.length));
}

function compact(cfg: unknown): string {
  if (typeof cfg !== "object" || cfg === null) return String(cfg);
  return Object.entries(cfg).map(([name, value]) =>
    `${name}=${typeof value === "object" ? JSON.stringify(value) : value}`
  ).join(" ");
}
