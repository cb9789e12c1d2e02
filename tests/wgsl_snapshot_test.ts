// The generated WGSL, as it was last reviewed. After a change on purpose, FLASH_MLA_UPDATE_SNAPSHOTS=1 rewrites the files;
// review them like code.

import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { defaultLimits } from "../src/gpu/capabilities.ts";
import * as attend from "../src/gpu/kernels/attend.ts";
import * as expand from "../src/gpu/kernels/expand.ts";

const directory = new URL("snapshots/", import.meta.url);
const update = process.env.FLASH_MLA_UPDATE_SNAPSHOTS === "1";

const small: attend.AttendTile = {
  blockQ: 32,
  blockK: 32,
  numWarps: 2,
  numStages: 1,
  rowsPerThread: 4,
  blockDepth: 4,
  probKeys: 1,
  unrollDepth: false,
};
const shape: attend.AttendShape = { qkNopeHeadDim: 128, qkRopeHeadDim: 64, vHeadDim: 32, rope: "in_query" };

const kernels: Record<string, string> = {
  "attend": attend.wgsl(small, shape),
  "attend_no_rope": attend.wgsl(small, { ...shape, qkRopeHeadDim: 0, rope: "none" }),
  "attend_shared_rope_odd_widths": attend.wgsl(small, { ...shape, qkNopeHeadDim: 5, vHeadDim: 7, rope: "shared" }),
  "attend_two_stages_unrolled": attend.wgsl({ ...small, numStages: 2, unrollDepth: true }, shape),
  "expand": expand.wgsl(expand.expandTile({ expandBlock: 32, unrollDepth: true }, defaultLimits), {
    kvLoraRank: 512,
    headDim: 128,
  }),
  "expand_odd_widths": expand.wgsl(expand.expandTile({ expandBlock: 32, unrollDepth: false }, defaultLimits), {
    kvLoraRank: 7,
    headDim: 5,
  }),
};

describe("generated WGSL", () => {
  for (const [name, code] of Object.entries(kernels)) {
    test(`${name} is the reviewed one`, () => {
      const file = new URL(`${name}.wgsl`, directory);
      if (update) {
        mkdirSync(directory, { recursive: true });
        writeFileSync(file, code);
      }
      assert(existsSync(file), `${file.pathname} is missing: run with FLASH_MLA_UPDATE_SNAPSHOTS=1`);
      assertEquals(code, readFileSync(file, "utf8"));
    });

    test(`${name} has no undefined holes and whole workgroup variables`, () => {
      assert(
        !/undefined|NaN\b(?! )|\[object/.test(code.replaceAll("holds NaN or infinity", "").replaceAll("held NaN", "")),
      );
      for (const [, declaration] of code.matchAll(/var<workgroup> \w+: (.*?);/g)) {
        assert(/^array<array<array<vec4<f32>|^array<atomic<u32>, 4>/.test(declaration), declaration);
      }
    });
  }

  test("depends on no length and no head count", () => {
    const wide = { ...shape, queryHeads: 1, kvHeads: 1, keyLength: 7, qkNopeHeadDim: 64, qkRopeHeadDim: 32 };
    assertEquals(attend.wgsl(small, wide), kernels.attend);
  });
});
