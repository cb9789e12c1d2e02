// The layer's own kernels against their oracles, over odd widths, strides, and memory that is full of NaN where nobody writes.

import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import fc from "fast-check";
import { toGpu, toHost } from "../mod.ts";
import type { Capabilities } from "../src/gpu/capabilities.ts";
import type { GpuContext } from "../src/gpu/device.ts";
import { type KernelStep, KernelSteps } from "../src/gpu/kernel_steps.ts";
import { inQuads } from "../src/gpu/kernels/rotate.ts";
import { bytesOf, normStep, rotateStep } from "../src/gpu/layer_steps.ts";
import { columnsOfRun, columnUnit, dividedLinearSteps } from "../src/gpu/divided_linear.ts";
import {
  linearBytes,
  type LinearKernel,
  linearKernel,
  linearSteps,
  plainRows,
  whyNoMatrix,
} from "../src/gpu/linear.ts";
import { rotaryTable } from "../src/model/rotary.ts";
import type { RopeConfig } from "../src/model/rope_config.ts";
import { halfBits, toFloats, toHalves } from "../src/op/half.ts";
import { linear } from "../src/reference/linear.ts";
import { rmsNorm } from "../src/reference/rms_norm.ts";
import { rotateHeads } from "../src/reference/rotate.ts";
import { skip, skipEmulation, testContext } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { normals } from "./support/random_problem.ts";

type Stored = "f32" | "f16";

/** Numbers as they are once they are stored. */
function rounded(data: Float32Array, dtype: Stored): Float32Array {
  return dtype === "f16" ? toFloats(toHalves({ data, shape: [data.length] })).data : data;
}

/** A buffer that holds numbers. */
function uploaded(steps: KernelSteps, data: Float32Array, dtype: Stored): GPUBuffer {
  const bytes = new Uint8Array(bytesOf(data.length, dtype));
  const source = dtype === "f16" ? halfBits(toHalves({ data, shape: [data.length] }).data) : data;
  bytes.set(new Uint8Array(source.buffer, source.byteOffset, source.byteLength));
  return steps.upload(bytes.buffer);
}

/** Runs steps and reads a buffer; what nobody wrote is NaN. */
async function result(
  context: GpuContext,
  steps: KernelSteps,
  kernels: readonly KernelStep[],
  { buffer, dtype, count }: { readonly buffer: GPUBuffer; readonly dtype: Stored; readonly count: number },
): Promise<Float32Array> {
  await steps.bind("test", kernels);
  await steps.submit("test");
  const read = await toHost({ buffer, dtype, shape: [count], device: context.device });
  return toFloats(read).data;
}

/** Elements that are looked at behind a result. */
const behind = 8;

const drawn = (count: number, seed: number) => Float32Array.from({ length: count }, normals(seed));

/** A linear layer, everything that decides it. */
interface LinearCase {
  readonly rows: number;
  readonly inputs: number;
  readonly outputs: number;
  readonly items: number;
  readonly base: number;
  readonly between: number;
  readonly gap: number;
  readonly bias: boolean;
  readonly seed: number;
}

/** Gaps go with a bias: each kind of kernel is compiled for two kinds of calls, not for four. */
const linearCase = (quads: boolean, rows: readonly number[]) => {
  const unit = quads ? 4 : 1;
  const width = fc.integer({ min: 1, max: Math.floor(90 / unit) }).map((count) => count * unit);
  const space = fc.integer({ min: 0, max: 3 }).map((count) => count * unit);
  return fc.record({
    rows: fc.constantFrom(...rows),
    inputs: width,
    outputs: width,
    base: space,
    between: space,
    gap: space,
    bias: fc.boolean(),
    seed: fc.integer({ min: 0, max: 1e6 }),
  }).map((shape) => ({ ...shape, items: shape.bias ? [3, 2].find((count) => shape.rows % count === 0) ?? 1 : 1 }));
};

/** Runs one on the GPU, its rows spread over NaN, and compares. */
async function checkLinear(
  context: GpuContext,
  shape: LinearCase,
  kernel: LinearKernel,
  { left, weight, stored, capabilities = context.capabilities }: {
    readonly left: Stored;
    readonly weight: Stored;
    readonly stored: Stored;
    readonly capabilities?: Capabilities;
  },
): Promise<void> {
  const { inputs, outputs, base, between, seed } = shape;
  const { items } = shape;
  const perItem = shape.rows / items;
  const row = inputs + between;
  const gap = items > 1 ? shape.gap : 0;
  const rows = rounded(drawn(shape.rows * inputs, seed), left);
  const matrix = rounded(drawn(outputs * inputs, seed + 1).map((x) => x / Math.sqrt(inputs)), weight);
  const bias = shape.bias ? drawn(outputs, seed + 2) : undefined;

  const at = (r: number) => base + r * row + Math.floor(r / perItem) * gap;
  const spread = new Float32Array(Math.ceil((at(shape.rows - 1) + inputs) / 4) * 4).fill(NaN);
  for (let r = 0; r < shape.rows; r++) spread.set(rows.subarray(r * inputs, (r + 1) * inputs), at(r));
  const transposed = new Float32Array(inputs * outputs);
  for (let o = 0; o < outputs; o++) {
    for (let i = 0; i < inputs; i++) transposed[i * outputs + o] = matrix[o * inputs + i];
  }

  const steps = new KernelSteps(context);
  try {
    const layer = {
      buffer: uploaded(steps, transposed, weight),
      dtype: weight,
      inputs,
      outputs,
      ...(bias && { bias: uploaded(steps, bias, "f32") }),
    };
    const count = shape.rows * outputs;
    const into = { buffer: uploaded(steps, new Float32Array(count + behind).fill(NaN), stored), dtype: stored };
    assert(linearBytes(shape.rows, layer, stored) <= into.buffer.size);
    const given = {
      ...{ buffer: uploaded(steps, spread, left), size: bytesOf(spread.length, left), dtype: left, base, row },
      ...{ count: shape.rows, perItem, gap },
    };
    const kernels = linearSteps(steps, capabilities, "linear", given, layer, into, kernel);
    const found = await result(context, steps, kernels, { ...into, count: count + behind });
    const expected = linear(rows, matrix, inputs, bias);
    const bound = stored === "f16" || kernel === "matrix" ? { relL2: 1e-3 } : { relL2: 1e-5 };
    assertClose(
      { data: found.slice(0, count), shape: [count] },
      { data: expected, shape: [count] },
      { ...bound, absolute: stored === "f16" ? 1e-3 : 1e-6 },
      JSON.stringify(shape),
    );
    assert(found.subarray(count).every(Number.isNaN), "something was written behind the result");
  } finally {
    steps.dispose();
  }
}

describe("linear layers", { skip }, () => {
  const kinds: [
    name: string,
    kernel: LinearKernel,
    rows: readonly number[],
    quads: boolean,
    left: Stored,
    weight: Stored,
    stored: Stored,
  ][] = [
    ["a few rows, odd widths", "few", [1, 4, 12], false, "f32", "f32", "f32"],
    ["a few rows in quads", "few", [6, 17], true, "f32", "f32", "f32"],
    ["a few rows, halves, odd widths", "few", [9], false, "f16", "f16", "f16"],
    ["a few rows of float32 by halves in quads", "few", [2], true, "f32", "f16", "f32"],
    ["many rows, odd widths", "tiles", [3, 33, 60], false, "f32", "f32", "f32"],
    ["many rows in quads", "tiles", [32, 45], true, "f32", "f16", "f16"],
  ];
  for (const [name, kernel, rows, quads, left, weight, stored] of kinds) {
    test(`${name}: agree with the oracle`, async (t) => {
      const context = await testContext();
      if (!context.capabilities.f16 && [left, weight, stored].includes("f16")) return t.skip("no half precision");
      await fc.assert(
        fc.asyncProperty(
          linearCase(quads, rows),
          (shape) => checkLinear(context, shape, kernel, { left, weight, stored }),
        ),
        { numRuns: 12 },
      );
    });
  }

  test("a weight in several buffers: each writes its columns of the rows, and nothing else", async () => {
    const context = await testContext();
    const stored: readonly Stored[] = context.capabilities.f16 ? ["f32", "f16"] : ["f32"];
    const divided = fc.record({
      rows: fc.constantFrom(1, 3, 20),
      inputs: fc.integer({ min: 1, max: 12 }),
      outputs: fc.integer({ min: 1, max: 600 }),
      units: fc.integer({ min: 1, max: 3 }),
      dtype: fc.constantFrom(...stored),
      bias: fc.boolean(),
      seed: fc.integer({ min: 0, max: 1e6 }),
    });
    await fc.assert(
      fc.asyncProperty(divided, async ({ rows, inputs, outputs, units, dtype, bias, seed }) => {
        const values = rounded(drawn(rows * inputs, seed), dtype);
        const matrix = rounded(drawn(outputs * inputs, seed + 1).map((x) => x / Math.sqrt(inputs)), dtype);
        const added = bias ? drawn(outputs, seed + 2) : undefined;
        const steps = new KernelSteps(context);
        const runs = [];
        for (let first = 0; first < outputs; first += units * columnUnit) {
          const count = Math.min(units * columnUnit, outputs - first);
          const own = Float32Array.from({ length: inputs * count }, (_, i) => {
            return matrix[(first + i % count) * inputs + Math.floor(i / count)];
          });
          const buffer = uploaded(steps, own, dtype);
          const ownBias = added && uploaded(steps, added.slice(first, first + count), "f32");
          runs.push({ buffer, dtype, inputs, outputs: count, ...(ownBias && { bias: ownBias }) });
        }
        const count = rows * outputs;
        const into = { buffer: uploaded(steps, new Float32Array(count + behind).fill(NaN), dtype), dtype };
        const given = plainRows(uploaded(steps, values, dtype), dtype, rows, inputs);
        const weight = { dtype, inputs, outputs, runs };
        const kernels = dividedLinearSteps(steps, context.capabilities, "linear", given, weight, into);
        const found = await result(context, steps, kernels, { ...into, count: count + behind });
        steps.dispose();
        const shape = [count];
        const expected = { data: linear(values, matrix, inputs, added), shape };
        const within = dtype === "f16" ? { relL2: 1e-3, absolute: 1e-3 } : { relL2: 1e-5, absolute: 1e-6 };
        assertClose({ data: found.slice(0, count), shape }, expected, within);
        assert(found.subarray(count).every(Number.isNaN), "something was written behind the result");
      }),
      { numRuns: 15 },
    );
  });

  test("columns of a buffer are all, or whole units", () => {
    assertEquals(columnsOfRun(10, 1000, 4, 40_000), 1000);
    assertEquals(columnsOfRun(10, 1001, 4, 40_000), 896);
    assertEquals(columnsOfRun(10, 1001, 2, 5119), 128);
    assertEquals(columnsOfRun(10, 1001, 4, 5119), 0);
    assertEquals(columnsOfRun(1000, 3, 4, 12_000), 3);
  });

  test("on matrix units, to halves and to float32, with a bias and without", { skip: skipEmulation }, async () => {
    const context = await testContext();
    const { matrixUnits } = context.capabilities;
    const capabilities: Capabilities = { ...context.capabilities, matrixUnits: matrixUnits ?? "emulated" };
    for (const [stored, left] of [["f16", "f32"], ["f32", "f16"]] as const) {
      await fc.assert(
        fc.asyncProperty(
          linearCase(true, [17, 64, 70]).map((shape) => ({
            ...shape,
            inputs: shape.inputs * 2,
            outputs: Math.ceil(shape.outputs / 16) * 16,
            bias: stored === "f32",
          })),
          (shape) => checkLinear(context, shape, "matrix", { left, weight: "f16", stored, capabilities }),
        ),
        { numRuns: 6 },
      );
    }
  });

  test("which kernel runs follows from rows, elements and device", async () => {
    const { capabilities } = await testContext();
    const buffer = {} as GPUBuffer;
    const halves = { buffer, dtype: "f16" as const, inputs: 64, outputs: 64 };
    const floats = { ...halves, dtype: "f32" as const };
    const having = (matrixUnits: Capabilities["matrixUnits"]) => ({ ...capabilities, matrixUnits });
    assertEquals(linearKernel(16, halves, having("flag")), "few");
    assertEquals(linearKernel(17, halves, having("flag")), "matrix");
    assertEquals(linearKernel(17, halves, having("emulated")), "tiles");
    assertEquals(linearKernel(17, halves, having(null)), "tiles");
    assertEquals(linearKernel(17, floats, having("flag")), "tiles");
    assertEquals(linearKernel(17, { ...halves, outputs: 65 }, having("flag")), "tiles");
    assertEquals(whyNoMatrix({ ...halves, outputs: 65 }), "65 outputs are no multiple of 16");
  });
});

test("norms agree with the oracle, and leave what is between the parts alone", { skip }, async () => {
  const context = await testContext();
  await fc.assert(
    fc.asyncProperty(
      fc.record({
        rows: fc.integer({ min: 1, max: 40 }),
        widths: fc.array(fc.integer({ min: 1, max: 300 }), { minLength: 1, maxLength: 2 }),
        before: fc.integer({ min: 0, max: 5 }),
        epsilon: fc.constantFrom(1e-6, 1e-2),
        inHalves: fc.boolean(),
        seed: fc.integer({ min: 0, max: 1e6 }),
      }),
      async ({ rows, widths, before, epsilon, inHalves, seed }) => {
        let row = before;
        let weightAt = 0;
        const parts = widths.map((width) => {
          const part = { first: row, width, weight: weightAt };
          row += width + before;
          weightAt += width;
          return part;
        });
        const values = new Float32Array(rows * row).fill(NaN);
        const weights = drawn(weightAt, seed + 1);
        const random = normals(seed);
        const expected = new Float32Array(values);
        const apart = inHalves && context.capabilities.f16;
        const expectedApart = new Float32Array(apart ? rows * parts[0].width : 0);
        for (const { first, width, weight } of parts) {
          for (let r = 0; r < rows; r++) {
            const own = Float32Array.from({ length: width }, random);
            values.set(own, r * row + first);
            const normed = rmsNorm(own, weights.subarray(weight, weight + width), epsilon);
            const isApart = apart && weight === 0;
            if (isApart) expectedApart.set(normed, r * width);
            expected.set(isApart ? own : normed, r * row + first);
          }
        }
        const steps = new KernelSteps(context);
        const buffer = uploaded(steps, values, "f32");
        const halves = apart ? steps.borrow(bytesOf(expectedApart.length, "f16")) : undefined;
        const norms = uploaded(steps, weights, "f32");
        const step = normStep(steps, { buffer, count: rows, row }, parts, norms, epsilon, halves);
        const found = await result(context, steps, [step], { buffer, dtype: "f32", count: rows * row });
        assertClose({ data: found, shape: [rows * row] }, { data: expected, shape: [rows * row] }, { relL2: 1e-6 });
        if (halves !== undefined) {
          const count = expectedApart.length;
          const rounded = await result(context, steps, [], { buffer: halves, dtype: "f16", count });
          assertClose({ data: rounded, shape: [count] }, { data: expectedApart, shape: [count] }, { relL2: 1e-3 });
        }
        steps.dispose();
      },
    ),
    { numRuns: 25 },
  );
});

describe("the rotary embedding", { skip }, () => {
  const rope = (dim: number): RopeConfig => ({
    ...{ type: "default", dim, theta: 100, layout: "half", attentionFactor: 1.25, factor: 1 },
    ...{ maxPositionEmbeddings: 64, originalMaxPositionEmbeddings: 64, betaFast: 32, betaSlow: 1, truncate: true },
    ...{ shortFactor: [], longFactor: [] },
  });
  // Quads of float32 and halves, what has none, and what has them only on one side.
  const kinds: [before: number, dim: number, source: Stored, stored: Stored, space: number][] = [
    [8, 16, "f32", "f32", 4],
    [8, 8, "f32", "f16", 4],
    [4, 8, "f16", "f16", 4],
    [5, 6, "f32", "f32", 3],
    [3, 2, "f16", "f16", 1],
    [8, 16, "f32", "f32", 1],
    [12, 4, "f32", "f32", 4],
  ];
  for (const layout of ["interleaved", "half", null] as const) {
    test(`${layout ?? "of nothing"} agrees with the oracle, and writes rows only`, async () => {
      const context = await testContext();
      for (const [before, dim, from, to, space] of kinds) {
        const f16 = context.capabilities.f16;
        const [source, stored] = f16 ? [from, to] : ["f32", "f32"] as const;
        for (const tempered of [false, true]) {
          const [count, heads] = [5, tempered ? 3 : 1];
          const columns = heads * (before + dim);
          const row = columns + space;
          const rows = rounded(drawn(count * columns, before + dim), source);
          const spread = new Float32Array(Math.ceil((space + count * row) / 4) * 4).fill(NaN);
          for (let r = 0; r < count; r++) spread.set(rows.subarray(r * columns, (r + 1) * columns), space + r * row);
          const table = layout === null ? null : rotaryTable(rope(dim), [0, 3, 3, 17, 50]);
          const factors = tempered ? Float32Array.of(1, 0.5, 2, -1, 3) : null;
          const turns = new Float32Array(count * dim);
          table?.cos.forEach((cos, i) => turns.set([cos, table.sin[i]], 2 * i));
          const expected = rotateHeads(rows, { heads, before, dim, layout, table, factors: factors ?? undefined });

          const steps = new KernelSteps(context);
          const bound = (data: Float32Array) => ({
            buffer: uploaded(steps, data, "f32"),
            size: bytesOf(data.length, "f32"),
          });
          const resultRow = columns + space;
          const empty = new Float32Array(count * resultRow).fill(NaN);
          const into = { buffer: uploaded(steps, empty, stored), dtype: stored, row: resultRow };
          const step = rotateStep(steps, "rotate", {
            source: { buffer: uploaded(steps, spread, source), dtype: source, base: space, row },
            ...{ result: into, count, heads, before, dim, layout },
            turns: layout === null ? null : bound(turns),
            factors: factors === null ? null : bound(factors),
          }, context.capabilities.limits);
          const found = await result(context, steps, [step], { ...into, count: count * resultRow });
          steps.dispose();
          const what = `${before} + ${dim}, ${source} to ${stored}, ${heads} heads, ${space} apart`;
          for (let r = 0; r < count; r++) {
            const own = found.slice(r * resultRow, r * resultRow + columns);
            const wanted = expected.slice(r * columns, (r + 1) * columns);
            assertClose(
              { data: own, shape: [columns] },
              { data: wanted, shape: [columns] },
              { relL2: stored === "f16" ? 1e-3 : 1e-6 },
              `${what}, row ${r}`,
            );
            const padding = found.subarray(r * resultRow + columns, (r + 1) * resultRow);
            assert(padding.every(Number.isNaN), `${what}: something was written behind row ${r}`);
          }
        }
      }
    });
  }

  test("goes by quads only where each is of one part of one head", () => {
    assert(inQuads({ before: 128, dim: 64, layout: "half" }));
    assert(inQuads({ before: 8, dim: 4, layout: "interleaved" }));
    assert(!inQuads({ before: 8, dim: 4, layout: "half" }));
    assert(!inQuads({ before: 6, dim: 8, layout: "interleaved" }));
  });
});

test("toGpu() and the test's own upload agree", { skip }, async () => {
  const context = await testContext();
  const steps = new KernelSteps(context);
  const data = drawn(7, 1);
  const buffer = uploaded(steps, data, "f16");
  const read = await toHost({ buffer, dtype: "f16", shape: [7], device: context.device });
  using same = await toGpu(toHalves({ data, shape: [7] }));
  assertEquals(toFloats(read).data, toFloats(await toHost(same)).data);
  steps.dispose();
});
