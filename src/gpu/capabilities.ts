// What a device can do, as far as kernels and tuning care.

import { adapterInfoOf } from "./adapter_info.ts";
import type { ProbeFindings } from "./capability_probe.ts";
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
  /** The adapter in the driver's words; ends with `over OpenGL` where the engine runs on that instead of Vulkan. */
  readonly adapter: string;
  /** Whether the adapter runs on the CPU, as far as its name tells. */
  readonly software: boolean;
  /** Whether kernels may use half precision: the device has `shader-f16`, and a kernel that uses it gave the right numbers. */
  readonly f16: boolean;
  /**
   * The subgroups that kernels may use, or null. Their size is a power of two, they are made of neighbours
   * (`subgroup_invocation_id == local_invocation_index % subgroup_size`), and `subgroupShuffleXor` moves `vec4<f32>`: all of
   * this was seen to hold.
   */
  readonly subgroups: Subgroups | null;
  /** Timestamp queries: none, in full resolution, or rounded by the engine to coarse steps. */
  readonly timestamps: "none" | "exact" | "quantised";
  /** The subgroup matrices that the device was opened with; empty without the feature. */
  readonly subgroupMatrices: readonly SubgroupMatrixConfig[];
  /**
   * How kernels may use matrix units: in which syntax of WGSL they gave the right products of 16 × 16 × 16 halves, or null.
   * `emulated` is for tests of their kernels on devices without.
   */
  readonly matrixUnits: "template" | "flag" | "emulated" | null;
  /** The device's limits. */
  readonly limits: GpuLimits;
}

/**
 * Puts together what a device says of itself and what its probe found.
 *
 * @param device An open device.
 * @param engine Its engine.
 * @param findings What its kernels did.
 */
export function capabilitiesOf(device: GPUDevice, engine: Engine, findings: ProbeFindings): Capabilities {
  const limits = Object.fromEntries(limitNames.map((name) => [name, Number(device.limits[name])]));
  const info = adapterInfoOf(device);
  const subgroups = subgroupRange(info, findings.subgroupSizes);
  return {
    engine: engine.name,
    adapter: adapterName(info) + (engine.graphicsApi === "" ? "" : ` over ${engine.graphicsApi}`),
    software: /llvmpipe|lavapipe|swiftshader|software|basic render/i.test(adapterName(info)),
    f16: findings.f16,
    subgroups: subgroups === null ? null : { ...subgroups, directive: engine.subgroupsDirective },
    timestamps: timestampQuality(findings.ticks),
    subgroupMatrices: subgroupMatrices(device),
    // Kernels take a subgroup for 32 invocations, and halves for granted.
    matrixUnits: findings.f16 && subgroups?.minSize === 32 && subgroups.maxSize === 32 ? findings.matrixUnits : null,
    limits: limits as unknown as GpuLimits,
  };
}

/** Sizes that an engine gives when it does not know or does not tell: all that WebGPU allows. */
const untold = { min: 4, max: 128 };

/** The range of subgroup sizes: the engine's when it is one and holds what was seen, else what was seen. */
function subgroupRange(
  info: GPUAdapterInfo | undefined,
  seen: readonly number[],
): Pick<Subgroups, "minSize" | "maxSize"> | null {
  if (seen.length === 0) return null;
  const [least, most] = [seen[0], seen[seen.length - 1]];
  const { subgroupMinSize: min = 0, subgroupMaxSize: max = 0 } = info ?? {};
  const isTold = min > 0 && !(min === untold.min && max === untold.max);
  return isTold && min <= least && most <= max ? { minSize: min, maxSize: max } : { minSize: least, maxSize: most };
}

/** Steps that browsers and Dawn round timestamps to, in nanoseconds. */
const timestampSteps = [65_536n, 100_000n];

/** Clocks tick in tens of nanoseconds at most: that all of eight ticks fall on a coarse step is no accident. */
function timestampQuality(ticks: readonly bigint[]): Capabilities["timestamps"] {
  if (ticks.every((tick) => tick === 0n)) return "none";
  const isCoarse = timestampSteps.some((step) => ticks.every((tick) => tick % step === 0n));
  return isCoarse ? "quantised" : "exact";
}

function subgroupMatrices(device: GPUDevice): SubgroupMatrixConfig[] {
  if (!(device.features as ReadonlySet<string>).has("chromium-experimental-subgroup-matrix")) return [];
  const info = adapterInfoOf(device) as { readonly subgroupMatrixConfigs?: Iterable<SubgroupMatrixConfig> } | undefined;
  return [...info?.subgroupMatrixConfigs ?? []].map(({ componentType, resultComponentType, M, N, K }) => (
    { componentType, resultComponentType, M, N, K }
  ));
}

/** An adapter in the driver's words, as far as the engine passes them on. */
export function adapterName(info: GPUAdapterInfo | undefined): string {
  const { vendor = "", architecture = "", device = "", description = "" } = info ?? {};
  // Dawn describes the driver and names the card; Deno describes the card and gives it a number.
  if (description !== "" && /[a-z]{3}/i.test(device)) return `${device} (${description})`;
  return description || [vendor, architecture, device].filter((part) => part !== "").join(" ") || "unnamed adapter";
}

/** Every call asks for it. */
const fingerprints = new WeakMap<Capabilities, string>();

/** One line that two devices share exactly when a configuration tuned on one is valid on the other. */
export function deviceFingerprint(capabilities: Capabilities): string {
  let fingerprint = fingerprints.get(capabilities);
  if (fingerprint === undefined) fingerprints.set(capabilities, fingerprint = fingerprintOf(capabilities));
  return fingerprint;
}

function fingerprintOf(capabilities: Capabilities): string {
  const { engine, adapter, f16, subgroups, timestamps, subgroupMatrices, matrixUnits, limits } = capabilities;
  return [
    // Dawn compiles the same kernels in every runtime that hosts it.
    engine.replace(/^(Dawn \(webgpu \d[^,]*), [^)]*\)$/, "$1)"),
    adapter,
    f16 ? "f16" : "no f16",
    subgroups === null ? "no subgroups" : `subgroups ${subgroups.minSize} to ${subgroups.maxSize}`,
    `timestamps ${timestamps}`,
    ...matrixUnits === null ? [] : [`matrix units ${matrixUnits}`],
    ...subgroupMatrices.length === 0 ? [] : [`matrices ${subgroupMatrices.map(matrixName).join(" ")}`],
    ...limitNames.map((name) => limits[name]),
  ].join("; ");
}

/**
 * Capabilities for people to read.
 *
 * @param capabilities What {@link deviceCapabilities} gave.
 * @returns Lines of a name and a value, without a newline at the end.
 */
export function describeCapabilities(capabilities: Capabilities): string {
  const { engine, adapter, software, f16, subgroups, timestamps, subgroupMatrices, limits } = capabilities;
  const { minSize = 0, maxSize = 0 } = subgroups ?? {};
  const size = (bytes: number) => bytes < 2 ** 20 ? `${bytes / 2 ** 10} KiB` : `${Math.round(bytes / 2 ** 20)} MiB`;
  const lines = [
    ["engine", engine],
    ["adapter", software ? `${adapter} (in software)` : adapter],
    ["half precision", f16 ? "yes" : "no"],
    ["subgroups", subgroups === null ? "no" : minSize === maxSize ? `of ${minSize}` : `of ${minSize} to ${maxSize}`],
    ["subgroup matrices", subgroupMatrices.length === 0 ? "no" : subgroupMatrices.map(matrixName).join(", ")],
    ["timestamps", timestamps],
    [
      "workgroups",
      `${limits.maxComputeInvocationsPerWorkgroup} invocations, ${limits.maxComputeWorkgroupSizeX} along x, ` +
      `${size(limits.maxComputeWorkgroupStorageSize)} of memory, ${limits.maxComputeWorkgroupsPerDimension} per axis`,
    ],
    [
      "buffers",
      `${size(limits.maxBufferSize)}, bindings of ${size(limits.maxStorageBufferBindingSize)}, ` +
      `${limits.maxStorageBuffersPerShaderStage} to a kernel`,
    ],
  ];
  return lines.map(([name, value]) => `${name.padEnd(18)} ${value}`).join("\n");
}

function matrixName({ M, N, K, componentType, resultComponentType }: SubgroupMatrixConfig): string {
  return `${M}x${N}x${K} ${componentType} to ${resultComponentType}`;
}
