import type { Backend, Platform } from "./platform.ts";

/** One way to run decoding: the tile of absorbed attention, and how far keys are split. */
export interface DecodeConfig {
  /** Query rows, counted through tokens and heads, that one workgroup owns: they share each latent that it reads. */
  readonly blockRows: number;
  /** Keys that pass through workgroup memory at a time. */
  readonly blockK: number;
  /** Workgroup size in units of 32 invocations. */
  readonly numWarps: number;
  /** Whether row maxima and sums meet by subgroup shuffles (a device feature) or through workgroup memory. */
  readonly subgroups: boolean;
  /** Whether products run on matrix units (a device feature, for a cache of halves). */
  readonly matrixUnits: boolean;
  /** Whether the cache is bound as writable, which keeps some drivers from moving its loads to where they are used. */
  readonly pinned: boolean;
  /** Workgroups that splitting over keys aims at. */
  readonly workgroups: number;
  /** The platform that this configuration is for. */
  readonly platform: Platform;
  /** The kind of processor that this configuration is for. */
  readonly backend: Backend;
}
