// Text that the model makes up, character by character.

import type { Attention } from "./attention.ts";
import type { Corpus } from "./corpus.ts";
import { forward } from "./model.ts";
import { Random } from "./random.ts";
import type { Training } from "./training.ts";

/** How boldly the model speaks: below 1, what is likely becomes likelier. */
const temperature = 0.7;

/**
 * Has the model begin paragraphs, each up to the length of its context, all of a batch at once. A batch of training's shape
 * needs no kernel that training did not.
 *
 * @returns As many paragraphs as a batch has excerpts.
 */
export async function sample(training: Training, corpus: Corpus, attention: Attention): Promise<string[]> {
  const { settings: { sizes: { context }, batch, seed }, settings: { sizes }, parameters } = training;
  const { alphabet } = corpus;
  // Not training's own generator: a run that goes on must not depend on whether somebody looked.
  const random = new Random(seed + 1);
  const paragraphEnd = alphabet.indexOf("\n");
  const tokens = new Uint8Array(batch * context).fill(Math.max(0, paragraphEnd));
  const lengths = new Array<number>(batch).fill(0);
  const speaking = new Set(lengths.keys());

  for (let position = 0; position + 1 < context && speaking.size > 0; position++) {
    // What stands behind the position is not seen: attention is causal.
    const { logits, dispose } = await forward(parameters, sizes, tokens, attention);
    dispose();
    for (const row of speaking) {
      const at = (row * context + position) * alphabet.length;
      const next = draw(logits.subarray(at, at + alphabet.length), random);
      if (next === paragraphEnd) speaking.delete(row);
      else tokens[row * context + position + 1] = next, lengths[row]++;
    }
  }
  return lengths.map((length, row) => {
    const start = row * context + 1;
    const text = Array.from(tokens.subarray(start, start + length), (token) => alphabet[token]).join("");
    return speaking.has(row) ? `${text} …` : text;
  });
}

function draw(logits: Float32Array, random: Random): number {
  const max = logits.reduce((most, logit) => Math.max(most, logit), -Infinity);
  const weights = Float64Array.from(logits, (logit) => Math.exp((logit - max) / temperature));
  let left = random.uniform() * weights.reduce((sum, weight) => sum + weight, 0);
  const drawn = weights.findIndex((weight) => (left -= weight) < 0);
  return drawn < 0 ? weights.length - 1 : drawn;
}
