// Gradients by the name of the tensor that they are of, and the gradient that they begin with.

import { FlashMLAError } from "./errors.ts";
import type { HostInputs, MlaInputs, TensorName } from "./mla_problem.ts";
import { type AnyTensor, checkTensor, isGpuTensor, type ResultLike } from "./tensor.ts";

/**
 * The gradients of a call by the name of the tensor that they are of: one for each tensor of numbers that the call has,
 * among its inputs or its options. Each has its tensor's shape and lies on its side, in its element type; bfloat16 gives
 * float32. Those on a GPU are the caller's to dispose of.
 *
 * @typeParam Inputs The call's inputs.
 */
export type MlaGradients<Inputs extends MlaInputs = MlaInputs> =
  & { readonly [Name in keyof Pick<Inputs, TensorName & keyof Inputs>]: ResultLike<Extract<Inputs[Name], AnyTensor>> }
  & { readonly [Name in Exclude<"bias" | "softmaxAux", keyof Inputs>]?: ResultLike<AnyTensor> };

/** Gradients that all lie on the host in float32. */
export type HostGradients = MlaGradients<HostInputs>;

/**
 * Checks the gradient of an output. Its element type and side are its own: a loss in float32 over an output of halves is
 * ordinary.
 *
 * @throws {FlashMLAError} With code `invalid-input` unless it has the output's shape, on no other device.
 */
export function checkGradOutput(gradOutput: AnyTensor, output: AnyTensor): void {
  checkTensor("gradOutput", gradOutput);
  const fail = (why: string) => {
    throw new FlashMLAError("invalid-input", `Cannot compute gradients: gradOutput ${why}`);
  };
  if (gradOutput.shape.join() !== output.shape.join()) {
    fail(`has shape [${gradOutput.shape.join(", ")}], the output has [${output.shape.join(", ")}]`);
  }
  const [device, expected] = [gradOutput, output].map((tensor) => isGpuTensor(tensor) ? tensor.device : undefined);
  if (device !== undefined && expected !== undefined && device !== expected) fail("lies on another device than output");
}
