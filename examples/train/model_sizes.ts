/** The sizes of the model. */
export interface ModelSizes {
  readonly layers: number;
  /** The width of the residual stream. */
  readonly width: number;
  readonly heads: number;
  /** L, the width of a latent row: all that a KV cache would hold, beside the rotary key. */
  readonly kvLoraRank: number;
  /** P, the part of a head's queries and keys that comes from latents. */
  readonly qkNopeHeadDim: number;
  /** R, the rotary part; even. */
  readonly qkRopeHeadDim: number;
  /** V, the width of a value head. */
  readonly vHeadDim: number;
  /** The inner width of the MLP. */
  readonly mlpWidth: number;
  /** How many characters the model sees at most. */
  readonly context: number;
}
