// The loops that ceilings are measured with: that they do the work which is counted.

import { describe, test } from "node:test";
import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import { matrixLoop, multiplyAddLoop, prepareLoop } from "../bench/ceilings.ts";
import { toFloats, toHalves, toHost } from "../mod.ts";
import { gpuContext } from "../src/gpu/device.ts";
import { skip, skipEmulation } from "./support/gpu.ts";
import { assertReviewed } from "./support/reviewed_wgsl.ts";
import { workgroupTotal, workgroupVariables } from "./support/workgroup_variables.ts";

/** What the loops read: `[0.25, 0.75)`, by the linear congruence of prepareLoop(). */
function loopInputs(): Float32Array {
  let state = 7;
  return Float32Array.from({ length: 4096 }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return 0.25 + state / 2 ** 33;
  });
}

/** The sums of one workgroup after so many iterations. */
async function sumsOf(code: string, iterations: number): Promise<Float32Array> {
  const context = await gpuContext();
  const loop = await prepareLoop(context, "a loop", code, 1);
  try {
    loop.iterate(iterations);
    await loop.time(1);
    const { device } = context;
    return (await toHost({ buffer: loop.sink, shape: [1024], dtype: "f32", device })).data as Float32Array;
  } finally {
    loop.dispose();
  }
}

describe("multiplyAddLoop()", () => {
  test("does 8 chains of 16 multiply-adds an iteration", () => {
    for (const type of ["f32", "f16"] as const) {
      assertEquals([...multiplyAddLoop(type).matchAll(/sum\d = fma\(/g)].length, 8 * 16);
    }
  });

  test("sums up what it says", { skip }, async () => {
    const inputs = loopInputs();
    const sums = await sumsOf(multiplyAddLoop("f32"), 2);
    for (const [invocation, column] of [[0, 0], [3, 1], [255, 3]]) {
      let expected = 0;
      for (let chain = 0; chain < 8; chain++) {
        let sum = inputs[4 * ((invocation + chain) % 1024) + column];
        for (let i = 0; i < 32; i++) sum = sum * inputs[column] + inputs[4 + column];
        expected += sum;
      }
      assertAlmostEquals(sums[4 * invocation + column], expected, 1e-4);
    }
  });
});

describe("matrixLoop()", () => {
  test("is the WGSL that was reviewed, in either syntax", () => {
    assertReviewed("bench_matrix_loop", matrixLoop("template"));
    assertReviewed("bench_matrix_loop_deprecated_syntax", matrixLoop("flag"));
  });

  test("does 32 products an iteration, in workgroup memory of whole quads that every device has", () => {
    for (const syntax of ["template", "flag"] as const) {
      const code = matrixLoop(syntax);
      assertEquals([...code.matchAll(/subgroupMatrixMultiplyAccumulate\(/g)].length, 32);
      for (const [name, bytes] of workgroupVariables(code)) assertEquals(bytes % 16, 0, name);
      assert(workgroupTotal(code) <= 16384);
    }
  });

  test("sums up what it says, by the emulation", { skip: skipEmulation }, async () => {
    const inputs = loopInputs();
    const shifted = { data: inputs.map((x) => x - 0.5), shape: [inputs.length] };
    const halves = toFloats(toHalves(shifted)).data;
    // Fragments of 16 rows of 2 quads of 8 halves: 2 left ones, then 4 right ones.
    const element = (fragment: number, row: number, column: number) =>
      halves[8 * (fragment * 32 + row * 2 + (column >> 3)) + (column & 7)];
    const sums = await sumsOf(matrixLoop("emulated"), 3);
    for (const [invocation, component] of [[0, 0], [33, 2], [255, 3]]) {
      const [row, side] = [(invocation % 32) >> 1, invocation & 1];
      let expected = 0;
      for (const column of [8 * side + component, 8 * side + 4 + component]) {
        for (let r = 0; r < 2; r++) {
          for (let c = 0; c < 4; c++) {
            for (let k = 0; k < 16; k++) expected += 3 * 4 * element(r, row, k) * element(2 + c, k, column);
          }
        }
      }
      assertAlmostEquals(sums[4 * invocation + component], expected, 1e-2);
    }
  });
});
