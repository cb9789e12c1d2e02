// The work of one call, cut into items: blocks of query rows against splits of their keys. Worked out on the host where the
// lengths are known there; a kernel does the same for lengths on a GPU (kernels/split_keys.ts).
//
// Splits exist so that few sequences fill the device: their number follows from how many workgroups a configuration aims at.
// Short sequences get few splits and long ones many, of about the same length, so that no workgroup is idle or lasts.

import type { DecodeProblem } from "../op/decode_problem.ts";
import { reach } from "../op/segments.ts";
import { itemWords, noSlot } from "./kernels/absorbed_operands.ts";
import { mergeWords } from "./kernels/merge_splits.ts";

/** The rows of one block, and the keys that they see. */
export interface RowBlock {
  /** Which sequence. */
  readonly sequence: number;
  /** First query row, counted through [tokens, heads]. */
  readonly row: number;
  /** How many rows. */
  readonly rows: number;
  /** First key that any of the rows sees. */
  readonly keyStart: number;
  /** One past the last. */
  readonly keyEnd: number;
  /** What a token's index becomes its position among the keys with. */
  readonly diagonal: number;
}

/** A call's work. */
export interface DecodeSchedule {
  /** The items' words, of one buffer of the cache after the other. */
  readonly items: readonly Uint32Array<ArrayBuffer>[];
  /** How many items there are. */
  readonly itemCount: number;
  /** The entries of the merging kernel. */
  readonly merges: Uint32Array<ArrayBuffer>;
  /** How many they are. */
  readonly mergeCount: number;
  /** Slots of partial results. */
  readonly slots: number;
  /** Most of them that one entry has. */
  readonly mostSplits: number;
}

/** Keys below which a split is not worth its merging. */
const leastSplit = 64;

/** Blocks of query rows, in order, with what they see. */
export function rowBlocks(problem: DecodeProblem, blockRows: number): RowBlock[] {
  const { tokenStarts, queryHeads, seqLens } = problem;
  const [left, right] = reach(problem);
  return seqLens!.flatMap((keys, sequence) => {
    const [first, end] = [tokenStarts[sequence], tokenStarts[sequence + 1]];
    const diagonal = keys - end;
    const blocks: RowBlock[] = [];
    for (let row = first * queryHeads; row < end * queryHeads; row += blockRows) {
      const rows = Math.min(blockRows, end * queryHeads - row);
      const lowest = diagonal + Math.floor(row / queryHeads);
      const highest = diagonal + Math.floor((row + rows - 1) / queryHeads);
      const keyStart = Math.min(keys, Math.max(0, lowest - left));
      const keyEnd = Math.max(keyStart, Math.min(keys, highest + right + 1));
      blocks.push({ sequence, row, rows, keyStart, keyEnd, diagonal });
    }
    return blocks;
  });
}

/** Keys of one split, so that all blocks together make about so many items. */
export function splitLength(blocks: readonly RowBlock[], blockK: number, workgroups: number): number {
  const keys = blocks.reduce((sum, { keyStart, keyEnd }) => sum + keyEnd - keyStart, 0);
  const length = Math.max(leastSplit, Math.ceil(keys / Math.max(1, workgroups)));
  return Math.ceil(length / blockK) * blockK;
}

/** The parts of a block's keys: of equal length, or between multiples of a fixed one. */
function splits({ keyStart, keyEnd }: RowBlock, length: number, blockK: number, fixed: boolean): [number, number][] {
  if (keyStart === keyEnd) return [[keyStart, keyEnd]];
  if (fixed) {
    const first = Math.floor(keyStart / length);
    return Array.from({ length: Math.ceil(keyEnd / length) - first }, (_, i) => [
      Math.max(keyStart, (first + i) * length),
      Math.min(keyEnd, (first + i + 1) * length),
    ]);
  }
  const count = Math.ceil((keyEnd - keyStart) / length);
  const even = Math.ceil((keyEnd - keyStart) / count / blockK) * blockK;
  return Array.from({ length: Math.ceil((keyEnd - keyStart) / even) }, (_, i) => [
    keyStart + i * even,
    Math.min(keyEnd, keyStart + (i + 1) * even),
  ]);
}

/**
 * Cuts a call into items.
 *
 * @param problem The call's dimensions, its lengths on the host.
 * @param tile What of the configuration it depends on.
 * @param shards Buffers that the cache lies in: each item is done once for each of them.
 * @param maxSlots Slots that there is memory for; splits become longer where more would be needed.
 */
export function decodeSchedule(
  problem: DecodeProblem,
  { blockRows, blockK, workgroups }: {
    readonly blockRows: number;
    readonly blockK: number;
    readonly workgroups: number;
  },
  shards: number,
  maxSlots: number,
): DecodeSchedule {
  const blocks = rowBlocks(problem, blockRows);
  const { splitKeys } = problem;
  let length = splitKeys ?? splitLength(blocks, blockK, workgroups);
  const cut = () => blocks.map((block) => splits(block, length, blockK, splitKeys !== null));
  let parts = cut();
  const slotsOf = () => parts.reduce((sum, own) => sum + (own.length * shards > 1 ? own.length * shards : 0), 0);
  while (splitKeys === null && slotsOf() > maxSlots && parts.some((own) => own.length > 1)) {
    length *= 2;
    parts = cut();
  }
  const items: { readonly words: number[]; readonly keys: number; readonly shared: boolean }[] = [];
  const merges: number[] = [];
  let slots = 0;
  blocks.forEach(({ sequence, row, rows, diagonal }, i) => {
    const own = parts[i];
    const shared = own.length * shards > 1;
    if (shared) merges.push(row, rows, slots, own.length * shards);
    own.forEach(([start, end]) => {
      const words = [sequence, row, rows, start, end, diagonal, shared ? slots : noSlot, 0];
      items.push({ words, keys: end - start, shared });
      if (shared) slots += shards;
    });
  });
  // The longest first: what is left to the end is short.
  items.sort((a, b) => b.keys - a.keys);
  return {
    items: Array.from({ length: shards }, (_, shard) => {
      const packed = new Uint32Array(Math.max(1, items.length) * itemWords);
      items.forEach(({ words, shared }, i) => {
        packed.set(words.map((word) => word >>> 0), i * itemWords);
        if (shared) packed[i * itemWords + 6] += shard;
      });
      return packed;
    }),
    itemCount: items.length,
    merges: Uint32Array.from(merges.length === 0 ? [0, 0, 0, 0] : merges),
    mergeCount: merges.length / mergeWords,
    slots,
    mostSplits: parts.reduce((most, own) => Math.max(most, own.length * shards), 0),
  };
}
