/**
 * Where an implementation runs. `reference` is the plain-TypeScript oracle; `xla` is the same implementation under the
 * name that ejkernel users know.
 */
export type Platform = "webgpu" | "reference" | "xla";

/** The platforms by name, as ejkernel's enum has them. */
export const Platform = {
  /** WGSL kernels on a WebGPU device. */
  WEBGPU: "webgpu",
  /** The oracle in plain TypeScript. */
  REFERENCE: "reference",
  /** The same as {@link Platform.REFERENCE}: it stands in for ejkernel's XLA backend. */
  XLA: "xla",
} as const satisfies Record<string, Platform>;

/** The kind of processor that an implementation needs; `any` matches every one. */
export type Backend = "gpu" | "cpu" | "any";

/** The backends by name. */
export const Backend = {
  /** A GPU, hardware or software. */
  GPU: "gpu",
  /** The processor that runs the script. */
  CPU: "cpu",
  /** No requirement. */
  ANY: "any",
} as const satisfies Record<string, Backend>;

/** One name for each platform: `xla` is `reference`. */
export function canonicalPlatform(platform: Platform): Platform {
  return platform === Platform.XLA ? Platform.REFERENCE : platform;
}
