// What a call says beside its tensors: mask, scale, place and configuration.

import type { MlaExecutor } from "./flash_mla.ts";
import type { FlashMLAConfig } from "./op/config.ts";
import { cannotRun } from "./op/errors.ts";
import type { MlaEvent } from "./op/mla_event.ts";
import { type MlaInputs, type MlaMathOptions, tensorNames } from "./op/mla_problem.ts";
import type { Platform } from "./op/platform.ts";
import { type AnyMask, type AnyTensor, type GpuMaskTensor, type GpuTensor, isGpuTensor, kindOf } from "./op/tensor.ts";

/** The options of one call. */
export interface MlaOptions extends MlaMathOptions {
  /** Where to run; `auto`, the default, takes WebGPU where there is an adapter and the reference elsewhere. */
  readonly platform?: Platform | "auto";
  /** A configuration for this call only; chosen by the executor's chain when absent. */
  readonly cfg?: FlashMLAConfig;
  /** What chooses the configuration; {@link defaultExecutor} when absent. */
  readonly executor?: MlaExecutor;
  /** The WebGPU device to run on; that of the tensors, or the process's own, opened on first use, when absent. */
  readonly device?: GPUDevice;
  /** Hears of what the call's user may want to know; a line on the console, once per process, when absent. */
  readonly onEvent?: (event: MlaEvent) => void;
}

/** The options of one call, with the tensor that takes the result. */
export interface MlaCallOptions<Out extends AnyTensor = AnyTensor> extends MlaOptions {
  /**
   * The tensor that takes the result, `[batch, queryLength, queryHeads, vHeadDim]` in float32 or halves, written in place
   * and returned. On a GPU it needs a buffer that no input lies in. When absent, the result is a new tensor like the query.
   */
  readonly out?: Out;
}

const knownOptions = [
  ...["softmaxScale", "causal", "logitsSoftCap", "slidingWindow", "bias", "attentionMask", "softmaxAux", "dropout"],
  "precision",
  ...["platform", "cfg", "executor", "device", "out", "onEvent"],
];

/** Throws when an option is unknown or of the wrong kind. */
export function checkOptions(options: MlaOptions): void {
  for (const name of Object.keys(options)) {
    if (!knownOptions.includes(name)) cannotRun(`unknown option "${name}"; known are ${knownOptions.join(", ")}`);
  }
  const { device, cfg, onEvent } = options;
  if (onEvent !== undefined && typeof onEvent !== "function") {
    cannotRun(`onEvent must be a function, got ${kindOf(onEvent)}`);
  }
  if (device !== undefined && typeof device?.createBuffer !== "function") {
    cannotRun(`device must be a GPUDevice, got ${kindOf(device)}`);
  }
  if (cfg !== undefined && (typeof cfg !== "object" || cfg === null)) {
    cannotRun(`cfg must be a FlashMLAConfig, got ${kindOf(cfg)}`);
  }
}

/** The tensors of a call that lie on a GPU, by name: among the inputs, which hold those of the options too, and `out`. */
export function gpuTensors(inputs: MlaInputs, out?: AnyTensor): [name: string, tensor: GpuTensor | GpuMaskTensor][] {
  const found: [name: string, tensor: GpuTensor | GpuMaskTensor][] = [];
  const given = { ...inputs, out };
  for (const name of [...tensorNames, "out", "attentionMask"] as const) {
    const tensor = given[name];
    if (tensor !== undefined && isGpuTensor<AnyTensor | AnyMask>(tensor)) found.push([name, tensor]);
  }
  return found;
}

/** The device that a call's tensors and options name, if any. */
export function deviceOf(inputs: MlaInputs, { device, out }: MlaCallOptions): GPUDevice | undefined {
  let [owner, found] = ["options.device", device];
  for (const [name, tensor] of gpuTensors(inputs, out)) {
    if (tensor.device === undefined) continue;
    if (found !== undefined && tensor.device !== found) {
      cannotRun(`${name} lies on another device than ${owner}`);
    }
    [owner, found] = [name, tensor.device];
  }
  return found;
}
