// A forward call made ready kernel by kernel, past the caches of plans: what it compiles, it compiles now.

import type { FlashMLAConfig, MlaInputs, MlaProblem } from "../mod.ts";
import { PlanCache } from "../src/gpu/compiled_plan.ts";
import type { GpuContext } from "../src/gpu/device.ts";
import { operandLayouts } from "../src/gpu/operand_layout.ts";
import { PreparedAttention } from "../src/gpu/prepared_attention.ts";
import { ResidentCall } from "../src/gpu/resident_call.ts";

/** A call that is ready to run and to be timed. */
export interface PreparedForward {
  readonly prepared: PreparedAttention;
  /** Gives its memory back. */
  dispose(): void;
}

/**
 * Plans, compiles, uploads and binds a call whose result stays in memory of ours.
 *
 * @param context The device.
 * @param problem The call's dimensions.
 * @param inputs The call's tensors.
 * @param cfg The configuration.
 * @param out Element type of the result.
 */
export async function prepareForward(
  context: GpuContext,
  problem: MlaProblem,
  inputs: MlaInputs,
  cfg: FlashMLAConfig,
  out: "f32" | "f16",
): Promise<PreparedForward> {
  const layouts = operandLayouts(problem, inputs, context.capabilities.f16, { out });
  const { compiled, release } = await new PlanCache(context).borrow(problem, cfg, layouts);
  let resident: ResidentCall | undefined;
  const dispose = () => {
    resident?.dispose();
    release();
  };
  try {
    resident = await ResidentCall.create(context, problem, { inputs }, compiled.plan);
    return { prepared: await PreparedAttention.create(context, problem, compiled, resident), dispose };
  } catch (error) {
    dispose();
    throw error;
  }
}
