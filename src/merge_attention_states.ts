import { checkOneDevice, type GpuAttentionState, mergeOnGpu } from "./gpu/merge_states.ts";
import type { AttentionState, LseLike } from "./op/attention_state.ts";
import { FlashMLAError } from "./op/errors.ts";
import { toFloats, toHalves } from "./op/half.ts";
import { checkSinks } from "./op/score_options.ts";
import { type AnyTensor, checkTensor, dtypeOf, type HostTensor, isGpuTensor, kindOf } from "./op/tensor.ts";
import type { ResultLike } from "./op/tensor.ts";
import { referenceMergeAttentionStates } from "./reference/merge_attention_states.ts";

/** What {@link mergeAttentionStates} may be told. */
export interface MergeOptions {
  /**
   * Sink logits, which join the denominator: `[queryHeads]` one per head, `[n]` shared by all heads, `[queryHeads, n]` or
   * `[1, n]`. They count once, so the states must be without them, and of several merges only the last is given them. For
   * states on a GPU they may lie on either side; those on the GPU are read back.
   */
  readonly softmaxAux?: AnyTensor;
}

/**
 * Joins attention over some keys with attention over others: the result is what attention over all of them gives, to within
 * rounding. More than two parts are merged one after another, in any order.
 *
 * ```text
 * lse = log( exp(a.lse) + exp(b.lse) )     output = exp(a.lse − lse) · a.output + exp(b.lse − lse) · b.output
 * ```
 *
 * The parts see disjoint keys, with the same queries. A row of a part that saw no key has `lse` −∞ and takes no part,
 * whatever its output holds; where neither part saw one the result is a zero row and −∞.
 *
 * @param a What {@link mlaAttentionWithLse} gave for some keys: output `[batch, queryLength, queryHeads, vHeadDim]` and lse
 * `[batch, queryHeads, queryLength]`, float32.
 * @param b The same for other keys; its output may have another element type.
 * @param options Sinks.
 * @returns The state of both together in new tensors, like `a`: on its side, the output in its element type (bfloat16 gives
 * float32), the log-sum-exp in float32.
 * @throws {FlashMLAError} When the states' shapes, element types or sides do not fit together (`invalid-input`), or the
 * device fails (`device`).
 *
 * @example Two halves of the keys
 * ```ts
 * import { mergeAttentionStates, mlaAttentionWithLse } from "@flash-mla/webgpu";
 *
 * const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
 * const over = (keys: number) => {
 *   const inputs = { query: ones(1, 3, 2, 16), keyValue: ones(1, keys, 4), wKc: ones(4, 2, 16), wVc: ones(4, 2, 32) };
 *   return mlaAttentionWithLse(inputs, { platform: "reference" });
 * };
 * const { output, lse } = await mergeAttentionStates(await over(5), await over(3));
 * console.log(output.shape, lse.data[0] - (await over(8)).lse.data[0]); // [1, 3, 2, 32] 0
 * ```
 */
export async function mergeAttentionStates<Output extends AnyTensor>(
  a: AttentionState<Output>,
  b: AttentionState,
  options: MergeOptions = {},
): Promise<AttentionState<ResultLike<Output>, LseLike<ResultLike<Output>>>> {
  check(a, b, options);
  const merged = isGpuTensor(a.output)
    ? await mergeOnGpu(a as GpuAttentionState, b as GpuAttentionState, options.softmaxAux)
    : mergeOnHost(a, b, options);
  return merged as AttentionState<ResultLike<Output>, LseLike<ResultLike<Output>>>;
}

function mergeOnHost(a: AttentionState, b: AttentionState, { softmaxAux }: MergeOptions): AttentionState {
  const floats = (tensor: AnyTensor) => toFloats(tensor as HostTensor);
  const [first, second] = [a, b].map(({ output, lse }) => ({ output: floats(output), lse: floats(lse) }));
  const { output, lse } = referenceMergeAttentionStates(first, second, softmaxAux && floats(softmaxAux));
  return { output: dtypeOf(a.output) === "f16" ? toHalves(output) : output, lse };
}

function refuse(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot merge attention states: ${why}`);
}

/** Throws unless two states and the sinks fit together. */
function check(a: AttentionState, b: AttentionState, options: MergeOptions): void {
  for (const [name, state] of [["a", a], ["b", b]] as const) {
    if (typeof state !== "object" || state === null) refuse(`${name} must be { output, lse }, got ${kindOf(state)}`);
    checkTensor(`${name}.output`, state.output);
    checkTensor(`${name}.lse`, state.lse);
  }
  if (typeof options !== "object" || options === null) refuse(`options must be an object, got ${kindOf(options)}`);
  const unknown = Object.keys(options).find((name) => name !== "softmaxAux");
  if (unknown !== undefined) refuse(`unknown option "${unknown}"; known is softmaxAux`);

  const { shape } = a.output;
  if (shape.length !== 4) {
    refuse(`a.output must have 4 axes [batch, queryLength, queryHeads, vHeadDim], got shape [${shape.join(", ")}]`);
  }
  const [batch, queryLength, queryHeads] = shape;
  sameShape("b.output", b.output, shape, "a.output has");
  for (const [name, { lse }] of [["a", a], ["b", b]] as const) {
    sameShape(`${name}.lse`, lse, [batch, queryHeads, queryLength], "the outputs go with");
    if (dtypeOf(lse) !== "f32") refuse(`${name}.lse has dtype "${dtypeOf(lse)}", expected "f32"`);
  }
  const { softmaxAux } = options;
  if (softmaxAux !== undefined) checkSinks(softmaxAux, queryHeads, refuse);

  const side = (tensor: AnyTensor) => isGpuTensor(tensor) ? "on a GPU" : "on the host";
  // A few sinks are no reason to read a state back, nor to upload them before.
  const sinks = isGpuTensor(a.output) ? undefined : softmaxAux;
  for (
    const [name, tensor] of Object.entries({ "a.lse": a.lse, "b.output": b.output, "b.lse": b.lse, softmaxAux: sinks })
  ) {
    if (tensor === undefined || side(tensor) === side(a.output)) continue;
    refuse(`${name} lies ${side(tensor)}, a.output ${side(a.output)}; move one of them by toGpu() or toHost()`);
  }
  checkOneDevice([a.output, a.lse, b.output, b.lse].filter(isGpuTensor));
}

function sameShape(name: string, { shape }: AnyTensor, expected: readonly number[], whose: string): void {
  if (shape.join() === expected.join()) return;
  refuse(`${name} has shape [${shape.join(", ")}], ${whose} [${expected.join(", ")}]`);
}
