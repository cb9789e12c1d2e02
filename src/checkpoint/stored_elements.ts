// Elements as files have them, little-endian and packed, made into host tensors. So are the arrays of every runtime.

import { halfTensor, toFloats } from "../op/half.ts";
import type { HostTensor } from "../op/tensor.ts";
import { type BlockScales, fromE4m3, scalesShape } from "./fp8.ts";
import { shown } from "./refusal.ts";
import type { TensorPlace } from "./safetensors_header.ts";

type Decode = (bytes: Uint8Array<ArrayBuffer>, shape: readonly number[], scales?: BlockScales) => HostTensor;

/** How the element types that this library computes with are read. */
const decoders: ReadonlyMap<string, Decode> = new Map<string, Decode>([
  ["F32", ({ buffer }, shape) => ({ data: new Float32Array(buffer), shape })],
  ["F16", ({ buffer }, shape) => halfTensor(new Uint16Array(buffer), shape)],
  ["BF16", ({ buffer }, shape) => ({ data: new Uint16Array(buffer), shape, dtype: "bf16" })],
  ["F8_E4M3", (bytes, shape, scales) => ({ data: fromE4m3(bytes, shape, scales), shape })],
]);

/** The element type whose tensors have scales beside them. */
export const SCALED_DTYPE = "F8_E4M3";

/**
 * Says why a tensor cannot be read.
 *
 * @param place The tensor.
 * @returns What is supported and what it is instead, or undefined if it can be read.
 */
export function whyUnreadable({ dtype }: TensorPlace): string | undefined {
  if (decoders.has(dtype)) return undefined;
  return `expected one of ${[...decoders.keys()].join(", ")}, got ${dtype}`;
}

/**
 * Says why a tensor's scales do not fit it.
 *
 * @param place The tensor.
 * @param scales Its scales.
 * @param block Rows and columns that share a scale.
 * @returns What was expected and what came, or undefined if they fit.
 */
export function whyUnscalable(
  { shape }: TensorPlace,
  scales: TensorPlace,
  block: BlockScales["block"],
): string | undefined {
  if (!["F32", "F16", "BF16"].includes(scales.dtype)) return `expected scales of F32, F16 or BF16, got ${scales.dtype}`;
  // One scale for the whole tensor: no blocks to mistake.
  if (scales.shape.length === 0) return undefined;
  const expected = scalesShape(shape, block);
  if (expected?.length === scales.shape.length && expected.every((n, i) => n === scales.shape[i])) return undefined;
  const blocks = expected === undefined ? "" : `, or ${shown(expected)} for blocks of ${block[0]} × ${block[1]}`;
  return `expected scales of shape []${blocks}, got ${shown(scales.shape)}`;
}

/**
 * Makes a tensor of a place's bytes.
 *
 * @param place The tensor, one that can be read.
 * @param bytes Its bytes, which the tensor keeps.
 * @param scales What to multiply it with.
 * @returns The tensor.
 */
export function storedTensor(
  { dtype, shape }: TensorPlace,
  bytes: Uint8Array<ArrayBuffer>,
  scales?: BlockScales,
): HostTensor {
  return decoders.get(dtype)!(bytes, [...shape], scales);
}

/**
 * Makes the scales of a place's bytes.
 *
 * @param place The scales.
 * @param bytes Their bytes.
 * @param block Rows and columns that share a scale.
 * @returns The scales.
 */
export function storedScales(
  place: TensorPlace,
  bytes: Uint8Array<ArrayBuffer>,
  block: BlockScales["block"],
): BlockScales {
  const { data } = toFloats(storedTensor(place, bytes));
  return { data, block };
}
