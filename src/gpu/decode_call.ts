// One call of decoding on one device, as its parts work on it.

import type { DecodeConfig } from "../op/decode_config.ts";
import type { DecodeInputs } from "../op/decode_implementation.ts";
import type { DecodeProblem } from "../op/decode_problem.ts";
import type { GpuLimits } from "./capabilities.ts";
import type { GpuContext } from "./device.ts";
import type { KernelSteps } from "./kernel_steps.ts";
import { productColumns, productTokens } from "./kernels/head_product.ts";
import { limitError } from "./limit_checks.ts";

/** A call that is being planned. */
export interface DecodeCall {
  /** The device. */
  readonly context: GpuContext;
  /** The call's dimensions. */
  readonly problem: DecodeProblem;
  /** The call's tensors. */
  readonly inputs: DecodeInputs;
  /** The configuration. */
  readonly cfg: DecodeConfig;
  /** Takes what is uploaded and borrowed. */
  readonly steps: KernelSteps;
}

/** Workgroups of kernels that stride over their work: enough to fill a device. */
export const stridingWorkgroups = 2048;

/** Tokens of all sequences. */
export function tokensOf({ batch, queryLength }: DecodeProblem): number {
  return batch * queryLength;
}

/** Workgroups of a product of every head's rows with a weight, `columns` wide. */
export function productGrid(problem: DecodeProblem, columns: number, limits: GpuLimits): [number, number, number] {
  const grid: [number, number, number] = [
    Math.ceil(columns / productColumns),
    Math.ceil(tokensOf(problem) / productTokens),
    problem.queryHeads,
  ];
  if (grid.every((groups) => groups <= limits.maxComputeWorkgroupsPerDimension)) return grid;
  throw limitError(`${grid.join(" × ")} workgroups`, "maxComputeWorkgroupsPerDimension", limits);
}
