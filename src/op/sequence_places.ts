// Where sequences are: their pages, their lengths, and where packed ones begin.

import type { CacheLayout } from "./decode_problem.ts";
import { type AnyIndexTensor, checkIndexTensor, type IndexTensor, isGpuIndex } from "./index_tensor.ts";
import { elementCount, kindOf } from "./tensor.ts";

/** Lengths of sequences: one integer each. */
export type SeqLens = Int32Array | readonly number[] | AnyIndexTensor;

/** How many hold each page; undefined for a cache that does not count. */
type Holders = (page: number) => number;

/**
 * Throws unless every page that a sequence's keys lie in is one of the cache's, and held.
 *
 * @param table The block table, on the host.
 * @param seqLens Keys of each sequence.
 * @param cache The cache's layout.
 * @param holders How many hold a page.
 * @param refuse Throws, saying why.
 */
export function checkPages(
  table: IndexTensor,
  seqLens: readonly number[],
  { pageSize, pages }: Pick<CacheLayout, "pageSize" | "pages">,
  holders: Holders,
  refuse: (why: string) => never,
): void {
  const columns = table.shape[1];
  seqLens.forEach((keys, sequence) => {
    for (let column = 0; column * pageSize < keys; column++) {
      checkPage(table.data[sequence * columns + column], sequence, column, pages, holders, refuse);
    }
  });
}

/** Throws unless a block table's entry is a page of the cache that somebody holds. */
export function checkPage(
  page: number,
  sequence: number,
  column: number,
  pages: number,
  holders: Holders,
  refuse: (why: string) => never,
): void {
  const where = `blockTable[${sequence}, ${column}] is ${page}`;
  if (page < 0 || page >= pages) refuse(`${where}, outside the cache, which has pages 0 to ${pages - 1}`);
  if (holders(page) === 0) refuse(`${where}, a page that was freed or never allocated; cache.allocate() gives pages`);
}

/** Where a key's row is, counted through all pages. */
export function placeOf(table: IndexTensor, sequence: number, key: number, pageSize: number): number {
  return table.data[sequence * table.shape[1] + Math.floor(key / pageSize)] * pageSize + key % pageSize;
}

/** The columns of a block table that has a row for each sequence. */
export function tableColumns(
  table: AnyIndexTensor | undefined,
  sequences: number,
  refuse: (why: string) => never,
): number {
  if (table === undefined) {
    refuse("blockTable is missing; expected integers [sequences, maxPages], the pages of each sequence");
  }
  checkIndexTensor("blockTable", table);
  if (table.shape.length !== 2) {
    refuse(`blockTable must have 2 axes [sequences, maxPages], got shape [${table.shape.join(", ")}]`);
  }
  if (table.shape[0] !== sequences) refuse(`blockTable has ${table.shape[0]} rows, there are ${sequences} sequences`);
  return table.shape[1];
}

/** The keys of each sequence, or null where they are on a GPU. */
export function checkSeqLens(
  seqLens: SeqLens | undefined,
  sequences: number,
  capacity: number,
  place: string,
  refuse: (why: string) => never,
): readonly number[] | null {
  if (seqLens === undefined) refuse("seqLens is missing; expected an Int32Array, the keys of each sequence");
  if (isGpuIndex(seqLens)) {
    checkIndexTensor("seqLens", seqLens);
    if (elementCount(seqLens.shape) !== sequences) {
      refuse(`seqLens has shape [${seqLens.shape}], there are ${sequences} sequences`);
    }
    return null;
  }
  const list = integers("seqLens", seqLens, refuse);
  if (list.length !== sequences) refuse(`seqLens has ${list.length} lengths, there are ${sequences} sequences`);
  list.forEach((keys, sequence) => {
    if (keys < 0) refuse(`seqLens[${sequence}] must not be negative, got ${keys}`);
    if (keys > capacity) refuse(`seqLens[${sequence}] is ${keys}, more than the ${capacity} tokens of ${place}`);
  });
  return list;
}

/** Integers on the host, however they are given. */
function integers(
  name: string,
  given: Exclude<SeqLens, { buffer: GPUBuffer }>,
  refuse: (why: string) => never,
): number[] {
  if (typeof given === "object" && given !== null && "data" in given) {
    checkIndexTensor(name, given);
    return Array.from(given.data);
  }
  if (!(given instanceof Int32Array) && !Array.isArray(given)) {
    refuse(`${name} must be an Int32Array, an array of numbers, or integers on a GPU, got ${kindOf(given)}`);
  }
  const list = Array.from(given as ArrayLike<number>);
  list.forEach((value, i) => {
    if (!Number.isSafeInteger(value)) refuse(`${name} must hold integers, got ${kindOf(value)} at index ${i}`);
  });
  return list;
}

/** Offsets of sequences packed along the sequence axis of batch 1. */
export function checkOffsets(
  offsets: Int32Array | Uint32Array | readonly number[],
  batch: number,
  length: number,
  name: string,
  refuse: (why: string) => never,
): number[] {
  if (!(offsets instanceof Int32Array || offsets instanceof Uint32Array || Array.isArray(offsets))) {
    refuse(`cuSeqlens must be an Int32Array, a Uint32Array or an array of numbers, got ${kindOf(offsets)}`);
  }
  const list = Array.from(offsets as ArrayLike<number>);
  if (batch !== 1) refuse(`cuSeqlens packs sequences into batch 1, ${name} has batch ${batch}`);
  if (list.length === 0) refuse("cuSeqlens must hold n + 1 offsets, got none");
  list.forEach((offset, i) => {
    if (!Number.isSafeInteger(offset)) refuse(`cuSeqlens must hold integers, got ${kindOf(offset)} at index ${i}`);
    if (i === 0 && offset !== 0) refuse(`cuSeqlens must start at 0, got ${offset}`);
    if (i > 0 && offset < list[i - 1]) {
      refuse(`cuSeqlens must not decrease, got ${list[i - 1]} then ${offset} at index ${i}`);
    }
  });
  const last = list[list.length - 1];
  if (last !== length) refuse(`cuSeqlens must end at the sequence length ${length}, got ${last}`);
  return list;
}
