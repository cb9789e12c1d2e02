// Which token comes next. Adding Gumbel noise to logits and taking the largest sum is drawing from their softmax. The noise
// does not depend on the logits, so that the same seed means the same draw however the logits were computed.

import { Random } from "../train/random.ts";

/** Chooses a token by its logits. */
export type Choose = (logits: Float32Array) => number;

/** A way to choose; those of the same seed draw the same, one step after another. */
export function chooser(temperature: number, seed: number): Choose {
  const random = new Random(seed);
  return (logits) => {
    const scores = Float64Array.from(
      logits,
      (logit) => temperature === 0 ? logit : logit / temperature - Math.log(-Math.log(1 - random.uniform())),
    );
    return scores.reduce((best, score, token) => score > scores[best] ? token : best, 0);
  };
}
