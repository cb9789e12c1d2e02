// Appending to a paged cache, validated: where each row goes, and which shared pages have to be copied before.

import { checkOffsets, checkPage, checkSeqLens, placeOf, type SeqLens, tableColumns } from "./sequence_places.ts";
import { FlashMLAError } from "./errors.ts";
import { type AnyIndexTensor, type IndexTensor, isGpuIndex } from "./index_tensor.ts";
import type { PageAllocator } from "./page_allocator.ts";
import { type AnyTensor, checkTensor } from "./tensor.ts";

/** Where new rows belong. */
export interface AppendWhere {
  /**
   * Page numbers of each sequence, `[sequences, maxPages]`. On the host, an entry whose page others share is replaced by that
   * of a copy before it is written to.
   */
  readonly blockTable: AnyIndexTensor;
  /** Keys of each sequence before the new ones. */
  readonly seqLens: SeqLens;
  /** Offsets `[sequences + 1]` of rows packed into batch 1; without them each batch item is a sequence. */
  readonly cuSeqlens?: Int32Array | Uint32Array | readonly number[];
}

/** What an append does. */
export interface AppendPlan {
  /** First row of each sequence, counted through both axes, and behind it the number of rows. */
  readonly rowStarts: readonly number[];
  /** Where each row goes, as page · pageSize + place in the page; null where table or lengths lie on a GPU. */
  readonly places: Uint32Array<ArrayBuffer> | null;
  /** Entries of the table to be given a copy of their page. */
  readonly shared: readonly { readonly entry: number; readonly page: number }[];
}

function fail(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot append to the cache: ${why}`);
}

/**
 * Validates an append and works out what it does. Nothing is changed.
 *
 * @param rows The new rows.
 * @param where Where they belong.
 * @param cache The cache: its row width, page size and pages.
 * @param allocator Who holds which page.
 * @throws {FlashMLAError} With code `invalid-input`, naming the argument; or `limit` when the copies of shared pages need
 * more pages than are free.
 */
export function appendPlan(
  rows: AnyTensor,
  where: AppendWhere,
  cache: { readonly width: number; readonly pageSize: number },
  allocator: PageAllocator,
): AppendPlan {
  checkTensor("rows", rows);
  const { shape } = rows;
  if (shape.length !== 3) {
    fail(`rows must have 3 axes [batch, length, kvLoraRank + qkRopeHeadDim], got shape [${shape}]`);
  }
  const [batch, length, width] = shape;
  if (width !== cache.width) fail(`rows are ${width} elements wide, the cache's are ${cache.width}`);
  if (typeof where !== "object" || where === null) fail("expected { blockTable, seqLens } beside the rows");
  const rowStarts = where.cuSeqlens === undefined
    ? Array.from({ length: batch + 1 }, (_, i) => i * length)
    : checkOffsets(where.cuSeqlens, batch, length, "rows", fail);
  const sequences = rowStarts.length - 1;
  const { blockTable } = where;
  const columns = tableColumns(blockTable, sequences, fail);
  const capacity = columns * cache.pageSize;
  const seqLens = checkSeqLens(
    where.seqLens,
    sequences,
    capacity,
    `${columns} pages of ${cache.pageSize} tokens`,
    fail,
  );
  seqLens?.forEach((keys, sequence) => {
    const added = rowStarts[sequence + 1] - rowStarts[sequence];
    if (keys + added <= capacity) return;
    fail(
      `sequence ${sequence} has ${keys} keys and gets ${added}, its row of blockTable has room for ${capacity} ` +
        `(${columns} pages of ${cache.pageSize} tokens)`,
    );
  });
  if (seqLens === null || isGpuIndex(blockTable)) return { rowStarts, places: null, shared: [] };
  const shared = sharedPages(blockTable, seqLens, rowStarts, cache.pageSize, allocator);
  return { rowStarts, places: placesOf(blockTable, seqLens, rowStarts, cache.pageSize), shared };
}

/** Where each row goes by the table as it is now. */
export function placesOf(
  table: IndexTensor,
  seqLens: readonly number[],
  rowStarts: readonly number[],
  pageSize: number,
): Uint32Array<ArrayBuffer> {
  const places = new Uint32Array(rowStarts[rowStarts.length - 1]);
  seqLens.forEach((keys, sequence) => {
    for (let row = rowStarts[sequence]; row < rowStarts[sequence + 1]; row++) {
      places[row] = placeOf(table, sequence, keys + row - rowStarts[sequence], pageSize);
    }
  });
  return places;
}

/** The entries whose pages are written to and held by others, too. */
function sharedPages(
  table: IndexTensor,
  seqLens: readonly number[],
  rowStarts: readonly number[],
  pageSize: number,
  allocator: PageAllocator,
): { entry: number; page: number }[] {
  const columns = table.shape[1];
  /** By page: who writes to it, as entries of the table. */
  const writers = new Map<number, number[]>();
  seqLens.forEach((keys, sequence) => {
    const added = rowStarts[sequence + 1] - rowStarts[sequence];
    if (added === 0) return;
    const last = Math.floor((keys + added - 1) / pageSize);
    // Pages before the first new row are read later on; they are checked where they are read.
    for (let column = Math.floor(keys / pageSize); column <= last; column++) {
      const entry = sequence * columns + column;
      const page = table.data[entry];
      checkPage(page, sequence, column, allocator.pages, (at) => allocator.holders(at), fail);
      writers.set(page, [...writers.get(page) ?? [], entry]);
    }
  });
  const shared: { entry: number; page: number }[] = [];
  for (const [page, entries] of writers) {
    const holders = allocator.holders(page);
    if (entries.length > holders) {
      const [one, other] = entries.map((entry) => Math.floor(entry / columns));
      fail(
        `sequences ${one} and ${other} both append to page ${page}, which is held ${
          holders === 1 ? "once" : `${holders} times`
        }; ` +
          "cache.fork() holds pages for a sequence that shares them",
      );
    }
    // The last one that holds a page has it for itself.
    const copied = entries.length === holders ? entries.slice(0, -1) : entries;
    shared.push(...copied.map((entry) => ({ entry, page })));
  }
  if (shared.length > allocator.freePages) {
    throw new FlashMLAError(
      "limit",
      `Cannot append to the cache: ${shared.length} shared pages have to be copied, ${allocator.freePages} of ` +
        `${allocator.pages} are free; free pages of sequences that have ended, or create a cache with more`,
    );
  }
  return shared;
}
