// Whether Dawn has an adapter here: a machine may have one for Deno's own WebGPU alone.

import { openDevice } from "../../mod.ts";

/** The reason why tests on Dawn cannot run here, or false. */
export const noDawn: string | false = await openDevice({ engine: "dawn" }).then(
  (device) => (device.destroy(), false),
  (error: Error) => error.message,
);
