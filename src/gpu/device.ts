// Devices: one of our own per process, opened on first use and again after a loss, or the caller's.

import { FlashMLAError } from "../op/errors.ts";
import { BufferPool } from "./buffers.ts";
import { type Capabilities, capabilitiesOf, limitNames } from "./capabilities.ts";
import { PipelineCache } from "./pipelines.ts";

/** A device with what the library keeps for it. */
export interface GpuContext {
  /** The device. */
  readonly device: GPUDevice;
  /** What it can do. */
  readonly capabilities: Capabilities;
  /** Its compiled kernels. */
  readonly pipelines: PipelineCache;
  /** Its memory. */
  readonly buffers: BufferPool;
  /** Why the device was lost, or null while it lives. */
  readonly lost: () => string | null;
}

const contexts = new WeakMap<GPUDevice, GpuContext>();
let opening: Promise<GpuContext> | null = null;

/**
 * The context of a caller's device, or of the process's own.
 *
 * @param device A device to use; without one the process's own is opened on first use, and anew after it was lost.
 * @returns The context; equal devices give the same one.
 * @throws {FlashMLAError} With code `unsupported-platform` where the runtime has no adapter, or `device` when the given
 * device is already lost.
 */
export async function gpuContext(device?: GPUDevice): Promise<GpuContext> {
  if (device !== undefined) {
    const context = contexts.get(device) ?? adopt(device, device.adapterInfo);
    // A loss that happened before we came is known only after the microtasks have run.
    await Promise.resolve();
    if (context.lost() !== null) throw lostError(context);
    return context;
  }
  const current = opening ??= openOwn().catch((error) => {
    opening = null;
    throw error;
  });
  const context = await current;
  if (context.lost() === null) return context;
  if (opening === current) opening = null;
  return await gpuContext();
}

/** Whether this runtime offers a WebGPU adapter. Never throws. */
export async function hasAdapter(): Promise<boolean> {
  try {
    await gpuContext();
    return true;
  } catch {
    return false;
  }
}

/** The error for a call that a lost device could not finish. */
export function lostError(context: GpuContext, cause?: unknown): FlashMLAError {
  return new FlashMLAError(
    "device",
    `The GPU device "${context.capabilities.adapter}" was lost (${context.lost() ?? "no reason given"}); ` +
      "this call has no result. Call again: without options.device a new device is opened",
    { cause },
  );
}

/** Engines report a loss some time after the first operation that it made fail; this is long enough, in milliseconds. */
const lossNotice = 50;

/**
 * Does GPU work and explains its failure: when the device turns out to be lost, that is the error.
 *
 * @throws {FlashMLAError} The {@link lostError} of a lost device; whatever the work threw otherwise.
 */
export async function unlessLost<Result>(context: GpuContext, work: () => Promise<Result>): Promise<Result> {
  if (context.lost() !== null) throw lostError(context);
  try {
    const result = await work();
    // Some engines resolve what a lost device was asked for, with zeros.
    if (context.lost() === null) return result;
  } catch (error) {
    let timer: ReturnType<typeof setTimeout> | undefined;
    const notice = new Promise<void>((resolve) => timer = setTimeout(resolve, lossNotice));
    await Promise.race([context.device.lost, notice]);
    clearTimeout(timer);
    if (context.lost() === null) throw error;
    throw lostError(context, error);
  }
  throw lostError(context);
}

async function openOwn(): Promise<GpuContext> {
  const gpu = (globalThis as { navigator?: { gpu?: GPU } }).navigator?.gpu;
  if (gpu === undefined) {
    throw new FlashMLAError("unsupported-platform", 'Cannot use platform "webgpu": this runtime has no navigator.gpu');
  }
  const adapter = await gpu.requestAdapter({ powerPreference: "high-performance" });
  if (adapter === null) {
    throw new FlashMLAError(
      "unsupported-platform",
      'Cannot use platform "webgpu": no adapter was found; install a Vulkan, Metal or DirectX 12 driver, ' +
        "or Mesa's lavapipe for a software one",
    );
  }
  const requiredLimits = Object.fromEntries(limitNames.map((name) => [name, Number(adapter.limits[name])]));
  const wanted: GPUFeatureName[] = ["timestamp-query", "shader-f16"];
  const requiredFeatures = wanted.filter((name) => adapter.features.has(name));
  return adopt(await adapter.requestDevice({ label: "flash-mla", requiredLimits, requiredFeatures }), adapter.info);
}

function adopt(device: GPUDevice, info: GPUAdapterInfo | undefined): GpuContext {
  let lost: string | null = null;
  const capabilities = capabilitiesOf(device, info);
  const context: GpuContext = {
    device,
    capabilities,
    pipelines: new PipelineCache(device),
    buffers: new BufferPool(device, capabilities.limits.maxBufferSize),
    lost: () => lost,
  };
  device.lost.then((loss) => lost = loss.message || loss.reason || "unknown reason");
  contexts.set(device, context);
  return context;
}
