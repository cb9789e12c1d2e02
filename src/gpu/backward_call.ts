// The gradients of a whole call on the GPU: sums in float32 for every tensor, the pieces that add to them, and their delivery
// as what the caller gave.

import type { AttentionState } from "../op/attention_state.ts";
import type { FlashMLAConfig } from "../op/config.ts";
import { FlashMLAError } from "../op/errors.ts";
import { toHalves } from "../op/half.ts";
import type { MlaGradients } from "../op/mla_gradients.ts";
import { mapTensors, type MlaInputs, type MlaProblem, type TensorName } from "../op/mla_problem.ts";
import { pieces } from "../op/pieces.ts";
import {
  type AnyTensor,
  dtypeOf,
  elementCount,
  type GpuTensor,
  isGpuTensor,
  type OwnedGpuTensor,
  type Tensor,
} from "../op/tensor.ts";
import { backwardPlan, whyBackwardInvalid } from "./backward_plan.ts";
import { type CallMemory, ownCall } from "./call_memory.ts";
import { planCache } from "./compiled_plan.ts";
import { type GpuContext, unlessLost } from "./device.ts";
import { inErrorScopes } from "./error_scopes.ts";
import { allocated, toGpu, toHost } from "./gpu_tensor.ts";
import { type HalfCopy, halfCopy, halfPipeline } from "./half_copy.ts";
import { mostBackwardKeyRows } from "./key_rows.ts";
import { backwardLayouts, type OperandLayouts } from "./operand_layout.ts";
import { PreparedAttention } from "./prepared_attention.ts";
import { type BackwardTensors, ResidentCall } from "./resident_call.ts";

/** The sums of a call's gradients, by the name of the input. */
export type GradientSums = MlaInputs<OwnedGpuTensor>;

/** What a call's gradients are made from, and what takes them. */
export type WholeTensors = Omit<BackwardTensors, "clear" | "gradients"> & { readonly gradients: GradientSums };

/** A piece of a call whose gradients are computed at once. Its tensors are views of the call's. */
export interface BackwardPiece {
  /** The part's dimensions. */
  readonly problem: MlaProblem;
  /** The part's inputs. */
  readonly inputs: MlaInputs;
  /** The part of what the gradients are made from, and of the sums. */
  readonly tensors: BackwardTensors;
}

/** A piece made ready. */
export interface PreparedPiece {
  /** The piece, bound to its memory. */
  readonly prepared: PreparedAttention;
  /** Gives back what it borrowed. */
  dispose(): void;
}

/**
 * Computes the gradients of a call that was run.
 *
 * @param context The device.
 * @param problem The problem.
 * @param inputs The call's tensors.
 * @param cfg A configuration.
 * @param saved The call's output and log-sum-exp.
 * @param gradOutput The gradient of the output.
 * @returns One gradient for each tensor of numbers, like its tensor.
 * @throws {FlashMLAError} With code `invalid-config` when the configuration's backward tile cannot run, `limit` when the
 * call passes a limit, `device` when the device fails.
 */
export async function gradientsOnGpu(
  context: GpuContext,
  problem: MlaProblem,
  inputs: MlaInputs,
  cfg: FlashMLAConfig,
  saved: AttentionState,
  gradOutput: AnyTensor,
): Promise<MlaGradients> {
  checkBackward(context, problem, cfg);
  const gradients = await allocateSums(context, inputs);
  const delivered: Partial<Record<TensorName, AnyTensor>> = {};
  let lse: OwnedGpuTensor | undefined;
  let done = false;
  try {
    // Log-sum-exps are cut along their last axis, for which they have to lie on the GPU.
    if (!isGpuTensor(saved.lse) && elementCount(saved.lse.shape) > 0) lse = await toGpu(saved.lse, context.device);
    const whole = { output: saved.output, lse: lse ?? saved.lse, gradOutput, gradients };
    const parts = backwardPieces(context, problem, inputs, whole);
    if (parts.length === 0) await clearSums(context, gradients);
    // Limits are told before any work on the first piece.
    if (parts.length > 1) parts.forEach((part) => planned(context, part, cfg));
    for (const part of parts) {
      const { prepared, dispose } = await preparePiece(context, part, cfg, async (make) => ownCall(await make()));
      await prepared.submit().finally(dispose);
    }
    await Promise.all(
      entriesOf(inputs).map(async ([name, input]) => {
        delivered[name] = await deliver(context, input, gradients[name]!);
      }),
    );
    done = true;
    return delivered as MlaGradients;
  } finally {
    lse?.dispose();
    for (const [name, sum] of entriesOf(gradients)) {
      if (done && delivered[name] === sum) continue;
      (sum as OwnedGpuTensor).dispose();
      const other = delivered[name];
      if (!done && other !== undefined && isGpuTensor(other)) (other as OwnedGpuTensor).dispose();
    }
  }
}

/**
 * Checks that a configuration can compute a problem's gradients.
 *
 * @throws {FlashMLAError} With code `invalid-config`.
 */
export function checkBackward(context: GpuContext, problem: MlaProblem, cfg: FlashMLAConfig): void {
  const why = whyBackwardInvalid(cfg, problem, context.capabilities);
  if (why !== null) throw new FlashMLAError("invalid-config", `Cannot compute gradients: ${why}`);
}

/** Allocates the sums of a call's gradients. */
export async function allocateSums(context: GpuContext, inputs: MlaInputs): Promise<GradientSums> {
  const entries = entriesOf(inputs);
  // All at once: each waits for the device.
  const made = await Promise.allSettled(entries.map(([, { shape }]) => allocated(context, shape, "f32")));
  const failure = made.find((outcome) => outcome.status === "rejected");
  if (failure !== undefined) {
    for (const outcome of made) if (outcome.status === "fulfilled") outcome.value.dispose();
    throw failure.reason;
  }
  const sums = made.map((outcome, i) => [entries[i][0], (outcome as PromiseFulfilledResult<OwnedGpuTensor>).value]);
  return Object.fromEntries(sums) as GradientSums;
}

/** The pieces of a call whose gradients are computed one after another; none where no query meets a key. */
export function backwardPieces(
  context: GpuContext,
  problem: MlaProblem,
  inputs: MlaInputs,
  { output, lse, gradOutput, gradients }: WholeTensors,
): BackwardPiece[] {
  const most = mostBackwardKeyRows(problem, inputs, context.capabilities.limits.maxStorageBufferBindingSize);
  const grads = pieces(problem, gradients, most, { out: gradOutput });
  return pieces(problem, inputs, most, { out: output, lse })
    .map((part, i): BackwardPiece => ({
      problem: part.problem,
      inputs: part.inputs,
      tensors: {
        output: part.out!,
        lse: part.lse!,
        gradOutput: grads[i].out!,
        gradients: grads[i].inputs as MlaInputs<GpuTensor>,
        clear: false,
      },
    }))
    .filter(({ problem: { batch, queryLength, keyLength } }) => batch * queryLength * keyLength > 0)
    .map((part, i) => ({ ...part, tensors: { ...part.tensors, clear: i === 0 } }));
}

/**
 * Plans, compiles, uploads and binds one piece.
 *
 * @param context The device.
 * @param piece The piece.
 * @param cfg The configuration.
 * @param hold Keeps the piece's memory, which it may share with other configurations.
 */
export async function preparePiece(
  context: GpuContext,
  piece: BackwardPiece,
  cfg: FlashMLAConfig,
  hold: (make: () => Promise<ResidentCall>) => Promise<CallMemory>,
): Promise<PreparedPiece> {
  const { problem, inputs, tensors } = piece;
  const { compiled, release } = await planCache(context).borrow(problem, cfg, layoutsOf(context, piece), "backward");
  let memory: CallMemory | undefined;
  const dispose = () => {
    memory?.dispose();
    release();
  };
  try {
    memory = await hold(() => ResidentCall.create(context, problem, { inputs, backward: tensors }, compiled.plan));
    return { prepared: await PreparedAttention.create(context, problem, compiled, memory.resident), dispose };
  } catch (error) {
    dispose();
    throw error;
  }
}

function layoutsOf(context: GpuContext, { problem, inputs, tensors }: BackwardPiece): OperandLayouts {
  return backwardLayouts(problem, inputs, context.capabilities.f16, tensors);
}

function planned(context: GpuContext, piece: BackwardPiece, cfg: FlashMLAConfig): void {
  backwardPlan(piece.problem, cfg, context.capabilities, layoutsOf(context, piece));
}

/** Makes all sums zero. */
export async function clearSums(context: GpuContext, sums: GradientSums): Promise<void> {
  await unlessLost(context, () =>
    inErrorScopes(context, "clear its memory", () => {
      const encoder = context.device.createCommandEncoder({ label: "flash-mla gradients" });
      for (const [, { buffer }] of entriesOf(sums) as [TensorName, OwnedGpuTensor][]) encoder.clearBuffer(buffer);
      context.device.queue.submit([encoder.finish()]);
    }));
}

/** A gradient as the caller's tensor is: on its side, in its element type. */
async function deliver(context: GpuContext, input: AnyTensor, sum: OwnedGpuTensor): Promise<AnyTensor> {
  const half = dtypeOf(input) === "f16";
  if (!isGpuTensor(input)) {
    const floats = await toHost(sum, context.device) as Tensor;
    return half ? toHalves(floats) : floats;
  }
  return half ? await packed(context, sum) : sum;
}

/** A tensor of halves on the GPU. */
async function packed(context: GpuContext, floats: OwnedGpuTensor): Promise<OwnedGpuTensor> {
  const pipeline = await halfPipeline(context, "pack");
  const rows = inRows(floats.shape);
  let copy: HalfCopy | undefined;
  try {
    return await allocated(context, floats.shape, "f16", (halves) => {
      if (elementCount(floats.shape) === 0) return;
      const encoder = context.device.createCommandEncoder({ label: "flash-mla gradients" });
      // An odd number of halves leaves half a word that nobody writes.
      encoder.clearBuffer(halves.buffer);
      const pass = encoder.beginComputePass();
      const range = { start: 0, end: rows[1] };
      copy = halfCopy(context, pipeline, { buffer: halves.buffer, dtype: "f16", shape: rows }, range, floats.buffer);
      copy.encode(pass);
      pass.end();
      context.device.queue.submit([encoder.finish()]);
    });
  } finally {
    copy?.dispose();
  }
}

/** A dense shape as rows of one batch item. */
function inRows(shape: readonly number[]): [1, number, number] {
  const columns = shape[shape.length - 1];
  return [1, elementCount(shape) / columns, columns];
}

/** The tensors of numbers among the inputs, by name. */
export function entriesOf(inputs: MlaInputs): [TensorName, AnyTensor][] {
  const entries: [TensorName, AnyTensor][] = [];
  mapTensors(inputs, (tensor, name) => {
    entries.push([name, tensor]);
    return tensor;
  });
  return entries;
}
