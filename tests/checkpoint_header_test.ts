import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { readSafetensors } from "../src/checkpoint/read_safetensors.ts";
import { FlashMLAError } from "../src/op/errors.ts";
import { assertRefused, countingReader, safetensorsBytes, withHeader } from "./support/safetensors_bytes.ts";

const f32 = (...offsets: unknown[]) => ({ dtype: "F32", shape: [2], data_offsets: offsets });

/** Tries to open a file of a header; `data` bytes follow it. */
function refused(header: unknown, data: number, ...texts: string[]): Promise<void> {
  const text = typeof header === "string" ? header : JSON.stringify(header);
  const bytes = withHeader(text, data);
  return assertRefused(() => readSafetensors(bytes), `Cannot read safetensors from ${bytes.length} bytes: `, ...texts);
}

describe("readSafetensors() takes", () => {
  test("a header that is padded, without metadata or with null for it, and a file of no tensors", async () => {
    assertEquals((await readSafetensors(withHeader("{}      ", 0))).names, []);
    assertEquals((await readSafetensors(withHeader('{"__metadata__":null}', 0))).metadata, {});
    const { metadata } = await readSafetensors(withHeader('{"__metadata__":{"format":"pt"}}', 0));
    assertEquals(metadata, { format: "pt" });
  });

  test("tensors in any order of the header, and names them in the order of their bytes", async () => {
    const header = { b: f32(8, 16), a: f32(0, 8), none: { dtype: "I64", shape: [0, 3], data_offsets: [8, 8] } };
    const checkpoint = await readSafetensors(withHeader(JSON.stringify(header), 16));
    assertEquals(checkpoint.names, ["a", "none", "b"]);
    assertEquals(await checkpoint.info("none"), { dtype: "I64", shape: [0, 3], bytes: 0 });
  });

  test("names that objects have of their own accord", async () => {
    const data = new Float32Array([1, 2]);
    const names = ["__proto__", "constructor", "toString", ""];
    const header = `{${
      names.map((name, i) => `"${name}":${JSON.stringify(f32(i * 8, i * 8 + 8))}`).join()
    },"hasOwnProperty":${JSON.stringify(f32(32, 40))}}`;
    const bytes = withHeader(header, 40);
    bytes.set(new Uint8Array(data.buffer), bytes.length - 40);
    const checkpoint = await readSafetensors(bytes);
    assertEquals(checkpoint.names, [...names, "hasOwnProperty"]);
    assertEquals((await checkpoint.tensor("__proto__")).data, data);
    assert(!checkpoint.has("valueOf"));
  });

  test("every element type of the format for info()", async () => {
    const bits = { F4: 4, F6_E2M3: 6, F6_E3M2: 6, F8_E8M0: 8, F8_E5M2: 8, F8_E4M3FNUZ: 8, F8_E5M2FNUZ: 8 };
    const more = { BOOL: 8, U8: 8, I8: 8, I16: 16, U16: 16, I32: 32, U32: 32, I64: 64, U64: 64, F64: 64, C64: 64 };
    for (const [dtype, size] of Object.entries({ ...bits, ...more })) {
      const data = new Uint8Array(size);
      const checkpoint = await readSafetensors(safetensorsBytes({ x: { dtype, shape: [2, 4], data } }));
      assertEquals(await checkpoint.info("x"), { dtype, shape: [2, 4], bytes: size });
      await assertRefused(() => checkpoint.tensor("x"), `"x": expected one of F32, F16, BF16, F8_E4M3, got ${dtype}`);
    }
  });
});

describe("readSafetensors() refuses", () => {
  test("sources too short for a header, and headers of impossible lengths", async () => {
    for (const length of [0, 1, 7]) {
      const why = `expected the 8 bytes of a header's length, got a source of ${length} bytes`;
      await assertRefused(() => readSafetensors(new Uint8Array(length)), why);
    }
    const open = (length: bigint) => () => readSafetensors(withHeader("{}", 6, length));
    await assertRefused(open(0n), "expected a header, got one of 0 bytes");
    await assertRefused(open(9n), "expected a header of 9 bytes, got a source of 16 bytes in all");
    await assertRefused(open(100_000_001n), "at most 100000000 bytes, got a length of 100000001");
    await assertRefused(open(2n ** 64n - 1n), "at most 100000000 bytes, got a length of 18446744073709551615");
    const lfs = new TextEncoder().encode("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n");
    await assertRefused(() => readSafetensors(lfs), "Git leaves in place of a file of LFS");
  });

  test("headers that are no JSON object in UTF-8", async () => {
    await refused("[]", 0, 'expected the header to begin with "{", got byte 91');
    await refused(" {}", 0, 'expected the header to begin with "{", got byte 32');
    await refused('{"a":', 0, "expected the header in JSON, got");
    await refused("{}{}", 0, "expected the header in JSON, got");
    await refused(`{"a":${"[".repeat(200_000)}`, 0, "expected the header in JSON, got");
    const latin1 = withHeader(Uint8Array.of(0x7b, 0x22, 0xe9, 0x22, 0x7d), 0);
    await assertRefused(() => readSafetensors(latin1), "in UTF-8, got other bytes");
  });

  test("keys that come twice, however they are written", async () => {
    const a = JSON.stringify(f32(0, 8));
    await refused(`{"a":${a},"a":${a}}`, 8, 'the header has "a" twice');
    await refused(`{"a":${a},"\\u0061":${a}}`, 8, 'the header has "a" twice');
    await refused('{"a":{"dtype":"F32","shape":[3],"shape":[2],"data_offsets":[0,8]}}', 8, 'has "shape" twice');
    await refused('{"__metadata__":{"k":"1","k":"2"}}', 0, 'has "k" twice');
    const tricky = { '":{"a': f32(0, 8), 'a\\": [': f32(8, 16), "}": f32(16, 24) };
    assertEquals((await readSafetensors(withHeader(JSON.stringify(tricky), 24))).names, Object.keys(tricky));
  });

  test("metadata other than strings", async () => {
    await refused({ __metadata__: [] }, 0, "expected __metadata__ to be an object, got []");
    await refused({ __metadata__: { k: 1 } }, 0, 'expected __metadata__ of strings, got 1 for "k"');
  });

  test("entries of wrong types", async () => {
    await refused({ a: 1 }, 0, 'tensor "a": expected an object, got 1');
    await refused({ a: null }, 0, 'tensor "a": expected an object, got null');
    await refused({ a: {} }, 0, "expected dtype to be a string, got undefined");
    await refused({ a: { ...f32(0, 8), dtype: "F31" } }, 8, "expected dtype to be one of F4, ", 'got "F31"');
    await refused({ a: { ...f32(0, 8), dtype: "toString" } }, 8, "expected dtype to be one of F4, ");
    for (const shape of [2, "2", null, [-2], [0.5], ["2"], [[2]], [null], [1e300], [2 ** 53]]) {
      await refused({ a: { ...f32(0, 8), shape } }, 8, 'tensor "a": expected shape to hold non-negative integers, got');
    }
    await refused('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0, "shape to hold non-negative integers");
    for (const offsets of [[], [0], [0, 8, 8], [-8, 0], [0, 8.5], ["0", "8"], [0, 1e17]]) {
      await refused({ a: f32(...offsets) }, 8, "expected data_offsets to be two non-negative integers, got [");
    }
    await refused({ a: { ...f32(0, 8), data_offsets: { 0: 0, 1: 8 } } }, 8, "expected data_offsets to be two");
  });

  test("offsets that are out of order, out of range, overlap, leave holes, or do not fit the shape", async () => {
    await refused({ a: f32(8, 0) }, 8, 'tensor "a": expected data_offsets in order, got [8,0]');
    await refused({ a: f32(0, 12) }, 12, "expected data_offsets 8 bytes apart, as F32 of shape [2] needs, got [0,12]");
    await refused({ a: f32(0, 8), b: f32(4, 12) }, 12, 'expected "b" at byte 8 of the data, got 4: an overlap');
    await refused({ a: f32(0, 8), b: f32(0, 8) }, 8, 'expected "b" at byte 8 of the data, got 0: an overlap');
    await refused({ a: f32(0, 8), b: f32(12, 20) }, 20, 'expected "b" at byte 8 of the data, got 12: a hole');
    await refused({ a: f32(4, 12) }, 12, 'expected "a" at byte 0 of the data, got 4: a hole before it');
    await refused({ a: f32(0, 8), b: f32(8, 16) }, 12, "as its header says, got", "cut short");
    await refused({ a: f32(0, 8) }, 9, "as its header says, got");
    await refused("{}", 1, "expected 10 bytes as its header says, got 11");
    await refused({ a: { dtype: "F4", shape: [3], data_offsets: [0, 1] } }, 1, "data_offsets 1.5 bytes apart");
  });

  test("shapes whose sizes cannot be counted, with or without a zero after them", async () => {
    for (const shape of [[2 ** 40, 2 ** 40], [2 ** 40, 2 ** 40, 0], [2 ** 52], Array(2000).fill(2)]) {
      await refused(
        { a: { dtype: "F32", shape, data_offsets: [0, 0] } },
        0,
        "expected a shape whose bits can be counted",
      );
    }
    const empty = { dtype: "F32", shape: [0, 2 ** 40, 2 ** 40], data_offsets: [0, 0] };
    assertEquals((await readSafetensors(withHeader(JSON.stringify({ empty }), 0))).names, ["empty"]);
  });

  test("absurd sizes before anything of them is read", async () => {
    const shape = [2 ** 40];
    const header = JSON.stringify({ a: { dtype: "U8", shape, data_offsets: [0, 2 ** 40] } });
    const reader = countingReader(withHeader(header, 16));
    await assertRefused(() => readSafetensors(reader), "bytes as its header says, got", "cut short");
    assertEquals(reader.ranges, [[0, 8], [8, 8 + header.length]]);
    const long = countingReader(withHeader("{}", 6, 99_999_999n));
    await assertRefused(() => readSafetensors(long), "expected a header of 99999999 bytes, got a source of 16 bytes");
    assertEquals(long.ranges, [[0, 8]]);
  });

  test("with messages that stay short whatever the file says", async () => {
    const name = "x".repeat(100_000);
    for (
      const header of [
        `{"${name}":1}`,
        `{"a":"${name}"}`,
        `{"a":{"dtype":"${name}","shape":[],"data_offsets":[0,0]}}`,
        `{"a":{"dtype":"F32","shape":[${"1,".repeat(50_000)}"${name}"],"data_offsets":[0,0]}}`,
        `{${name}`,
        `{"__metadata__":{"${name}":1}}`,
      ]
    ) {
      const error = await readSafetensors(withHeader(header, 0)).then(() => null, (error) => error);
      assert(error instanceof FlashMLAError && error.message.length < 500, `${error?.message.length} characters`);
    }
  });
});
