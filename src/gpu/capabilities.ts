// What a device can do, as far as kernels and tuning care.

import type { Engine } from "./engine.ts";

/** The limits of a device that decide what a kernel may use, under WebGPU's own names. */
export interface GpuLimits {
  /** Bytes of workgroup memory per workgroup. */
  readonly maxComputeWorkgroupStorageSize: number;
  /** Invocations per workgroup. */
  readonly maxComputeInvocationsPerWorkgroup: number;
  /** Invocations along x. */
  readonly maxComputeWorkgroupSizeX: number;
  /** Workgroups along one axis of a dispatch. */
  readonly maxComputeWorkgroupsPerDimension: number;
  /** Bytes that one storage binding may cover. */
  readonly maxStorageBufferBindingSize: number;
  /** Bytes of one buffer. */
  readonly maxBufferSize: number;
  /** Storage buffers that one kernel may bind. */
  readonly maxStorageBuffersPerShaderStage: number;
}

/** The limits by name, in the order in which they are printed. */
export const limitNames = [
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxComputeWorkgroupsPerDimension",
  "maxStorageBufferBindingSize",
  "maxBufferSize",
  "maxStorageBuffersPerShaderStage",
] as const satisfies readonly (keyof GpuLimits)[];

/** What WebGPU guarantees on every device. */
export const defaultLimits: GpuLimits = {
  maxComputeWorkgroupStorageSize: 16384,
  maxComputeInvocationsPerWorkgroup: 256,
  maxComputeWorkgroupSizeX: 256,
  maxComputeWorkgroupsPerDimension: 65535,
  maxStorageBufferBindingSize: 134217728,
  maxBufferSize: 268435456,
  maxStorageBuffersPerShaderStage: 8,
};

/** Groups of invocations that exchange values without workgroup memory. */
export interface Subgroups {
  /** Fewest invocations of a subgroup. */
  readonly minSize: number;
  /** Most invocations of a subgroup. */
  readonly maxSize: number;
  /** Whether WGSL must say `enable subgroups;` (Dawn, browsers) or must not (Deno). */
  readonly directive: boolean;
}

/** One shape of the matrix multiplication that a subgroup does as a whole: M × K times K × N. */
export interface SubgroupMatrixConfig {
  /** Element type of both factors, such as `f16`. */
  readonly componentType: string;
  /** Element type of the product and the sum, such as `f32`. */
  readonly resultComponentType: string;
  /** Rows of the left factor. */
  readonly M: number;
  /** Columns of the right factor. */
  readonly N: number;
  /** Columns of the left factor. */
  readonly K: number;
}

/** A device as kernels and tuning see it. */
export interface Capabilities {
  /** The WebGPU implementation and its version, such as `wgpu (Deno 2.9.6)`. */
  readonly engine: string;
  /** The adapter in the driver's words. */
  readonly adapter: string;
  /** Whether the adapter runs on the CPU, as far as its name tells. */
  readonly software: boolean;
  /** Whether kernels may use half precision (`shader-f16`). */
  readonly f16: boolean;
  /** The subgroups that kernels may use, or null. */
  readonly subgroups: Subgroups | null;
  /** Timestamp queries: none, in full resolution, or rounded by the engine to coarse steps. */
  readonly timestamps: "none" | "exact" | "quantised";
  /** The subgroup matrices that the device was opened with; empty without the feature. */
  readonly subgroupMatrices: readonly SubgroupMatrixConfig[];
  /** The device's limits. */
  readonly limits: GpuLimits;
}

/** Reads the capabilities of an open device. */
export function capabilitiesOf(device: GPUDevice, engine: Engine): Capabilities {
  const limits = Object.fromEntries(limitNames.map((name) => [name, Number(device.limits[name])]));
  const adapter = adapterName(device.adapterInfo);
  return {
    engine: engine.name,
    adapter,
    software: /llvmpipe|lavapipe|swiftshader|software|basic render/i.test(adapter),
    f16: device.features.has("shader-f16"),
    subgroups: null,
    timestamps: device.features.has("timestamp-query") ? "exact" : "none",
    subgroupMatrices: [],
    limits: limits as unknown as GpuLimits,
  };
}

/** An adapter in the driver's words, as far as the engine passes them on. */
export function adapterName(info: GPUAdapterInfo | undefined): string {
  const { vendor = "", architecture = "", device = "", description = "" } = info ?? {};
  return description || [vendor, architecture, device].filter((part) => part !== "").join(" ") || "unnamed adapter";
}

/** One line that two devices share exactly when a configuration tuned on one is valid on the other. */
export function deviceFingerprint(capabilities: Capabilities): string {
  const { engine, adapter, f16, subgroups, timestamps, limits } = capabilities;
  return [
    engine,
    adapter,
    f16 ? "f16" : "no f16",
    subgroups === null ? "no subgroups" : `subgroups ${subgroups.minSize} to ${subgroups.maxSize}`,
    `timestamps ${timestamps}`,
    ...limitNames.map((name) => limits[name]),
  ].join("; ");
}
