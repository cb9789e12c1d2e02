import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { roofline } from "../bench/roofline.ts";

const chart = (...roofs: { name?: string; tflops: number }[]) =>
  roofline({
    ...{ title: "Some", subtitle: "a < b", bandwidth: 1000, roofs },
    points: [{ series: "one", intensity: 50, tflops: 5, label: "x" }],
  });
const count = (text: string, pattern: RegExp) => [...text.matchAll(pattern)].length;

describe("roofline()", () => {
  test("draws one roof as memory's slope and a level", () => {
    const svg = chart({ tflops: 40 });
    assertEquals(count(svg, /<polyline class="roof"/g), 1);
    assertEquals(count(svg, /<line class="roof"/g), 0);
    assert(svg.includes(">40 TFLOP/s</text>") && svg.includes(">1000 GB/s</text>"));
    assert(svg.includes("a &lt; b") && !svg.includes("a < b"));
  });

  test("draws a level for every further roof from where memory's slope meets it, each with its name", () => {
    const svg = chart({ name: "f32", tflops: 10 }, { name: "matrix", tflops: 1000 }, { name: "f16", tflops: 100 });
    assertEquals(count(svg, /<line class="roof"/g), 2);
    for (const label of ["f32: 10 TFLOP/s", "f16: 100 TFLOP/s", "matrix: 1000 TFLOP/s"]) assert(svg.includes(label));
    const levels = [...svg.matchAll(/<line class="roof" x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="([\d.]+)"/g)]
      .map(([, x1, x2, y1, y2]) => [x1, x2, y1, y2].map(Number));
    const [low, high] = levels;
    assert(low[2] === low[3] && high[2] === high[3] && low[2] > high[2] && low[0] < high[0]);
    // The slope is a straight line on logarithmic axes: it ends on the highest roof and passes where the others begin.
    const slope = /<polyline class="roof" points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)/.exec(svg)!.slice(1).map(Number);
    for (const [x, , y] of levels) {
      const at = slope[1] + (slope[3] - slope[1]) * (x - slope[0]) / (slope[2] - slope[0]);
      assert(Math.abs(at - y) < 0.5, `${at} and ${y}`);
    }
  });

  test("has room for points above every roof", () => {
    const svg = roofline({
      ...{ title: "", subtitle: "", bandwidth: 1000, roofs: [{ tflops: 5 }] },
      points: [{ series: "one", intensity: 9000, tflops: 50, label: "x" }],
    });
    for (const [, x, y] of svg.matchAll(/<circle cx="([\d.]+)" cy="([\d.-]+)"/g)) {
      assert(Number(x) <= 836 && Number(y) >= 84, `${x}, ${y}`);
    }
  });
});
