// Angles are those of torch in float32, bit by bit: the models' formulas over arrays that store each result as float32.

import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { inverseFrequencies, rotaryTable } from "../src/model/rotary.ts";
import { ropeConfig, ropeFields } from "../src/model/rope_config.ts";

const [R, longest] = [64, 4096];
const positions = Uint32Array.from([
  ...Array.from({ length: 70 }, (_, i) => i),
  ...Array.from({ length: 17 }, (_, i) => [2 ** i - 1, 2 ** i, 2 ** i + 1]).flat(),
  ...Array.from({ length: 200 }, (_, i) => i * 7919 % 131_072),
  131_071,
  131_072,
]);

type Operand = Float32Array | number;

/** An operation on each element; numbers become float32 too. */
function elementwise(operation: (a: number, b: number) => number): (a: Operand, b: Operand) => Float32Array {
  return (a, b) => {
    const [left, right] = [a, b].map((operand) => typeof operand === "number" ? Float32Array.of(operand) : operand);
    const length = Math.max(left.length, right.length);
    return Float32Array.from({ length }, (_, i) => operation(left[i % left.length], right[i % right.length]));
  };
}
const plus = elementwise((a, b) => a + b);
const minus = elementwise((a, b) => a - b);
const times = elementwise((a, b) => a * b);
const over = elementwise((a, b) => a / b);
const power = elementwise((a, b) => a ** b);

const pairs = Float32Array.from({ length: R / 2 }, (_, i) => i);
/** The base to the power of 2i / R. */
const powersOf = (base: Operand) => power(base, over(times(pairs, 2), R));

/** YaRN between two bounds; they and their distance are double before they meet an array. */
function yarn(base: number, factor: number, low: number, high: number): Float32Array {
  const ramp = over(minus(pairs, low), high - low).map((value) => Math.min(1, Math.max(0, value)));
  const kept = minus(1, ramp);
  const [plain, stretched] = [over(1, powersOf(base)), over(1, times(factor, powersOf(base)))];
  return plus(times(stretched, minus(1, kept)), times(plain, kept));
}

/** The pair that turns so often in 4,096 positions. */
const pairThatTurns = (turns: number, base: number) =>
  R * Math.log(4096 / (turns * 2 * Math.PI)) / (2 * Math.log(base));

const divisors = Array.from({ length: R / 2 }, (_, i) => 1 + i / 7);
const yarnFields = { rope_type: "yarn", factor: 40, original_max_position_embeddings: 4096 };
const longFields = {
  ...{ rope_type: "longrope", factor: 2.3, original_max_position_embeddings: 4096 },
  ...{ short_factor: divisors, long_factor: divisors.toReversed() },
};
/** The base that `dynamic` stretches by 3.3 for 10,000 tokens. */
function dynamicBase(): Float32Array {
  const grown = minus(over(times(3.3, 10_000), longest), 3.3 - 1);
  return times(10_000, power(grown, R / (R - 2)));
}

/** Rope fields, the length of the sequence, and its frequencies. */
const cases: Readonly<Record<string, [Record<string, unknown>, number, Float32Array]>> = {
  default: [{}, 1, over(1, powersOf(10_000))],
  "default, Kimi-K2's base": [{ rope_theta: 50_000 }, 1, over(1, powersOf(50_000))],
  "default, a base that is no float32": [{ rope_theta: 10_000.3 }, 1, over(1, powersOf(10_000.3))],
  linear: [{ rope_type: "linear", factor: 3.3 }, 1, over(over(1, powersOf(10_000)), 3.3)],
  "dynamic, short": [{ rope_type: "dynamic", factor: 3.3 }, 4096, over(1, powersOf(10_000))],
  "dynamic, long": [{ rope_type: "dynamic", factor: 3.3 }, 10_000, over(1, powersOf(dynamicBase()))],
  yarn: [{ ...yarnFields, mscale: 1.3, mscale_all_dim: 0.7 }, 1, yarn(10_000, 40, 10, 23)],
  "yarn between pairs": [
    { ...yarnFields, truncate: false },
    1,
    yarn(10_000, 40, pairThatTurns(32, 10_000), pairThatTurns(1, 10_000)),
  ],
  "yarn with both bounds at one pair": [
    { ...yarnFields, beta_fast: 1, truncate: false },
    1,
    yarn(10_000, 40, pairThatTurns(1, 10_000), pairThatTurns(1, 10_000) + 0.001),
  ],
  "longrope, short": [longFields, 4096, over(1, times(Float32Array.from(divisors), powersOf(10_000)))],
  "longrope, long": [longFields, 4097, over(1, times(Float32Array.from(divisors.toReversed()), powersOf(10_000)))],
};

describe("rotary angles are torch's in float32", () => {
  for (const [name, [fields, length, frequencies]] of Object.entries(cases)) {
    const assumed = { maxPositionEmbeddings: longest, theta: 10_000 };
    const rope = ropeConfig(ropeFields({ rope_parameters: fields }, assumed), R, "half", longest);

    test(`${name}: frequencies`, () => assertEquals(inverseFrequencies(rope, length), frequencies));

    test(`${name}: positions 0 to 131,072`, () => {
      const { cos, sin } = rotaryTable(rope, positions, length);
      positions.forEach((position, row) => {
        const angles = times(position, frequencies);
        const at = (table: Float32Array) => table.slice(row * R / 2, (row + 1) * R / 2);
        assertEquals(at(cos), times(angles.map(Math.cos), rope.attentionFactor), `cosines of ${position}`);
        assertEquals(at(sin), times(angles.map(Math.sin), rope.attentionFactor), `sines of ${position}`);
      });
    });
  }

  test("which exact ones are not", () => {
    const exact = Array.from({ length: R / 2 }, (_, i) => 131_072 / 10_000 ** (2 * i / R));
    const off = times(131_072, over(1, powersOf(10_000))).map((angle, i) => Math.abs(angle - exact[i]));
    assert(Math.max(...off) > 0.001);
  });
});
