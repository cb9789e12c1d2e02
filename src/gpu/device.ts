// Devices: one of our own per process, opened on first use and again after a loss, or the caller's.

import { FlashMLAError } from "../op/errors.ts";
import { kindOf } from "../op/tensor.ts";
import { adapterInfoOf } from "./adapter_info.ts";
import { BindGroupCache } from "./bind_groups.ts";
import { BufferPool } from "./buffers.ts";
import { probe } from "./capability_probe.ts";
import { adapterName, type Capabilities, capabilitiesOf } from "./capabilities.ts";
import { adapterAdvice, engineOf } from "./engine.ts";
import { ParamBlocks } from "./param_blocks.ts";
import { PipelineCache } from "./pipelines.ts";
import { type DeviceOptions, requestDevice } from "./request_device.ts";

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
  /** Parameter blocks in it. */
  readonly params: ParamBlocks;
  /** What binds it to kernels. */
  readonly bindGroups: BindGroupCache;
  /** Why the device was lost, or null while it lives. */
  readonly lost: () => string | null;
}

const contexts = new WeakMap<GPUDevice, Promise<GpuContext>>();
let opening: Promise<GpuContext> | null = null;

/**
 * Opens a device of its own, apart from the one that calls without `options.device` share. It is the caller's to destroy.
 *
 * @param options Which engine, adapter and features.
 * @returns A device with the adapter's limits, and with half precision, subgroups and timestamp queries where they are to
 * be had; the library has probed it.
 * @throws {FlashMLAError} With code `unsupported-platform` where there is no engine, no adapter that computes right, or no
 * such feature, saying what to install; `invalid-input` for options that are none.
 *
 * @example Dawn in Deno, beside Deno's own WebGPU
 * ```ts ignore
 * import { deviceCapabilities, describeCapabilities, openDevice } from "@flash-mla/webgpu";
 *
 * const device = await openDevice({ engine: "dawn" });
 * console.log(describeCapabilities(await deviceCapabilities(device)));
 * // then mlaAttention(inputs, { device }), and in the end device.destroy()
 * ```
 */
export async function openDevice(options: DeviceOptions = {}): Promise<GPUDevice> {
  return (await openOwn(options)).device;
}

/**
 * What a device can do: read from it and, once per device, measured.
 *
 * @param device A device; the process's own when absent.
 * @throws {FlashMLAError} What {@link gpuContext} throws.
 */
export async function deviceCapabilities(device?: GPUDevice): Promise<Capabilities> {
  return (await gpuContext(device)).capabilities;
}

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
    if (typeof device?.createBuffer !== "function") {
      throw new FlashMLAError("invalid-input", `Cannot use device: expected a GPUDevice, got ${kindOf(device)}`);
    }
    const context = await adopted(device);
    if (context.lost() !== null) throw lostError(context);
    return context;
  }
  const current = opening ??= openOwn({}).catch((error) => {
    opening = null;
    throw error;
  });
  const context = await current;
  if (context.lost() === null) return context;
  if (opening === current) opening = null;
  return await gpuContext();
}

/**
 * Whether this runtime offers a WebGPU adapter.
 *
 * @throws {FlashMLAError} With code `invalid-input` when `FLASH_MLA_ENGINE` names no engine; never otherwise.
 */
export async function hasAdapter(): Promise<boolean> {
  try {
    await gpuContext();
    return true;
  } catch (error) {
    if (error instanceof FlashMLAError && error.code === "invalid-input") throw error;
    return false;
  }
}

/** What is known of a device before its capabilities are. */
type NamedDevice = Pick<GpuContext, "device" | "lost"> & { readonly capabilities: Pick<Capabilities, "adapter"> };

/** The error for a call that a lost device could not finish. */
export function lostError(context: NamedDevice, cause?: unknown): FlashMLAError {
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
export async function unlessLost<Result>(context: NamedDevice, work: () => Promise<Result>): Promise<Result> {
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

/** Opens a device and adopts it; one that is refused is not left open. */
async function openOwn(options: DeviceOptions): Promise<GpuContext> {
  const device = await requestDevice(options);
  try {
    return await adopted(device);
  } catch (error) {
    device.destroy();
    throw error;
  }
}

function adopted(device: GPUDevice): Promise<GpuContext> {
  let context = contexts.get(device);
  if (context === undefined) {
    context = adopt(device);
    contexts.set(device, context);
    context.catch(() => contexts.delete(device));
  }
  return context;
}

async function adopt(device: GPUDevice): Promise<GpuContext> {
  let reason: string | null = null;
  const lost = () => reason;
  device.lost.then((loss) => reason = loss.message || loss.reason || "unknown reason");
  // A loss that happened before we came is known only after the microtasks have run.
  await Promise.resolve();
  const named = { device, lost, capabilities: { adapter: adapterName(adapterInfoOf(device)) } };
  const capabilities = await unlessLost(named, async () => {
    const engine = await engineOf(device);
    const findings = await probe(device, engine);
    if (findings.computes) return capabilitiesOf(device, engine, findings);
    throw new FlashMLAError(
      "unsupported-platform",
      `Cannot use the GPU device "${named.capabilities.adapter}" (${engine.name}): it gave wrong numbers for plain ` +
        `arithmetic, as an engine does that found no driver; ${adapterAdvice()}`,
    );
  });
  const buffers = new BufferPool(device, capabilities.limits.maxBufferSize);
  const params = new ParamBlocks(device);
  const bindGroups = new BindGroupCache(device);
  return { device, capabilities, pipelines: new PipelineCache(device), buffers, params, bindGroups, lost };
}
