import type { CacheKey, CacheRecord } from "../../src/cache/cache_record.ts";

/** A configuration small enough to read in a failure message. */
export interface SampleConfig {
  readonly block: number;
  readonly note?: string;
}

export function sampleKey(parts: Partial<CacheKey> | string = {}): CacheKey {
  const given = typeof parts === "string" ? { bucket: parts } : parts;
  return { op: "flash_mla@1", device: "test device", bucket: "f32 B1", candidates: "0123456789abcdef", ...given };
}

export function sampleRecord(block: number, note?: string): CacheRecord<SampleConfig> {
  const cfg = note === undefined ? { block } : { block, note };
  return {
    cfg,
    timings: [{ cfg, ms: 1.5, samples: 9, rejected: null }, { cfg, ms: null, samples: 0, rejected: "too large" }],
    timingMethod: "wall",
    libraryVersion: "0.1.0",
    date: "2026-01-01T00:00:00.000Z",
  };
}
