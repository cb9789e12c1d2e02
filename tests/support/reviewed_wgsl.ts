// Generated WGSL beside the text that was last reviewed.

import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { assert, assertEquals } from "@std/assert";

const directory = new URL("../snapshots/", import.meta.url);
const update = process.env.FLASH_MLA_UPDATE_SNAPSHOTS === "1";

/** Asserts that a kernel's code is the reviewed one; with FLASH_MLA_UPDATE_SNAPSHOTS=1, writes it down instead. */
export function assertReviewed(name: string, code: string): void {
  const file = new URL(`${name}.wgsl`, directory);
  if (update) {
    mkdirSync(directory, { recursive: true });
    writeFileSync(file, code);
  }
  assert(existsSync(file), `${file.pathname} is missing: run with FLASH_MLA_UPDATE_SNAPSHOTS=1`);
  assertEquals(code, readFileSync(file, "utf8"));
}
