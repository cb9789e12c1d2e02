// A configuration made ready to be timed forward and backward: output, log-sum-exp and gradients stay on the GPU, in memory
// that all trials of one call share.

import type { MlaTrial } from "../op/implementation.ts";
import { toFloats, toHalves } from "../op/half.ts";
import type { HostGradients } from "../op/mla_gradients.ts";
import { lseShape, type MlaInputs, type MlaProblem, outputShape, type TensorName } from "../op/mla_problem.ts";
import { pieces } from "../op/pieces.ts";
import { elementCount, type OwnedGpuTensor, type Tensor } from "../op/tensor.ts";
import { tuningGradOutput } from "../op/tuning_grad_output.ts";
import {
  allocateSums,
  type BackwardPiece,
  clearSums,
  entriesOf,
  type GradientSums,
  type PreparedPiece,
} from "./backward_call.ts";
import { type GpuContext, unlessLost } from "./device.ts";
import { allocated, toGpu, toHost } from "./gpu_tensor.ts";
import { mostBackwardKeyRows } from "./key_rows.ts";
import type { StorageType } from "./operand_layout.ts";
import { timeOnGpu, timingMethod } from "./timing.ts";

/** What the trials of one call share. */
export interface TrialTensors {
  /** The first piece of the call, whose gradients are computed at once. */
  readonly piece: BackwardPiece;
  /** Its result. */
  readonly output: OwnedGpuTensor;
  /** Its log-sum-exp. */
  readonly lse: OwnedGpuTensor;
  /** The sums of its gradients. */
  readonly gradients: GradientSums;
  /** Gives all of it back. */
  dispose(): void;
}

/**
 * Allocates what the trials of one call share.
 *
 * @param context The device.
 * @param problem The call's dimensions.
 * @param inputs The call's tensors.
 * @param dtype Element type of the result.
 */
export async function trialTensors(
  context: GpuContext,
  problem: MlaProblem,
  inputs: MlaInputs,
  dtype: StorageType,
): Promise<TrialTensors> {
  const most = mostBackwardKeyRows(problem, inputs, context.capabilities.limits.maxStorageBufferBindingSize);
  const parts = pieces(problem, inputs, most);
  const part = parts.find(({ problem: { batch, queryLength } }) => batch * queryLength > 0) ?? parts[0];
  const made: OwnedGpuTensor[] = [];
  const keep = (tensor: OwnedGpuTensor) => {
    made.push(tensor);
    return tensor;
  };
  const dispose = () => made.splice(0).forEach((tensor) => tensor.dispose());
  try {
    const output = keep(await allocated(context, outputShape(part.problem), dtype));
    const lse = keep(await allocated(context, lseShape(part.problem), "f32"));
    const floats = tuningGradOutput(part.problem);
    const gradOutput = keep(await toGpu(dtype === "f16" ? toHalves(floats) : floats, context.device));
    const gradients = await allocateSums(context, part.inputs);
    for (const [, sum] of entriesOf(gradients)) keep(sum as OwnedGpuTensor);
    const tensors = { output, lse, gradOutput, gradients, clear: true };
    return { piece: { ...part, tensors }, output, lse, gradients, dispose };
  } catch (error) {
    dispose();
    throw error;
  }
}

/**
 * A trial of one configuration.
 *
 * @param context The device.
 * @param tensors What it works on.
 * @param forward The configuration's forward kernels.
 * @param backward Its backward kernels, or null where there is nothing to compute.
 * @param dispose Gives back what the trial holds.
 */
export async function backwardTrial(
  context: GpuContext,
  { output, gradients }: TrialTensors,
  forward: PreparedPiece["prepared"],
  backward: PreparedPiece["prepared"] | null,
  dispose: () => void,
): Promise<MlaTrial> {
  return {
    timingMethod: await timingMethod(context),
    async output() {
      await forward.submit();
      return toFloats(await toHost(output, context.device));
    },
    async gradients() {
      await forward.submit();
      if (backward === null) await clearSums(context, gradients);
      else await backward.submit();
      const read = await Promise.all(
        entriesOf(gradients).map(async ([name, sum]) =>
          [name, await toHost(sum as OwnedGpuTensor, context.device) as Tensor] as const
        ),
      );
      return Object.fromEntries(read) as Record<TensorName, Tensor> as HostGradients;
    },
    time: (repeats) =>
      unlessLost(context, () =>
        timeOnGpu(context, (encoder, bounds) => {
          if (backward === null) return forward.encode(encoder, { timestampWrites: bounds });
          const { beginningOfPassWriteIndex: begin, endOfPassWriteIndex: end } = bounds ?? {};
          const at = (index: GPUComputePassTimestampWrites | undefined) => ({ timestampWrites: index });
          forward.encode(
            encoder,
            at(begin === undefined ? undefined : { querySet: bounds!.querySet, beginningOfPassWriteIndex: begin }),
          );
          backward.encode(
            encoder,
            at(end === undefined ? undefined : { querySet: bounds!.querySet, endOfPassWriteIndex: end }),
          );
        }, repeats)),
    dispose,
  };
}

/** Whether a piece has any gradients but zero. */
export function hasGradients({ problem: { batch, queryLength, keyLength } }: Pick<BackwardPiece, "problem">): boolean {
  return elementCount([batch, queryLength, keyLength]) > 0;
}
