import { mkdirSync, truncateSync, writeFileSync } from "node:fs";
import { describe, test } from "node:test";
import { pathToFileURL } from "node:url";
import { assertEquals } from "@std/assert";
import type { Checkpoint } from "../src/checkpoint/checkpoint.ts";
import { filePath } from "../src/checkpoint/file_source.ts";
import { readSafetensors, type SafetensorsSource } from "../src/checkpoint/read_safetensors.ts";
import { temporaryFolder } from "./support/cache_folder.ts";
import { assertRefused, countingReader, safetensorsBytes, withHeader } from "./support/safetensors_bytes.ts";

const file = safetensorsBytes({
  a: { dtype: "F32", shape: [3], data: Float32Array.of(1, 2, 3) },
  b: { dtype: "F32", shape: [1, 2], data: Float32Array.of(4, 5) },
}, { format: "pt" });

/** Reads all of a checkpoint, twice at the same time, and closes it. */
async function assertReads(checkpoint: Checkpoint): Promise<void> {
  const [a, b, again] = await Promise.all([
    checkpoint.tensor("a"),
    checkpoint.tensor("b"),
    checkpoint.tensors(() => true),
  ]);
  assertEquals([a.data, b.data], [Float32Array.of(1, 2, 3), Float32Array.of(4, 5)]);
  assertEquals([...again], [["a", a], ["b", b]]);
  assertEquals(checkpoint.metadata, { format: "pt" });
  await checkpoint.close();
  await assertRefused(() => checkpoint.tensor("a"), "it was closed");
}

describe("readSafetensors() reads", () => {
  test("bytes, in views and in shared memory too", async () => {
    await assertReads(await readSafetensors(file));
    const larger = new Uint8Array(file.length + 9);
    larger.set(file, 5);
    await assertReads(await readSafetensors(larger.subarray(5, 5 + file.length)));
    const shared = new Uint8Array(new SharedArrayBuffer(file.length));
    shared.set(file);
    await assertReads(await readSafetensors(shared));
  });

  test("a Blob, by slices of it", async () => {
    await assertReads(await readSafetensors(new Blob([file])));
    const slices: unknown[] = [];
    const blob = new Blob([file]);
    const spied = Object.assign(blob, {
      slice: (start: number, end: number) => {
        slices.push([start, end]);
        return Blob.prototype.slice.call(blob, start, end);
      },
    });
    const checkpoint = await readSafetensors(spied);
    await checkpoint.tensor("b");
    const start = file.length - 20;
    assertEquals(slices, [[0, 8], [8, start], [start + 12, start + 20]]);
    const bad = new File(["{}"], "weights.safetensors");
    await assertRefused(() => readSafetensors(bad), 'the file "weights.safetensors": expected the 8 bytes');
    await assertRefused(() => readSafetensors(new Blob([])), "a Blob of 0 bytes: expected the 8 bytes");
  });

  test("a path, and a URL of it", async () => {
    using folder = temporaryFolder();
    const path = folder.file("größe #1 %20 weights.safetensors");
    writeFileSync(path, file);
    await assertReads(await readSafetensors(path));
    await assertReads(await readSafetensors(pathToFileURL(path)));
    await assertReads(await readSafetensors(pathToFileURL(path).href));
    await using checkpoint = await readSafetensors(path);
    assertEquals((await checkpoint.tensor("b")).shape, [1, 2]);
  });

  test("a folder: its one file, or else its index", async () => {
    using folder = temporaryFolder();
    await assertRefused(
      () => readSafetensors(folder.path),
      `from ${folder.path}: the folder has neither model.safetensors nor model.safetensors.index.json`,
    );
    mkdirSync(folder.file("shards"));
    writeFileSync(folder.file("shards", "1.safetensors"), file);
    const index = { weight_map: { b: "shards/1.safetensors" }, metadata: { total_size: 20 } };
    writeFileSync(folder.file("model.safetensors.index.json"), JSON.stringify(index));
    const sharded = await readSafetensors(pathToFileURL(folder.path + "/"));
    assertEquals([sharded.names, sharded.metadata], [["b"], { total_size: "20" }]);
    assertEquals((await sharded.tensor("b")).data, Float32Array.of(4, 5));
    await sharded.close();
    writeFileSync(folder.file("model.safetensors"), file);
    await assertReads(await readSafetensors(folder.path));
  });

  test("by a function, to the byte", async () => {
    const reader = countingReader(file);
    await assertReads(await readSafetensors(reader));
    const { read } = countingReader(file);
    await assertReads(await readSafetensors({ read }));
  });

  test("by a function that knows no size, when the last byte is there", async () => {
    const header = '{"a":{"dtype":"U8","shape":[1000000000000],"data_offsets":[0,1000000000000]}}';
    const ranges: number[][] = [];
    const bytes = withHeader(header, 0);
    const read = (start: number, end: number) => {
      ranges.push([start, end]);
      return Promise.resolve(bytes.subarray(start, end));
    };
    await assertRefused(() => readSafetensors({ read }), "expected 1 bytes at", "got 0");
    const end = bytes.length + 1e12;
    assertEquals(ranges, [[0, 8], [8, bytes.length], [end - 1, end]]);
  });
});

describe("readSafetensors() refuses", () => {
  test("paths of nothing, and of what is no file", async () => {
    using folder = temporaryFolder();
    const path = folder.file("none.safetensors");
    await assertRefused(() => readSafetensors(path), `from ${path}: there is no such file or folder`);
    await assertRefused(() => readSafetensors(pathToFileURL(path)), `from ${path}: there is no such file`);
    await assertRefused(() => readSafetensors(""), 'from "": there is no such file');
    await assertRefused(() => readSafetensors("file://host.example/a.safetensors"), "Cannot read safetensors from");
    await assertRefused(() => readSafetensors("/dev/null"), "from /dev/null: it is no ordinary file");
  });

  test("a file that gets shorter while it is open", async () => {
    using folder = temporaryFolder();
    const path = folder.file("model.safetensors");
    writeFileSync(path, file);
    const checkpoint = await readSafetensors(folder.path);
    truncateSync(path, file.length - 4);
    assertEquals((await checkpoint.tensor("a")).shape, [3]);
    await assertRefused(() => checkpoint.tensor("b"), `${path}: expected 8 bytes at `, "got 4: it was cut short");
    await checkpoint.close();
  });

  test("functions that fail, and that return something else", async () => {
    const open = (read: unknown, size?: unknown) => () => readSafetensors({ size, read } as SafetensorsSource);
    await assertRefused(open(() => Promise.reject(new Error("no tape"))), "reading bytes 0 to 8 failed: no tape");
    await assertRefused(
      open(() => {
        throw undefined;
      }),
      "reading bytes 0 to 8 failed: undefined",
    );
    await assertRefused(open(() => "01234567"), 'read() must return a Uint8Array, got "01234567"');
    await assertRefused(open(() => new Uint8Array(9)), "a range reader: expected 8 bytes at 0, got 9");
    for (const size of [-1, 1.5, NaN, "9", null]) {
      await assertRefused(open(() => file, size), "size must be a non-negative integer, got");
    }
  });

  test("what is no source", async () => {
    for (const source of [undefined, null, 1, {}, [], new ArrayBuffer(8), new Float32Array(2)]) {
      await assertRefused(
        () => readSafetensors(source as unknown as SafetensorsSource),
        "expected a Uint8Array, a Blob, a path, a URL, { size?, read } or an index { weight_map }",
      );
    }
    const why = "expected a URL of http, https or file; of others, pass the Blob that fetch() gives";
    await assertRefused(() => readSafetensors("blob://x/1"), why);
    await assertRefused(() => readSafetensors(new URL("data:,x")), why);
    await assertRefused(() => readSafetensors("http://"), "it is no URL");
    await assertRefused(() => readSafetensors(file, { fetch: 1 as never }), "fetch must be a function, got 1");
  });

  test("paths in browsers, saying what to pass there", async () => {
    for (const location of ["model.safetensors", new URL("file:///model.safetensors")]) {
      await assertRefused(
        () => filePath(location, "browser"),
        "a browser opens no paths; pass a Blob or File, bytes in a Uint8Array, a URL of http or https, or { read }",
      );
    }
  });
});
