// A call's items and the entries of the merging kernel as kernels bind them, by the host or by a kernel that runs before.

import { reach } from "../op/segments.ts";
import { boundIndices } from "./bound_tensor.ts";
import { type DecodeCall, stridingWorkgroups } from "./decode_call.ts";
import { decodeSchedule, splitLength } from "./decode_schedule.ts";
import type { KernelStep } from "./kernel_steps.ts";
import { resultQuads, unbounded } from "./kernels/absorbed_operands.ts";
import * as split from "./kernels/split_keys.ts";

/** Bytes that partial results may take: beyond that splits become longer. */
const partialLimit = 256 * 2 ** 20;

/** A call's work. */
export interface BoundWork {
  /** The items of each of the cache's buffers. */
  readonly items: readonly GPUBufferBinding[];
  readonly itemCount: number;
  readonly merges: GPUBufferBinding;
  readonly mergeCount: number;
  /** Slots of partial results. */
  readonly slots: number;
  /** Most of them that one entry of the merging kernel has. */
  readonly mostSplits: number;
  /** Bytes of one. */
  readonly slotBytes: number;
}

/** The items of each of the cache's buffers, and the entries of the merging kernel. */
export function boundWork(call: DecodeCall, shards: number, before: KernelStep[]): BoundWork {
  const { context, problem, cfg, steps } = call;
  const { blockRows, blockK, workgroups } = cfg;
  const { maxStorageBufferBindingSize } = context.capabilities.limits;
  const slotBytes = blockRows * resultQuads(problem) * 16;
  const maxSlots = Math.floor(Math.min(partialLimit, maxStorageBufferBindingSize) / slotBytes);
  if (problem.seqLens === null) return workOnGpu(call, shards, maxSlots, before);
  const made = decodeSchedule(problem, { blockRows, blockK, workgroups }, shards, maxSlots);
  return {
    ...made,
    slotBytes,
    items: made.items.map((words) => ({ buffer: steps.upload(words), size: words.byteLength })),
    merges: { buffer: steps.upload(made.merges), size: made.merges.byteLength },
  };
}

/** The same for lengths that lie on the GPU. */
function workOnGpu(call: DecodeCall, shards: number, maxSlots: number, before: KernelStep[]): BoundWork {
  const { problem, inputs, cfg, steps } = call;
  const { blockRows, blockK, workgroups } = cfg;
  const { sequences, queryHeads, tokenStarts, capacity, splitKeys } = problem;
  const tokens = tokenStarts[1];
  const sequenceBlocks = Math.ceil(tokens * queryHeads / blockRows);
  const blocks = sequences * sequenceBlocks;
  const longest = { keyStart: 0, keyEnd: capacity, sequence: 0, row: 0, rows: 0, diagonal: 0 };
  let length = splitKeys ?? splitLength(Array.from({ length: blocks }, () => longest), blockK, workgroups);
  const splitsOf = () => Math.max(1, Math.ceil(capacity / length) + (splitKeys === null ? 0 : 1));
  while (splitKeys === null && blocks * splitsOf() * shards > maxSlots && splitsOf() > 1) length *= 2;
  const maxSplits = splitsOf();
  const lens = boundIndices(steps, inputs.seqLens);
  const [left, right] = reach(problem).map((keys) => Math.min(keys, unbounded));
  const itemBytes = split.itemBytes(blocks * maxSplits);
  const merges = { buffer: steps.borrow(16 * blocks), size: Math.max(16, 16 * blocks) };
  const items = Array.from({ length: shards }, (_, shard) => {
    const own = { buffer: steps.borrow(itemBytes), size: itemBytes };
    const words = [blocks, sequenceBlocks, blockRows, tokens, queryHeads, length, maxSplits, shard, shards, capacity];
    before.push({
      label: "split keys",
      code: split.wgsl(),
      bindings: {
        0: steps.params(Uint32Array.of(...words, left, right, lens.base, splitKeys === null ? 0 : 1)),
        1: lens.binding,
        2: own,
        3: merges,
      },
      workgroups: [Math.min(stridingWorkgroups, Math.ceil(blocks / split.workgroupSize))],
    });
    return own;
  });
  return {
    items,
    merges,
    itemCount: blocks * maxSplits,
    mergeCount: blocks,
    slots: blocks * maxSplits * shards,
    mostSplits: maxSplits * shards,
    slotBytes: blockRows * resultQuads(problem) * 16,
  };
}
