// Rows of a paged cache in the order of their keys, in memory of their own: for what reads latents that follow each other.

import type { AnyIndexTensor } from "../op/index_tensor.ts";
import type { GpuTensor } from "../op/tensor.ts";
import { stridingWorkgroups } from "./decode_call.ts";
import type { GpuContext } from "./device.ts";
import { type KernelStep, KernelSteps } from "./kernel_steps.ts";
import { quadElements } from "./kernels/absorbed_operands.ts";
import * as gather from "./kernels/gather_latents.ts";
import type { GpuLatentStore } from "./latent_store.ts";
import { checkBinding } from "./limit_checks.ts";
import { rowPlaces } from "./row_places.ts";

/** Rows, and the kernels that bring them. */
export interface GatheredRows {
  /** What is to be run, and disposed of by itself. */
  readonly steps: KernelSteps;
  /** The rows, `[sequences, count, L + R]`. */
  readonly rows: GpuTensor;
  /** Gives the rows' memory back. */
  dispose(): void;
  /** The same after a failure: the memory may be what the device refused. */
  discard(): void;
}

/**
 * Prepares the gathering of so many keys of some sequences.
 *
 * @param context The device.
 * @param store The cache.
 * @param wanted Pages of each sequence, which sequences, the first key, and how many.
 * @throws {FlashMLAError} When the rows pass a binding (`limit`) or a kernel does not compile (`device`).
 */
export async function gatheredRows(
  context: GpuContext,
  store: GpuLatentStore,
  { blockTable, sequences, first, count }: {
    readonly blockTable: AnyIndexTensor;
    readonly sequences: readonly number[];
    readonly first: number;
    readonly count: number;
  },
): Promise<GatheredRows> {
  const steps = new KernelSteps(context);
  const width = store.layout.kvLoraRank + store.layout.qkRopeHeadDim;
  const stride = store.rowQuads * quadElements(store.storage);
  const total = sequences.length * count;
  // Not among what the steps borrow: the rows outlive them.
  const { buffers, device } = context;
  const bytes = Math.max(16, total * store.rowQuads * 16);
  checkBinding("gathered latents", bytes, context.capabilities.limits);
  const gathered = buffers.acquire("storage", bytes);
  try {
    const offsets = sequences.flatMap((sequence) => Array.from({ length: count }, (_, i) => [sequence, first + i]));
    const zeros = { data: new Int32Array(blockTable.shape[0]), shape: [blockTable.shape[0]] };
    const { places, before } = rowPlaces(steps, store.layout, { blockTable, seqLens: zeros, rows: offsets });
    const [shardPlaces, quads] = [store.layout.pageSize, store.rowQuads * quadElements(store.storage) / 4];
    const kernels = store.shards.map(({ buffer, firstPage, pages }): KernelStep => ({
      label: "gather latents",
      code: gather.wgsl(store.storage),
      bindings: {
        0: steps.params(Uint32Array.of(total, quads, firstPage * shardPlaces, pages * shardPlaces)),
        1: places,
        2: { buffer },
        3: { buffer: gathered, size: bytes },
      },
      workgroups: [Math.min(stridingWorkgroups, Math.ceil(total * quads / gather.workgroupSize))],
    }));
    await steps.bind("read the cache", [...before, ...kernels]);
  } catch (error) {
    buffers.discard(gathered);
    steps.dispose();
    throw error;
  }
  let disposed = false;
  const rows: GpuTensor = {
    buffer: gathered,
    shape: [sequences.length, count, width],
    strides: [count * stride, stride, 1],
    dtype: store.layout.dtype,
    device,
    get disposed() {
      return disposed;
    },
  };
  const end = (give: () => void) => () => {
    if (!disposed) give();
    disposed = true;
  };
  return {
    steps,
    rows,
    dispose: end(() => buffers.release("storage", gathered)),
    discard: end(() => buffers.discard(gathered)),
  };
}
