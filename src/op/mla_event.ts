/**
 * What the user of a call may want to know:
 *
 * - `f16-converted`: once per device: the device has no half precision; tensors of halves are computed with as float32.
 * - `mask-ignored`: at every such call: both `bias` and `attentionMask` were given; the bias holds, as in ejkernel.
 */
export type MlaEventCode = "f16-converted" | "mask-ignored";

/** Something worth telling about a call. The computation goes on regardless. */
export interface MlaEvent {
  /** The kind of event. */
  readonly code: MlaEventCode;
  /** What happened and what to do, for a person. */
  readonly message: string;
}

const ignored = "Both bias and attentionMask are given: the bias holds and the mask is ignored. Hide keys with minus " +
  "infinity in the bias, or leave one of the two out.";
let saidIgnored = false;

/** Says that a mask beside a bias is ignored: to the call's listener, or else once on the console. */
export function tellMaskIgnored(onEvent?: (event: MlaEvent) => void): void {
  if (onEvent === undefined) {
    if (!saidIgnored) console.warn(ignored);
    saidIgnored = true;
    return;
  }
  try {
    onEvent({ code: "mask-ignored", message: ignored });
  } catch {
    // A listener's failure is no reason to stop computing.
  }
}
