// The library's own registry, and which platform "auto" means.

import { FlashMLAError } from "./op/errors.ts";
import type { MlaImplementation } from "./op/implementation.ts";
import type { Platform } from "./op/platform.ts";
import { webgpuImplementation } from "./gpu/webgpu_implementation.ts";
import { referenceImplementation } from "./reference/reference_implementation.ts";
import { KernelRegistry } from "./registry.ts";

/** The implementations that the library runs: WebGPU first, then the reference. */
export const kernelRegistry: KernelRegistry<MlaImplementation> = new KernelRegistry();

kernelRegistry.register("flash_mla", "webgpu", "gpu", webgpuImplementation, { priority: 10 });
kernelRegistry.register("flash_mla", "reference", "any", referenceImplementation);

/**
 * Which platform a call runs on.
 *
 * @param algorithm Operation name, such as `flash_mla`.
 * @param platform The platform that was asked for; `auto` takes the registered one of highest priority that this runtime
 * can run.
 * @returns A registered platform. One that was named is not checked for availability: opening it says why it cannot.
 * @throws {FlashMLAError} With code `unsupported-platform`, listing what is registered.
 */
export async function detectPlatform(algorithm: string, platform: Platform | "auto" = "auto"): Promise<Platform> {
  if (platform !== "auto") return kernelRegistry.get(algorithm, { platform }).platform;
  kernelRegistry.get(algorithm);
  const candidates = kernelRegistry.listImplementations(algorithm).sort((a, b) => b.priority - a.priority);
  for (const { platform, implementation } of candidates) {
    if (await implementation.isAvailable()) return platform;
  }
  throw new FlashMLAError(
    "unsupported-platform",
    `Cannot run "${algorithm}": no registered platform is available here`,
  );
}
