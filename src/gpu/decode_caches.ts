// The cache of a call as kernels bind it: the buffers of a paged one, or a tensor.

import type { AnyTensor } from "../op/tensor.ts";
import { boundTensor } from "./bound_tensor.ts";
import { type DecodeCall, stridingWorkgroups } from "./decode_call.ts";
import type { KernelStep } from "./kernel_steps.ts";
import { quadElements, rowQuads } from "./kernels/absorbed_operands.ts";
import * as append from "./kernels/append_latents.ts";
import { GpuLatentStore } from "./latent_store.ts";
import { checkBinding } from "./limit_checks.ts";

/** A part of the cache that one dispatch reads. */
export interface BoundCache {
  readonly binding: GPUBufferBinding;
  /** Quads from the binding's start to the first row. */
  readonly base: number;
  /** Quads from one row to the next. */
  readonly row: number;
  /** Without pages: rows from one sequence to the next. */
  readonly sequenceRows: number;
  /** The pages that it holds. */
  readonly firstPage: number;
  readonly pageCount: number;
}

/** The parts of the cache in order: one for each of its buffers. */
export function boundCaches(call: DecodeCall, before: KernelStep[]): BoundCache[] {
  const { inputs } = call;
  const { cache } = inputs;
  if (cache instanceof GpuLatentStore) {
    return cache.shards.map(({ buffer, firstPage, pages }) => ({
      binding: { buffer },
      base: 0,
      row: cache.rowQuads,
      sequenceRows: 0,
      firstPage,
      pageCount: pages,
    }));
  }
  return [tensorCache(call, cache as AnyTensor, before)];
}

/** A tensor without pages: the caller's where its rows are whole quads; else a copy whose rows are. */
function tensorCache(call: DecodeCall, cache: AnyTensor, before: KernelStep[]): BoundCache {
  const { context, problem, steps } = call;
  const { limits } = context.capabilities;
  const [sequences, keyLength, width] = cache.shape;
  const bound = boundTensor(steps, "cache", cache, limits);
  const { storage } = bound.elements;
  const perQuad = quadElements(storage);
  const [item, row] = bound.strides;
  const fixed = { firstPage: 0, pageCount: 0 };
  // Of rows that are no whole number of quads the last one would read what lies behind, which may be anything.
  const aligned = [bound.base, row, width].every((n) => n % perQuad === 0) && (sequences === 1 || item % row === 0);
  if (aligned && bound.binding.size! % 16 === 0) {
    const sequenceRows = sequences === 1 ? 0 : item / row;
    return { ...fixed, binding: bound.binding, base: bound.base / perQuad, row: row / perQuad, sequenceRows };
  }
  const quads = rowQuads(problem, storage);
  const count = sequences * keyLength;
  const size = Math.max(16, count * quads * 16);
  checkBinding("the cache with padded rows", size, limits);
  const padded = { buffer: steps.borrow(size), size };
  const places = Uint32Array.from({ length: count }, (_, i) => i);
  const fourths = quads * perQuad / 4;
  before.push({
    label: "pad rows",
    code: append.wgsl(bound.elements, storage),
    bindings: {
      0: steps.params(Uint32Array.of(count, width, fourths, keyLength, bound.base, item, row, 0, count)),
      1: bound.binding,
      2: { buffer: steps.upload(places), size: Math.max(16, 4 * count) },
      3: padded,
    },
    workgroups: [Math.min(stridingWorkgroups, Math.ceil(count * fourths / append.workgroupSize))],
  });
  return { ...fixed, binding: padded, base: 0, row: quads, sequenceRows: keyLength };
}
