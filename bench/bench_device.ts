// The device that a benchmark of all paths opens: with matrix units where the engine and the adapter offer them.

import { FlashMLAError, openDevice } from "../mod.ts";
import { type GpuContext, gpuContext } from "../src/gpu/device.ts";
import { subgroupMatrixFeature } from "../src/gpu/request_device.ts";

/**
 * Opens a device of its own on the engine that `FLASH_MLA_ENGINE` names; it is the caller's to destroy.
 *
 * @throws {FlashMLAError} With code `unsupported-platform` where there is no adapter.
 */
export async function openBenchDevice(): Promise<GpuContext> {
  try {
    return await gpuContext(await openDevice({ features: [subgroupMatrixFeature] }));
  } catch (error) {
    if (!(error instanceof FlashMLAError) || error.code !== "unsupported-platform") throw error;
    return await gpuContext(await openDevice());
  }
}
