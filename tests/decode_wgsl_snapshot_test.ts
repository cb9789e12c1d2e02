// The generated WGSL of decoding, as it was last reviewed. After a change on purpose, FLASH_MLA_UPDATE_SNAPSHOTS=1 rewrites
// the files; review them like code.

import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import * as absorb from "../src/gpu/kernels/absorb_query.ts";
import * as absorbedAttend from "../src/gpu/kernels/absorbed_attend.ts";
import type { AbsorbedShape } from "../src/gpu/kernels/absorbed_operands.ts";
import * as append from "../src/gpu/kernels/append_latents.ts";
import * as gather from "../src/gpu/kernels/gather_latents.ts";
import * as matrixAbsorbedAttend from "../src/gpu/kernels/matrix_absorbed_attend.ts";
import { workgroupBytes } from "../src/gpu/kernels/matrix_absorbed_layout.ts";
import * as merge from "../src/gpu/kernels/merge_splits.ts";
import * as place from "../src/gpu/kernels/place_rows.ts";
import * as project from "../src/gpu/kernels/project_output.ts";
import * as split from "../src/gpu/kernels/split_keys.ts";
import * as store from "../src/gpu/kernels/store_rows.ts";
import { assertReviewed } from "./support/reviewed_wgsl.ts";
import { workgroupTotal, workgroupVariables } from "./support/workgroup_variables.ts";

const shape: AbsorbedShape = {
  kvLoraRank: 32,
  qkRopeHeadDim: 16,
  query: "floats",
  cache: "floats",
  output: "floats",
  pageSize: 64,
  sharded: false,
  bounded: false,
  softCap: false,
  sinkQuads: 0,
  lse: false,
};
const odd: AbsorbedShape = {
  ...{ ...shape, kvLoraRank: 7, qkRopeHeadDim: 2, pageSize: 1, sharded: true, bounded: true, softCap: true, lse: true },
  ...{ sinkQuads: 2, cache: "halves" },
};
const withoutPages: AbsorbedShape = { ...shape, pageSize: 0, query: "halves", cache: "halves", output: "halves" };
const tile = { blockRows: 8, blockK: 8, numWarps: 1, subgroups: false, pinned: false };
const withSubgroups = { subgroups: { minSize: 32, maxSize: 32, directive: true } };
const without = { subgroups: null };
const units = { blockRows: 16, blockK: 16, subgroups: 2, pinned: false };
const halves: AbsorbedShape = { ...shape, query: "halves", cache: "halves", kvLoraRank: 64 };
const quads = (storage: "floats" | "halves") => ({ storage, quads: true });
const single = (storage: "floats" | "halves") => ({ storage, quads: false });

const kernels: Record<string, string> = {
  "absorb_query": absorb.wgsl({
    ...{ query: quads("floats"), weight: quads("halves"), result: "floats" },
    ...{ kvLoraRank: 32, qkNopeHeadDim: 16, qkRopeHeadDim: 8 },
  }),
  "absorb_query_odd_widths_halves": absorb.wgsl({
    ...{ query: single("halves"), weight: single("floats"), result: "halves" },
    ...{ kvLoraRank: 7, qkNopeHeadDim: 5, qkRopeHeadDim: 3 },
  }),
  "absorb_query_copies": absorb.wgsl({
    ...{ query: single("halves"), weight: null, result: "floats" },
    ...{ kvLoraRank: 7, qkNopeHeadDim: 0, qkRopeHeadDim: 2 },
  }),
  "append_latents": append.wgsl(quads("floats"), "floats"),
  "append_latents_rounds": append.wgsl(single("floats"), "halves"),
  "gather_latents": gather.wgsl("halves"),
  "merge_splits": merge.wgsl({ ...shape, lse: true }, 8, 4),
  "merge_splits_sinks_halves": merge.wgsl({ ...withoutPages, sinkQuads: 2 }, 16, 32),
  "place_rows": place.wgsl(64),
  "project_output": project.wgsl({
    ...{ attended: "floats", weight: quads("halves"), result: "halves", kvLoraRank: 32, vHeadDim: 16 },
  }),
  "project_output_odd_widths": project.wgsl({
    ...{ attended: "floats", weight: single("floats"), result: "floats", kvLoraRank: 7, vHeadDim: 5 },
  }),
  "split_keys": split.wgsl(),
  "store_rows": store.wgsl("floats"),
  "store_rows_halves": store.wgsl("halves"),
  "absorbed_attend": absorbedAttend.wgsl(tile, shape, without),
  "absorbed_attend_odd_widths_shards_bounds_cap_sinks_lse": absorbedAttend.wgsl(tile, odd, without),
  "absorbed_attend_halves_without_pages_subgroups": absorbedAttend.wgsl(
    { ...tile, blockRows: 16, blockK: 16, numWarps: 4, subgroups: true, pinned: true },
    withoutPages,
    withSubgroups,
  ),
  "matrix_absorbed_attend": matrixAbsorbedAttend.wgsl(units, halves, "template"),
  "matrix_absorbed_attend_shards_bounds_cap_sinks_lse_emulated": matrixAbsorbedAttend.wgsl(
    { ...units, blockRows: 32, blockK: 32, subgroups: 4, pinned: true },
    {
      ...halves,
      sharded: true,
      bounded: true,
      softCap: true,
      sinkQuads: 2,
      lse: true,
      kvLoraRank: 20,
      qkRopeHeadDim: 5,
    },
    "emulated",
  ),
};

/** Words that WGSL reserves for later and that come to mind as names; engines refuse them, each at its own time. */
const reserved = new Set(
  ("active as async attribute auto await become cast class common compile delete do enum export extends external filter " +
    "final finally friend from get goto impl implements import inline interface layout macro match meta mod module move " +
    "mut namespace new nil null of operator package partition pass patch precise precision premerge priv protected pub " +
    "public readonly ref register require resource restrict self set shared sizeof smooth static std super target " +
    "template this throw trait try type typedef union unless unsafe use using virtual volatile where with yield")
    .split(" "),
);

describe("generated WGSL of decoding", () => {
  for (const [name, code] of Object.entries(kernels)) {
    test(`${name} is the reviewed one`, () => assertReviewed(name, code));

    test(`${name} has no undefined holes and no reserved words for names`, () => {
      assert(!/undefined|NaN\b(?! )|\[object/.test(code.replaceAll(/\/\/.*/g, "")));
      const names = [...code.matchAll(/\b(?:let|var|const|fn)\s+(\w+)/g)].map(([, name]) => name);
      assert(names.length > 0);
      for (const name of names) assert(!reserved.has(name), name);
    });
  }

  // One stray word misaligned the arrays behind it on an H100, and gave wrong products without a word.
  test("workgroup variables on matrix units are of whole 16 bytes, and as many as workgroupBytes() says", () => {
    for (const blockRows of [16, 32, 64]) {
      for (const [blockK, subgroups] of [[16, 2], [16, 8], [32, 4], [32, 8]]) {
        for (const [kvLoraRank, qkRopeHeadDim] of [[512, 64], [20, 5], [1, 0]]) {
          const tile = { blockRows, blockK, subgroups, pinned: false };
          const widths = { ...halves, kvLoraRank, qkRopeHeadDim, bounded: true, sharded: true };
          for (const backend of ["template", "flag"] as const) {
            const code = matrixAbsorbedAttend.wgsl(tile, widths, backend);
            for (const [name, bytes] of workgroupVariables(code)) assertEquals(bytes % 16, 0, name);
            assertEquals(workgroupTotal(code), workgroupBytes(tile, widths));
          }
        }
      }
    }
    assertEquals(
      workgroupBytes({ ...units, blockRows: 64, subgroups: 8 }, { kvLoraRank: 512, qkRopeHeadDim: 64 }),
      48912,
    );
  });
});
