// The text that the model learns, as numbers: one for each character.
//
// pride_and_prejudice.txt holds chapters 1 to 10 of Jane Austen's novel of 1813, which is in the public domain; the marks
// for italics were taken out.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";

/** A text to train on. */
export interface Corpus {
  /** The characters that occur, in the order of their codes; a token is an index into it. */
  readonly alphabet: readonly string[];
  /** The first nine tenths of the text, which training sees. */
  readonly training: Uint8Array;
  /** The last tenth, which it never sees. */
  readonly heldOut: Uint8Array;
  /**
   * The entropy of single characters, in nats: the loss of a model that knows how frequent each character is, and nothing
   * else. Whoever falls below it has learned from context.
   */
  readonly unigramEntropy: number;
  /** SHA-256 of the text, in hexadecimal: a checkpoint belongs to one text. */
  readonly digest: string;
}

/** The novel's opening chapters. */
export function prideAndPrejudice(): Corpus {
  return corpusOf(readFileSync(new URL("pride_and_prejudice.txt", import.meta.url), "utf8"));
}

/**
 * Makes a corpus of a text. Lines are joined to paragraphs first, so that a line break means something.
 *
 * @param text At least ten characters, of at most 256 kinds.
 */
export function corpusOf(text: string): Corpus {
  const paragraphs = text.trim().split(/\n{2,}/).map((paragraph) => paragraph.replaceAll("\n", " "));
  const characters = [...paragraphs.join("\n") + "\n"];
  const alphabet = [...new Set(characters)].sort();
  if (characters.length < 10 || alphabet.length > 256) {
    throw new Error(
      `Cannot train on the text: expected at least 10 characters of at most 256 kinds, got ` +
        `${characters.length} of ${alphabet.length}`,
    );
  }
  const tokenOf = new Map(alphabet.map((character, token) => [character, token]));
  const tokens = Uint8Array.from(characters, (character) => tokenOf.get(character)!);
  const split = Math.floor(tokens.length * 0.9);
  return {
    alphabet,
    training: tokens.subarray(0, split),
    heldOut: tokens.subarray(split),
    unigramEntropy: entropy(tokens, alphabet.length),
    digest: createHash("sha256").update(text).digest("hex"),
  };
}

function entropy(tokens: Uint8Array, kinds: number): number {
  const counts = new Float64Array(kinds);
  for (const token of tokens) counts[token]++;
  return counts.reduce(
    (sum, count) => count === 0 ? sum : sum - count / tokens.length * Math.log(count / tokens.length),
    0,
  );
}
