// One row of `bench:gpu`: what a step of a call under a path took, beside what it had to do and what the device can do.

import type { FlashMLAConfig } from "../mod.ts";
import type { Ceilings } from "./ceilings.ts";
import type { FirstCall } from "./first_call.ts";
import type { Samples } from "./interleaved.ts";
import type { KernelPath } from "./kernel_path.ts";
import type { Work, WorkStep } from "./work.ts";

/** What names a row, the same in every run. */
export interface RowName {
  readonly shape: string;
  readonly path: string;
  readonly step: WorkStep;
}

/** A row that could not be measured. */
export interface FailedRow extends RowName {
  readonly error: string;
}

/** Where a row's configuration comes from. */
export interface Chosen {
  readonly cfg: FlashMLAConfig;
  /** `heuristic`, or `tuned` with how many candidates were timed. */
  readonly chosenBy: string;
  /** What the tuner rejected for wrong results. */
  readonly miscomputed: readonly string[];
}

/** A row that was measured. */
export interface MeasuredRow extends RowName, Samples, Work, Chosen {
  readonly tflops: number;
  /** GB/s of the bytes that have to move. */
  readonly gbps: number;
  /** FLOPs for each byte that has to move. */
  readonly intensity: number;
  /** Of the measured ceiling of the path's arithmetic; null where that is missing. */
  readonly arithmeticShare: number | null;
  /** Of the measured copy. */
  readonly copyShare: number | null;
  /** Milliseconds that arithmetic or memory take at the least, whichever takes longer; null without ceilings. */
  readonly floorMs: number | null;
  /** Of whole calls only. */
  readonly first?: FirstCall;
  /** Whether this process had compiled the kernels before {@link first} was measured. */
  readonly driverKnewKernels?: boolean;
}

/** A row, measured or not. */
export type BenchRow = MeasuredRow | FailedRow;

/** Whether a row could not be measured. */
export function isFailed(row: BenchRow): row is FailedRow {
  return "error" in row;
}

/**
 * Works out a row's figures.
 *
 * @param name What names it.
 * @param path Its path.
 * @param samples What was measured.
 * @param work What it had to do.
 * @param ceilings What the device can do.
 */
export function figures(
  name: RowName,
  path: Pick<KernelPath, "ceiling">,
  samples: Samples,
  work: Work,
  ceilings: Ceilings,
): Omit<MeasuredRow, keyof Chosen> {
  const tflops = work.flops / samples.ms / 1e9;
  const gbps = work.bytes / samples.ms / 1e6;
  const peak = ceilings.arithmetic.find((ceiling) => ceiling.name === path.ceiling)?.tflops ?? null;
  const { copyGbps } = ceilings;
  const floors = [
    ...peak === null ? [] : [work.flops / peak / 1e9],
    ...copyGbps === null ? [] : [work.bytes / copyGbps / 1e6],
  ];
  return {
    ...name,
    ...samples,
    ...work,
    ...{ tflops, gbps, intensity: work.flops / work.bytes },
    arithmeticShare: peak && tflops / peak,
    copyShare: copyGbps && gbps / copyGbps,
    floorMs: floors.length === 0 ? null : Math.max(...floors),
  };
}
