import { describe, test } from "node:test";
import { assert, assertEquals, assertThrows } from "@std/assert";
import fc from "fast-check";
import { attentionPlan, whyInvalid } from "../src/gpu/attention_plan.ts";
import { type Capabilities, defaultLimits } from "../src/gpu/capabilities.ts";
import { paramsBytes, paramsStride } from "../src/gpu/dispatch_plan.ts";
import * as attend from "../src/gpu/kernels/attend.ts";
import { type BlockOwner, blockWords, type RowRange, schedule } from "../src/gpu/schedule.ts";
import { FlashMLAError } from "../src/op/errors.ts";
import { floatInputs, type MlaProblem, mlaProblem } from "../src/op/mla_problem.ts";
import { pieces } from "../src/op/pieces.ts";
import { segments, visibleKeys } from "../src/op/segments.ts";
import { smallConfig } from "./support/gpu.ts";
import { problems, randomCall } from "./support/random_problem.ts";

const v3: MlaProblem = {
  batch: 1,
  queryLength: 4096,
  keyLength: 4096,
  queryHeads: 128,
  kvHeads: 128,
  kvLoraRank: 512,
  qkNopeHeadDim: 128,
  qkRopeHeadDim: 64,
  vHeadDim: 128,
  rope: "in_query",
  causal: true,
  softmaxScale: 192 ** -0.5,
  cuSeqlens: null,
  logitsSoftCap: null,
  slidingWindow: null,
  scoreTerm: "none",
  sinks: 0,
  dropout: null,
  precision: "f32",
  dtype: "f32",
};

const least: Capabilities = {
  engine: "test",
  adapter: "the least WebGPU allows",
  software: false,
  f16: false,
  subgroups: null,
  timestamps: "none",
  subgroupMatrices: [],
  matrixUnits: null,
  limits: defaultLimits,
};

const windows = fc.oneof(
  fc.constant(undefined),
  fc.integer({ min: 1, max: 9 }),
  fc.tuple(fc.nat(9), fc.nat(9)),
);

const randomProblems = fc.tuple(problems(), windows).map(([shape, slidingWindow]) => {
  const { inputs, options } = randomCall(shape);
  const math = { ...options, slidingWindow };
  return { inputs, options: math, problem: mlaProblem(inputs, math) };
});

describe("schedule()", () => {
  test("covers every row once and sees exactly what the row sees", () => {
    fc.assert(
      fc.property(
        randomProblems,
        fc.integer({ min: 1, max: 9 }),
        fc.integer({ min: 1, max: 20 }),
        (drawn, blockQ, cut) => {
          const { problem } = drawn;
          const rows = problem.batch * problem.queryLength;
          const seen: string[] = [];
          const covered = new Set<number>();
          for (let start = 0; start < rows; start += cut) {
            for (const [row, columns] of visible(problem, blockQ, { start, end: Math.min(start + cut, rows) })) {
              assert(!covered.has(row + start), `row ${row + start} twice`);
              covered.add(row + start);
              columns.forEach((key) => seen.push(`${row + start} ${key}`));
            }
          }
          assertEquals(seen.toSorted(), visiblePairs(problem));
          assertEquals(covered.size, rows);
        },
      ),
      { numRuns: 300 },
    );
  });

  test("gives keys the queries that see them, range by range", () => {
    fc.assert(
      fc.property(
        randomProblems,
        fc.integer({ min: 1, max: 9 }),
        fc.integer({ min: 1, max: 20 }),
        ({ problem }, blockK, cut) => {
          const rows = problem.batch * problem.queryLength;
          const seen: string[] = [];
          for (let start = 0; start < rows; start += cut) {
            const range = { start, end: Math.min(start + cut, rows) };
            for (const [key, queries] of visible(problem, blockK, range, "keys")) {
              queries.forEach((query) => seen.push(`${query + start} ${key}`));
            }
          }
          assertEquals(seen.toSorted(), visiblePairs(problem));
        },
      ),
      { numRuns: 300 },
    );
  });

  test("visits no block of keys outside of a window", () => {
    const problem: MlaProblem = { ...v3, queryLength: 32768, keyLength: 32768, slidingWindow: [512, 512] };
    const words = schedule(problem, 128, { start: 0, end: 32768 });
    for (let i = 0; i < words.length; i += blockWords) assert(words[i + 3] - words[i + 2] <= 512 + 128);
  });

  test("starts the longest blocks first", () => {
    const words = schedule(v3, 128, { start: 0, end: 4096 });
    const keys = Array.from({ length: words.length / blockWords }, (_, i) => words[i * blockWords + 3]);
    assertEquals(keys, keys.toSorted((a, b) => b - a));
    assertEquals(keys.length, 32);
  });

  /** Every row of a range with the columns that it sees, as the kernels work it out. */
  function visible(
    problem: MlaProblem,
    blockRows: number,
    range: RowRange,
    owner: BlockOwner = "queries",
  ): [row: number, columns: number[]][] {
    const words = schedule(problem, blockRows, range, owner);
    const found: [number, number[]][] = [];
    for (let i = 0; i < words.length; i += blockWords) {
      const [rowStart, rowEnd, columnStart, columnEnd, sharedStart, sharedEnd] = words.subarray(i, i + blockWords);
      const [diagonalStart, diagonalEnd] = [words[i + 6] | 0, words[i + 7] | 0];
      assert(rowEnd - rowStart <= blockRows && rowEnd > rowStart);
      const union = new Set<number>();
      for (let row = rowStart; row < rowEnd; row++) {
        const columns: number[] = [];
        for (let column = columnStart; column < columnEnd; column++) {
          const sees = column >= row + diagonalStart && column < row + diagonalEnd;
          if (sees) columns.push(column);
          // Where kernels do not mask, every row sees everything.
          if (column >= sharedStart && column < sharedEnd) assert(sees, `row ${row} hides ${column}`);
        }
        columns.forEach((column) => union.add(column));
        found.push([row, columns]);
      }
      if (union.size > 0) assertEquals([Math.min(...union), Math.max(...union)], [columnStart, columnEnd - 1]);
    }
    return found;
  }

  function visiblePairs(problem: MlaProblem): string[] {
    const pairs: string[] = [];
    for (const segment of segments(problem)) {
      for (let row = segment.queryStart; row < segment.queryEnd; row++) {
        const { start, end } = visibleKeys(segment, row, problem);
        for (let key = start; key < end; key++) pairs.push(`${row} ${key}`);
      }
    }
    return pairs.toSorted();
  }
});

describe("attentionPlan()", () => {
  test("keeps expanded keys and values within 256 MiB and a binding", () => {
    const plan = attentionPlan(v3, smallConfig, least);
    assert(plan.scratch.expanded! <= Math.min(256 * 2 ** 20, defaultLimits.maxStorageBufferBindingSize));
    const heads = plan.dispatches.filter(({ kernel }) => kernel === "attend").map(({ workgroups }) => workgroups[0]);
    assertEquals(heads.reduce((sum, n) => sum + n, 0), 128 * plan.queryRanges.length);
  });

  test("cuts queries so that no binding passes the limit", () => {
    const { queryRanges } = attentionPlan(v3, smallConfig, least);
    assert(queryRanges.length > 1);
    for (const { start, end } of queryRanges) {
      assert((end - start) * 128 * 192 * 4 <= defaultLimits.maxStorageBufferBindingSize);
    }
    assertEquals(queryRanges[queryRanges.length - 1].end, 4096);
  });

  test("splits dispatches past the limit on workgroups", () => {
    const limits = { ...defaultLimits, maxComputeWorkgroupsPerDimension: 16 };
    const problem = { ...v3, queryHeads: 8, kvHeads: 2, keyLength: 1024, queryLength: 1024, kvLoraRank: 16 };
    const plan = attentionPlan({ ...problem, qkNopeHeadDim: 32, vHeadDim: 32 }, smallConfig, { ...least, limits });
    for (const { workgroups } of plan.dispatches) assert(Math.max(...workgroups) <= 16);
    const rows = plan.dispatches.filter(({ kernel }) => kernel === "attend")
      .reduce((sum, { workgroups: [heads, blocks] }) => sum + heads * blocks, 0);
    assertEquals(rows, 8 * 1024 / 32);
  });

  test("gives each dispatch its own parameters", () => {
    const plan = attentionPlan(v3, smallConfig, least);
    assertEquals(plan.dispatches.map(({ params }) => params), plan.dispatches.map((_, i) => i));
    assertEquals(plan.params.byteLength, plan.dispatches.length * paramsStride);
    assert(paramsBytes <= paramsStride);
  });

  for (
    const [what, change] of [
      ["keyValue", { keyLength: 2 ** 17 }],
      ["wKc", { kvHeads: 1024, queryHeads: 1024 }],
      ["the expanded keys and values of one head", { keyLength: 2 ** 15, vHeadDim: 2048, queryHeads: 1, kvHeads: 1 }],
    ] as const
  ) {
    test(`names the limit when ${what} passes it`, () => {
      const error = assertThrows(() => attentionPlan({ ...v3, ...change }, smallConfig, least), FlashMLAError);
      assertEquals(error.code, "limit");
      assert(error.message.includes(what) && error.message.includes("maxStorageBufferBindingSize is 134217728"));
    });
  }
});

describe("whyInvalid()", () => {
  const wrong: [string, Partial<typeof smallConfig>, string][] = [
    ["a fraction", { blockQ: 1.5 }, "blockQ must be a positive integer"],
    ["a missing field", { numWarps: undefined }, "numWarps must be a positive integer"],
    ["three stages", { numStages: 3 }, "numStages must be 1 or 2"],
    ["odd rows", { rowsPerThread: 3 }, "rowsPerThread must be a multiple of 4"],
    ["rows that do not divide", { blockQ: 36, rowsPerThread: 8 }, "blockQ 36 is not a multiple of rowsPerThread 8"],
    ["keys that do not divide", { blockK: 40 }, "blockK 40 is not a multiple of 4 keys × 8 columns"],
    ["a deep slice", { blockDepth: 12 }, "blockDepth 12 does not divide"],
    ["too many invocations", { blockQ: 256, numWarps: 16 }, "maxComputeInvocationsPerWorkgroup = 256"],
    [
      "too much workgroup memory",
      { blockK: 64, blockDepth: 32, probKeys: 4 },
      "maxComputeWorkgroupStorageSize = 16384",
    ],
    ["an expansion tile of its own", { expandBlock: 48 }, "expandBlock must be 32, 64 or 128"],
    ["subgroups of a device that has none", { subgroups: true }, "subgroups is true, the device has none"],
    ["no word on subgroups", { subgroups: undefined }, "subgroups must be true or false, got undefined"],
    ["probabilities of no slice", { probKeys: 3 }, "probKeys must be 1, 2 or a multiple of 4"],
  ];
  for (const [what, change, message] of wrong) {
    test(`refuses ${what}`, () => {
      const reason = whyInvalid({ ...smallConfig, ...change } as typeof smallConfig, v3, least);
      assert(reason?.includes(message), `${reason}`);
    });
  }

  test("counts the workgroup memory that the kernel declares", () => {
    for (
      const tile of [smallConfig, { ...smallConfig, blockQ: 64, blockK: 64, numStages: 2, probKeys: 2, blockDepth: 8 }]
    ) {
      const code = attentionPlan(v3, tile, least).kernels.attend;
      const declared = [...code.matchAll(/var<workgroup> \w+: array<array<array<vec4<f32>, (\d+)>, (\d+)>, (\d+)>/g)]
        .reduce((sum, [, a, b, c]) => sum + 16 * Number(a) * Number(b) * Number(c), 16);
      assertEquals(attend.workgroupBytes(tile, v3), declared);
    }
  });
});

describe("pieces()", () => {
  test("are whole sequences, in order, that make up the call", () => {
    fc.assert(
      fc.property(randomProblems, fc.integer({ min: 1, max: 40 }), ({ problem, inputs, options }, maxKeyRows) => {
        const parts = pieces(problem, inputs, maxKeyRows);
        let queryRow = 0;
        for (const part of parts) {
          assertEquals(part.queryRow, queryRow);
          assertEquals(mlaProblem(part.inputs, options), part.problem);
          queryRow += part.problem.batch * part.problem.queryLength;
          const whole = segments(part.problem).filter(({ keyStart, keyEnd }) => keyEnd > keyStart);
          assert(part.problem.batch * part.problem.keyLength <= maxKeyRows || whole.length === 1);
        }
        assertEquals(queryRow, problem.batch * problem.queryLength);
        assertEquals(parts.flatMap(({ inputs }) => [...floatInputs(inputs).query.data]), [...inputs.query.data]);
      }),
      { numRuns: 300 },
    );
  });
});
