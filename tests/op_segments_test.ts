import { describe, test } from "node:test";
import { assertEquals } from "@std/assert";
import fc from "fast-check";
import { mlaProblem } from "../src/op/mla_problem.ts";
import { type Segment, segments, visibleKeys } from "../src/op/segments.ts";
import { packedProblems, problems, type ProblemShape, randomCall } from "./support/random_problem.ts";

function segmentsOf(shape: ProblemShape): Segment[] {
  const { inputs, options } = randomCall(shape);
  return segments(mlaProblem(inputs, options));
}

const batched: ProblemShape = {
  batch: 2,
  queryLength: 2,
  keyLength: 3,
  kvHeads: 1,
  headsPerKvHead: 1,
  kvLoraRank: 1,
  qkNopeHeadDim: 1,
  qkRopeHeadDim: 0,
  vHeadDim: 1,
  rope: "none",
  causal: false,
  softmaxScale: null,
  cuSeqlens: null,
  values: "plain",
  seed: 1,
};

describe("segments()", () => {
  test("makes one segment of each batch item", () => {
    assertEquals(segmentsOf(batched), [
      { queryStart: 0, queryEnd: 2, keyStart: 0, keyEnd: 3, item: 0 },
      { queryStart: 2, queryEnd: 4, keyStart: 3, keyEnd: 6, item: 1 },
    ]);
  });

  test("makes one segment of each packed sequence, empty ones included", () => {
    const packed = { ...batched, batch: 1, queryLength: 5, keyLength: 5, cuSeqlens: [0, 0, 2, 2, 5] };
    assertEquals(segmentsOf(packed), [
      { queryStart: 0, queryEnd: 0, keyStart: 0, keyEnd: 0, item: 0 },
      { queryStart: 0, queryEnd: 2, keyStart: 0, keyEnd: 2, item: 0 },
      { queryStart: 2, queryEnd: 2, keyStart: 2, keyEnd: 2, item: 0 },
      { queryStart: 2, queryEnd: 5, keyStart: 2, keyEnd: 5, item: 0 },
    ]);
  });

  test("is empty for batch 0 and for no packed sequence", () => {
    assertEquals(segmentsOf({ ...batched, batch: 0 }), []);
    assertEquals(segmentsOf({ ...batched, batch: 1, queryLength: 0, keyLength: 0, cuSeqlens: [0] }), []);
  });

  test("covers every query row and key row once, in order", () => {
    fc.assert(fc.property(problems(), (shape) => {
      let [query, key] = [0, 0];
      for (const { queryStart, queryEnd, keyStart, keyEnd } of segmentsOf(shape)) {
        assertEquals([queryStart, keyStart], [query, key]);
        [query, key] = [queryEnd, keyEnd];
      }
      assertEquals([query, key], [shape.batch * shape.queryLength, shape.batch * shape.keyLength]);
    }));
  });

  test("has as many segments as there are packed sequences", () => {
    fc.assert(fc.property(packedProblems(), (shape) => {
      assertEquals(segmentsOf(shape).length, shape.cuSeqlens!.length - 1);
    }));
  });
});

describe("visibleKeys()", () => {
  const item = 0;
  /** The keys that each query of a segment sees, counted from the segment's first. */
  const seen = (segment: Segment, causal: boolean, slidingWindow: [number, number] | null = null) =>
    Array.from({ length: segment.queryEnd - segment.queryStart }, (_, i) => {
      const { start, end } = visibleKeys(segment, segment.queryStart + i, { causal, slidingWindow });
      return [start - segment.keyStart, end - segment.keyStart];
    });
  /** How many keys from the first on. */
  const ends = (segment: Segment, causal: boolean) =>
    seen(segment, causal).map(([start, end]) => {
      assertEquals(start, 0);
      return end;
    });

  test("are all without causal and window", () => {
    assertEquals(ends({ queryStart: 10, queryEnd: 13, keyStart: 20, keyEnd: 25, item }, false), [5, 5, 5]);
  });

  test("end at the diagonal with as many keys as queries", () => {
    assertEquals(ends({ queryStart: 10, queryEnd: 13, keyStart: 20, keyEnd: 23, item }, true), [1, 2, 3]);
  });

  test("are aligned bottom-right with more keys than queries", () => {
    assertEquals(ends({ queryStart: 10, queryEnd: 13, keyStart: 20, keyEnd: 25, item }, true), [3, 4, 5]);
  });

  test("are none for the first queries with fewer keys than queries", () => {
    assertEquals(ends({ queryStart: 10, queryEnd: 14, keyStart: 20, keyEnd: 22, item }, true), [0, 0, 1, 2]);
    assertEquals(ends({ queryStart: 10, queryEnd: 12, keyStart: 20, keyEnd: 20, item }, true), [0, 0]);
  });

  test("stay within a window around the aligned position", () => {
    const segment = { queryStart: 10, queryEnd: 13, keyStart: 20, keyEnd: 25, item };
    assertEquals(seen(segment, false, [1, 1]), [[1, 4], [2, 5], [3, 5]]);
    assertEquals(seen(segment, true, [1, 1]), [[1, 3], [2, 4], [3, 5]]);
    assertEquals(seen(segment, false, [0, 0]), [[2, 3], [3, 4], [4, 5]]);
    // With fewer keys than queries the first ones stand before every key.
    assertEquals(seen({ ...segment, keyEnd: 21 }, false, [9, 0]), [[0, 0], [0, 0], [0, 1]]);
  });
});
