// The largest errors that comparisons of this process found, by what they were allowed, in the file that the variable
// FLASH_MLA_ERRORS names; without it nothing is kept. tools/test_gpu.ts reports them.

import { appendFileSync } from "node:fs";
import process from "node:process";

const file = process.env.FLASH_MLA_ERRORS;
const worst = new Map<string, number>();

/**
 * Notes an error.
 *
 * @param metric What was measured, such as `relL2`.
 * @param value The error.
 * @param bound What it was allowed.
 */
export function noteError(metric: string, value: number, bound: number): void {
  if (file === undefined) return;
  const key = `${metric} within ${bound}`;
  if (!(value > (worst.get(key) ?? -1))) return;
  worst.set(key, value);
  appendFileSync(file, `${JSON.stringify({ key, value })}\n`);
}
