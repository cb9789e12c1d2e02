// Files that were damaged at random: each is read or refused, in time and memory that its own size bounds.

import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import fc from "fast-check";
import { readSafetensors } from "../src/checkpoint/read_safetensors.ts";
import { FlashMLAError } from "../src/op/errors.ts";
import { checkTensor } from "../src/op/tensor.ts";
import { safetensorsBytes, withHeader } from "./support/safetensors_bytes.ts";

const file = safetensorsBytes({
  "model.w": { dtype: "F8_E4M3", shape: [3, 5], data: Uint8Array.from({ length: 15 }, (_, i) => i * 17) },
  "model.w_scale_inv": { dtype: "F32", shape: [2, 3], data: Float32Array.of(1, 2, 3, 4, 5, 6) },
  "model.v": { dtype: "BF16", shape: [2, 4], data: new Uint16Array(8) },
  "model.i": { dtype: "I64", shape: [2], data: new Uint8Array(16) },
  "model.e": { dtype: "F16", shape: [0], data: new Uint16Array(0) },
}, { format: "pt" });

/** Opens a file and reads all of it; gives whether it was taken. Anything but a result and a refusal fails. */
async function readOrRefused(bytes: Uint8Array, size: boolean): Promise<boolean> {
  let largest = 0;
  const reader = {
    ...(size && { size: bytes.length }),
    read(start: number, end: number) {
      // The function that allocates, so that what it is asked for is what a file can make the library allocate.
      assert(Number.isSafeInteger(start) && start >= 0 && start < end, `${start} to ${end}`);
      largest = Math.max(largest, end - start);
      return Promise.resolve(bytes.subarray(start, end));
    },
  };
  let taken = true;
  try {
    const checkpoint = await readSafetensors(reader, { blockSize: 2 });
    for (const name of checkpoint.names) {
      const { dtype, shape, bytes } = await checkpoint.info(name);
      assert(dtype !== "" && shape.every(Number.isSafeInteger) && bytes >= 0);
      try {
        const tensor = await checkpoint.tensor(name);
        checkTensor(name, tensor);
        assertEquals([...tensor.shape], [...shape]);
      } catch (error) {
        if (!(error instanceof FlashMLAError)) throw error;
      }
    }
  } catch (error) {
    if (!(error instanceof FlashMLAError) || error.code !== "invalid-input") throw error;
    assert(error.message.startsWith("Cannot read safetensors from a range reader"), error.message);
    assert(error.message.length < 600, error.message);
    taken = false;
  }
  assert(!size || largest <= bytes.length, `${largest} bytes of ${bytes.length}`);
  return taken;
}

const mutation = fc.oneof(
  fc.record({ kind: fc.constant("byte" as const), at: fc.nat(), value: fc.nat(255) }),
  fc.record({ kind: fc.constant("bit" as const), at: fc.nat(), value: fc.nat(7) }),
  fc.record({ kind: fc.constant("cut" as const), at: fc.nat(), value: fc.constant(0) }),
  fc.record({ kind: fc.constant("insert" as const), at: fc.nat(), value: fc.nat(255) }),
  fc.record({ kind: fc.constant("digit" as const), at: fc.nat(), value: fc.nat(9) }),
);

function mutated(bytes: Uint8Array, { kind, at, value }: { kind: string; at: number; value: number }): Uint8Array {
  const place = bytes.length === 0 ? 0 : at % bytes.length;
  if (kind === "cut") return bytes.slice(0, place);
  if (kind === "insert") return Uint8Array.of(...bytes.subarray(0, place), value, ...bytes.subarray(place));
  const copy = bytes.slice();
  if (kind === "byte") copy[place] = value;
  if (kind === "bit") copy[place] ^= 1 << value;
  if (kind === "digit") {
    // Digits are what sizes and offsets are made of.
    const digits = [...copy.keys()].filter((i) => copy[i] >= 0x30 && copy[i] <= 0x39);
    if (digits.length > 0) copy[digits[at % digits.length]] = 0x30 + value;
  }
  return copy;
}

describe("readSafetensors() of damaged files", () => {
  test("takes the file that is whole", async () => {
    assert(await readOrRefused(file, true));
    assert(await readOrRefused(file, false));
  });

  test("reads or refuses them", async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(mutation, { minLength: 1, maxLength: 4 }), fc.boolean(), async (mutations, size) => {
        await readOrRefused(mutations.reduce(mutated, file), size);
      }),
      { numRuns: 3000 },
    );
  });

  test("refuses them cut anywhere", async () => {
    for (let length = 0; length < file.length; length++) {
      assertEquals(await readOrRefused(file.subarray(0, length), true), false, `${length} bytes`);
      assertEquals(await readOrRefused(file.subarray(0, length), false), false, `${length} bytes`);
    }
  });

  test("reads or refuses bytes that are none", async () => {
    await fc.assert(
      fc.asyncProperty(fc.uint8Array({ maxLength: 64 }), async (bytes) => {
        await readOrRefused(bytes, true);
      }),
      { numRuns: 500 },
    );
  });

  test("reads or refuses headers of any JSON", async () => {
    const number = fc.oneof(fc.nat(40), fc.maxSafeInteger(), fc.double(), fc.constantFrom(2 ** 53, 2 ** 64, -1));
    const entry = fc.oneof(
      fc.record({
        dtype: fc.oneof(fc.constantFrom("F32", "F16", "BF16", "F8_E4M3", "U8", "F4"), fc.string()),
        shape: fc.oneof(fc.array(number, { maxLength: 4 }), fc.jsonValue()),
        data_offsets: fc.oneof(fc.array(number, { minLength: 1, maxLength: 3 }), fc.jsonValue()),
      }, { requiredKeys: [] }),
      fc.jsonValue(),
    );
    const key = fc.oneof(fc.string(), fc.constantFrom("__metadata__", "a", "a_scale_inv", "__proto__"));
    await fc.assert(
      fc.asyncProperty(fc.dictionary(key, entry), fc.nat(64), fc.boolean(), async (header, data, size) => {
        await readOrRefused(withHeader(JSON.stringify(header), data), size);
      }),
      { numRuns: 2000 },
    );
  });

  test("takes every file that is well formed, in whatever order its header is", async () => {
    const tensors = fc.array(
      fc.record({
        dtype: fc.constantFrom("F32", "BF16", "F8_E4M3", "U8"),
        shape: fc.array(fc.nat(4), { maxLength: 3 }),
      }),
      { maxLength: 6 },
    );
    const bytesOf: Record<string, number> = { F32: 4, BF16: 2, F8_E4M3: 1, U8: 1 };
    await fc.assert(
      fc.asyncProperty(tensors, fc.boolean(), async (tensors, backwards) => {
        let end = 0;
        const entries = tensors.map(({ dtype, shape }, i) => {
          const size = shape.reduce((product, axis) => product * axis, bytesOf[dtype]);
          return [`tensor ${i}`, { dtype, shape, data_offsets: [end, end += size] }] as const;
        });
        if (backwards) entries.reverse();
        assert(await readOrRefused(withHeader(JSON.stringify(Object.fromEntries(entries)), end), true));
      }),
      { numRuns: 300 },
    );
  });
});
