import { describe, test } from "node:test";
import { assertEquals } from "@std/assert";
import fc from "fast-check";
import { mlaProblem } from "../src/op/mla_problem.ts";
import { reach, type Segment, segments, visibleKeys } from "../src/op/segments.ts";
import { packedProblems, problems, type ProblemShape, randomCall } from "./support/random_problem.ts";
import { range } from "./support/tensor_parts.ts";
import { seesByPosition } from "./support/visible_pairs.ts";

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
  type Options = Parameters<typeof visibleKeys>[2];
  const none: Options = { causal: false, slidingWindow: null };
  const causal: Options = { causal: true, slidingWindow: null };
  const segment = (queries: number, keys: number): Segment => {
    return { queryStart: 10, queryEnd: 10 + queries, keyStart: 20, keyEnd: 20 + keys, item: 0 };
  };
  /** The keys that each query of a segment sees, counted from the segment's first one: first and one past the last. */
  const seen = (of: Segment, options: Options) =>
    range(of.queryStart, of.queryEnd).map((row) => {
      const { start, end } = visibleKeys(of, row, options);
      return [start - of.keyStart, end - of.keyStart];
    });

  test("are all of the segment's without causal and window", () => {
    assertEquals(seen(segment(3, 5), none), [[0, 5], [0, 5], [0, 5]]);
  });

  test("end on the diagonal with as many keys as queries", () => {
    assertEquals(seen(segment(3, 3), causal), [[0, 1], [0, 2], [0, 3]]);
  });

  test("are aligned bottom-right with more keys than queries", () => {
    assertEquals(seen(segment(3, 5), causal), [[0, 3], [0, 4], [0, 5]]);
    assertEquals(seen(segment(2, 5), { causal: false, slidingWindow: [1, 0] }), [[2, 4], [3, 5]]);
  });

  test("are none for the first queries with fewer keys than queries", () => {
    assertEquals(seen(segment(4, 2), causal), [[0, 0], [0, 0], [0, 1], [0, 2]]);
    assertEquals(seen(segment(2, 0), causal), [[0, 0], [0, 0]]);
    assertEquals(seen(segment(4, 2), { causal: false, slidingWindow: [0, 1] }), [[0, 0], [0, 1], [0, 2], [1, 2]]);
  });

  test("of a window are w to either side and the query's own, with causal w + 1", () => {
    const five = segment(5, 5);
    const symmetric = [[0, 2], [0, 3], [1, 4], [2, 5], [3, 5]];
    assertEquals(seen(five, { causal: false, slidingWindow: [1, 1] }), symmetric);
    const past = [[0, 1], [0, 2], [0, 3], [1, 4], [2, 5]];
    assertEquals(seen(five, { causal: true, slidingWindow: [2, 2] }), past);
    assertEquals(seen(segment(3, 3), { causal: false, slidingWindow: [0, 0] }), [[0, 1], [1, 2], [2, 3]]);
  });

  test("of a window past all keys are all", () => {
    const wide = Number.MAX_SAFE_INTEGER;
    assertEquals(seen(segment(2, 3), { causal: false, slidingWindow: [wide, wide] }), [[0, 3], [0, 3]]);
  });

  test("are those that the definition names, pair by pair", () => {
    fc.assert(
      fc.property(problems({ features: ["slidingWindow"] }), (shape) => {
        const { inputs, options } = randomCall(shape);
        const problem = mlaProblem(inputs, options);
        const sees = seesByPosition(inputs, options);
        for (const segment of segments(problem)) {
          const { item } = segment;
          for (const row of range(segment.queryStart, segment.queryEnd)) {
            const { start, end } = visibleKeys(segment, row, problem);
            const i = row - item * shape.queryLength;
            const expected = range(0, shape.keyLength).filter((j) => sees(i, j)).map((j) => item * shape.keyLength + j);
            assertEquals(range(start, end), expected);
            assertEquals(segment.keyStart <= start && start <= end && end <= segment.keyEnd, true);
          }
        }
      }),
      { numRuns: 300 },
    );
  });
});

describe("reach()", () => {
  test("is infinite where nothing bounds it, and 0 to the right with causal", () => {
    assertEquals(reach({ causal: false, slidingWindow: null }), [Infinity, Infinity]);
    assertEquals(reach({ causal: true, slidingWindow: null }), [Infinity, 0]);
    assertEquals(reach({ causal: false, slidingWindow: [3, 5] }), [3, 5]);
    assertEquals(reach({ causal: true, slidingWindow: [3, 5] }), [3, 0]);
  });
});
