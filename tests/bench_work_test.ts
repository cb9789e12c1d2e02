// What the benchmarks count: FLOPs and bytes against numbers worked out by hand.

import { describe, test } from "node:test";
import { assert, assertAlmostEquals, assertEquals } from "@std/assert";
import { figures } from "../bench/bench_row.ts";
import { benchInputs, gpuShapes, isDifferentiated } from "../bench/shapes.ts";
import { visibleTriples, workOf } from "../bench/work.ts";
import { type HostInputs, mlaProblem } from "../src/op/mla_problem.ts";

const zeros = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)), shape });

/** B 1, Sq 3, Sk 4, H 2, Hkv 1, L 5, P 6, R 2, V 7. */
const inputs: HostInputs = {
  query: zeros(1, 3, 2, 8),
  keyValue: zeros(1, 4, 5),
  wKc: zeros(5, 1, 6),
  wVc: zeros(5, 1, 7),
  bK: zeros(1, 4, 2),
};
const full = mlaProblem(inputs);
const causal = mlaProblem(inputs, { causal: true });

describe("workOf()", () => {
  test("counts the expansion by keys, rank and KV heads", () => {
    // 2·4·5·1·13; latents 20, weights 65, expanded 52.
    assertEquals(workOf("expand", full, 4), { flops: 520, bytes: 4 * (20 + 65 + 52) });
    assertEquals(workOf("expand", causal, 2), { flops: 520, bytes: 2 * (20 + 65 + 52) });
  });

  test("counts attention by visible pairs", () => {
    // 3·4·2 triples, of 2·15 FLOPs each; query 48, expanded 52, rotary keys 8, output 42.
    assertEquals(workOf("attend", full, 4), { flops: 24 * 30, bytes: 4 * (48 + 52 + 8 + 42) });
    // Bottom-right: 2 + 3 + 4 pairs.
    assertEquals(visibleTriples(causal), 18);
    assertEquals(workOf("attend", causal, 2), { flops: 18 * 30, bytes: 2 * (48 + 52 + 8 + 42) });
  });

  test("counts no scratch in whole calls", () => {
    // query 48, latents 20, weights 65, rotary keys 8: 141 elements in, 42 out.
    assertEquals(workOf("forward", causal, 2), { flops: 520 + 540, bytes: 2 * (141 + 42) });
    // 18 triples of 2·(3·8 + 2·7) FLOPs, and the two gradients of the expansion.
    assertEquals(workOf("forward+backward", causal, 2), {
      flops: 520 + 540 + 18 * 76 + 2 * 520,
      bytes: 2 * (141 + 42) + 2 * (141 + 2 * 42) + 4 * 141,
    });
  });

  test("counts a shared rotary query once a row", () => {
    const shared = mlaProblem({ ...inputs, query: zeros(1, 3, 2, 6), bQ: zeros(1, 3, 2) });
    assertEquals(workOf("attend", shared, 4).bytes, 4 * (36 + 6 + 52 + 8 + 42));
  });

  test("gives the floors of DeepSeek-V2-Lite at 2,048 tokens that bench/NOTES.md has", () => {
    const [B, S, H, L, P, R, V] = [1, 2048, 16, 512, 128, 64, 128];
    const problem = { ...causal, batch: B, queryLength: S, keyLength: S, queryHeads: H, kvHeads: H, kvLoraRank: L };
    const lite = { ...problem, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V };
    assertEquals(workOf("expand", lite, 4).flops, 8_589_934_592);
    assertEquals(workOf("attend", lite, 4).flops, 2 * (2048 * 2049 / 2) * 16 * 320);
    assertAlmostEquals(workOf("attend", lite, 4).flops / 41.9e12 * 1e3, 0.513, 5e-4);
  });

  test("leaves out what windows and other sequences hide", () => {
    assertEquals(visibleTriples({ ...full, slidingWindow: [1, 0] }), 2 * (2 + 2 + 2));
    const packed = { ...full, queryLength: 4, keyLength: 4, cuSeqlens: [0, 1, 1, 4] };
    assertEquals(visibleTriples(packed), 2 * (1 + 9));
    assertEquals(visibleTriples({ ...packed, causal: true }), 2 * (1 + 6));
  });
});

describe("figures()", () => {
  const name = { shape: "some", path: "matrix f16", step: "forward" } as const;
  const samples = { ms: 2, spread: 0, samples: [2], probes: [null], repeats: 1 };
  const ceiling = { title: "", spread: 0, probeMs: null };
  const arithmetic = [{ ...ceiling, name: "f32", tflops: 5 }, { ...ceiling, name: "matrix", tflops: 20 }] as const;

  test("gives rates, shares of the path's own ceiling, and the higher floor", () => {
    const row = figures(name, { ceiling: "matrix" }, samples, { flops: 20e9, bytes: 1e9 }, {
      ...{ arithmetic, copyGbps: 1000, errors: [] },
    });
    const { tflops, gbps, intensity, arithmeticShare, copyShare, floorMs } = row;
    assertEquals([tflops, gbps, intensity, arithmeticShare, copyShare, floorMs], [10, 500, 20, 0.5, 0.5, 1]);
  });

  test("gives no shares of ceilings that were not measured", () => {
    const nothing = { arithmetic: [], copyGbps: null, errors: [] };
    const row = figures(name, { ceiling: "matrix" }, samples, { flops: 20e9, bytes: 1e9 }, nothing);
    assertEquals([row.arithmeticShare, row.copyShare, row.floorMs], [null, null, null]);
  });
});

describe("gpuShapes()", () => {
  test("gives valid problems under names of their own at every scale", () => {
    for (const length of [64, 100, 4096]) {
      const shapes = gpuShapes(false, length);
      assertEquals(new Set(shapes.map(({ name }) => name)).size, shapes.length);
      assertEquals(shapes.filter((shape) => isDifferentiated(shape, length)).length, 1);
      assert(shapes.some(({ queryLength }) => queryLength % 2 === 1));
      for (const quick of gpuShapes(true, length)) assert(shapes.some(({ name }) => name === quick.name));
    }
    for (const shape of gpuShapes(false, 64)) {
      const { causal, slidingWindow } = shape;
      const problem = mlaProblem(benchInputs(shape, "f16"), { causal, slidingWindow });
      assertEquals(problem.dtype, "f16");
      assertEquals([problem.queryHeads, problem.kvHeads], [shape.heads, shape.kvHeads ?? shape.heads]);
    }
  });
});
