import { describe, test } from "node:test";
import { assertEquals } from "@std/assert";
import fc from "fast-check";
import { mlaProblem } from "../src/op/mla_problem.ts";
import { type Segment, segments, visibleKeyEnd } from "../src/op/segments.ts";
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
      { queryStart: 0, queryEnd: 2, keyStart: 0, keyEnd: 3 },
      { queryStart: 2, queryEnd: 4, keyStart: 3, keyEnd: 6 },
    ]);
  });

  test("makes one segment of each packed sequence, empty ones included", () => {
    const packed = { ...batched, batch: 1, queryLength: 5, keyLength: 5, cuSeqlens: [0, 0, 2, 2, 5] };
    assertEquals(segmentsOf(packed), [
      { queryStart: 0, queryEnd: 0, keyStart: 0, keyEnd: 0 },
      { queryStart: 0, queryEnd: 2, keyStart: 0, keyEnd: 2 },
      { queryStart: 2, queryEnd: 2, keyStart: 2, keyEnd: 2 },
      { queryStart: 2, queryEnd: 5, keyStart: 2, keyEnd: 5 },
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

describe("visibleKeyEnd()", () => {
  /** How many keys each query of a segment sees. */
  const seen = (segment: Segment, causal: boolean) =>
    Array.from({ length: segment.queryEnd - segment.queryStart }, (_, i) => {
      return visibleKeyEnd(segment, segment.queryStart + i, causal) - segment.keyStart;
    });

  test("is the segment's end without causal", () => {
    assertEquals(seen({ queryStart: 10, queryEnd: 13, keyStart: 20, keyEnd: 25 }, false), [5, 5, 5]);
  });

  test("is the diagonal with as many keys as queries", () => {
    assertEquals(seen({ queryStart: 10, queryEnd: 13, keyStart: 20, keyEnd: 23 }, true), [1, 2, 3]);
  });

  test("is aligned bottom-right with more keys than queries", () => {
    assertEquals(seen({ queryStart: 10, queryEnd: 13, keyStart: 20, keyEnd: 25 }, true), [3, 4, 5]);
  });

  test("leaves the first queries nothing with fewer keys than queries", () => {
    assertEquals(seen({ queryStart: 10, queryEnd: 14, keyStart: 20, keyEnd: 22 }, true), [0, 0, 1, 2]);
    assertEquals(seen({ queryStart: 10, queryEnd: 12, keyStart: 20, keyEnd: 20 }, true), [0, 0]);
  });
});
