/**
 * What went wrong, for programs that want to react to it:
 *
 * - `invalid-input`: a tensor, an offset list or an option that does not fit the operation.
 * - `invalid-config`: a tile configuration that this problem or this device cannot run.
 * - `unsupported-platform`: no implementation is registered under that name, or the runtime has none.
 * - `limit`: the problem is legal, but a buffer or dispatch would pass a limit of the device.
 * - `device`: the device was lost, or a kernel failed to compile or to run on it.
 * - `no-config`: every link of the selector chain was empty or switched off.
 */
export type FlashMLAErrorCode =
  | "invalid-input"
  | "invalid-config"
  | "unsupported-platform"
  | "limit"
  | "device"
  | "no-config";

/** Every error that this library throws on purpose. The message names the argument, what was expected and what came. */
export class FlashMLAError extends Error {
  /** The kind of failure. */
  readonly code: FlashMLAErrorCode;

  /**
   * Makes an error.
   *
   * @param code The kind of failure.
   * @param message One sentence for a person: what cannot be done, and why.
   * @param options The standard error options, such as `cause`.
   */
  constructor(code: FlashMLAErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = "FlashMLAError";
    this.code = code;
  }
}

/** Refuses a call for its input, saying why. */
export function cannotRun(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot run MLA: ${why}`);
}
