// The steps of a model's attention layer that are neither products nor attention: norms and the rotary embedding.

import { elementBytes } from "../op/tensor.ts";
import { normSource, rotateSource } from "./kernel_sources.ts";
import type { KernelStep, KernelSteps } from "./kernel_steps.ts";
import * as rotate from "./kernels/rotate.ts";
import { storageElement } from "./kernels/storage_element.ts";
import { checkBinding } from "./limit_checks.ts";
import type { GpuLimits } from "./capabilities.ts";
import type { StorageType } from "./operand_layout.ts";

/** Rows of float32 in a buffer of ours, from its start on. */
export interface FloatRows {
  /** The buffer. */
  readonly buffer: GPUBuffer;
  /** How many rows there are. */
  readonly count: number;
  /** Elements of a row. */
  readonly row: number;
}

/** A part of each row that is normed by itself. */
export interface NormedPart {
  /** Its first column. */
  readonly first: number;
  /** Its width. */
  readonly width: number;
  /** Index of its first weight. */
  readonly weight: number;
}

/**
 * Norms one or two parts of rows, in place.
 *
 * @param steps Takes the parameters.
 * @param rows The rows.
 * @param parts The parts.
 * @param weights Their weights, float32.
 * @param epsilon What is added to the mean of the squares.
 * @param halves Takes the first part, dense, instead of the rows.
 */
export function normStep(
  steps: KernelSteps,
  rows: FloatRows,
  parts: readonly NormedPart[],
  weights: GPUBuffer,
  epsilon: number,
  halves?: GPUBuffer,
): KernelStep {
  const params = new ArrayBuffer(48);
  const words = new Uint32Array(params);
  parts.forEach(({ first, width, weight }, i) => words.set([first, width, weight], 4 * i));
  words.set([rows.count, rows.row], 8);
  new Float32Array(params)[10] = epsilon;
  return {
    label: "rms norm",
    code: normSource({ halves: halves !== undefined }),
    bindings: {
      0: steps.params(params),
      1: { buffer: weights },
      2: { buffer: rows.buffer, size: bytesOf(rows.count * rows.row, "f32") },
      3: halves && { buffer: halves, size: bytesOf(rows.count * parts[0].width, "f16") },
    },
    workgroups: [Math.min(rows.count, 65_535), parts.length],
  };
}

/** What turns. */
export interface RotateWork {
  /** The rows before. */
  readonly source: {
    readonly buffer: GPUBuffer;
    readonly dtype: StorageType;
    /** Elements to the first row. */
    readonly base: number;
    /** Elements from one row to the next. */
    readonly row: number;
  };
  /** The rows after. */
  readonly result: {
    readonly buffer: GPUBuffer;
    readonly dtype: StorageType;
    readonly row: number;
    /** First column that is written, at a multiple of 256 bytes; 0 when absent. */
    readonly first?: number;
  };
  /** How many rows there are. */
  readonly count: number;
  /** Heads of a row. */
  readonly heads: number;
  /** Columns of a head before those that turn. */
  readonly before: number;
  /** R. */
  readonly dim: number;
  /** Which columns are a pair; null where none turns. */
  readonly layout: "interleaved" | "half" | null;
  /** Cosine and sine of each pair of each row. */
  readonly turns: GPUBufferBinding | null;
  /** A factor of each row. */
  readonly factors: GPUBufferBinding | null;
}

/** Most workgroups of the rotation: they stride over what there is. */
const rotateWorkgroups = 4096;

/**
 * Turns rows.
 *
 * @throws {FlashMLAError} With code `limit` when rows pass a binding.
 */
export function rotateStep(steps: KernelSteps, label: string, work: RotateWork, limits: GpuLimits): KernelStep {
  const { source, result, count, heads, before, dim, layout, turns, factors } = work;
  const columns = heads * (before + dim);
  const inQuads = rotate.inQuads(work) && columns % 4 === 0;
  const offset = (result.first ?? 0) * elementBytes(result.dtype);
  const sizes = {
    source: bytesOf(source.base + (count - 1) * source.row + columns, source.dtype),
    result: bytesOf(count * result.row, result.dtype) - offset,
  };
  for (const [name, size] of Object.entries(sizes)) checkBinding(`${label}'s ${name}`, size, limits);
  return {
    label,
    code: rotateSource({
      source: storageElement(source.dtype, inQuads && source.base % 4 === 0 && source.row % 4 === 0),
      result: storageElement(result.dtype, inQuads && result.row % 4 === 0),
      before,
      dim,
      layout,
      tempered: factors !== null,
    }),
    bindings: {
      0: steps.params(Uint32Array.of(count, columns, source.base, source.row, result.row)),
      1: { buffer: source.buffer, size: Math.min(sizes.source, source.buffer.size) },
      2: layout === null ? undefined : turns!,
      3: factors ?? undefined,
      4: { buffer: result.buffer, offset, size: Math.min(sizes.result, result.buffer.size - offset) },
    },
    workgroups: [Math.min(rotateWorkgroups, Math.ceil(count * Math.ceil(columns / 4) / rotate.workgroupSize))],
  };
}

/** Bytes of so many elements in whole quads. */
export function bytesOf(elements: number, dtype: StorageType): number {
  return Math.max(16, Math.ceil(elements * elementBytes(dtype) / 16) * 16);
}
