// Encoders that the library makes, finishes and submits itself. What is recorded wrongly into an encoder comes out when it is
// finished, which is between the error scopes of its submission: nobody has to wait for an answer after every part. With an
// encoder of the caller's that would be too late, who would finish it far away from us.

const own = new WeakSet<GPUCommandEncoder>();

/** Opens an encoder that is finished by {@link submit}. */
export function ownEncoder(device: GPUDevice, label: string): GPUCommandEncoder {
  const encoder = device.createCommandEncoder({ label });
  own.add(encoder);
  return encoder;
}

/** Whether an encoder is one of those. */
export function isOwnEncoder(encoder: GPUCommandEncoder): boolean {
  return own.has(encoder);
}
