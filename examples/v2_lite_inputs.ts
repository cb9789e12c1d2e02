// Random tensors that are the same in every run, and the inputs of one call with DeepSeek-V2-Lite's head dimensions.

import type { HostInputs, Tensor } from "../mod.ts"; // in your project: "@flash-mla/webgpu"

/** A source of tensors with normally distributed elements of the given scale. */
export function randomTensors(seed: number): (scale: number, ...shape: number[]) => Tensor {
  let state = seed;
  // mulberry32: small, and good enough for inputs
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return (scale, ...shape) => ({
    data: Float32Array.from({ length: shape.reduce((a, b) => a * b) }, () => normal() * scale),
    shape,
  });
}

/** One sequence through 16 heads: kvLoraRank 512, qkNopeHeadDim 128, qkRopeHeadDim 64, vHeadDim 128. */
export function v2LiteInputs(length: number): HostInputs {
  const tensor = randomTensors(1);
  return {
    query: tensor(1, 1, length, 16, 128 + 64),
    keyValue: tensor(1, 1, length, 512),
    wKc: tensor(512 ** -0.5, 512, 16, 128),
    wVc: tensor(512 ** -0.5, 512, 16, 128),
    bK: tensor(1, 1, length, 64),
  };
}
