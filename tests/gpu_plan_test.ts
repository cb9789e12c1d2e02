import { describe, test } from "node:test";
import { assert, assertEquals, assertThrows } from "@std/assert";
import fc from "fast-check";
import { attentionPlan, paramsBytes, paramsStride, whyInvalid } from "../src/gpu/attention_plan.ts";
import { type Capabilities, defaultLimits } from "../src/gpu/capabilities.ts";
import * as attend from "../src/gpu/kernels/attend.ts";
import { blockWords, type RowRange, schedule } from "../src/gpu/schedule.ts";
import { FlashMLAError } from "../src/op/errors.ts";
import { floatInputs, type MlaProblem, mlaProblem } from "../src/op/mla_problem.ts";
import { pieces } from "../src/op/pieces.ts";
import { segments, visibleKeyEnd } from "../src/op/segments.ts";
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
  limits: defaultLimits,
};

const randomProblems = problems().map((shape) => {
  const { inputs, options } = randomCall(shape);
  return { inputs, problem: mlaProblem(inputs, options) };
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
          const seen: number[][] = Array.from({ length: rows }, () => []);
          for (let start = 0; start < rows; start += cut) {
            for (const [row, from, to] of visible(problem, blockQ, { start, end: Math.min(start + cut, rows) })) {
              seen[row].push(from, to);
            }
          }
          for (const segment of segments(problem)) {
            for (let row = segment.queryStart; row < segment.queryEnd; row++) {
              assertEquals(seen[row], [segment.keyStart, visibleKeyEnd(segment, row, problem.causal)], `row ${row}`);
            }
          }
        },
      ),
      { numRuns: 300 },
    );
  });

  test("starts the longest blocks first", () => {
    const words = schedule(v3, 128, { start: 0, end: 4096 });
    const keys = Array.from({ length: words.length / blockWords }, (_, i) => words[i * blockWords + 3]);
    assertEquals(keys, keys.toSorted((a, b) => b - a));
    assertEquals(keys.length, 32);
  });

  /** [row, first key, one past the last key] of every row of a range, as the kernel works it out. */
  function visible(problem: MlaProblem, blockQ: number, range: RowRange): [number, number, number][] {
    const words = schedule(problem, blockQ, range);
    const found: [number, number, number][] = [];
    for (let i = 0; i < words.length; i += blockWords) {
      const [queryStart, queryEnd, keyStart, keyEnd, sharedEnd] = words.subarray(i, i + blockWords);
      const diagonal = words[i + 5] | 0;
      assert(queryEnd - queryStart <= blockQ && queryEnd > queryStart);
      const ends = Array.from(
        { length: queryEnd - queryStart },
        (_, r) => Math.max(keyStart, Math.min(keyEnd, Math.max(queryStart + r + diagonal, 0))),
      );
      assertEquals(Math.max(...ends), keyEnd);
      assertEquals(Math.min(...ends), sharedEnd);
      ends.forEach((end, r) => found.push([queryStart + r + range.start, keyStart, end]));
    }
    return found;
  }
});

describe("attentionPlan()", () => {
  test("keeps expanded keys and values within 256 MiB and a binding", () => {
    const plan = attentionPlan(v3, smallConfig, least);
    assert(plan.keysBytes + plan.valuesBytes <= 256 * 2 ** 20);
    assert(plan.keysBytes <= defaultLimits.maxStorageBufferBindingSize);
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
      ["the expanded keys or values of one head", { keyLength: 2 ** 15, vHeadDim: 2048, queryHeads: 1, kvHeads: 1 }],
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
      fc.property(randomProblems, fc.integer({ min: 1, max: 40 }), ({ problem, inputs }, maxKeyRows) => {
        const parts = pieces(problem, inputs, maxKeyRows);
        let queryRow = 0;
        for (const part of parts) {
          assertEquals(part.queryRow, queryRow);
          assertEquals(mlaProblem(part.inputs, problem), part.problem);
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
