import { readdirSync, readFileSync } from "node:fs";
import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import fc from "fast-check";
import { e4m3ToFloat } from "../src/checkpoint/fp8.ts";
import { readSafetensors } from "../src/checkpoint/read_safetensors.ts";
import { toFloats } from "../src/op/half.ts";
import { checkTensor } from "../src/op/tensor.ts";
import { assertRefused, countingReader, type RawTensor, safetensorsBytes } from "./support/safetensors_bytes.ts";
import { parseSafetensors } from "./support/safetensors.ts";

const golden = new URL("./golden/", import.meta.url);

describe("readSafetensors() reads the golden file", () => {
  for (const name of readdirSync(golden).filter((name) => name.endsWith(".safetensors")).sort()) {
    test(name, async () => {
      const expected = parseSafetensors(readFileSync(new URL(name, golden)));
      const checkpoint = await readSafetensors(new URL(name, golden));
      assertEquals([...checkpoint.names].sort(), [...expected.tensors.keys()].sort());
      assertEquals(checkpoint.metadata, expected.metadata);
      for (const [tensor, { dtype, shape, data }] of expected.tensors) {
        assertEquals(await checkpoint.info(tensor), { dtype, shape, bytes: data.byteLength });
        if (dtype === "F32") assertEquals(await checkpoint.tensor(tensor), { data: data as Float32Array, shape });
        else await assertRefused(() => checkpoint.tensor(tensor), `expected one of F32, F16, BF16`, `got ${dtype}`);
      }
      await checkpoint.close();
    });
  }
});

describe("tensor()", () => {
  test("keeps F32, F16 and BF16 to the bit, at any offset, in memory of its own", async () => {
    // Three bytes first, so that everything else lies at odd places, in a view that does so too.
    const file = safetensorsBytes({
      odd: { dtype: "U8", shape: [3], data: Uint8Array.of(1, 2, 3) },
      single: { dtype: "F32", shape: [2, 2], data: Float32Array.of(1.5, -0, Infinity, 1e-45) },
      half: { dtype: "F16", shape: [3], data: Uint16Array.of(0x3c00, 0xfbff, 0x0001) },
      brain: { dtype: "BF16", shape: [1, 2], data: Uint16Array.of(0x3f80, 0xc000) },
      scalar: { dtype: "F32", shape: [], data: Float32Array.of(7) },
      empty: { dtype: "BF16", shape: [4, 0], data: new Uint16Array(0) },
    });
    const bytes = new Uint8Array(file.length + 1).subarray(1);
    bytes.set(file);
    const checkpoint = await readSafetensors(bytes);
    const names = ["single", "half", "brain", "scalar", "empty"];
    const tensors = await checkpoint.tensors(names);
    assertEquals([...tensors.keys()], names);
    for (const [name, tensor] of tensors) {
      checkTensor(name, tensor);
      assertEquals(await checkpoint.tensor(name), tensor);
      assertEquals([tensor.data.byteOffset, tensor.data.buffer.byteLength], [0, tensor.data.byteLength]);
    }
    bytes.fill(0);
    const bits = (name: string) => [...new Uint16Array(tensors.get(name)!.data.buffer)];
    const words = new Uint32Array(tensors.get("single")!.data.buffer);
    assertEquals([...words], [0x3fc00000, 0x80000000, 0x7f800000, 1]);
    assertEquals([bits("half"), bits("brain")], [[0x3c00, 0xfbff, 0x0001], [0x3f80, 0xc000]]);
    assertEquals([tensors.get("half")!.dtype, tensors.get("brain")!.dtype], ["f16", "bf16"]);
    assertEquals([tensors.get("scalar")!.shape, tensors.get("scalar")!.data[0]], [[], 7]);
    assertEquals([tensors.get("empty")!.shape, tensors.get("empty")!.data.length], [[4, 0], 0]);
  });

  test("gives memory that later reads do not share", async () => {
    const one = { dtype: "F32", shape: [1], data: Float32Array.of(1) };
    const checkpoint = await readSafetensors(safetensorsBytes({ one, other: one }));
    const first = await checkpoint.tensor("one");
    (first.data as Float32Array)[0] = 5;
    (first.shape as number[])[0] = 9;
    assertEquals(await checkpoint.tensor("one"), { data: Float32Array.of(1), shape: [1] });
    assertEquals((await checkpoint.info("one")).shape, [1]);
  });

  test("throws for names that are not there, and for anything after close()", async () => {
    const checkpoint = await readSafetensors(
      safetensorsBytes({ "a.weight": { dtype: "F32", shape: [1], data: Float32Array.of(1) } }),
    );
    assertEquals([checkpoint.has("a.weight"), checkpoint.has("b")], [true, false]);
    await assertRefused(() => checkpoint.tensor("b"), 'expected one of its 1 tensors ("a.weight" …), got "b"');
    await assertRefused(() => checkpoint.info("b"), 'got "b"');
    await assertRefused(() => checkpoint.tensors(["a.weight", "b"]), 'got "b"');
    for (const which of ["a.weight", 1, null, {}]) {
      await assertRefused(() => checkpoint.tensors(which as string[]), "expected names or a function, got");
    }
    await checkpoint.close();
    await checkpoint.close();
    await checkpoint[Symbol.asyncDispose]();
    await assertRefused(() => checkpoint.tensor("a.weight"), "it was closed");
    await assertRefused(() => checkpoint.tensors(() => true), "it was closed");
    await assertRefused(() => checkpoint.info("a.weight"), "it was closed");
    assertEquals(checkpoint.names, ["a.weight"]);
  });
});

describe("tensors()", () => {
  const sixteen = (i: number): RawTensor => ({ dtype: "F32", shape: [4], data: new Float32Array(4).fill(i) });
  const file = safetensorsBytes(Object.fromEntries([0, 1, 2, 3, 4, 5].map((i) => [`t${i}`, sixteen(i)])));
  const start = file.length - 6 * 16;
  const range = (from: number, to: number) => [start + from * 16, start + to * 16] as [number, number];

  test("reads neighbours in one range, and nothing but what was asked for", async () => {
    const reader = countingReader(file);
    const checkpoint = await readSafetensors(reader);
    assertEquals(reader.ranges.splice(0), [[0, 8], [8, start]]);
    const some = await checkpoint.tensors(["t5", "t2", "t0", "t1", "t2"]);
    assertEquals(reader.ranges.splice(0), [range(0, 3), range(5, 6)]);
    assertEquals([...some].map(([name, { data }]) => [name, data[3]]), [["t5", 5], ["t2", 2], ["t0", 0], ["t1", 1]]);
    assertEquals([...(await checkpoint.tensors((name) => name > "t3")).keys()], ["t4", "t5"]);
    assertEquals(reader.ranges.splice(0), [range(4, 6)]);
    assertEquals((await checkpoint.tensors(new Set<string>())).size, 0);
    await checkpoint.info("t0");
    assertEquals(reader.ranges, []);
  });

  test("reads nothing when one of them cannot be read", async () => {
    const reader = countingReader(
      safetensorsBytes({ a: sixteen(1), b: { dtype: "I64", shape: [1], data: new Uint8Array(8) } }),
    );
    const checkpoint = await readSafetensors(reader);
    reader.ranges.length = 0;
    await assertRefused(() => checkpoint.tensors(["a", "b"]), 'tensor "b": expected one of F32', "got I64");
    assertEquals(reader.ranges, []);
  });
});

describe("F8_E4M3", () => {
  test("has the values of float8_e4m3fn", () => {
    const values = Array.from({ length: 256 }, (_, bits) => e4m3ToFloat(bits));
    assertEquals([0x00, 0x01, 0x07, 0x08, 0x38, 0x3c, 0x77, 0x7e].map((bits) => values[bits]), [
      ...[0, 2 ** -9, 7 * 2 ** -9, 2 ** -6, 1, 1.5, 240, 448],
    ]);
    assertEquals([values[0x7f], values[0xff], 1 / values[0x80]], [NaN, NaN, -Infinity]);
    // Every byte in order of its magnitude is larger than the one before, and signs mirror.
    for (let bits = 1; bits < 0x7f; bits++) {
      assert(values[bits] > values[bits - 1], `${bits}`);
      assertEquals(values[bits | 0x80], -values[bits]);
    }
  });

  test("is decoded as it is where there is no scale", async () => {
    const data = Uint8Array.from({ length: 256 }, (_, bits) => bits);
    const checkpoint = await readSafetensors(safetensorsBytes({ w: { dtype: "F8_E4M3", shape: [256], data } }));
    assertEquals(await checkpoint.tensor("w"), { data: Float32Array.from(data, e4m3ToFloat), shape: [256] });
    assertEquals(await checkpoint.info("w"), { dtype: "F8_E4M3", shape: [256], bytes: 256 });
  });

  test("is multiplied with one scale per block, for any shape and size of block", async () => {
    const axis = fc.integer({ min: 0, max: 9 });
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.integer({ min: 0, max: 3 }), { maxLength: 2 }),
        axis,
        axis,
        fc.tuple(fc.integer({ min: 1, max: 5 }), fc.integer({ min: 1, max: 5 })),
        fc.constantFrom("F32", "BF16"),
        async (before, rows, columns, [blockRows, blockColumns], dtype) => {
          const matrices = before.reduce((product, axis) => product * axis, 1);
          const [scaleRows, scaleColumns] = [Math.ceil(rows / blockRows), Math.ceil(columns / blockColumns)];
          const data = Uint8Array.from({ length: matrices * rows * columns }, (_, i) => (i * 37 + 11) % 127);
          // Powers of two and halves of them, which BF16 has exactly.
          const scales = Float32Array.from(
            { length: matrices * scaleRows * scaleColumns },
            (_, i) => 1.5 * 2 ** (i % 9),
          );
          const words = new Uint32Array(scales.buffer);
          const checkpoint = await readSafetensors(
            safetensorsBytes({
              "w_scale_inv": {
                dtype,
                shape: [...before, scaleRows, scaleColumns],
                data: dtype === "F32" ? scales : Uint16Array.from(words, (word) => word >>> 16),
              },
              w: { dtype: "F8_E4M3", shape: [...before, rows, columns], data },
            }),
            { blockSize: blockRows === blockColumns ? blockRows : [blockRows, blockColumns] },
          );
          const expected = Float32Array.from(data, (bits, i) => {
            const [matrix, row, column] = [
              ...[Math.floor(i / columns / rows), Math.floor(i / columns) % rows, i % columns],
            ];
            const block = Math.floor(row / blockRows) * scaleColumns + Math.floor(column / blockColumns);
            return e4m3ToFloat(bits) * scales[matrix * scaleRows * scaleColumns + block];
          });
          assertEquals(await checkpoint.tensor("w"), { data: expected, shape: [...before, rows, columns] });
        },
      ),
      { numRuns: 200 },
    );
  });

  test("has blocks of 128 × 128 unless told otherwise, as DeepSeek-V3 has", async () => {
    const [rows, columns] = [130, 257];
    const file = safetensorsBytes({
      w: { dtype: "F8_E4M3", shape: [rows, columns], data: new Uint8Array(rows * columns).fill(0x38) },
      w_scale_inv: { dtype: "F32", shape: [2, 3], data: Float32Array.of(1, 2, 3, 4, 5, 6) },
    });
    const reader = countingReader(file);
    const { data } = await (await readSafetensors(reader)).tensor("w");
    const at = (row: number, column: number) => data[row * columns + column];
    assertEquals([at(0, 127), at(0, 128), at(127, 256), at(128, 0), at(129, 255), at(129, 256)], [1, 2, 3, 4, 5, 6]);
    assertEquals(reader.ranges.length, 3);
    const checkpoint = await readSafetensors(file, { blockSize: 64 });
    await assertRefused(() => checkpoint.tensor("w"), "or [3,5] for blocks of 64 × 64, got [2,3]");
    assertEquals((await checkpoint.tensor("w_scale_inv")).data, Float32Array.of(1, 2, 3, 4, 5, 6));
  });

  test("takes one scale for all", async () => {
    const file = safetensorsBytes({
      w: { dtype: "F8_E4M3", shape: [2, 2], data: Uint8Array.of(0x38, 0x40, 0xb8, 0x00) },
      w_scale_inv: { dtype: "BF16", shape: [], data: Uint16Array.of(0x4040) },
      v: { dtype: "F8_E4M3", shape: [1], data: Uint8Array.of(0x38) },
      v_scale_inv: { dtype: "F32", shape: [], data: Float32Array.of(0.1) },
    });
    const checkpoint = await readSafetensors(file, { blockSize: 1 });
    assertEquals((await checkpoint.tensor("w")).data, Float32Array.of(3, 6, -3, 0));
    assertEquals(toFloats(await checkpoint.tensor("v")).data, Float32Array.of(0.1));
  });

  test("throws when the scale has another shape or element type", async () => {
    const open = (shape: number[], scaleShape: number[], dtype = "F32") =>
      readSafetensors(safetensorsBytes({
        w: { dtype: "F8_E4M3", shape, data: new Uint8Array(shape.reduce((a, b) => a * b, 1)) },
        w_scale_inv: { dtype, shape: scaleShape, data: new Uint8Array(scaleShape.reduce((a, b) => a * b, 4)) },
      }));
    for (const shape of [[1], [2, 2], [2, 1], [1, 2, 1], [0, 2], [2]]) {
      const checkpoint = await open([5, 200], shape);
      await assertRefused(
        () => checkpoint.tensor("w"),
        'tensor "w": expected scales of shape []',
        "[1,2] for blocks of",
      );
    }
    const vector = await open([200], [2]);
    await assertRefused(() => vector.tensor("w"), "expected scales of shape [], got [2]");
    const integers = await open([5, 5], [1, 1], "I32");
    await assertRefused(() => integers.tensor("w"), "expected scales of F32, F16 or BF16, got I32");
  });

  test("throws when the block size is none", async () => {
    for (const blockSize of [0, -1, 1.5, NaN, "128", [128], [128, 0], [1, 2, 3], null]) {
      const options = { blockSize: blockSize as number };
      await assertRefused(() => readSafetensors(safetensorsBytes({}), options), "blockSize must be a positive integer");
    }
  });
});
