// The rotary embedding: what it does to scores and norms, and its tables against the formulas of each type.

import { describe, test } from "node:test";
import { assertAlmostEquals, assertEquals, assertThrows } from "@std/assert";
import fc from "fast-check";
import { FlashMLAError } from "../src/op/errors.ts";
import { inverseFrequencies, rotaryTable, rotate } from "../src/model/rotary.ts";
import { type RopeConfig, ropeConfig, ropeFields, type RopeLayout } from "../src/model/rope_config.ts";
import { normals } from "./support/random_problem.ts";

/** The rotary embedding of some rope fields, for 2,048 tokens. */
function rope(fields: Record<string, unknown>, dim = 16, layout: RopeLayout = "interleaved"): RopeConfig {
  const read = ropeFields({ rope_parameters: fields }, { maxPositionEmbeddings: 2048, theta: 10000 });
  return ropeConfig(read, dim, layout, 2048);
}

const longFactors = Array.from({ length: 8 }, (_, i) => 1 + i);
const kinds: Readonly<Record<string, Record<string, unknown>>> = {
  default: {},
  linear: { rope_type: "linear", factor: 4 },
  dynamic: { rope_type: "dynamic", factor: 4 },
  yarn: { rope_type: "yarn", factor: 40, original_max_position_embeddings: 64, mscale: 1, mscale_all_dim: 0.5 },
  longrope: { rope_type: "longrope", factor: 4, short_factor: longFactors, long_factor: longFactors.toReversed() },
};

const layouts = fc.constantFrom<RopeLayout>("interleaved", "half");
const positions = fc.integer({ min: 0, max: 1000 });
const seeds = fc.integer({ min: 0, max: 1e6 });
const dot = (a: ArrayLike<number>, b: ArrayLike<number>) =>
  Array.from(a).reduce((sum, value, i) => sum + value * b[i], 0);
/** Half a unit in the last place of 1: how far rounding to float32 takes a number, in parts of it. */
const rounding = 2 ** -24;
/** A pair's power of the base is rounded, after its exponent was, which the base's logarithm enlarges; so is the inverse. */
const frequencyError = (Math.log(10000) + 2) * rounding;
const relativelyClose = (actual: ArrayLike<number>, expected: ArrayLike<number>, tolerance: number) => {
  assertEquals(actual.length, expected.length);
  for (let i = 0; i < actual.length; i++) assertAlmostEquals(actual[i] / expected[i], 1, tolerance);
};
const close = (actual: ArrayLike<number>, expected: ArrayLike<number>, tolerance: number) => {
  assertEquals(actual.length, expected.length);
  for (let i = 0; i < actual.length; i++) {
    assertAlmostEquals(actual[i], expected[i], tolerance * Math.max(1, Math.abs(expected[i])));
  }
};

describe("rotate()", () => {
  for (const [kind, fields] of Object.entries(kinds)) {
    test(`${kind}: a query's score of a key depends on their distance only`, () => {
      fc.assert(fc.property(layouts, positions, positions, positions, seeds, (layout, i, j, shift, seed) => {
        const embedding = rope(fields, 16, layout);
        const random = normals(seed);
        const [q, k] = [Float32Array.from({ length: 16 }, random), Float32Array.from({ length: 16 }, random)];
        const score = (by: number) => {
          // Both of one sequence: its length decides the frequencies of dynamic and longrope.
          const turned = [q, k].map((row, n) =>
            rotate(row, rotaryTable(embedding, [by + (n === 0 ? i : j)], 2048), layout)
          );
          return dot(turned[0], turned[1]);
        };
        // Each angle, of at most one radian per position, is rounded once; the rest rounds cosines, sines and turned rows.
        const turns = (i + shift) + (j + shift) + i + j;
        const size = Math.sqrt(dot(q, q) * dot(k, k)) * embedding.attentionFactor ** 2;
        assertAlmostEquals(score(shift), score(0), rounding * (turns + 16) * size);
      }));
    });

    test(`${kind}: norms are kept, but for the attention factor`, () => {
      fc.assert(fc.property(layouts, positions, seeds, (layout, position, seed) => {
        const embedding = rope(fields, 16, layout);
        const row = Float32Array.from({ length: 16 }, normals(seed));
        const turned = rotate(row, rotaryTable(embedding, [position]), layout);
        assertAlmostEquals(Math.sqrt(dot(turned, turned)), embedding.attentionFactor * Math.sqrt(dot(row, row)), 1e-4);
      }));
    });
  }

  test("turns nothing at position 0", () => {
    const row = Float32Array.from({ length: 16 }, normals(3));
    assertEquals(rotate(row, rotaryTable(rope({}), [0]), "interleaved"), row);
  });

  test("the two layouts are one rotation of columns in another order", () => {
    const table = rotaryTable(rope({}, 6), [5]);
    const turned = rotate([1, 2, 3, 4, 5, 6], table, "interleaved");
    const halves = rotate([1, 3, 5, 2, 4, 6], table, "half");
    assertEquals([...halves], [0, 2, 4, 1, 3, 5].map((column) => turned[column]));
  });

  test("turns each head of a position alike, and each position by its own angle", () => {
    const table = rotaryTable(rope({}, 2), [1, 3]);
    const turned = rotate([1, 0, 0, 1, 1, 0, 0, 1], table, "interleaved");
    const [c1, s1, c3, s3] = [Math.cos(1), Math.sin(1), Math.cos(3), Math.sin(3)];
    close(turned, [c1, s1, -s1, c1, c3, s3, -s3, c3], 1e-7);
  });

  test("works where nothing is rotated", () => {
    const table = rotaryTable(rope({}, 0), [0, 1, 2]);
    assertEquals([table.cos.length, table.positions], [0, 3]);
    assertEquals(rotate([], table, "half").length, 0);
  });

  test("refuses rows that do not fit the table", () => {
    const table = rotaryTable(rope({}, 4), [0, 1]);
    const message = "rows have 12 elements, not a multiple of the table's 2 positions of 4 columns";
    assertThrows(() => rotate(new Float32Array(12), table, "half"), FlashMLAError, message);
  });
});

describe("rotaryTable()", () => {
  test("holds the cosines and sines of position · θ^(−2i/R)", () => {
    fc.assert(fc.property(fc.array(positions, { maxLength: 4 }), fc.integer({ min: 1, max: 8 }), (at, pairs) => {
      const { cos, sin } = rotaryTable(rope({}, 2 * pairs), at);
      const angles = at.flatMap((m) => Array.from({ length: pairs }, (_, i) => m / 10000 ** (i / pairs)));
      angles.forEach((angle, i) => {
        const tolerance = angle * (frequencyError + rounding) + rounding;
        assertAlmostEquals(cos[i], Math.cos(angle), tolerance);
        assertAlmostEquals(sin[i], Math.sin(angle), tolerance);
      });
    }));
  });

  test("linear with a factor equals positions divided by it", () => {
    fc.assert(fc.property(fc.array(positions, { maxLength: 4 }), fc.integer({ min: 1, max: 16 }), (at, factor) => {
      const stretched = rotaryTable(rope({ rope_type: "linear", factor }), at);
      const shrunk = rotaryTable(rope({}), at.map((m) => m / factor));
      // The stretched frequency and its angle are rounded, the shrunk position and its angle.
      const tolerance = Math.max(0, ...at) / factor * 4 * rounding + 2 * rounding;
      close(stretched.cos, shrunk.cos, tolerance);
      close(stretched.sin, shrunk.sin, tolerance);
    }));
  });

  test("yarn with factor 1 equals default", () => {
    const fields = {
      rope_type: "yarn",
      factor: 1,
      original_max_position_embeddings: 2048,
      mscale: 1,
      mscale_all_dim: 1,
    };
    fc.assert(fc.property(fc.array(positions, { maxLength: 4 }), (at) => {
      const [yarn, plain] = [rotaryTable(rope(fields), at), rotaryTable(rope({}), at)];
      // The two parts of a mixed frequency are rounded, their sum, and both angles.
      const tolerance = Math.max(0, ...at) * 6 * rounding + 2 * rounding;
      close(yarn.cos, plain.cos, tolerance);
      close(yarn.sin, plain.sin, tolerance);
    }));
  });

  test("yarn keeps fast pairs, stretches slow ones, and mixes those between", () => {
    // DeepSeek-V3: pair d turns 4096 / (2π · 10000^(d/32)) times in pretraining; 32 times at pair 10.5, once at 22.5.
    const fields = {
      rope_type: "yarn",
      factor: 40,
      original_max_position_embeddings: 4096,
      mscale: 1,
      mscale_all_dim: 1,
    };
    const { attentionFactor } = rope(fields, 64);
    const frequencies = inverseFrequencies(rope(fields, 64));
    const expected = Array.from({ length: 32 }, (_, d) => {
      const plain = 10000 ** (-d / 32);
      const kept = d <= 10 ? 1 : d >= 23 ? 0 : (23 - d) / 13;
      return plain * (kept + (1 - kept) / 40);
    });
    relativelyClose(frequencies, expected, frequencyError + 8 * rounding);
    assertEquals(attentionFactor, 1);
    const exact = inverseFrequencies(rope({ ...fields, truncate: false }, 64));
    const bound = (turns: number) => 32 * Math.log(4096 / (2 * Math.PI * turns)) / Math.log(10000);
    const kept = (bound(1) - 15) / (bound(1) - bound(32));
    const mixed = 10000 ** (-15 / 32) * (kept + (1 - kept) / 40);
    // The distance from a bound loses digits that were rounded: 7.5 of 15 pairs.
    relativelyClose([exact[15]], [mixed], frequencyError + 16 * rounding);
  });

  test("yarn of Kimi-K2 has both bounds at one turn", () => {
    const fields = {
      rope_type: "yarn",
      rope_theta: 50000,
      factor: 32,
      beta_fast: 1,
      beta_slow: 1,
      original_max_position_embeddings: 4096,
    };
    const at = 32 * Math.log(4096 / (2 * Math.PI)) / Math.log(50000); // 19.2
    const expected = Array.from({ length: 32 }, (_, d) => 50000 ** (-d / 32) / (d > at ? 32 : 1));
    relativelyClose(inverseFrequencies(rope(fields, 64)), expected, (Math.log(50000) + 4) * rounding);
  });

  test("dynamic stretches the base from the longest sequence on", () => {
    const dynamic = rope(kinds.dynamic);
    assertEquals(inverseFrequencies(dynamic, 2048), inverseFrequencies(rope({})));
    const theta = 10000 * (4 * 2 - 3) ** (16 / 14);
    const stretched = Array.from({ length: 8 }, (_, i) => theta ** (-i / 8));
    // The base itself is rounded five times.
    relativelyClose(inverseFrequencies(dynamic, 4096), stretched, (Math.log(theta) + 7) * rounding);
    assertEquals(rotaryTable(dynamic, [4095]), rotaryTable(dynamic, [4095], 4096));
    assertEquals([...inverseFrequencies(rope(kinds.dynamic, 2), 9000)], [1]);
  });

  test("longrope divides by other factors past the length of pretraining", () => {
    const fields = { ...kinds.longrope, original_max_position_embeddings: 512 };
    const plain = inverseFrequencies(rope({}));
    relativelyClose(inverseFrequencies(rope(fields), 512), plain.map((f, i) => f / (1 + i)), 4 * rounding);
    relativelyClose(inverseFrequencies(rope(fields), 513), plain.map((f, i) => f / (8 - i)), 4 * rounding);
  });

  test("attention factors are those of the papers unless the file says otherwise", () => {
    const yarn = { rope_type: "yarn", factor: 40, original_max_position_embeddings: 4096 };
    const ln40 = Math.log(40);
    assertAlmostEquals(rope(yarn).attentionFactor, 0.1 * ln40 + 1, 1e-15);
    assertAlmostEquals(rope({ ...yarn, mscale: 1 }).attentionFactor, 0.1 * ln40 + 1, 1e-15);
    const both = rope({ ...yarn, mscale: 2, mscale_all_dim: 0.5 }).attentionFactor;
    assertAlmostEquals(both, (0.2 * ln40 + 1) / (0.05 * ln40 + 1), 1e-15);
    assertEquals(rope({ ...yarn, attention_factor: 1.5 }).attentionFactor, 1.5);
    const long = { ...kinds.longrope, original_max_position_embeddings: 512 };
    assertAlmostEquals(rope(long).attentionFactor, Math.sqrt(1 + Math.log(4) / Math.log(512)), 1e-15);
    assertAlmostEquals(
      rope({ ...long, factor: undefined }).attentionFactor,
      Math.sqrt(1 + Math.log(4) / Math.log(512)),
      1e-15,
    );
    assertEquals(rope({ ...long, factor: 1 }).attentionFactor, 1);
    assertEquals(rope(kinds.linear).attentionFactor, 1);
  });
});
