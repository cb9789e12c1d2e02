// The instruments are tested too: a metric, a reader or a property that cannot fail would make every other test worthless.

import { describe, test } from "node:test";
import { assertAlmostEquals, assertEquals, assertRejects, assertThrows } from "@std/assert";
import fc from "fast-check";
import { type HostInputs, mlaProblem } from "../src/op/mla_problem.ts";
import { tensor } from "../src/op/tensor.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { type Attention, attentionProperties } from "./support/attention_properties.ts";
import { assertClose, cosDiff, relL2 } from "./support/metrics.ts";
import { normals, packedProblems, problems, randomCall } from "./support/random_problem.ts";
import { parseSafetensors } from "./support/safetensors.ts";

const correct: Attention = (inputs, options) => referenceMlaAttention(inputs, mlaProblem(inputs, options));

/** Attention with one mistake each, and the properties that notice it, by the start of their names. */
const mistakes: Record<string, { attention: Attention; noticedBy: string[] }> = {
  "ignores causal": {
    attention: (inputs, options) => correct(inputs, { ...options, causal: false }),
    noticedBy: ["causal rows", "rows are means", "rows without", "NaN keys"],
  },
  "aligns causal top-left": {
    attention: (inputs, options) =>
      options.causal ? correct(alignedTopLeft(inputs), options) : correct(inputs, options),
    noticedBy: ["the last queries"],
  },
  "lets packed sequences see each other": {
    attention: (inputs, options) => correct({ ...inputs, cuSeqlens: undefined }, options),
    noticedBy: ["packed", "NaN keys"],
  },
  "reads batch item 0 for all": {
    attention: (inputs, options) => correct({ ...inputs, keyValue: firstItemForAll(inputs.keyValue) }, options),
    noticedBy: ["batch items"],
  },
  "ignores softmaxScale": {
    attention: (inputs, options) => correct(inputs, { ...options, softmaxScale: undefined }),
    noticedBy: ["a factor"],
  },
  "takes 1/√P for the default scale": {
    attention: (inputs, options) => correct(inputs, { softmaxScale: inputs.wKc.shape[2] ** -0.5, ...options }),
    noticedBy: ["softmaxScale defaults"],
  },
  "weighs keys by their position": {
    attention: (inputs, options) => correct({ ...inputs, keyValue: fading(inputs.keyValue) }, options),
    noticedBy: ["the order", "every key twice"],
  },
  "loses accuracy in large scores": {
    attention: (inputs, options) => correct({ ...inputs, bK: inputs.bK && rounded(inputs.bK) }, options),
    noticedBy: ["a constant"],
  },
  "deals heads out to KV heads in turn": {
    attention: (inputs, options) => correct({ ...inputs, query: headsInTurn(inputs) }, options),
    noticedBy: ["grouped"],
  },
  "drops a shared rope": {
    attention: (inputs, options) =>
      correct({ ...inputs, bQ: inputs.bQ && { ...inputs.bQ, data: new Float32Array(inputs.bQ.data.length) } }, options),
    noticedBy: ["shared rope"],
  },
  "adds 1 to every rotary key": {
    attention: (inputs, options) =>
      correct({ ...inputs, bK: inputs.bK && { ...inputs.bK, data: inputs.bK.data.map((x, i) => x + i % 2) } }, options),
    noticedBy: ["zero rope"],
  },
  "mixes value columns": {
    attention: async (inputs, options) => {
      const { data, shape } = await correct(inputs, options);
      return { data: data.map((x, i) => x + data[i - i % shape[3]]), shape };
    },
    noticedBy: ["value columns", "rows are means"],
  },
  "masks by multiplying": {
    attention: async (inputs, options) => {
      const { data, shape } = await correct(inputs, options);
      const leak = 0 * inputs.keyValue.data.reduce((sum, x) => sum + x, 0) + 0 * inputs.query.data[0];
      return { data: data.map((x) => x + leak), shape };
    },
    noticedBy: ["NaN keys", "NaN queries"],
  },
  "swallows NaN": {
    attention: async (inputs, options) => {
      const { data, shape } = await correct(inputs, options);
      return { data: data.map((x) => Number.isNaN(x) ? 0 : x), shape };
    },
    noticedBy: ["NaN keys", "NaN queries"],
  },
};

function alignedTopLeft(inputs: HostInputs): HostInputs {
  const [batch, queries] = inputs.query.shape;
  const keys = inputs.keyValue.shape[1];
  if (queries >= keys) return inputs;
  const cut = (rows: HostInputs["keyValue"]) => {
    const width = rows.shape[2];
    const data = Array.from({ length: batch }, (_, b) => [
      ...rows.data.subarray(b * keys * width, (b * keys + queries) * width),
    ]);
    return tensor(Float32Array.from(data.flat()), [batch, queries, width]);
  };
  return { ...inputs, keyValue: cut(inputs.keyValue), ...(inputs.bK ? { bK: cut(inputs.bK) } : {}) };
}

function firstItemForAll({ data, shape }: HostInputs["keyValue"]): HostInputs["keyValue"] {
  return { data: data.map((_, i) => data[i % (shape[1] * shape[2])]), shape };
}

function fading({ data, shape }: HostInputs["keyValue"]): HostInputs["keyValue"] {
  return { data: data.map((x, i) => x / (1 + Math.floor(i / shape[2]))), shape };
}

function rounded({ data, shape }: HostInputs["keyValue"]): HostInputs["keyValue"] {
  return { data: data.map((x) => Number(x.toPrecision(2))), shape };
}

function headsInTurn({ query, wKc }: HostInputs): HostInputs["query"] {
  const [batch, length, heads, width] = query.shape;
  const groups = wKc.shape[1];
  const data = new Float32Array(query.data.length);
  for (let row = 0; row < batch * length; row++) {
    for (let h = 0; h < heads; h++) {
      const from = (h % groups) * (heads / groups) + Math.floor(h / groups);
      data.set(
        query.data.subarray((row * heads + from) * width, (row * heads + from + 1) * width),
        (row * heads + h) * width,
      );
    }
  }
  return { data, shape: query.shape };
}

describe("attentionProperties", () => {
  for (const [name, { attention, noticedBy }] of Object.entries(mistakes)) {
    test(`notice attention that ${name}`, async () => {
      for (const start of noticedBy) {
        const property = attentionProperties.find(({ name }) => name.startsWith(start))!;
        await assertRejects(() => property.check(attention, { runs: 200, tolerance: 1e-5 }), Error);
      }
    });
  }

  test("each notices some mistake", () => {
    const starts = Object.values(mistakes).flatMap(({ noticedBy }) => noticedBy);
    const unused = attentionProperties.filter(({ name }) => !starts.some((start) => name.startsWith(start)));
    assertEquals(unused, []);
  });
});

describe("relL2() and cosDiff()", () => {
  test("are 0 for equal values, NaN and infinities included", () => {
    const values = [1, -2, NaN, Infinity, -Infinity, 0];
    assertEquals([relL2(values, values), cosDiff(values, values)], [0, 0]);
  });

  test("are what the formulas say", () => {
    assertAlmostEquals(relL2([3, 4.5], [3, 4]), 0.5 / 5, 1e-15);
    assertAlmostEquals(cosDiff([3, 4.5], [3, 4]), 1 - (2 * (9 + 18)) / (9 + 9 + 16 + 20.25), 1e-15);
  });

  test("are infinite where non-finite values differ in place or kind, or lengths differ", () => {
    for (
      const [actual, expected] of [
        [[NaN, 1], [1, NaN]],
        [[NaN], [0]],
        [[0], [NaN]],
        [[Infinity], [-Infinity]],
        [[Infinity], [NaN]],
        [[1], [1, 1]],
      ]
    ) assertEquals([relL2(actual, expected), cosDiff(actual, expected)], [Infinity, Infinity]);
  });

  test("know an expected result of zeros", () => {
    assertEquals([relL2([0, 0], [0, 0]), relL2([0, 1e-9], [0, 0])], [0, Infinity]);
    assertEquals(cosDiff([0, 1e-9], [0, 0]), 0);
  });
});

describe("assertClose()", () => {
  const expected = tensor(Float32Array.of(3, 4), [1, 2]);

  test("passes inside the bounds", () => {
    assertClose(expected, expected, { relL2: 0, cosDiff: 0 });
    assertClose(tensor(Float32Array.of(3, 4.25), [1, 2]), expected, { relL2: 0.06, cosDiff: 0.002 });
    assertClose(tensor(Float32Array.of(3, 4.25), [1, 2]), expected, { relL2: 0, absolute: 0.2 });
  });

  test("names the bound and the worst element", () => {
    const off = tensor(Float32Array.of(3, 4.25), [1, 2]);
    assertThrows(() => assertClose(off, expected, { relL2: 0.04 }), Error, "relL2 0.05 > 0.04; worst at [0,1]: 4.25");
    assertThrows(() => assertClose(off, expected, { cosDiff: 1e-4 }), Error, "cosDiff");
    assertThrows(() => assertClose(off, expected, { relL2: 0, absolute: 0.1 }), Error, "relL2");
  });

  test("names shapes and non-finite elements that differ", () => {
    assertThrows(() => assertClose(tensor(expected.data, [2, 1]), expected, {}), Error, "shape [2,1], expected [1,2]");
    const bad = tensor(Float32Array.of(3, NaN), [1, 2]);
    assertThrows(() => assertClose(bad, expected, { relL2: 9 }, "out"), Error, "out: NaN at element 1, expected 4");
  });
});

describe("random problems", () => {
  test("are all valid, and the same record grows the same call", () => {
    fc.assert(fc.property(problems(), (shape) => {
      const { inputs, options } = randomCall(shape);
      const problem = mlaProblem(inputs, options);
      assertEquals([problem.queryLength, problem.keyLength], [shape.queryLength, shape.keyLength]);
      assertEquals(randomCall(shape), { inputs, options });
    }));
  });

  test("reach every rope mode, lengths of 0, unequal lengths and empty packed sequences", () => {
    const drawn = fc.sample(problems(), { numRuns: 300, seed: 1 });
    assertEquals(new Set(drawn.map(({ rope }) => rope)).size, 3);
    const some = (holds: (shape: typeof drawn[number]) => boolean) => drawn.filter(holds).length >= 5;
    assertEquals(some(({ queryLength, keyLength }) => queryLength > keyLength && keyLength > 0), true);
    assertEquals(some(({ queryLength, keyLength }) => queryLength < keyLength && queryLength > 0), true);
    assertEquals(some(({ batch }) => batch === 0), true);
    assertEquals(some(({ keyLength }) => keyLength === 0), true);
    const packed = fc.sample(packedProblems(), { numRuns: 100, seed: 1 });
    assertEquals(packed.some(({ cuSeqlens }) => cuSeqlens!.some((end, i) => i > 0 && end === cuSeqlens![i - 1])), true);
  });

  test("draw normal numbers: mean 0, variance 1, and values() within ±1 when small", () => {
    const random = normals(5);
    const drawn = Array.from({ length: 20_000 }, random);
    const mean = drawn.reduce((sum, x) => sum + x, 0) / drawn.length;
    const variance = drawn.reduce((sum, x) => sum + (x - mean) ** 2, 0) / drawn.length;
    assertAlmostEquals(mean, 0, 0.03);
    assertAlmostEquals(variance, 1, 0.05);
  });
});

describe("parseSafetensors()", () => {
  /** A file with this header, followed by `size` data bytes 0, 1, 2, … */
  function file(header: object, size: number): Uint8Array {
    const text = new TextEncoder().encode(JSON.stringify(header));
    const bytes = new Uint8Array(8 + text.length + size);
    new DataView(bytes.buffer).setBigUint64(0, BigInt(text.length), true);
    bytes.set(text, 8);
    for (let i = 0; i < size; i++) bytes[8 + text.length + i] = i;
    return bytes;
  }

  test("reads metadata and tensors, at any alignment", () => {
    const header = {
      __metadata__: { oracle: "none" },
      mask: { dtype: "U8", shape: [3], data_offsets: [0, 3] },
      ids: { dtype: "I32", shape: [1, 2], data_offsets: [3, 11] },
    };
    const { metadata, tensors } = parseSafetensors(file(header, 11));
    assertEquals(metadata, { oracle: "none" });
    assertEquals(tensors.get("mask"), { dtype: "U8", shape: [3], data: Uint8Array.of(0, 1, 2) });
    assertEquals(tensors.get("ids"), { dtype: "I32", shape: [1, 2], data: Int32Array.of(0x06050403, 0x0a090807) });
  });

  test("refuses what is broken", () => {
    const one = { dtype: "F32", shape: [2], data_offsets: [0, 8] };
    const cases: [Uint8Array, string][] = [
      [new Uint8Array(7), "7 bytes hold no header length"],
      [file({}, 0).subarray(0, 9), "a header of 2 bytes in a file of 9"],
      [file({ one: { ...one, dtype: "F8" } }, 8), "one has unknown element type F8"],
      [file({ one: { ...one, shape: [3] } }, 8), "one [3] of F32 cannot lie at bytes 0 to 8"],
      [file({ one: { ...one, data_offsets: [4, 12] } }, 12), "one [2] of F32 cannot lie at bytes 4 to 12"],
      [file({ one, two: one }, 8), "two [2] of F32 cannot lie at bytes 0 to 8, after 8 used bytes"],
      [file({ one }, 4), "one [2] of F32 cannot lie at bytes 0 to 8"],
      [file({ one }, 9), "1 bytes after the last tensor"],
    ];
    for (const [bytes, message] of cases) assertThrows(() => parseSafetensors(bytes), Error, message);
  });
});
