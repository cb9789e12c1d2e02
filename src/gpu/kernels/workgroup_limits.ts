// Whether a kernel's workgroup is within a device's limits.

import type { GpuLimits } from "../capabilities.ts";

/** Why a workgroup of so many invocations and bytes of memory cannot run, or null when it can. */
export function whyTooLarge(
  invocations: number,
  bytes: number,
  { maxComputeInvocationsPerWorkgroup: most, maxComputeWorkgroupStorageSize: mostBytes }: GpuLimits,
): string | null {
  if (invocations > most) return `${invocations} invocations pass maxComputeInvocationsPerWorkgroup = ${most}`;
  if (bytes <= mostBytes) return null;
  return `${bytes} bytes of workgroup memory pass maxComputeWorkgroupStorageSize = ${mostBytes}`;
}
