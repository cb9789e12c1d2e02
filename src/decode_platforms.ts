// The implementations of decoding.

import { webgpuDecoding } from "./gpu/webgpu_decoding.ts";
import type { DecodeImplementation } from "./op/decode_implementation.ts";
import { referenceDecoding } from "./reference/reference_decoding.ts";
import { KernelRegistry } from "./registry.ts";

/** The implementations that the library runs: WebGPU first, then the reference. */
export const decodeRegistry: KernelRegistry<DecodeImplementation> = new KernelRegistry();

decodeRegistry.register("mla_decode", "webgpu", "gpu", webgpuDecoding, { priority: 10 });
decodeRegistry.register("mla_decode", "reference", "any", referenceDecoding);
