// The rotary embedding: pair i of a row at position m turns by the angle m · f_i.
//
//   f_i = θ^(−2i/R)                                              default
//       / factor                                                 linear
//       with θ · (factor·n/N − (factor − 1))^(R/(R − 2))         dynamic, n tokens of at least N = maxPositionEmbeddings
//       · ((1 − ramp_i) + ramp_i / factor)                       yarn, ramp from 0 at betaFast turns to 1 at betaSlow
//       / shortFactor_i, or / longFactor_i past pretraining      longrope
//
// Every step is rounded to float32, in the order in which Hugging Face transformers has torch take it: models are trained and
// run with these angles. Exact ones drift away from them with the position, by up to 0.006 at 131,072.

import { cannotRun } from "../op/errors.ts";
import type { RopeConfig, RopeLayout } from "./rope_config.ts";

const { fround } = Math;

/** Cosines and sines of some positions, each times the embedding's attention factor. */
export interface RotaryTable {
  /** Cosines, `[positions, R/2]`. */
  readonly cos: Float32Array<ArrayBuffer>;
  /** Sines, `[positions, R/2]`. */
  readonly sin: Float32Array<ArrayBuffer>;
  /** How many positions. */
  readonly positions: number;
  /** R. */
  readonly dim: number;
}

/**
 * The angle by which each pair turns from one position to the next.
 *
 * @param rope The rotary embedding.
 * @param sequenceLength Tokens of the sequence; `dynamic` and `longrope` depend on it. Default: as short as in pretraining.
 * @returns `[R/2]`, in radians.
 */
export function inverseFrequencies(rope: RopeConfig, sequenceLength = 0): Float32Array<ArrayBuffer> {
  const { type, dim } = rope;
  const theta = fround(type === "dynamic" ? dynamicTheta(rope, sequenceLength) : rope.theta);
  const factor = fround(rope.factor);
  const powers = Float32Array.from({ length: dim / 2 }, (_, i) => theta ** fround(2 * i / dim));
  if (type === "linear") return powers.map((power) => fround(1 / power) / factor);
  if (type === "yarn") {
    const ramp = yarnRamp(rope);
    return powers.map((power, i) => {
      const kept = fround(1 - ramp(i));
      const stretched = fround(1 / fround(factor * power));
      return fround(stretched * fround(1 - kept)) + fround(fround(1 / power) * kept);
    });
  }
  if (type === "longrope") {
    const divisors = sequenceLength > rope.originalMaxPositionEmbeddings ? rope.longFactor : rope.shortFactor;
    return powers.map((power, i) => 1 / fround(fround(divisors[i]) * power));
  }
  return powers.map((power) => 1 / power);
}

/**
 * Cosines and sines of positions.
 *
 * @param rope The rotary embedding.
 * @param positions Positions, counted from the start of each sequence.
 * @param sequenceLength Tokens of the sequence, for `dynamic` and `longrope`. Default: one past the largest position, as
 * models take it. Keys that were cached before keep the table of their own call.
 * @returns The table, for {@link rotate}.
 */
export function rotaryTable(
  rope: RopeConfig,
  positions: ArrayLike<number>,
  sequenceLength: number = largest(positions) + 1,
): RotaryTable {
  const frequencies = inverseFrequencies(rope, sequenceLength);
  const pairs = frequencies.length;
  const cos = new Float32Array(positions.length * pairs);
  const sin = new Float32Array(positions.length * pairs);
  const attentionFactor = fround(rope.attentionFactor);
  for (let row = 0; row < positions.length; row++) {
    const position = fround(positions[row]);
    for (let i = 0; i < pairs; i++) {
      const angle = fround(position * frequencies[i]);
      cos[row * pairs + i] = fround(Math.cos(angle)) * attentionFactor;
      sin[row * pairs + i] = fround(Math.sin(angle)) * attentionFactor;
    }
  }
  return { cos, sin, positions: positions.length, dim: rope.dim };
}

/**
 * Turns rows by a table.
 *
 * Columns stay where the checkpoint has them. The code of DeepSeek-V3 and its relatives moves the even columns of
 * `interleaved` rows in front of the odd ones while it turns them; queries and keys are moved alike, so that every score is
 * the same, but a row of their cache is a permutation of one of ours.
 *
 * @param rows Rows, `[positions, heads, R]`; any number of heads.
 * @param table The table of the positions.
 * @param layout Which columns are a pair.
 * @returns The turned rows, in new memory.
 * @throws {FlashMLAError} With code `invalid-input`, when the rows are not a whole number of heads of each position.
 */
export function rotate(rows: ArrayLike<number>, table: RotaryTable, layout: RopeLayout): Float32Array<ArrayBuffer> {
  const { cos, sin, positions, dim } = table;
  const turned = new Float32Array(rows.length);
  if (rows.length === 0) return turned;
  const heads = rows.length / (positions * dim);
  if (!Number.isSafeInteger(heads)) {
    cannotRun(
      `rows have ${rows.length} elements, not a multiple of the table's ${positions} positions of ${dim} columns`,
    );
  }
  const pairs = dim / 2;
  const [step, apart] = layout === "interleaved" ? [2, 1] : [1, pairs];
  for (let row = 0; row < positions * heads; row++) {
    const at = Math.floor(row / heads) * pairs;
    for (let i = 0; i < pairs; i++) {
      const first = row * dim + i * step;
      const second = first + apart;
      turned[first] = rows[first] * cos[at + i] - rows[second] * sin[at + i];
      turned[second] = rows[second] * cos[at + i] + rows[first] * sin[at + i];
    }
  }
  return turned;
}

/** The base for a sequence; past the longest one it is a tensor in transformers, and so float32 at each step. */
function dynamicTheta({ theta, dim, factor, maxPositionEmbeddings }: RopeConfig, sequenceLength: number): number {
  if (sequenceLength <= maxPositionEmbeddings) return theta;
  const ratio = fround(fround(fround(factor) * sequenceLength) / maxPositionEmbeddings);
  const stretch = fround(ratio - fround(factor - 1)) ** fround(dim / (dim - 2));
  return fround(theta) * fround(stretch);
}

/** How much of the stretch a pair takes, 0 to 1: linear between the pairs that turn betaFast and betaSlow times. */
function yarnRamp({ dim, theta, betaFast, betaSlow, truncate, originalMaxPositionEmbeddings }: RopeConfig) {
  const pairThatTurns = (times: number) =>
    dim * Math.log(originalMaxPositionEmbeddings / (times * 2 * Math.PI)) / (2 * Math.log(theta));
  const [fast, slow] = [pairThatTurns(betaFast), pairThatTurns(betaSlow)];
  const low = Math.max(truncate ? Math.floor(fast) : fast, 0);
  const high = Math.min(truncate ? Math.ceil(slow) : slow, dim - 1);
  // Both bounds may be one pair: then all before it keep their frequency and all behind it are stretched.
  const width = fround(high === low ? high + 0.001 - low : high - low);
  return (pair: number) => Math.min(1, Math.max(0, fround(fround(pair - fround(low)) / width)));
}

function largest(positions: ArrayLike<number>): number {
  let most = -1;
  for (let i = 0; i < positions.length; i++) most = Math.max(most, positions[i]);
  return most;
}
