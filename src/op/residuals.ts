// What gradients are computed from stays as it was: the output and the log-sum-exp of the run, beside its inputs.

import type { AttentionState } from "./attention_state.ts";
import { cannotRun, FlashMLAError } from "./errors.ts";
import { type MlaInputs, tensorNames } from "./mla_problem.ts";
import { type AnyMask, type AnyTensor, type HostTensor, isGpuTensor } from "./tensor.ts";

/** A run's results as gradients need them: copied where they lie on the host, the caller's own on a GPU. */
export function residualsOf({ output, lse }: AttentionState): AttentionState {
  return { output: privateCopy(output), lse: privateCopy(lse) };
}

/** The same elements in memory of its own; on a GPU the tensor itself. */
export function privateCopy(tensor: AnyTensor): AnyTensor {
  if (isGpuTensor(tensor)) return tensor;
  return { ...tensor, data: (tensor.data as Float32Array).slice(), shape: [...tensor.shape] } as HostTensor;
}

/**
 * Checks that a run whose gradients are wanted does not overwrite what they are computed from.
 *
 * @throws {FlashMLAError} With code `invalid-input` when `out` lies in an input's memory.
 */
export function checkApart(inputs: MlaInputs, out: AnyTensor): void {
  for (const name of [...tensorNames, "attentionMask"] as const) {
    const tensor = inputs[name];
    if (tensor === undefined || !shareMemory(tensor, out)) continue;
    cannotRun(`out lies in the memory of ${name}, which gradients are computed from; give it memory of its own`);
  }
}

/**
 * Checks that everything on a GPU that gradients are computed from is still there.
 *
 * @throws {FlashMLAError} With code `invalid-input` when a tensor was disposed of.
 */
export function checkStillThere(inputs: MlaInputs, { output, lse }: AttentionState): void {
  const { cuSeqlens: _, ...tensors } = { ...inputs, output, lse };
  for (const [name, tensor] of Object.entries<AnyTensor | AnyMask | undefined>(tensors)) {
    if ((tensor as { disposed?: boolean } | undefined)?.disposed !== true) continue;
    const why = `${name} was disposed of; dispose of it after the last gradients`;
    throw new FlashMLAError("invalid-input", `Cannot compute gradients: ${why}`);
  }
}

function shareMemory(a: AnyTensor | AnyMask, b: AnyTensor): boolean {
  if (isGpuTensor(b)) return "buffer" in a && a.buffer === b.buffer;
  if (isGpuTensor(a)) return false;
  const [first, second] = [(a as HostTensor).data as Uint8Array, b.data as Uint8Array];
  if (first.buffer !== second.buffer) return false;
  const end = (view: Uint8Array) => view.byteOffset + view.byteLength;
  return first.byteOffset < end(second) && second.byteOffset < end(first);
}
