// The problem: DeepSeek-V2-Lite's attention heads, and random inputs for them that are the same on every visit.

import type { HostInputs, Tensor } from "../../mod.ts";

/** Heads, and the widths that the paper calls kvLoraRank, qkNopeHeadDim, qkRopeHeadDim and vHeadDim. */
const [H, L, P, R, V] = [16, 512, 128, 64, 128];

/** The problem in a line for people. */
export const headsInWords = `DeepSeek-V2-Lite: ${H} heads, latent rank ${L}, keys ${P} + ${R} rotary, values ${V}`;

const weights = { wKc: random(1, L ** -0.5, L, H, P), wVc: random(2, L ** -0.5, L, H, V) };

/**
 * The inputs of one sequence.
 *
 * @param tokens Its length; it decides every element.
 */
export function v2LiteInputs(tokens: number): HostInputs {
  return {
    query: random(tokens * 3, 1, 1, tokens, H, P + R),
    keyValue: random(tokens * 3 + 1, 1, 1, tokens, L),
    bK: random(tokens * 3 + 2, 1, 1, tokens, R),
    ...weights,
  };
}

/** Normally distributed elements: mulberry32, then both halves of Box and Muller's transform. */
function random(seed: number, deviation: number, ...shape: number[]): Tensor {
  const data = new Float32Array(shape.reduce((product, axis) => product * axis));
  let state = seed | 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  for (let i = 0; i < data.length; i += 2) {
    const radius = deviation * Math.sqrt(-2 * Math.log(1 - uniform()));
    const angle = 2 * Math.PI * uniform();
    data[i] = radius * Math.cos(angle);
    data[i + 1] = radius * Math.sin(angle); // past the end of an odd length, where it is ignored
  }
  return { data, shape };
}
