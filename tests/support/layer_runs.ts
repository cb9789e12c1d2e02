// Ways of running a layer over the same tokens.

import type { MlaAttention, MlaForwardOptions, Tensor } from "../../mod.ts";
import { normals } from "./random_problem.ts";

/** Whole numbers from one past `from` up to `to`. */
export const upTo = (from: number, to: number): number[] => Array.from({ length: to - from }, (_, i) => from + i + 1);

/** Tokens `from` to `to` of each sequence. */
export function tokensOf({ data, shape: [batch, length, width] }: Tensor, from: number, to: number): Tensor {
  const part = new Float32Array(batch * (to - from) * width);
  for (let item = 0; item < batch; item++) {
    const at = item * length * width;
    part.set(data.subarray(at + from * width, at + to * width), item * (to - from) * width);
  }
  return { data: part, shape: [batch, to - from, width] };
}

/** The layer run on chunks that end at `ends`, over what the ones before left in the cache. */
export async function inChunks(
  layer: MlaAttention,
  hiddenStates: Tensor,
  ends: readonly number[],
  options: MlaForwardOptions,
): Promise<Tensor> {
  const [batch, length, width] = hiddenStates.shape;
  const output = new Float32Array(batch * length * width);
  let start = 0;
  for (const end of ends) {
    const { data } = await layer.forward(tokensOf(hiddenStates, start, end), options);
    for (let item = 0; item < batch; item++) {
      const rows = data.subarray(item * (end - start) * width, (item + 1) * (end - start) * width);
      output.set(rows, (item * length + start) * width);
    }
    start = end;
  }
  return { data: output, shape: hiddenStates.shape };
}

/** Hidden states drawn from a seed. */
export function randomStates(seed: number, ...shape: readonly [batch: number, length: number, width: number]): Tensor {
  const random = normals(seed);
  return { data: Float32Array.from({ length: shape[0] * shape[1] * shape[2] }, random), shape };
}
