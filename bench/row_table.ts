// Rows of `bench:gpu` for people to read.

import { type BenchRow, isFailed } from "./bench_row.ts";
import type { Ceilings } from "./ceilings.ts";
import { configText } from "./kernel_path.ts";

const number = (value: number, digits: number, width: number) => value.toFixed(digits).padStart(width);
/** Three digits or more, also of a software adapter's rates. */
const rate = (value: number, width: number) => (value >= 100 ? value.toFixed(1) : value.toPrecision(3)).padStart(width);
const percent = (share: number | null, width: number) =>
  (share === null ? "–" : number(100 * share, 1, 1)).padStart(width);

/** The ceilings, a line each. */
export function ceilingsText({ arithmetic, copyGbps, errors }: Ceilings): string {
  return [
    ...arithmetic.map(({ title, tflops, spread }) =>
      `ceiling: ${title.padEnd(26)} ${rate(tflops, 9)} TFLOP/s  (spread ${number(100 * spread, 1, 1)} %)`
    ),
    ...copyGbps === null ? [] : [`ceiling: ${"copy by a kernel".padEnd(26)} ${number(copyGbps, 0, 9)} GB/s`],
    ...errors.map((error) => `ceiling missing: ${error}`),
  ].join("\n");
}

/** The names of the columns. */
export const tableHead =
  "  path        step                     ms   TFLOP/s  % peak  % copy  spread  compile    first  " +
  "configuration";

/** A shape's rows under its name. Of a row's shares, `% peak` is that of the path's arithmetic. */
export function shapeText(name: string, rows: readonly BenchRow[]): string {
  return [name, ...rows.map(rowText)].join("\n");
}

function rowText(row: BenchRow): string {
  const head = `  ${row.path.padEnd(11)} ${row.step.padEnd(17)}`;
  if (isFailed(row)) return `${head} failed: ${row.error}`;
  const { ms, tflops, arithmeticShare, copyShare, spread, first, driverKnewKernels, cfg, chosenBy, miscomputed } = row;
  const seconds = (value: number | undefined) =>
    value === undefined ? "".padStart(9) : `${number(value / 1000, 2, 7)} s`;
  const wrong = miscomputed.length === 0 ? "" : `; rejected: ${[...new Set(miscomputed)].join("; ")}`;
  return `${head}${number(ms, 3, 11)}${rate(tflops, 10)}${percent(arithmeticShare, 8)}${percent(copyShare, 8)}` +
    `${percent(spread, 7)}%${seconds(first?.compileMs)}${driverKnewKernels ? "*" : " "}${seconds(first?.firstCallMs)}` +
    (first === undefined ? "" : `  ${configText(cfg)} (${chosenBy}${wrong})`);
}
