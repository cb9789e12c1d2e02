/** How surprised the logits are by what came, and the gradient of that. */
export interface Surprise {
  /** The mean of −log p(target), in nats per token. */
  readonly loss: number;
  /** ∂loss/∂logits, `[rows, kinds]`. */
  readonly gradLogits: Float32Array;
}

/**
 * Cross-entropy after a softmax.
 *
 * @param logits `[rows, kinds]`.
 * @param targets The token that came, for each row.
 */
export function crossEntropy(logits: Float32Array, targets: Uint8Array): Surprise {
  const kinds = logits.length / targets.length;
  const gradLogits = new Float32Array(logits.length);
  let total = 0;
  for (let row = 0; row < targets.length; row++) {
    const at = row * kinds;
    let max = -Infinity;
    for (let i = 0; i < kinds; i++) max = Math.max(max, logits[at + i]);
    let sum = 0;
    for (let i = 0; i < kinds; i++) sum += Math.exp(logits[at + i] - max);
    total += max + Math.log(sum) - logits[at + targets[row]];
    for (let i = 0; i < kinds; i++) gradLogits[at + i] = Math.exp(logits[at + i] - max) / sum / targets.length;
    gradLogits[at + targets[row]] -= 1 / targets.length;
  }
  return { loss: total / targets.length, gradLogits };
}
