// Two runs of `bench:gpu` held against each other, row by row.

import { type BenchRow, isFailed, type RowName } from "./bench_row.ts";

/** A row slower by more than this has got slower: samples of one steady card lie within 1 % or so. */
export const tolerance = 0.03;

/** One row before and after. */
export interface Change extends RowName {
  /** Milliseconds; null where the row failed or was not measured. */
  readonly beforeMs: number | null;
  readonly afterMs: number | null;
  /** How many times as fast it is now; null where one of both is missing. */
  readonly ratio: number | null;
  readonly verdict: "slower" | "faster" | "same" | "new" | "missing" | "failed";
}

type Timed = RowName & ({ readonly ms: number } | { readonly error: string });

/** What {@link changes} needs of a row. */
export type ComparedRow = BenchRow | Timed;

/**
 * Compares rows of the same name.
 *
 * @param before The earlier run's rows.
 * @param after This run's rows.
 * @returns A change for each row of this run, in its order, then one for each that only the earlier run measured.
 */
export function changes(before: readonly ComparedRow[], after: readonly ComparedRow[]): Change[] {
  const earlier = new Map(before.map((row) => [nameOf(row), row]));
  const changed = after.map((row): Change => {
    const beforeMs = millisecondsOf(earlier.get(nameOf(row)));
    const afterMs = millisecondsOf(row);
    const ratio = beforeMs === null || afterMs === null ? null : beforeMs / afterMs;
    const { shape, path, step } = row;
    return { shape, path, step, beforeMs, afterMs, ratio, verdict: verdictOf(beforeMs, afterMs) };
  });
  const now = new Set(after.map(nameOf));
  const gone = before.filter((row) => !now.has(nameOf(row)) && millisecondsOf(row) !== null);
  return [
    ...changed,
    ...gone.map((row): Change => {
      const { shape, path, step } = row;
      return { shape, path, step, beforeMs: millisecondsOf(row), afterMs: null, ratio: null, verdict: "missing" };
    }),
  ];
}

function verdictOf(before: number | null, after: number | null): Change["verdict"] {
  if (after === null) return "failed";
  if (before === null) return "new";
  if (after > before * (1 + tolerance)) return "slower";
  return before > after * (1 + tolerance) ? "faster" : "same";
}

function millisecondsOf(row: ComparedRow | undefined): number | null {
  return row === undefined || "error" in row ? null : row.ms;
}

function nameOf({ shape, path, step }: RowName): string {
  return [shape, path, step].join(" | ");
}

/** The changes as a table. */
export function changesText(all: readonly Change[]): string {
  const ms = (value: number | null) => (value === null ? "–" : value.toFixed(3)).padStart(10);
  const lines = all.map(({ shape, path, step, beforeMs, afterMs, ratio, verdict }) =>
    `${shape.padEnd(52)} ${path.padEnd(11)} ${step.padEnd(17)}${ms(beforeMs)}${ms(afterMs)} ${
      (ratio === null ? "–" : `${ratio.toFixed(2)}×`).padStart(8)
    }  ${verdict === "slower" ? "SLOWER" : verdict}`
  );
  const slower = all.filter(({ verdict }) => verdict === "slower").length;
  return [
    `${"shape".padEnd(52)} ${"path".padEnd(11)} ${"step".padEnd(17)} before ms  after ms     ratio`,
    ...lines,
    `${slower} of ${all.length} rows slower by more than ${tolerance * 100} %`,
  ].join("\n");
}

/** The probes' median of a run's rows: two runs are comparable where these are alike. */
export function probesOf(rows: readonly BenchRow[]): number[] {
  return rows.flatMap((row) => isFailed(row) ? [] : row.probes.filter((probe) => probe !== null));
}
