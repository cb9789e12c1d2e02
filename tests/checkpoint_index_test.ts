import { writeFileSync } from "node:fs";
import { describe, test } from "node:test";
import { assertEquals } from "@std/assert";
import fc from "fast-check";
import { readSafetensors, type SafetensorsSource, type ShardSource } from "../src/checkpoint/read_safetensors.ts";
import { FlashMLAError } from "../src/op/errors.ts";
import { temporaryFolder } from "./support/cache_folder.ts";
import { assertRefused, type CountingReader, countingReader, safetensorsBytes } from "./support/safetensors_bytes.ts";

const one = (value: number) => ({ dtype: "F32", shape: [1], data: Float32Array.of(value) });
const shards = {
  "1.safetensors": safetensorsBytes({ a: one(1), b: one(2), extra: one(9) }),
  "2.safetensors": safetensorsBytes({
    c_scale_inv: one(3),
    w: { dtype: "F8_E4M3", shape: [1, 2], data: Uint8Array.of(0x38, 0x40) },
  }),
  "3.safetensors": safetensorsBytes({ w_scale_inv: { dtype: "F32", shape: [1, 1], data: Float32Array.of(10) } }),
};
const index = {
  metadata: { total_size: 20, format: "pt", nested: {} },
  weight_map: { b: "1.safetensors", a: "1.safetensors", w: "2.safetensors", w_scale_inv: "3.safetensors" },
};

/** Shards that remember what was read of them. */
function countedShards() {
  const readers = new Map<string, CountingReader>();
  const opened: string[] = [];
  const shard = (name: string) => {
    opened.push(name);
    const reader = readers.get(name) ?? countingReader(shards[name as keyof typeof shards]);
    readers.set(name, reader);
    return reader;
  };
  return { shard, opened, readers };
}

describe("readSafetensors() of an index", () => {
  test("opens a shard when it is needed, and once", async () => {
    const { shard, opened, readers } = countedShards();
    const checkpoint = await readSafetensors(index, { shard });
    assertEquals(checkpoint.names, ["b", "a", "w", "w_scale_inv"]);
    assertEquals(checkpoint.metadata, { total_size: "20", format: "pt" });
    assertEquals([checkpoint.has("w"), checkpoint.has("extra")], [true, false]);
    assertEquals(opened, []);
    await Promise.all([checkpoint.tensor("a"), checkpoint.tensor("b"), checkpoint.info("a")]);
    assertEquals(opened, ["1.safetensors"]);
    const start = shards["1.safetensors"].length - 12;
    assertEquals(readers.get("1.safetensors")!.ranges, [[0, 8], [8, start], [start, start + 4], [
      start + 4,
      start + 8,
    ]]);
    await assertRefused(() => checkpoint.tensor("extra"), "from the index: expected one of its 4 tensors");
    await checkpoint.close();
    await assertRefused(() => checkpoint.tensor("a"), "from the index: it was closed");
  });

  test("reads tensors from several shards, neighbours of each in one range, and a scale from another", async () => {
    const { shard, opened, readers } = countedShards();
    const checkpoint = await readSafetensors(index, { shard });
    const tensors = await checkpoint.tensors((name) => !name.endsWith("_scale_inv"));
    assertEquals([...tensors].map(([name, { data }]) => [name, data]), [
      ...[["b", Float32Array.of(2)], ["a", Float32Array.of(1)], ["w", Float32Array.of(10, 20)]],
    ]);
    assertEquals(opened, ["1.safetensors", "2.safetensors", "3.safetensors"]);
    assertEquals([...readers.values()].map(({ ranges }) => ranges.length), [3, 3, 3]);
  });

  test("finds shards beside a file, or through the option", async () => {
    using folder = temporaryFolder();
    for (const [name, bytes] of Object.entries(shards)) writeFileSync(folder.file(name), bytes);
    const path = folder.file("other.safetensors.index.json");
    writeFileSync(path, JSON.stringify(index));
    const checkpoint = await readSafetensors(path);
    assertEquals((await checkpoint.tensor("w")).data, Float32Array.of(10, 20));
    await checkpoint.close();
    const asked: string[] = [];
    const shard = (name: string) => {
      asked.push(name);
      return Promise.resolve(new Blob([shards[name as keyof typeof shards]]));
    };
    const resolved = await readSafetensors(path, { shard });
    assertEquals((await resolved.tensor("a")).data, Float32Array.of(1));
    assertEquals(asked, ["1.safetensors"]);
    const file = new File([JSON.stringify(index)], "model.safetensors.index.json");
    assertEquals((await (await readSafetensors(file, { shard })).tensor("b")).data, Float32Array.of(2));
    await assertRefused(() => readSafetensors(file), "the option shard has to say where its files are");
    await assertRefused(() => readSafetensors(index), "the option shard has to say where its files are");
    await assertRefused(() => readSafetensors(index, { shard: "." as never }), 'shard must be a function, got "."');
  });

  test("throws for a shard that is missing, damaged or lacks what the index promises, and tries again", async () => {
    using folder = temporaryFolder();
    const path = folder.file("model.safetensors.index.json");
    writeFileSync(path, JSON.stringify({ weight_map: { a: "1.safetensors", z: "1.safetensors", c: "2.safetensors" } }));
    const checkpoint = await readSafetensors(folder.path);
    const shard = folder.file("1.safetensors");
    await assertRefused(() => checkpoint.tensor("a"), `from ${shard}: there is no such file`);
    writeFileSync(shard, shards["1.safetensors"].subarray(0, 50));
    await assertRefused(() => checkpoint.info("a"), `from ${shard}: expected a header of`);
    writeFileSync(shard, shards["1.safetensors"]);
    assertEquals((await checkpoint.tensor("a")).data, Float32Array.of(1));
    await assertRefused(
      () => checkpoint.tensor("z"),
      `from ${shard}: expected "z" in it, as ${path} says, got 3 others`,
    );
    await assertRefused(() => checkpoint.tensors(["a", "c"]), "2.safetensors: there is no such file");
    await checkpoint.close();
    const nested = await readSafetensors(index, { shard: () => index as unknown as ShardSource });
    await assertRefused(() => nested.tensor("a"), 'shard("1.safetensors") must give a file, got an index');
  });

  test("closes a shard that is still being opened", async () => {
    let release = () => {};
    const waiting = new Promise<void>((resolve) => release = resolve);
    const checkpoint = await readSafetensors(index, {
      shard: async (name) => {
        await waiting;
        return shards[name as keyof typeof shards];
      },
    });
    const reading = checkpoint.tensor("w").then(() => "read", (error) => error);
    const closing = checkpoint.close();
    release();
    await closing;
    await assertRefused(async () => {
      throw await reading;
    }, "it was closed");
  });

  test("refuses files outside of the folder before any is opened", async () => {
    const outside = [
      ...["../1.safetensors", "a/../../1.safetensors", "/etc/passwd", "..", ".", "", "a//b", "a/", "./a"],
      ...["..\\1.safetensors", "C:\\1.safetensors", "C:1.safetensors", "file:///1", "https://x.example/1", "a\0b"],
    ];
    for (const name of outside) {
      const { shard, opened } = countedShards();
      const weight_map = { a: "1.safetensors", b: name };
      await assertRefused(
        () => readSafetensors({ weight_map }, { shard }),
        'from the index: expected "b" in a file of the index\'s folder, got',
      );
      assertEquals(opened, []);
    }
  });

  test("refuses what is no index", async () => {
    using folder = temporaryFolder();
    const path = folder.file("x.index.json");
    const cases: [text: string, why: string][] = [
      ["", "the index is empty"],
      ["{", "expected the index in JSON, got"],
      ["[]", "expected the index to be a JSON object, got []"],
      ["{}", "expected weight_map to be an object of file names by tensor, got undefined"],
      ['{"weight_map":[]}', "expected weight_map to be an object of file names by tensor, got []"],
      ['{"weight_map":{"a":1}}', 'expected "a" in a file of the index\'s folder, got 1'],
      ['{"weight_map":{"a":"1","a":"2"}}', 'the index has "a" twice'],
    ];
    for (const [text, why] of cases) {
      writeFileSync(path, text);
      await assertRefused(() => readSafetensors(path), `from ${path}: ${why}`);
    }
    for (const weight_map of [null, [], "a", 1]) {
      const source = { weight_map } as unknown as SafetensorsSource;
      await assertRefused(() => readSafetensors(source, { shard: () => path }), "expected weight_map to be an object");
    }
  });

  test("reads or refuses any JSON", async () => {
    const map = fc.oneof(fc.dictionary(fc.string(), fc.oneof(fc.webPath(), fc.jsonValue())), fc.jsonValue());
    await fc.assert(
      fc.asyncProperty(fc.record({ weight_map: map, metadata: fc.jsonValue() }), async (index) => {
        try {
          const source = index as unknown as SafetensorsSource;
          const checkpoint = await readSafetensors(source, { shard: () => shards["1.safetensors"] });
          for (const name of checkpoint.names) await checkpoint.tensor(name);
        } catch (error) {
          if (!(error instanceof FlashMLAError)) throw error;
        }
      }),
      { numRuns: 500 },
    );
  });
});
