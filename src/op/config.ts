import type { Backend, Platform } from "./platform.ts";

/**
 * One way to run the operation: ejkernel's tile fields, and what the WGSL kernels need beside them.
 *
 * `blockQ`, `blockK`, `numWarps` and `numStages` mean what they mean in ejkernel. A warp is 32 invocations, so the
 * attention kernel's workgroup has `32 · numWarps` of them.
 */
export interface FlashMLAConfig {
  /** Query rows that one workgroup owns. */
  readonly blockQ: number;
  /** Keys that pass through workgroup memory at a time. */
  readonly blockK: number;
  /** Workgroup size in units of 32 invocations. */
  readonly numWarps: number;
  /** Staging buffers in workgroup memory: 1 loads then computes, 2 loads the next slice while computing this one. */
  readonly numStages: number;
  /** Query rows that one invocation keeps in registers, a multiple of 4. */
  readonly rowsPerThread: number;
  /** Head columns (for scores) or keys (for values) staged per step. */
  readonly blockDepth: number;
  /** Keys per invocation whose probabilities pass through workgroup memory at a time: 1, 2 or a multiple of 4. */
  readonly probKeys: number;
  /** Whether the steps of a staged slice are copied out (faster on GPUs) or looped over (compiles fast on CPUs). */
  readonly unrollDepth: boolean;
  /** Whether a row's maxima and sums meet by subgroup shuffles (a device feature) or through workgroup memory. */
  readonly subgroups: boolean;
  /** Side of the square tile of the expansion GEMM: 32, 64 or 128. */
  readonly expandBlock: number;
  /** Columns of the backward attention tiles: 32, 64 or 128; 256 for heads too wide for the registers of those. */
  readonly gradBlock: number;
  /**
   * Whether products run on matrix units (a device feature, for tensors of halves and with the option `precision: "f16"`
   * for all). Then `blockQ`, `blockK`, `numWarps` and `rowsPerThread` are the matrix kernel's: query rows, keys, subgroups,
   * and query rows of a subgroup; the other fields hold for what matrix units cannot do.
   */
  readonly matrixUnits: boolean;
  /** The platform that this configuration is for. */
  readonly platform: Platform;
  /** The kind of processor that this configuration is for. */
  readonly backend: Backend;
}
