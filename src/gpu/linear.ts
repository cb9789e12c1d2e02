// Linear layers on a GPU: rows [M, K] × weight [K, N], with or without a bias. Which kernel runs depends on how many rows there
// are and on how the weight is stored:
//
//   a few rows, as in decoding       linear_rows.ts      each weight is read once, memory decides
//   many rows, halves, matrix units  matrix_expand.ts    f16 products, f32 sums
//   many rows otherwise              expand.ts           f32 products and sums
//
// Weights lie transposed, inputs along the rows, as the expansion's do.

import { elementBytes } from "../op/tensor.ts";
import { expandSource, linearRowsSource, matrixExpandSource } from "./kernel_sources.ts";
import type { Capabilities } from "./capabilities.ts";
import * as expand from "./kernels/expand.ts";
import { isWhole, type MatrixExpandTile } from "./kernels/matrix_expand.ts";
import * as few from "./kernels/linear_rows.ts";
import type { KernelStep, KernelSteps } from "./kernel_steps.ts";
import { paddedWidth } from "./kernels/matrix_scratch.ts";
import { bytesOf } from "./layer_steps.ts";
import { storageElement } from "./kernels/storage_element.ts";
import { checkBinding, limitError } from "./limit_checks.ts";
import { expandTile as matrixTile } from "./matrix_config.ts";
import type { StorageType } from "./operand_layout.ts";
import { chunks } from "./query_ranges.ts";

/** A weight in GPU memory. */
export interface LinearWeight {
  /** Its elements, `[inputs, outputs]`. */
  readonly buffer: GPUBuffer;
  /** How they are stored. */
  readonly dtype: StorageType;
  /** K. */
  readonly inputs: number;
  /** N. */
  readonly outputs: number;
  /** Float32, `[outputs]`, where there is one. */
  readonly bias?: GPUBuffer;
}

/** Rows in GPU memory. Lengths are in elements. */
export interface LinearRows {
  /** The buffer. */
  readonly buffer: GPUBuffer;
  /** Bytes from its start to what is bound, a multiple of 256; 0 when absent. */
  readonly offset?: number;
  /** Bytes to bind. */
  readonly size: number;
  /** How elements are stored. */
  readonly dtype: StorageType;
  /** From the binding's start to the first row. */
  readonly base: number;
  /** From one row to the next. */
  readonly row: number;
  /** How many there are. */
  readonly count: number;
  /** Rows of a batch item; all when absent. */
  readonly perItem?: number;
  /** Further elements from one batch item to the next. */
  readonly gap?: number;
}

/** Dense rows from a buffer's start on. */
export function plainRows(buffer: GPUBuffer, dtype: StorageType, count: number, row: number): LinearRows {
  return {
    buffer,
    dtype,
    size: Math.min(buffer.size, bytesOf(count * row, dtype)),
    base: 0,
    row,
    count,
  };
}

/** The kernels that there are. */
export type LinearKernel = "few" | "matrix" | "tiles";

/** Most rows that take the kernel for a few. Each eight of them read the weight once more, from a cache where it fits one. */
const fewRows = 16;

/** The kernel that a device takes for so many rows. */
export function linearKernel(
  count: number,
  weight: Pick<LinearWeight, "dtype" | "outputs">,
  { matrixUnits }: Capabilities,
): LinearKernel {
  if (count <= fewRows) return "few";
  // The emulation of matrix units is for tests.
  const hasUnits = matrixUnits !== null && matrixUnits !== "emulated";
  return hasUnits && whyNoMatrix(weight) === null ? "matrix" : "tiles";
}

/** Why a weight cannot be multiplied on matrix units, or null when it can. */
export function whyNoMatrix({ dtype, outputs }: Pick<LinearWeight, "dtype" | "outputs">): string | null {
  if (dtype !== "f16") return "it is no tensor of halves";
  return outputs === paddedWidth(outputs) ? null : `${outputs} outputs are no multiple of 16`;
}

/** Bytes of the result of so many rows. */
export function linearBytes(count: number, { outputs }: Pick<LinearWeight, "outputs">, dtype: StorageType): number {
  return bytesOf(count * outputs, dtype);
}

/**
 * The dispatches of a linear layer.
 *
 * @param steps Takes the parameters.
 * @param capabilities The device's.
 * @param label The kernel's name in messages and measurements.
 * @param rows The rows.
 * @param weight The weight.
 * @param result What takes the result, `[rows, outputs]`, dense from the buffer's start on.
 * @param kernel Which kernel. Default: {@link linearKernel}.
 * @throws {FlashMLAError} With code `limit` when an operand passes a binding or a dispatch is too wide.
 */
export function linearSteps(
  steps: KernelSteps,
  capabilities: Capabilities,
  label: string,
  rows: LinearRows,
  weight: LinearWeight,
  result: { readonly buffer: GPUBuffer; readonly dtype: StorageType },
  kernel: LinearKernel = linearKernel(rows.count, weight, capabilities),
): KernelStep[] {
  const { limits } = capabilities;
  const { inputs: K, outputs: N } = weight;
  const { perItem = rows.count, gap = 0 } = rows;
  const gapped = gap !== 0 && perItem < rows.count;
  const sizes = {
    rows: rows.size,
    weight: Math.ceil(K * N * elementBytes(weight.dtype) / 4) * 4,
    result: linearBytes(rows.count, weight, result.dtype),
  };
  for (const [name, size] of Object.entries(sizes)) checkBinding(`${label}'s ${name}`, size, limits);
  const bindings = {
    1: { buffer: rows.buffer, offset: rows.offset ?? 0, size: rows.size },
    2: { buffer: weight.buffer, size: sizes.weight },
    3: { buffer: result.buffer, size: Math.min(sizes.result, result.buffer.size) },
    4: weight.bias && { buffer: weight.bias, size: 4 * N },
  };
  const aligned = [rows.base, rows.row, K, gapped ? gap : 0].every((n) => n % 4 === 0) &&
    rows.size % (4 * elementBytes(rows.dtype)) === 0;
  const left = storageElement(rows.dtype, aligned);
  const right = storageElement(weight.dtype, N % 4 === 0);
  const stored = storageElement(result.dtype, N % 4 === 0);
  const bias = weight.bias !== undefined;
  const most = limits.maxComputeWorkgroupsPerDimension;
  const grid = (columns: number, tiles: number): [number, number] => {
    if (columns <= most && tiles <= most) return [columns, tiles];
    throw limitError(`${columns} × ${tiles} workgroups of ${label}`, "maxComputeWorkgroupsPerDimension", limits);
  };

  if (kernel === "few") {
    const tile = few.linearRowsTile(rows.count, N);
    const words = [rows.count, N, K, rows.base, rows.row, perItem, gap >>> 0];
    return [{
      label,
      code: linearRowsSource(tile, { left, weight: right, result: stored, gapped, bias }),
      bindings: { 0: steps.params(Uint32Array.from(words)), ...bindings },
      workgroups: grid(Math.ceil(N / 4 / tile.columnQuads), Math.ceil(rows.count / tile.rows)),
    }];
  }
  const inEights = (tile: MatrixExpandTile) =>
    isWhole(tile, K, N) && rows.dtype === "f16" && weight.dtype === "f16" && rows.size % 16 === 0 &&
    [rows.base, rows.row, gapped ? gap : 0].every((n) => n % 8 === 0);
  const units = kernel === "matrix" ? matrixTile(capabilities) : null;
  const block = [128, 64].find((side) => N >= side && rows.count >= side) ?? 32;
  const tile = units ?? expand.expandTile({ expandBlock: block, unrollDepth: true }, limits);
  const code = units === null
    ? expandSource(tile as expand.ExpandTile, {
      ...{ latent: left, weight: right, expanded: stored, gapped },
      ...(bias && { bias }),
    })
    : matrixExpandSource(units, {
      ...inEights(units) ? { latent: "vec4<u32>", weight: "vec4<u32>" } : { latent: left, weight: right },
      ...{ headDim: N, gapped },
      ...(result.dtype === "f32" && { result: "floats" as const }),
      ...(bias && { bias }),
    }, capabilities.matrixUnits!);
  return chunks(Math.ceil(rows.count / tile.blockM), most).map(([firstTile, tiles]) => ({
    label,
    code,
    bindings: {
      0: steps.params(
        Uint32Array.from([rows.count, N, 0, firstTile, K, N, rows.base, rows.row, perItem, gap >>> 0, 0, 0]),
      ),
      ...bindings,
    },
    workgroups: units === null ? grid(Math.ceil(N / tile.blockN), tiles) : grid(tiles, Math.ceil(N / tile.blockN)),
  }));
}
