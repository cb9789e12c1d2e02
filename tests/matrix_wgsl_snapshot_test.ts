// The generated WGSL of the kernels on matrix units, as it was last reviewed, in the native back end and the emulated one.
// After a change on purpose, FLASH_MLA_UPDATE_SNAPSHOTS=1 rewrites the files; review them like code.

import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import * as attend from "../src/gpu/kernels/matrix_attend.ts";
import { type MatrixAttendTile, workgroupBytes } from "../src/gpu/kernels/matrix_attend_layout.ts";
import * as grad from "../src/gpu/kernels/matrix_attend_backward.ts";
import * as expand from "../src/gpu/kernels/matrix_expand.ts";
import * as project from "../src/gpu/kernels/matrix_expand_backward.ts";
import * as magnitude from "../src/gpu/kernels/matrix_magnitude.ts";
import * as maxima from "../src/gpu/kernels/matrix_maxima.ts";
import * as rope from "../src/gpu/kernels/matrix_rope.ts";
import * as stage from "../src/gpu/kernels/matrix_stage.ts";
import type { ScoreTerms } from "../src/gpu/kernels/score_terms.ts";
import { assertReviewed } from "./support/reviewed_wgsl.ts";
import { workgroupTotal, workgroupVariables } from "./support/workgroup_variables.ts";

const plain: ScoreTerms = { scoreTerm: "none", softCap: false, window: false, bias: "f32", dropout: false };
const every: ScoreTerms = { scoreTerm: "bias", softCap: true, window: true, bias: "f16", dropout: true };
const small = { qkNopeHeadDim: 32, qkRopeHeadDim: 16, vHeadDim: 32 };
const odd = { qkNopeHeadDim: 7, qkRopeHeadDim: 5, vHeadDim: 9 };
const deepSeek = { qkNopeHeadDim: 128, qkRopeHeadDim: 64, vHeadDim: 128 };
const halves: attend.MatrixAttendShape = {
  ...small,
  ...{ rope: "in_query", query: "vec4<f16>", output: "vec4<f16>", ropeQuery: "f32", terms: plain },
  ...{ sinkQuads: 0, lse: true },
};
const floats: attend.MatrixAttendShape = {
  ...odd,
  ...{ rope: "shared", query: "f32", output: "f32", ropeQuery: "f32", terms: every, sinkQuads: 1, lse: false },
};
const attendTile: MatrixAttendTile = { blockQ: 32, blockK: 32, subgroups: 2, rowFragments: 1, pinned: true };
const gradTile: grad.MatrixGradTile = { rows: 32, columns: 32, rowFragments: 2, pinned: true };
const gemm: expand.MatrixExpandTile = { blockM: 32, blockN: 32, depth: 16, rowFragments: 1, columnFragments: 1 };
/** The tiles that an H100 ran fastest, at DeepSeek's widths. */
const large = {
  attend: { blockQ: 128, blockK: 32, subgroups: 8, rowFragments: 2, pinned: true },
  grad: { rows: 64, columns: 32, rowFragments: 2, pinned: true },
  gemm: { blockM: 128, blockN: 256, depth: 32, rowFragments: 4, columnFragments: 4 },
  project: { blockM: 128, blockN: 128, depth: 32, rowFragments: 4, columnFragments: 2 },
};

const kernels: Record<string, string> = {
  "matrix_attend": attend.wgsl(attendTile, halves, "template"),
  "matrix_attend_deprecated_syntax": attend.wgsl(attendTile, halves, "flag"),
  "matrix_attend_emulated_every_option": attend.wgsl(attendTile, floats, "emulated"),
  "matrix_attend_backward_query": grad.wgsl(
    "query",
    gradTile,
    { ...small, terms: plain, gradient: "vec4<f32>" },
    "template",
  ),
  "matrix_attend_backward_keys_emulated_every_option": grad.wgsl(
    "keys",
    gradTile,
    { ...odd, terms: every, gradient: "f32" },
    "emulated",
  ),
  "matrix_expand": expand.wgsl(
    gemm,
    { latent: "vec4<f16>", weight: "vec4<f16>", headDim: 32, gapped: false },
    "template",
  ),
  "matrix_expand_emulated_odd_widths": expand.wgsl(
    gemm,
    { latent: "f32", weight: "f32", headDim: 7, gapped: true },
    "emulated",
  ),
  "matrix_expand_backward_latents": project.wgsl(
    "latents",
    gemm,
    { side: "keys", left: "vec4<f32>", right: "vec4<f16>", gradient: "vec4<f32>", gapped: false },
    "template",
  ),
  "matrix_expand_backward_weights_emulated": project.wgsl(
    "weights",
    gemm,
    { side: "values", left: "f32", right: "f32", gradient: "f32", gapped: true },
    "emulated",
  ),
  "matrix_magnitude": magnitude.wgsl("vec4<f16>"),
  "matrix_maxima": maxima.wgsl(),
  "matrix_rope": rope.wgsl({ ropeKey: "f32", qkRopeHeadDim: 5 }),
  "matrix_stage": stage.wgsl({ ...small, rope: "in_query", query: "vec4<f32>", ropeQuery: "f32", gradOutput: "f32" }),
};

describe("generated WGSL on matrix units", () => {
  for (const [name, code] of Object.entries(kernels)) {
    test(`${name} is the reviewed one`, () => assertReviewed(name, code));

    test(`${name} has no undefined holes, and workgroup variables of whole 16 bytes`, () => {
      assert(!/undefined|\[object|\bNaNu?\b(?! )/.test(code.replaceAll(/\/\/.*/g, "")));
      for (const [variable, bytes] of workgroupVariables(code)) assertEquals(bytes % 16, 0, variable);
    });
  }

  test("workgroup memory is what workgroupBytes() says, and fits 48 KiB at DeepSeek's widths", () => {
    const shape = { ...halves, ...deepSeek };
    const gradShape = { ...deepSeek, terms: plain, gradient: "vec4<f32>" as const };
    const expandShape = { latent: "vec4<f16>", weight: "vec4<f16>", headDim: 128, gapped: false } as const;
    const projectShape = { side: "keys", left: "f32", right: "f32", gradient: "f32", gapped: false } as const;
    const pairs: [number, string][] = [
      [workgroupBytes(large.attend, deepSeek), attend.wgsl(large.attend, shape, "template")],
      [grad.workgroupBytes(large.grad, deepSeek, "query"), grad.wgsl("query", large.grad, gradShape, "template")],
      [grad.workgroupBytes(large.grad, deepSeek, "keys"), grad.wgsl("keys", large.grad, gradShape, "template")],
      [expand.workgroupBytes(large.gemm), expand.wgsl(large.gemm, expandShape, "template")],
      ...(["latents", "weights"] as const).map((which): [number, string] => [
        project.workgroupBytes(which, large.project),
        project.wgsl(which, large.project, projectShape, "template"),
      ]),
    ];
    for (const [said, code] of pairs) {
      assertEquals(said, workgroupTotal(code), code.split("\n").find((line) => line.startsWith("//")));
      assert(said <= 48 * 1024, `${said} bytes`);
    }
  });
});
