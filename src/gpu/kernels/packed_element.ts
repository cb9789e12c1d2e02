// How kernels that need no half precision of the device read and write rows of halves: two to a word, which core WGSL unpacks.

import type { RowStorage } from "./absorbed_operands.ts";

/** How a tensor's elements are read: four at a time where every row begins at a multiple of four. */
export interface PackedElements {
  /** How they are stored. */
  readonly storage: RowStorage;
  /** Whether rows begin at multiples of four elements and are as long. */
  readonly quads: boolean;
}

/** WGSL's element type of such an array. */
export function packedType({ storage, quads }: PackedElements): string {
  if (storage === "floats") return quads ? "vec4<f32>" : "f32";
  return quads ? "vec2<u32>" : "u32";
}

/**
 * WGSL of `load_NAME(at, column, width) -> vec4<f32>`: four neighbours of a row whose column 0 is element `at`, zeros from
 * `width` on. `column` is a multiple of 4.
 */
export function packedLoad(name: string, { storage, quads }: PackedElements): string {
  const head = `fn load_${name}(at: u32, column: u32, width: u32) -> vec4<f32> {`;
  if (quads) {
    // The load stands outside of a branch: inside of one each would wait for memory by itself.
    const value = storage === "floats" ? "quad" : "vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y))";
    return `${head}
  let quad = ${name}[(at + min(column, width - 4u)) / 4u];
  return select(vec4<f32>(), ${value}, column < width);
}`;
  }
  const one = storage === "floats" ? `${name}[i]` : `unpack2x16float(${name}[i / 2u])[i % 2u]`;
  return `${head}
  var quad = vec4<f32>();
  for (var c = 0u; c < 4u && column + c < width; c += 1u) {
    let i = at + column + c;
    quad[c] = ${one};
  }
  return quad;
}`;
}

/** The largest half; what is beyond it is stored as it, where an infinity would make NaN of a product with zero. */
const largestHalf = 65504;

/** WGSL of `packQuad(value) -> vec2<u32>`: four halves, what is too large for them clamped, NaN kept. */
export const packQuad = `fn packQuad(value: vec4<f32>) -> vec2<u32> {
  let bounded = select(clamp(value, vec4<f32>(-${largestHalf}.0), vec4<f32>(${largestHalf}.0)), value, value != value);
  return vec2<u32>(pack2x16float(bounded.xy), pack2x16float(bounded.zw));
}`;
