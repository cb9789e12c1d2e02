import { existsSync, writeFileSync } from "node:fs";
import process from "node:process";
import { describe, test } from "node:test";
import { assert, assertEquals, assertFalse, assertRejects } from "@std/assert";
import { denoFiles, denoRuntime } from "../src/cache/deno_runtime.ts";
import { type FileRuntime, isMissing, isThereAlready } from "../src/cache/file_runtime.ts";
import { nodeFiles } from "../src/cache/node_runtime.ts";
import { temporaryFolder } from "./support/cache_folder.ts";

const deno = denoRuntime();
const implementations: [name: string, files: FileRuntime | null][] = [
  ["Deno's files", deno === undefined ? null : denoFiles(deno)],
  ["node:fs", nodeFiles],
  ["node:fs where it has to be imported", {
    ...nodeFiles,
    state: (path) => withoutBuiltins(() => nodeFiles.state(path)),
  }],
];

/** What Node before 20.16 does. The module is asked for before the first await. */
function withoutBuiltins<T>(work: () => Promise<T>): Promise<T> {
  const { getBuiltinModule } = process;
  try {
    Object.assign(process, { getBuiltinModule: undefined });
    return work();
  } finally {
    Object.assign(process, { getBuiltinModule });
  }
}

async function rejection(promise: Promise<unknown>): Promise<Error> {
  return await assertRejects(() => promise, Error);
}

for (const [name, files] of implementations) {
  describe(`FileRuntime of ${name}`, { skip: files === null ? "needs Deno" : false }, () => {
    test("makes directories, again and again", async () => {
      using folder = temporaryFolder();
      await files!.makeDirectory(folder.file("a", "b", "c"));
      await files!.makeDirectory(folder.file("a", "b", "c"));
      await Promise.all([1, 2, 3].map(() => files!.makeDirectory(folder.file("a", "d", "e"))));
      assert(existsSync(folder.file("a", "b", "c")) && existsSync(folder.file("a", "d", "e")));
      writeFileSync(folder.file("file"), "");
      await rejection(files!.makeDirectory(folder.file("file", "below")));
      await rejection(files!.makeDirectory("/proc/none/below"));
    });

    test("tells when a file was written to", async () => {
      using folder = temporaryFolder();
      const path = folder.file("file");
      assertEquals(await files!.state(path), null);
      writeFileSync(path, "abc");
      const state = await files!.state(path);
      assertEquals(state?.size, 3);
      assert(Math.abs(state!.modified - Date.now()) < 60_000);
      assertEquals(await files!.state(path), state);
      assertEquals(new TextDecoder().decode(await files!.readFile(path)), "abc");
    });

    test("makes a file only once, and its errors say what was in the way", async () => {
      using folder = temporaryFolder();
      const path = folder.file("file");
      await files!.createNew(path);
      const there = await rejection(files!.createNew(path));
      assertEquals([isThereAlready(there), isMissing(there)], [true, false]);
      await files!.rename(path, folder.file("renamed"));
      await files!.remove(folder.file("renamed"));
      assertFalse(existsSync(folder.file("renamed")));
      const missing = await rejection(files!.rename(path, folder.file("renamed")));
      assertEquals([isThereAlready(missing), isMissing(missing)], [false, true]);
    });
  });
}
