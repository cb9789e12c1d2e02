// The GPU under test, found once per test file. Tests skip statically, with the reason in their report.

import { type GpuContext, gpuContext } from "../../src/gpu/device.ts";
import { findGpu } from "../../src/gpu/engine.ts";
import { mlaAttention } from "../../mod.ts";
import type { FlashMLAConfig } from "../../src/op/config.ts";
import type { DecodeConfig } from "../../src/op/decode_config.ts";
import type { Attention } from "./attention_properties.ts";

/** The reason why GPU tests cannot run here, or false. */
export const skip: string | false = await gpuContext().then(() => false, (error: Error) => error.message);

/**
 * The reason why emulated matrix units are not tested here, or false. The emulation is plain WGSL, the same on every engine:
 * a software adapter, which compiles it for minutes, does so for one of them.
 */
export const skipEmulation: string | false = skip || await gpuContext().then(({ capabilities }) => {
  if (!capabilities.f16) return "the device has no half precision";
  const again = capabilities.software && capabilities.engine.startsWith("Dawn");
  return again ? "emulated matrix units are tested on the runtime's own WebGPU where the adapter is software" : false;
});

/** The context of the process's own device. Every buffer that it lends starts out full of NaN. */
export async function testContext(): Promise<GpuContext> {
  const context = await gpuContext();
  context.buffers.poison = true;
  return context;
}

/** A configuration that any device runs and that software adapters compile in seconds. */
export const smallConfig: FlashMLAConfig = {
  blockQ: 32,
  blockK: 32,
  numWarps: 2,
  numStages: 1,
  rowsPerThread: 4,
  blockDepth: 4,
  probKeys: 1,
  unrollDepth: true,
  subgroups: false,
  expandBlock: 32,
  gradBlock: 32,
  matrixUnits: false,
  platform: "webgpu",
  backend: "gpu",
};

/** The same for decoding. */
export const smallDecodeConfig: DecodeConfig = {
  blockRows: 4,
  blockK: 4,
  numWarps: 1,
  subgroups: false,
  matrixUnits: false,
  pinned: false,
  workgroups: 8,
  platform: "webgpu",
  backend: "gpu",
};

/** The public function on the GPU under one configuration. */
export function attentionUnder(cfg: FlashMLAConfig): Attention {
  return (inputs, options) => mlaAttention(inputs, { ...options, platform: "webgpu", cfg });
}

/** A device of the test's own, with WebGPU's default limits and no features unless asked for. */
export async function openTestDevice(descriptor: GPUDeviceDescriptor = {}): Promise<GPUDevice> {
  const adapter = await (await findGpu()).requestAdapter();
  return await adapter!.requestDevice(descriptor);
}
