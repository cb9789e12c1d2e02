// The generated WGSL, as it was last reviewed. After a change on purpose, FLASH_MLA_UPDATE_SNAPSHOTS=1 rewrites the files;
// review them like code.

import { describe, test } from "node:test";
import { assert } from "@std/assert";
import { defaultLimits } from "../src/gpu/capabilities.ts";
import * as attend from "../src/gpu/kernels/attend.ts";
import * as attendBackward from "../src/gpu/kernels/attend_backward.ts";
import type { AttendBackwardShape, GradTarget } from "../src/gpu/kernels/attend_backward_operands.ts";
import type { AttendShape } from "../src/gpu/kernels/attend_operands.ts";
import * as expand from "../src/gpu/kernels/expand.ts";
import * as expandBackward from "../src/gpu/kernels/expand_backward.ts";
import * as halfCopy from "../src/gpu/kernels/half_copy.ts";
import * as headSum from "../src/gpu/kernels/head_sum.ts";
import * as rowStats from "../src/gpu/kernels/row_stats.ts";
import type { ScoreTerms } from "../src/gpu/kernels/score_terms.ts";
import * as sinkGradient from "../src/gpu/kernels/sink_gradient.ts";
import * as sinks from "../src/gpu/kernels/sinks.ts";
import { assertReviewed } from "./support/reviewed_wgsl.ts";

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
const backward: AttendBackwardShape = {
  qkNopeHeadDim: 32,
  qkRopeHeadDim: 16,
  vHeadDim: 32,
  rope: "in_query",
  query: "vec4<f32>",
  ropeQuery: "f32",
  gradOutput: "vec4<f32>",
  expanded: "vec4<f32>",
  terms: noTerms,
};
const oddBackward: AttendBackwardShape = {
  ...{ ...backward, qkNopeHeadDim: 7, qkRopeHeadDim: 5, vHeadDim: 9, rope: "shared" },
  ...{ query: "f32", gradOutput: "f32", expanded: "f32", terms: { ...noTerms, scoreTerm: "mask" } },
};
const biasedBackward: AttendBackwardShape = { ...backward, query: "vec4<f16>", gradOutput: "f16", terms: biased.terms };
const roomy = { ...defaultLimits, maxComputeWorkgroupStorageSize: 49152 };
const attendBackwardOf = (target: GradTarget, shape: AttendBackwardShape, gradBlock = 32, limits = defaultLimits) => {
  const tile = attendBackward.gradTile(target, { gradBlock, unrollDepth: false }, shape, limits)!;
  return attendBackward.wgsl(target, tile, shape);
};

const kernels: Record<string, string> = {
  "attend_backward_query": attendBackwardOf("query", backward),
  "attend_backward_query_odd_widths_shared_rope_mask": attendBackwardOf("query", oddBackward),
  "attend_backward_keys": attendBackwardOf("keys", backward),
  "attend_backward_keys_halves_bias_cap_dropout": attendBackwardOf("keys", biasedBackward),
  "attend_backward_keys_64": attendBackwardOf("keys", backward, 64),
  "attend_backward_query_128_two_stages": attendBackwardOf("query", backward, 128, roomy),
  "attend_backward_bias": attendBackwardOf("bias", biasedBackward),
  "expand_backward_latents": expandBackward.wgsl("latents", tile(true), {
    ...{ left: "vec4<f32>", right: "vec4<f16>", gradient: "vec4<f32>", gapped: false },
  }),
  "expand_backward_weights_odd_widths": expandBackward.wgsl("weights", tile(false), {
    ...{ left: "f16", right: "f32", gradient: "f32", gapped: true },
  }),
  "row_stats": rowStats.wgsl({ output: "vec4<f16>", gradOutput: "f32" }),
  "head_sum": headSum.wgsl("f32"),
  "sink_gradient": sinkGradient.wgsl("f16"),
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
    test(`${name} is the reviewed one`, () => assertReviewed(name, code));

    test(`${name} has no undefined holes and whole workgroup variables`, () => {
      assert(
        !/undefined|NaN\b(?! )|\[object/.test(code.replaceAll("holds NaN or infinity", "").replaceAll("held NaN", "")),
      );
      for (const [, declaration] of code.matchAll(/var<workgroup> \w+: (.*?);/g)) {
        const whole = /^array<array<array<vec4<f32>|^array<atomic<u32>, 4>|^array<array<f32, 8>, 8>|^array<f32, 256>/;
        assert(whole.test(declaration), declaration);
      }
    });
  }

  test("says `enable subgroups;` only where the engine wants it", () => {
    const hidden = { subgroups: { minSize: 32, maxSize: 32, directive: false } };
    assert(kernels.attend_halves_subgroups.startsWith("enable subgroups;\nenable f16;\n"));
    assert(attend.wgsl({ ...small, subgroups: true }, halves, hidden).startsWith("enable f16;\n"));
  });
});
