// Where the rows of keys are in a paged cache.

import type { CacheLayout } from "../op/decode_problem.ts";
import { type AnyIndexTensor, isGpuIndex } from "../op/index_tensor.ts";
import { placeOf } from "../op/sequence_places.ts";
import { boundIndices } from "./bound_tensor.ts";
import { stridingWorkgroups } from "./decode_call.ts";
import type { KernelStep, KernelSteps } from "./kernel_steps.ts";
import * as place from "./kernels/place_rows.ts";

/** Which rows. */
export interface WantedRows {
  /** Pages of each sequence. */
  readonly blockTable: AnyIndexTensor;
  /** The key from which each sequence's offsets count. */
  readonly seqLens: AnyIndexTensor;
  /** The sequence and the offset of each row. */
  readonly rows: readonly (readonly number[])[];
}

/**
 * Works out where rows are: at once, or, where table or lengths lie on a GPU, by a kernel that is to run before.
 *
 * @param steps Takes what is uploaded.
 * @param layout The cache's layout.
 * @param wanted The rows.
 */
export function rowPlaces(
  steps: KernelSteps,
  { pageSize, pages }: Pick<CacheLayout, "pageSize" | "pages">,
  { blockTable, seqLens, rows }: WantedRows,
): { readonly places: GPUBufferBinding; readonly before: KernelStep[] } {
  const size = Math.max(16, 4 * rows.length);
  if (!isGpuIndex(blockTable) && !isGpuIndex(seqLens)) {
    const found = rows.map(([sequence, offset]) =>
      placeOf(blockTable, sequence, seqLens.data[sequence] + offset, pageSize)
    );
    return { places: { buffer: steps.upload(Uint32Array.from(found)), size }, before: [] };
  }
  const places = { buffer: steps.borrow(size), size };
  const table = boundIndices(steps, blockTable);
  const lens = boundIndices(steps, seqLens);
  const before: KernelStep = {
    label: "place rows",
    code: place.wgsl(pageSize),
    bindings: {
      0: steps.params(Uint32Array.of(rows.length, blockTable.shape[1], pages, table.base, lens.base)),
      1: { buffer: steps.upload(Uint32Array.from(rows.flat())), size: Math.max(16, 8 * rows.length) },
      2: table.binding,
      3: lens.binding,
      4: places,
    },
    workgroups: [Math.min(stridingWorkgroups, Math.ceil(rows.length / place.workgroupSize))],
  };
  return { places, before: [before] };
}
