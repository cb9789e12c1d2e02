// Whether two ways of computing the same have given the same.

import type { Generated } from "./generating.ts";

/** Relative to the largest logit: what rounding to float32 in another order may come to, and 100 times what it does. */
const tolerance = 1e-4;

/** How two runs compare, as far as the second one went. */
export interface Agreement {
  /** Tokens that were compared. */
  readonly tokens: number;
  /** Those that are the same. */
  readonly same: number;
  /** The largest difference of two logits. */
  readonly logitDifference: number;
  /** The largest logit, without its sign. */
  readonly largestLogit: number;
  /**
   * Whether no logit differs by more than rounding. Then a token that is not the same was a tie: two tokens' scores lay
   * closer together than that.
   */
  readonly ok: boolean;
}

/** Compares a run with one that has read the same tokens. */
export function agreement(expected: Generated, actual: Generated): Agreement {
  let [same, logitDifference, largestLogit] = [0, 0, 0];
  actual.tokens.forEach((token, step) => {
    if (token === expected.tokens[step]) same++;
    actual.logits[step].forEach((logit, i) => {
      const other = expected.logits[step][i];
      // Math.max() keeps NaN, which is within no tolerance.
      logitDifference = Math.max(logitDifference, Math.abs(logit - other));
      largestLogit = Math.max(largestLogit, Math.abs(other));
    });
  });
  const ok = logitDifference <= tolerance * largestLogit;
  return { tokens: actual.tokens.length, same, logitDifference, largestLogit, ok };
}
