// Asking an engine for a device: which adapter, which features, and limits as high as the adapter's.

import { FlashMLAError } from "../op/errors.ts";
import { kindOf } from "../op/tensor.ts";
import { rememberAdapter } from "./adapter_info.ts";
import { adapterName, limitNames } from "./capabilities.ts";
import { adapterAdvice, type EngineName, findGpu, hiddenFeatures } from "./engine.ts";

/** The feature that subgroup matrices (tensor cores) need, which only Dawn and Chromium have, behind a switch. */
export const subgroupMatrixFeature = "chromium-experimental-subgroup-matrix";

/** Which device to open. */
export interface DeviceOptions {
  /**
   * `native`: the runtime's own WebGPU. `dawn`: the npm package `webgpu`. A `GPU` is used as it is. Default: what the
   * environment variable `FLASH_MLA_ENGINE` names, else `native` where there is one, else `dawn`.
   */
  readonly engine?: EngineName | GPU;
  /** Which of several adapters; `high-performance` by default. */
  readonly powerPreference?: GPUPowerPreference;
  /**
   * WebGPU features that the device must have, beside those that the library asks for where they are to be had:
   * `shader-f16`, `subgroups` and `timestamp-query`. `chromium-experimental-subgroup-matrix` also has Dawn allow what is
   * no standard yet.
   */
  readonly features?: readonly string[];
}

const optionNames = ["engine", "powerPreference", "features"];
const powerPreferences = ["low-power", "high-performance"];

/** What kernels and measurements gain from; asked for, not insisted on. */
const wantedFeatures = ["timestamp-query", "shader-f16", "subgroups"];

/**
 * Opens a device.
 *
 * @param options Which.
 * @throws {FlashMLAError} With code `invalid-input` for options that are none, `unsupported-platform` where there is no
 * engine, no adapter or no such feature.
 */
export async function requestDevice(options: DeviceOptions): Promise<GPUDevice> {
  const { engine, powerPreference = "high-performance", features = [] } = checked(options);
  const experimental = features.includes(subgroupMatrixFeature);
  const gpu = typeof engine === "object" ? engine : await findGpu(engine, { experimental });
  const adapter = async () => {
    const found = await gpu.requestAdapter({ powerPreference });
    if (found !== null) return found;
    throw new FlashMLAError(
      "unsupported-platform",
      `Cannot use platform "webgpu": no adapter was found; ${adapterAdvice()}`,
    );
  };
  const open = async (from: GPUAdapter, names: Iterable<string>) => {
    const device = await from.requestDevice({
      label: "flash-mla",
      requiredFeatures: [...names] as GPUFeatureName[],
      requiredLimits: Object.fromEntries(limitNames.map((name) => [name, Number(from.limits[name])])),
    });
    rememberAdapter(device, from.info);
    return device;
  };

  const first = await adapter();
  const listed: ReadonlySet<string> = first.features;
  const hidden = hiddenFeatures(gpu).filter((name) => !listed.has(name));
  const missing = features.filter((name) => !listed.has(name) && !hidden.includes(name));
  const refuse = (names: readonly string[], cause?: unknown) =>
    new FlashMLAError(
      "unsupported-platform",
      `Cannot open a device: the adapter "${adapterName(first.info)}" has no ${names.map((n) => `"${n}"`).join(", ")}`,
      { cause },
    );
  if (missing.length > 0) throw refuse(missing);
  const sure = new Set([...features, ...wantedFeatures].filter((name) => listed.has(name)));
  if (hidden.length > 0) {
    try {
      return await open(first, [...sure, ...hidden]);
    } catch (error) {
      const insisted = features.filter((name) => hidden.includes(name));
      if (insisted.length > 0) throw refuse(insisted, error);
    }
    // An adapter serves one request.
    return await open(await adapter(), sure);
  }
  return await open(first, sure);
}

function checked(options: DeviceOptions): DeviceOptions {
  const refuse = (why: string) => {
    throw new FlashMLAError("invalid-input", `Cannot open a device: ${why}`);
  };
  if (typeof options !== "object" || options === null) refuse(`options must be an object, got ${kindOf(options)}`);
  for (const name of Object.keys(options)) {
    if (!optionNames.includes(name)) refuse(`unknown option "${name}"; known are ${optionNames.join(", ")}`);
  }
  const { engine, powerPreference, features } = options;
  const isGpu = typeof engine === "object" && typeof engine?.requestAdapter === "function";
  if (engine !== undefined && engine !== "native" && engine !== "dawn" && !isGpu) {
    refuse(`engine must be "native", "dawn" or a GPU, got ${kindOf(engine)}`);
  }
  if (powerPreference !== undefined && !powerPreferences.includes(powerPreference)) {
    refuse(`powerPreference must be "low-power" or "high-performance", got ${kindOf(powerPreference)}`);
  }
  if (features !== undefined && !(Array.isArray(features) && features.every((name) => typeof name === "string"))) {
    refuse(`features must be an array of feature names, got ${kindOf(features)}`);
  }
  return options;
}
