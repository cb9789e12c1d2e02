// How expanded keys and values lie for the kernels on matrix units: in halves, every row a whole number of fragments.
//
//   keys    [keyRows, G, paddedP]     values  [keyRows, G, paddedV]     rope  [keyRows, paddedR]      G heads of a group
//
// Widths are padded to multiples of 16 with zeros, so that attention stages whole quads and knows no odd widths. The
// rotary keys stand behind in the same binding: they need rounding and padding, too, and one binding then feeds it all.

import type { MlaProblem } from "../../op/mla_problem.ts";
import { fragmentSize } from "./matrix_unit.ts";
import { load4, type StorageElement } from "./storage_element.ts";

/** The widths of a head. */
export type HeadWidths = Pick<MlaProblem, "qkNopeHeadDim" | "qkRopeHeadDim" | "vHeadDim">;

/** A width in whole fragments. */
export function paddedWidth(width: number): number {
  return Math.ceil(width / fragmentSize) * fragmentSize;
}

/** Where each part of the scratch begins, in halves, and how long it is in bytes. */
export interface MatrixScratch {
  /** The values. */
  readonly valuesBase: number;
  /** The rotary keys. */
  readonly ropeBase: number;
  /** Bytes of all of it. */
  readonly bytes: number;
}

/**
 * The scratch of one head group.
 *
 * @param widths The widths of a head.
 * @param keyRows Key rows of all batch items.
 * @param heads KV heads of the group.
 */
export function matrixScratch(widths: HeadWidths, keyRows: number, heads: number): MatrixScratch {
  const valuesBase = keyRows * heads * paddedWidth(widths.qkNopeHeadDim);
  const ropeBase = valuesBase + keyRows * heads * paddedWidth(widths.vHeadDim);
  return { valuesBase, ropeBase, bytes: 2 * (ropeBase + keyRows * paddedWidth(widths.qkRopeHeadDim)) };
}

/** WGSL of functions that keep halves finite where floats are, and NaN where they are. */
export const halfRange = `fn saturated(x: vec4<f32>) -> vec4<f32> {
  let isNan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
  return select(clamp(x, vec4<f32>(-65504.0), vec4<f32>(65504.0)), x, isNan);
}

fn finiteHalves(quad: vec4<u32>) -> vec4<u32> {
  let low = select(vec4<u32>(0x0000ffffu), vec4<u32>(), (quad & vec4<u32>(0x7c00u)) == vec4<u32>(0x7c00u));
  let high = select(vec4<u32>(0xffff0000u), vec4<u32>(), (quad & vec4<u32>(0x7c000000u)) == vec4<u32>(0x7c000000u));
  return quad & (low | high);
}`;

/** How kernels load what becomes halves: eight halves as words where every run of eight is aligned. */
export type HalvesElement = StorageElement | "vec4<u32>";

/**
 * WGSL expression of eight neighbours along the last axis as halves, zeros for those at or past `width`. It needs
 * {@link halfRange} and the matrix unit's `packHalves`; halves that lie in quads pass as they are.
 *
 * @param column First of the eight columns; a multiple of 8, below `width`.
 * @param native Whether halves may be taken for words: Deno's compiler, which the emulation runs on, cannot.
 */
export function loadHalves(
  buffer: string,
  element: HalvesElement,
  offset: string,
  column: string,
  width: string,
  native: boolean,
): string {
  if (element === "vec4<u32>") return `${buffer}[(${offset} + ${column}) / 8u]`;
  // Loads stand outside of branches: those inside of one each wait for memory by itself.
  const second = `${column} + 4u < ${width}`;
  if (element === "vec4<f16>") {
    const at = `(${offset} + ${column}) / 4u`;
    const words = (quad: string) =>
      native
        ? `bitcast<vec2<u32>>(${quad})`
        : `vec2<u32>(pack2x16float(vec2<f32>(${quad}.xy)), pack2x16float(vec2<f32>(${quad}.zw)))`;
    const [low, high] = [`${buffer}[${at}]`, `${buffer}[${at} + select(0u, 1u, ${second})]`];
    return `vec4<u32>(${words(low)}, select(vec2<u32>(), ${words(high)}, ${second}))`;
  }
  const low = load4(buffer, element, offset, column, width);
  const high = load4(buffer, element, offset, `select(${column}, ${column} + 4u, ${second})`, width);
  return `packHalves(saturated(${low}), select(vec4<f32>(), saturated(${high}), ${second}))`;
}
