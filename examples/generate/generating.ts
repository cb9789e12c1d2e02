// Generating token by token, whichever way the model reads.

import type { Choose } from "./choosing.ts";
import type { TokenReader } from "./token_reader.ts";

/** What to generate. */
export interface GeneratingOptions {
  readonly prompt: Uint8Array;
  /** How many tokens. */
  readonly tokens: number;
  readonly choose: Choose;
  /**
   * What is read instead of the reader's own choices. While the choices are the same, that is no difference; after one that
   * is not, the steps behind it can still be compared.
   */
  readonly follow?: readonly number[];
  /** Ends after so many seconds, with fewer tokens. */
  readonly seconds?: number;
  /** Hears of each token. */
  readonly onToken?: (tokens: number) => void;
}

/** What came out. */
export interface Generated {
  /** The tokens that were chosen. */
  readonly tokens: readonly number[];
  /** By token: the logits that it was chosen by. */
  readonly logits: readonly Float32Array[];
  /** Tokens of a second, by the median of the steps behind the prompt. */
  readonly tokensPerSecond: number;
}

/** Reads a prompt, then goes on from it. */
export async function generate(reader: TokenReader, options: GeneratingOptions): Promise<Generated> {
  const { prompt, choose, follow, seconds = Infinity, onToken } = options;
  const tokens: number[] = [];
  const logits: Float32Array[] = [];
  const times: number[] = [];
  const begin = performance.now();
  // Two tokens at least: the second one is the first that a step was taken for.
  while (tokens.length < options.tokens && (tokens.length < 2 || performance.now() - begin < seconds * 1000)) {
    const next = tokens.length === 0 ? prompt : Uint8Array.of((follow ?? tokens)[tokens.length - 1]);
    const start = performance.now();
    const expected = await reader.read(next);
    times.push(performance.now() - start);
    logits.push(expected);
    tokens.push(choose(expected));
    onToken?.(tokens.length);
  }
  const steps = times.slice(1).sort((a, b) => a - b);
  return { tokens, logits, tokensPerSecond: 1000 / steps[Math.floor(steps.length / 2)] };
}
