// Recording into encoders: into a caller's, where a mistake is told at once, or into one of our own.
//
// What is recorded wrongly into an encoder comes out when it is finished. With a caller's that would be too late: it is finished
// far away from us. Our own are finished between the error scopes of their submission, and nobody has to wait for an answer
// after every part.

import { FlashMLAError } from "../op/errors.ts";
import type { GpuContext } from "./device.ts";
import { inErrorScopes } from "./error_scopes.ts";

const own = new WeakSet<GPUCommandEncoder>();

/** Opens an encoder that the library finishes and submits itself, between error scopes. */
export function ownEncoder(device: GPUDevice, label: string): GPUCommandEncoder {
  const encoder = device.createCommandEncoder({ label });
  own.add(encoder);
  return encoder;
}

/**
 * Records.
 *
 * @param context The device.
 * @param encoder The encoder.
 * @param what What is recorded, after "could not" and "Cannot", and whose device the encoder must be of.
 * @param work Records; it must not await.
 * @throws {FlashMLAError} With code `invalid-input` when a caller's encoder cannot take it; what `work` throws.
 */
export async function recordInto(
  context: GpuContext,
  encoder: GPUCommandEncoder,
  { what, owner }: { readonly what: string; readonly owner: string },
  work: () => void,
): Promise<void> {
  if (own.has(encoder)) return work();
  await inErrorScopes(context, what, work).catch((error) => {
    if (!(error instanceof FlashMLAError) || error.code !== "device" || context.lost() !== null) throw error;
    const why = `encoder must be open, outside of any pass, and of ${owner} device (${error.message})`;
    throw new FlashMLAError("invalid-input", `Cannot ${what}: ${why}`, { cause: error });
  });
}
