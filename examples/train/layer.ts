// What every plain layer returns: its output, and the way back.

/** A layer's output, and how a gradient goes back through it. */
export interface Layer {
  /** What the layer computed. */
  readonly output: Float32Array;
  /**
   * Takes ∂output, writes the gradients of the layer's weights where the layer was told to, and gives the gradient of its
   * input.
   */
  backward(gradOutput: Float32Array): Float32Array;
}

/** A weight and the place of its gradient; both live in the model's parameters. */
export interface Weight {
  readonly value: Float32Array;
  readonly grad: Float32Array;
}

/** `a + b`, where a branch joins the residual stream. A new array: the way back needs what stood before. */
export function plus(a: Float32Array, b: Float32Array): Float32Array {
  const sum = new Float32Array(a.length);
  for (let i = 0; i < a.length; i++) sum[i] = a[i] + b[i];
  return sum;
}
