/**
 * What the user of a call may want to know:
 *
 * - `f16-converted`: the device has no half precision; tensors of halves are computed with as float32.
 * - `mask-ignored`: both `bias` and `attentionMask` were given; the bias holds, as in ejkernel.
 */
export type MlaEventCode = "f16-converted" | "mask-ignored";

/** Something worth telling about a call. The computation goes on regardless. */
export interface MlaEvent {
  /** The kind of event. */
  readonly code: MlaEventCode;
  /** What happened and what to do, for a person. */
  readonly message: string;
}
