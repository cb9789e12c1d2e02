import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import fc from "fast-check";
import { dropoutFactors, dropoutThreshold, seedWords, threefry2x32, type Words } from "../src/op/dropout.ts";

describe("threefry2x32()", () => {
  // The answers for 20 rounds that the authors publish with their own implementation, Random123.
  const known: [title: string, key: Words, counter: Words, expected: Words][] = [
    ["zeros", [0, 0], [0, 0], [0x6b200159, 0x99ba4efe]],
    ["ones", [0xffffffff, 0xffffffff], [0xffffffff, 0xffffffff], [0x1cb996fc, 0xbb002be7]],
    ["digits of π", [0x13198a2e, 0x03707344], [0x243f6a88, 0x85a308d3], [0xc4923a9c, 0x483df7a0]],
  ];
  for (const [title, key, counter, expected] of known) {
    test(`gives the published words for ${title}`, () => assertEquals(threefry2x32(key, counter), expected));
  }

  test("gives unsigned words, another pair for every key and counter", () => {
    const word = fc.integer({ min: 0, max: 2 ** 32 - 1 });
    const words = fc.tuple(word, word);
    fc.assert(fc.property(words, words, words, (key, counter, other) => {
      const result = threefry2x32(key, counter);
      for (const word of result) assert(Number.isInteger(word) && word >= 0 && word < 2 ** 32);
      if (counter.join() !== other.join()) assert(threefry2x32(key, other).join() !== result.join());
    }));
  });
});

describe("seedWords()", () => {
  test("are the lower and the upper half of a seed", () => {
    assertEquals(seedWords(0), [0, 0]);
    assertEquals(seedWords(2 ** 32 - 1), [0xffffffff, 0]);
    assertEquals(seedWords(2 ** 32), [0, 1]);
    assertEquals(seedWords(Number.MAX_SAFE_INTEGER), [0xffffffff, 0x1fffff]);
  });
});

describe("dropoutThreshold()", () => {
  test("is the rate's share of all words", () => {
    assertEquals(dropoutThreshold(0.5), 2 ** 31);
    assertEquals(dropoutThreshold(0.25), 2 ** 30);
    assertEquals(dropoutThreshold(0), 0);
  });

  test("is a word even for the largest rate below 1", () => {
    assertEquals(dropoutThreshold(1 - 2 ** -53), 2 ** 32 - 1);
  });
});

describe("dropoutFactors()", () => {
  const dropout = { rate: 0.5, seed: 2 ** 40 + 3, firstItem: 0, firstPosition: 0 };
  /** A head's factors for 12 × 12 pairs. */
  const pattern = (of: ReturnType<typeof dropoutFactors>, first = 0) =>
    Array.from({ length: 144 }, (_, n) => of(first + Math.floor(n / 12), first + n % 12));

  test("are 0 or 1 / (1 − rate), by the first word of the pair under the head's key", () => {
    const factor = dropoutFactors(dropout, 2, 5);
    const key = threefry2x32([3, 2 ** 8], [2, 5]);
    for (const [query, kept] of [[0, 7], [3, 3], [11, 0]]) {
      const [bits] = threefry2x32(key, [query, kept]);
      assertEquals(factor(query, kept), bits >= 2 ** 31 ? 2 : 0);
    }
    assertEquals([...new Set(pattern(factor))].sort(), [0, 2]);
  });

  test("of a piece are those of its place in the whole call", () => {
    const whole = dropoutFactors(dropout, 3, 1);
    const items = dropoutFactors({ ...dropout, firstItem: 2 }, 1, 1);
    assertEquals(pattern(items), pattern(whole));
    const positions = dropoutFactors({ ...dropout, firstPosition: 7 }, 3, 1);
    assertEquals(pattern(positions), pattern(whole, 7));
  });
});
