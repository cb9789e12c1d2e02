// The generated WGSL, as it was last reviewed. After a change on purpose, FLASH_MLA_UPDATE_SNAPSHOTS=1 rewrites the files;
// review them like code.

import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { defaultLimits } from "../src/gpu/capabilities.ts";
import * as attend from "../src/gpu/kernels/attend.ts";
import type { AttendShape } from "../src/gpu/kernels/attend_operands.ts";
import * as expand from "../src/gpu/kernels/expand.ts";
import * as halfCopy from "../src/gpu/kernels/half_copy.ts";
import type { ScoreTerms } from "../src/gpu/kernels/score_terms.ts";
import * as sinks from "../src/gpu/kernels/sinks.ts";

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
  subgroups: false,
};
const noTerms: ScoreTerms = { scoreTerm: "none", softCap: false, window: false, bias: "f32", dropout: false };
const shape: AttendShape = {
  vHeadDim: 32,
  rope: "in_query",
  query: "vec4<f32>",
  expanded: "vec4<f32>",
  output: "vec4<f32>",
  ropeKey: "vec4<f32>",
  ropeQuery: "f32",
  terms: noTerms,
  sinkQuads: 0,
  lse: false,
};
const odd: AttendShape = {
  vHeadDim: 7,
  rope: "shared",
  query: "f32",
  expanded: "f32",
  output: "f32",
  ropeKey: "f32",
  ropeQuery: "f32",
  terms: noTerms,
  sinkQuads: 0,
  lse: false,
};
const halves: AttendShape = { ...shape, query: "vec4<f16>", output: "f16", ropeKey: "f16" };
const window = { softCap: true, window: true };
const biased: AttendShape = {
  ...shape,
  terms: { ...noTerms, ...window, scoreTerm: "bias", bias: "f16", dropout: true },
  sinkQuads: 2,
  lse: true,
};
const masked: AttendShape = { ...shape, terms: { ...noTerms, scoreTerm: "mask" }, lse: true };
const withSubgroups = { subgroups: { minSize: 32, maxSize: 32, directive: true } };
const without = { subgroups: null };
const tile = (unrollDepth: boolean) => expand.expandTile({ expandBlock: 32, unrollDepth }, defaultLimits);

const kernels: Record<string, string> = {
  "attend": attend.wgsl(small, shape, without),
  "attend_no_rope": attend.wgsl(small, { ...shape, rope: "none" }, without),
  "attend_shared_rope_odd_widths": attend.wgsl(small, odd, without),
  "attend_bias_window_cap_sinks_dropout": attend.wgsl(small, biased, without),
  "attend_mask_lse": attend.wgsl(small, masked, without),
  "sinks": sinks.wgsl("f16"),
  "attend_two_stages_unrolled": attend.wgsl({ ...small, numStages: 2, unrollDepth: true }, shape, without),
  "attend_halves_subgroups": attend.wgsl({ ...small, subgroups: true }, halves, withSubgroups),
  "expand": expand.wgsl(tile(true), {
    latent: "vec4<f32>",
    weight: "vec4<f32>",
    expanded: "vec4<f32>",
    gapped: false,
  }),
  "expand_odd_widths": expand.wgsl(tile(false), { latent: "f32", weight: "f32", expanded: "f32", gapped: true }),
  "expand_halves": expand.wgsl(tile(false), {
    latent: "f16",
    weight: "vec4<f16>",
    expanded: "vec4<f16>",
    gapped: false,
  }),
  "half_unpack": halfCopy.wgsl("unpack"),
  "half_pack": halfCopy.wgsl("pack"),
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

  test("says `enable subgroups;` only where the engine wants it", () => {
    const hidden = { subgroups: { minSize: 32, maxSize: 32, directive: false } };
    assert(kernels.attend_halves_subgroups.startsWith("enable subgroups;\nenable f16;\n"));
    assert(attend.wgsl({ ...small, subgroups: true }, halves, hidden).startsWith("enable f16;\n"));
  });
});
