// Cosines and sines of a call's tokens. The layers of a model ask for the same ones, one layer after another, and two thousand
// tokens of 64 columns take 10 ms: those of the last calls are kept.

import { rotaryTable } from "../model/rotary.ts";
import type { RopeConfig } from "../model/rope_config.ts";
import type { LayerCall } from "./layer_call.ts";

/** Tables that are kept. */
const keptTables = 4;

/** Most elements of a table that is kept: 16 MiB. */
const mostElements = 2 ** 22;

interface Kept {
  readonly rope: string;
  readonly tokenStarts: readonly number[];
  readonly positions: Float64Array;
  readonly turns: Float32Array<ArrayBuffer>;
}

/** Those used last come last. */
const kept: Kept[] = [];

/**
 * Cosine and sine of each pair of each token, `[tokens, R/2, 2]`, in whole quads; not to be written to. Each sequence's by
 * itself, since stretched positions depend on how long it is.
 *
 * @param rope The rotary embedding.
 * @param call The tokens.
 */
export function rotaryTurns(
  rope: RopeConfig,
  { tokenStarts, positions }: Pick<LayerCall, "tokenStarts" | "positions">,
): Float32Array<ArrayBuffer> {
  const key = JSON.stringify(rope);
  const at = kept.findIndex((entry) =>
    entry.rope === key && sameNumbers(entry.positions, positions) && sameNumbers(entry.tokenStarts, tokenStarts)
  );
  const [found] = at < 0 ? [] : kept.splice(at, 1);
  const entry = found ?? {
    rope: key,
    tokenStarts: [...tokenStarts],
    positions: positions.slice(),
    turns: turnsOf(rope, tokenStarts, positions),
  };
  if (entry.turns.length <= mostElements) kept.push(entry);
  if (kept.length > keptTables) kept.shift();
  return entry.turns;
}

function turnsOf(rope: RopeConfig, tokenStarts: readonly number[], positions: Float64Array): Float32Array<ArrayBuffer> {
  const pairs = rope.dim / 2;
  const turns = new Float32Array(Math.max(4, Math.ceil(positions.length * pairs / 2) * 4));
  for (let s = 0; s + 1 < tokenStarts.length; s++) {
    const { cos, sin } = rotaryTable(rope, positions.subarray(tokenStarts[s], tokenStarts[s + 1]));
    const first = tokenStarts[s] * pairs * 2;
    for (let i = 0; i < cos.length; i++) {
      turns[first + 2 * i] = cos[i];
      turns[first + 2 * i + 1] = sin[i];
    }
  }
  return turns;
}

function sameNumbers(a: ArrayLike<number>, b: ArrayLike<number>): boolean {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}
