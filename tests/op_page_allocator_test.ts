// The accounting of a cache's pages, against a model that counts holders in the plainest way.

import { describe, test } from "node:test";
import { assert, assertEquals, assertThrows } from "@std/assert";
import { FlashMLAError, LatentCache, type Tensor } from "../mod.ts";
import { insideOf } from "../src/latent_cache.ts";
import { PageAllocator } from "../src/op/page_allocator.ts";
import { mulberry32 } from "./support/random_problem.ts";

/** How many hold each page. */
function holdersOf(allocator: PageAllocator): number[] {
  return Array.from({ length: allocator.pages }, (_, page) => allocator.holders(page));
}

/** Asserts that something throws with a code and a message, and leaves an allocator as it was. */
function refuses(allocator: PageAllocator, change: () => unknown, code: string, message: string): void {
  const before = [holdersOf(allocator), allocator.freePages];
  const error = assertThrows(change, FlashMLAError, message);
  assertEquals(error.code, code);
  assertEquals([holdersOf(allocator), allocator.freePages], before);
}

describe("PageAllocator", () => {
  test("hands out each page once, and counts what is left", () => {
    const allocator = new PageAllocator(5);
    assertEquals([allocator.freePages, allocator.heldPages], [5, 0]);
    const [two, three] = [allocator.allocate(2), allocator.allocate(3)];
    assertEquals([...two, ...three].sort(), [0, 1, 2, 3, 4]);
    assertEquals([allocator.freePages, allocator.heldPages], [0, 5]);
    assertEquals(allocator.allocate(0).length, 0);
    allocator.free(two);
    assertEquals([allocator.freePages, allocator.heldPages], [2, 3]);
    assertEquals([...allocator.allocate(2)].sort(), [...two].sort());
  });

  test("frees a shared page when its last holder lets go", () => {
    const allocator = new PageAllocator(3);
    const pages = allocator.allocate(2);
    allocator.share(pages);
    allocator.share([pages[0], pages[0]]);
    assertEquals([...pages].map((page) => allocator.holders(page)), [4, 2]);
    assertEquals(allocator.freePages, 1);
    allocator.free(pages);
    allocator.free([pages[1], pages[0]]);
    assertEquals([allocator.holders(pages[0]), allocator.holders(pages[1]), allocator.freePages], [2, 0, 2]);
    allocator.free([pages[0], pages[0]]);
    assertEquals(allocator.freePages, 3);
  });

  test("frees everything when it is cleared", () => {
    const allocator = new PageAllocator(4);
    allocator.share(allocator.allocate(3));
    allocator.clear();
    assertEquals([holdersOf(allocator), allocator.freePages], [[0, 0, 0, 0], 4]);
    assertEquals([...allocator.allocate(4)].sort(), [0, 1, 2, 3]);
  });

  test("refuses more pages than are free, and takes none then", () => {
    const allocator = new PageAllocator(4);
    allocator.allocate(3);
    refuses(allocator, () => allocator.allocate(2), "limit", "Cannot allocate 2 pages: 1 of 4 are free");
  });

  test("refuses counts that are none", () => {
    const allocator = new PageAllocator(4);
    for (const [count, what] of [[-1, "-1"], [1.5, "1.5"], [NaN, "NaN"], ["2", '"2"']] as const) {
      const message = `Cannot allocate pages: count must be a whole number, got ${what}`;
      refuses(allocator, () => allocator.allocate(count as number), "invalid-input", message);
    }
  });

  test("refuses to free what is not held, and frees nothing then", () => {
    const allocator = new PageAllocator(4);
    const [one, other] = allocator.allocate(2);
    allocator.share([other]);
    const refused = (pages: ArrayLike<number>, message: string) =>
      refuses(allocator, () => allocator.free(pages), "invalid-input", `Cannot free pages: ${message}`);
    refused([one, 3], "page 3 is held by nobody, it is named 1 times");
    refused([one, one], `page ${one} is held 1 times, it is named 2 times`);
    refused([other, one, other, other], `page ${other} is held 2 times, it is named 3 times`);
    refused([one, 4], "page 4 at index 1 is outside the cache, which has pages 0 to 3");
    refused([-1], "page -1 at index 0 is outside the cache");
    refused([0.5], "page 0.5 at index 0 is outside the cache");
    refused(Int32Array.of(2147480000), "page 2147480000 at index 0 is outside the cache");
    refused(null as never, "expected an Int32Array or an array of page numbers, got null");
    refused(3 as never, "expected an Int32Array or an array of page numbers, got 3");
  });

  test("refuses to share a page that nobody holds, and shares nothing then", () => {
    const allocator = new PageAllocator(3);
    const [page] = allocator.allocate(1);
    const refused = (pages: readonly number[], message: string) =>
      refuses(allocator, () => allocator.share(pages), "invalid-input", `Cannot fork pages: ${message}`);
    refused([page, page + 1], `page ${page + 1} was freed or never allocated`);
    refused([page, 3], "page 3 at index 1 is outside the cache, which has pages 0 to 2");
  });

  test("keeps its accounting exact over 10,000 random operations", () => {
    const random = mulberry32(5);
    const upTo = (max: number) => Math.floor(random() * (max + 1));
    const pages = 23;
    const allocator = new PageAllocator(pages);
    const model = new Array<number>(pages).fill(0);
    /** The pages of each sequence, with what all of them hold: nothing else does. */
    const sequences: number[][] = [];
    const counts = { allocate: 0, fork: 0, free: 0, part: 0, clear: 0, refused: 0 };
    for (let i = 0; i < 10_000; i++) {
      const free = model.filter((holders) => holders === 0).length;
      const choice = random();
      if (choice < 0.35) {
        const count = upTo(6);
        if (count > free) {
          refuses(allocator, () => allocator.allocate(count), "limit", `${free} of ${pages} are free`);
          counts.refused++;
        } else {
          const taken = [...allocator.allocate(count)];
          assert(taken.every((page) => model[page]++ === 0), "a page was handed out twice");
          sequences.push(taken);
          counts.allocate++;
        }
      } else if (choice < 0.55 && sequences.length > 0) {
        const parent = sequences[upTo(sequences.length - 1)];
        const shared = parent.slice(0, upTo(parent.length));
        allocator.share(shared);
        for (const page of shared) model[page]++;
        sequences.push(shared);
        counts.fork++;
      } else if (choice < 0.85 && sequences.length > 0) {
        const [own] = sequences.splice(upTo(sequences.length - 1), 1);
        const kept = random() < 0.3 ? own.splice(0, upTo(own.length)) : [];
        allocator.free(own);
        for (const page of own) model[page]--;
        if (kept.length > 0) sequences.push(kept);
        counts[kept.length > 0 ? "part" : "free"]++;
      } else if (choice < 0.997) {
        // Once more than it is held: nothing of the list may be let go of, what is before it neither.
        const page = upTo(pages - 1);
        const list = [...sequences[0] ?? [], ...new Array<number>(model[page] + 1).fill(page)];
        refuses(allocator, () => allocator.free(list), "invalid-input", "Cannot free pages");
        counts.refused++;
      } else {
        allocator.clear();
        model.fill(0);
        sequences.length = 0;
        counts.clear++;
      }
      assertEquals(holdersOf(allocator), model);
      assertEquals(allocator.freePages, model.filter((holders) => holders === 0).length);
      assertEquals(allocator.heldPages, pages - allocator.freePages);
    }
    assert(Object.values(counts).every((count) => count > 5), JSON.stringify(counts));
  });
});

describe("LatentCache's pages", () => {
  test("are allocated, forked, freed and cleared in the cache's own count", async () => {
    const cache = await LatentCache.create({ platform: "reference", pages: 6, kvLoraRank: 4, qkRopeHeadDim: 2 });
    assertEquals([cache.freePages, cache.bytes], [6, 6 * 64 * 6 * 4]);
    const parent = cache.allocate(3);
    const child = cache.fork(parent.subarray(0, 2));
    assertEquals([...child], [...parent.subarray(0, 2)]);
    cache.free(parent);
    assertEquals(cache.freePages, 4);
    cache.free(child);
    assertEquals(cache.freePages, 6);
    cache.allocate(5);
    cache.clear();
    assertEquals(cache.freePages, 6);
    assertThrows(() => cache.fork([0]), FlashMLAError, "page 0 was freed or never allocated");
    cache.dispose();
  });

  test("are counted exactly, and rows kept, over 10,000 operations of sequences that grow, fork, append and end", async () => {
    const [pages, pageSize, columns] = [60, 4, 6];
    const cache = await LatentCache.create({ platform: "reference", pages, pageSize, kvLoraRank: 1, qkRopeHeadDim: 0 });
    const random = mulberry32(6);
    const upTo = (max: number) => Math.floor(random() * (max + 1));
    let next = 0;
    /** Sequences with the rows that they must have; all held pages are theirs. */
    let sequences: { table: { data: Int32Array; shape: number[] }; rows: number[] }[] = [];
    const counts = { grown: 0, copied: 0, forked: 0, ended: 0, refused: 0 };
    const used = ({ table, rows }: typeof sequences[number]) =>
      table.data.subarray(0, Math.ceil(rows.length / pageSize));
    for (let i = 0; i < 10_000; i++) {
      const choice = random();
      if (choice < 0.1) {
        sequences.push({ table: { data: new Int32Array(columns).fill(2147480000), shape: [1, columns] }, rows: [] });
      } else if (choice < 0.7 && sequences.length > 0) {
        const sequence = sequences[upTo(sequences.length - 1)];
        const { table, rows } = sequence;
        const count = Math.min(1 + upTo(2), columns * pageSize - rows.length);
        const before = [[...table.data], cache.freePages];
        const seqLens = [rows.length];
        let taken: Int32Array | null = null;
        try {
          taken = cache.reserve({ blockTable: table, seqLens, newTokens: count });
          const data = Float32Array.from({ length: count }, () => next++);
          const free = cache.freePages;
          await cache.append({ data, shape: [1, count, 1] }, { blockTable: table, seqLens });
          counts.copied += free - cache.freePages;
          rows.push(...data);
          counts.grown++;
        } catch (error) {
          assert(error instanceof FlashMLAError && error.code === "limit", `${error}`);
          if (taken !== null) {
            cache.free(taken);
            table.data.set(before[0] as number[]);
          }
          assertEquals([[...table.data], cache.freePages], before);
          counts.refused++;
        }
      } else if (choice < 0.84 && sequences.length > 0) {
        const parent = sequences[upTo(sequences.length - 1)];
        const table = { data: new Int32Array(columns).fill(2147480000), shape: [1, columns] };
        table.data.set(cache.fork(used(parent)));
        sequences.push({ table, rows: [...parent.rows] });
        counts.forked++;
      } else if (sequences.length > 0) {
        const [ended] = sequences.splice(upTo(sequences.length - 1), 1);
        cache.free(used(ended));
        counts.ended++;
      }
      const held = new Set(sequences.flatMap((sequence) => [...used(sequence)]));
      assertEquals(cache.freePages, pages - held.size);
      for (const { table, rows } of sequences.slice(-1)) {
        const { rows: read } = await insideOf(cache).store.gather(table, 0, 0, rows.length);
        assertEquals([...(read as Tensor).data], rows);
      }
      if (i % 2_500 === 2_499) {
        cache.clear();
        sequences = [];
        assertEquals(cache.freePages, pages);
      }
    }
    assert(Object.values(counts).every((count) => count > 50), JSON.stringify(counts));
    cache.dispose();
  });
});
