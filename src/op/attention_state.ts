import type { AnyTensor, GpuTensor, OwnedGpuTensor, Tensor } from "./tensor.ts";

/** The log-sum-exp that goes with an output: float32 on the output's side. */
export type LseLike<Output extends AnyTensor> = Output extends GpuTensor ? OwnedGpuTensor : Tensor;

/**
 * Attention over some keys, with all that is needed to join it with attention over others, or to differentiate it.
 *
 * @typeParam Output What the output is.
 * @typeParam Lse What the log-sum-exp is.
 */
export interface AttentionState<Output extends AnyTensor = AnyTensor, Lse extends AnyTensor = AnyTensor> {
  /** The attended values, `[batch, queryLength, queryHeads, vHeadDim]`; a row that sees no key is zero. */
  readonly output: Output;
  /**
   * The natural logarithm of each softmax's denominator, sinks included, `[batch, queryHeads, queryLength]` in float32, on
   * the output's side; minus infinity for a row that sees no key.
   */
  readonly lse: Lse;
}
