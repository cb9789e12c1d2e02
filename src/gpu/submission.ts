// Submitting what was recorded, and reading a result back in the same submission.

import { elementBytes, elementCount, type GpuTensor } from "../op/tensor.ts";
import { type GpuContext, unlessLost } from "./device.ts";
import { inErrorScopes } from "./error_scopes.ts";
import { settled } from "./settled.ts";

/**
 * Submits an encoder and waits until the engine has accepted it.
 *
 * @param context The device.
 * @param encoder What was recorded.
 * @param what What it does, after "could not".
 * @param check Runs in the same turn as the submission.
 */
export async function submit(
  context: GpuContext,
  encoder: GPUCommandEncoder,
  what: string,
  check: () => void,
): Promise<void> {
  await unlessLost(context, () =>
    inErrorScopes(context, what, () => {
      check();
      context.device.queue.submit([encoder.finish()]);
    }));
}

/**
 * The same with a copy of a dense tensor to the host.
 *
 * @returns Its bytes, in whole words.
 */
export async function submitAndRead(
  context: GpuContext,
  encoder: GPUCommandEncoder,
  what: string,
  { buffer, shape, dtype }: GpuTensor,
  check: () => void,
): Promise<ArrayBuffer> {
  const size = Math.ceil(elementCount(shape) * elementBytes(dtype) / 4) * 4;
  const readback = context.buffers.acquire("readback", size);
  try {
    encoder.copyBufferToBuffer(buffer, 0, readback, 0, size);
    await submit(context, encoder, what, check);
    return await unlessLost(context, async () => {
      await settled(context.device, readback.mapAsync(1, 0, size));
      const bytes = readback.getMappedRange(0, size).slice(0);
      readback.unmap();
      context.buffers.release("readback", readback);
      return bytes;
    });
  } catch (error) {
    // It may be mapped or waiting for it: nobody may get it from the pool.
    context.buffers.discard(readback);
    throw error;
  }
}
