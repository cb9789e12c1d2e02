// The generated WGSL of the layer's own kernels, as it was last reviewed; see wgsl_snapshot_test.ts.

import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { defaultLimits } from "../src/gpu/capabilities.ts";
import * as expand from "../src/gpu/kernels/expand.ts";
import * as linearRows from "../src/gpu/kernels/linear_rows.ts";
import * as matrixExpand from "../src/gpu/kernels/matrix_expand.ts";
import * as rmsNorm from "../src/gpu/kernels/rms_norm.ts";
import * as rotate from "../src/gpu/kernels/rotate.ts";
import { assertReviewed } from "./support/reviewed_wgsl.ts";
import { workgroupTotal, workgroupVariables } from "./support/workgroup_variables.ts";

const gemm = { blockM: 32, blockN: 32, depth: 16, rowFragments: 1, columnFragments: 1 };
const tile = expand.expandTile({ expandBlock: 32, unrollDepth: false }, defaultLimits);
const few = { left: "vec4<f32>", weight: "vec4<f16>", result: "vec4<f32>", gapped: false, bias: false } as const;
const odd = { left: "f16", weight: "f32", result: "f16", gapped: true, bias: true } as const;

const kernels: Record<string, string> = {
  "linear_rows_one": linearRows.wgsl({ columnQuads: 16, rows: 1 }, few),
  "linear_rows_eight_odd_widths_bias": linearRows.wgsl({ columnQuads: 4, rows: 8 }, odd),
  "linear_bias": expand.wgsl(tile, {
    ...{ latent: "vec4<f32>", weight: "vec4<f32>", expanded: "vec4<f32>", gapped: false, bias: true },
  }),
  "linear_matrix_floats_bias": matrixExpand.wgsl(gemm, {
    ...{ latent: "vec4<f32>", weight: "vec4<f16>", headDim: 64, gapped: false, result: "floats", bias: true },
  }, "template"),
  "rms_norm": rmsNorm.wgsl({ halves: false }),
  "rms_norm_halves": rmsNorm.wgsl({ halves: true }),
  "rotate_interleaved": rotate.wgsl({
    ...{ source: "vec4<f32>", result: "vec4<f16>", before: 128, dim: 64, layout: "interleaved", tempered: false },
  }),
  "rotate_half_tempered": rotate.wgsl({
    ...{ source: "vec4<f32>", result: "vec4<f32>", before: 64, dim: 32, layout: "half", tempered: true },
  }),
  "rotate_half_odd_widths": rotate.wgsl({
    ...{ source: "f16", result: "f32", before: 5, dim: 6, layout: "half", tempered: false },
  }),
  "rotate_none": rotate.wgsl({
    ...{ source: "vec4<f32>", result: "f16", before: 4, dim: 2, layout: null, tempered: false },
  }),
};

describe("generated WGSL of the layer", () => {
  for (const [name, code] of Object.entries(kernels)) {
    test(`${name} is the reviewed one`, () => assertReviewed(name, code));

    test(`${name} has no undefined holes, and workgroup variables of whole 16 bytes`, () => {
      assert(!/undefined|\[object|\bNaNu?\b(?! )/.test(code.replaceAll(/\/\/.*/g, "")));
      for (const [variable, bytes] of workgroupVariables(code)) assertEquals(bytes % 16, 0, variable);
    });
  }

  test("workgroup memory of a few rows is what workgroupBytes() says, and fits the default limit", () => {
    for (const rows of [1, 2, 4, 8]) {
      for (const columnQuads of [4, 8, 16]) {
        const code = linearRows.wgsl({ columnQuads, rows }, few);
        assertEquals(linearRows.workgroupBytes({ columnQuads, rows }), workgroupTotal(code));
        assert(workgroupTotal(code) <= defaultLimits.maxComputeWorkgroupStorageSize);
      }
    }
  });

  test("narrow layers take narrow tiles, and a call's rows the fewest that hold them", () => {
    assertEquals(linearRows.linearRowsTile(1, 24_576), { columnQuads: 16, rows: 1 });
    assertEquals(linearRows.linearRowsTile(3, 7168), { columnQuads: 8, rows: 4 });
    assertEquals(linearRows.linearRowsTile(16, 2112), { columnQuads: 4, rows: 8 });
  });
});
