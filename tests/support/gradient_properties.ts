// What is true of the gradients of Multi-head Latent Attention whatever computes them, as checks over random problems with
// every feature. All but the last two relate an implementation to itself.

import type { HostInputs, MlaMathOptions, TensorName } from "../../src/op/mla_problem.ts";
import { tensorNames } from "../../src/op/mla_problem.ts";
import { elementCount, type MaskTensor, type Tensor } from "../../src/op/tensor.ts";
import { type Close, forAll, packedPositions, pick, type PropertyOptions } from "./attention_properties.ts";
import { denseAttention, type DenseInputs } from "./dense_attention.ts";
import {
  all,
  cut,
  having,
  inOneBias,
  poisonHiddenBias,
  queryHeads,
  repeatTerms,
  sinksPerHead,
  someSinks,
  someTerm,
} from "./option_properties.ts";
import {
  batchedProblems,
  type MlaCall,
  normals,
  packedProblems,
  problems,
  type ProblemShape,
  randomCall,
  randomTensor,
} from "./random_problem.ts";
import { appendToHeads, concatenate, map, range, scaled, sumOver, take, total } from "./tensor_parts.ts";
import { sees } from "./visible_pairs.ts";

/** Gradients of Σ output · gradOutput by the name of the tensor that they are of. */
export type Gradients = Readonly<Partial<Record<TensorName, Tensor>>>;

/** An implementation under test: one gradient for each tensor of numbers among the inputs. */
export type AttentionGradients = (
  inputs: HostInputs,
  options: MlaMathOptions,
  gradOutput: Tensor,
) => Gradients | Promise<Gradients>;

/** One property: throws when it finds a problem for which it does not hold. */
export type GradientPropertyCheck = (gradients: AttentionGradients, options: PropertyOptions) => Promise<void>;

/** Every tensor of numbers has a gradient of its shape, all of it finite, and nothing else has. */
export const everyTensorHasOne: GradientPropertyCheck = (gradients, options) =>
  forAll(problems(all(options)), options, async (shape) => {
    const { inputs, options: math } = randomCall(shape);
    const result = await gradients(inputs, math, gradOutputOf(shape));
    for (const name of tensorNames) {
      const expected = inputs[name]?.shape.join();
      const got = result[name]?.shape.join();
      if (got !== expected) throw new Error(`the gradient of ${name} has shape ${got}, expected ${expected}`);
      if (result[name]?.data.every(Number.isFinite) === false) throw new Error(`the gradient of ${name} is not finite`);
    }
  });

/** Gradients are linear in gradOutput. */
export const linearInGradOutput: GradientPropertyCheck = (gradients, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const { inputs, options: math } = randomCall(shape);
    const [a, b] = [gradOutputOf(shape), gradOutputOf(shape, 1)];
    const [one, other] = [await gradients(inputs, math, a), await gradients(inputs, math, b)];
    const mixed = await gradients(inputs, math, total([scaled(a, 2), scaled(b, -0.5)]));
    const expected = combine([one, other], ([x, y]) => total([scaled(x, 2), scaled(y, -0.5)]));
    compare(mixed, expected, close, "2·a − b/2");
  });

/** The same call gives the same bits: no sum depends on who comes first. */
export const sameBitsTwice: GradientPropertyCheck = (gradients, options) =>
  forAll(problems(all(options)), options, async (shape) => {
    const { inputs, options: math } = randomCall(shape);
    const gradOutput = gradOutputOf(shape);
    const [first, second] = [await gradients(inputs, math, gradOutput), await gradients(inputs, math, gradOutput)];
    for (const name of tensorNames) {
      const at = first[name]?.data.findIndex((x, i) => !Object.is(x, second[name]!.data[i])) ?? -1;
      if (at >= 0) throw new Error(`the gradient of ${name} differs between two runs at element ${at}`);
    }
  });

/** What nobody sees has a gradient of zero: keys, queries without keys, pairs of the bias. */
export const unseenHasNone: GradientPropertyCheck = (gradients, options) =>
  forAll(problems(all(options)), options, async (shape) => {
    const call = hideColumn(randomCall(shape), pick(shape, shape.keyLength));
    const result = await gradients(call.inputs, call.options, gradOutputOf(shape));
    const unseen = unseenParts(call);
    for (const [name, hidden] of Object.entries(unseen) as [TensorName, Hidden][]) {
      const at = result[name]?.data.findIndex((x, i) => x !== 0 && hidden(i)) ?? -1;
      if (at >= 0) throw new Error(`nobody sees element ${at} of ${name}, its gradient is ${result[name]!.data[at]}`);
    }
  });

/** NaN in what nobody sees reaches no gradient: keys, queries without keys, hidden pairs of the bias. */
export const nanUnseenReachesNone: GradientPropertyCheck = (gradients, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const call = hideColumn(randomCall(shape), pick(shape, shape.keyLength));
    const gradOutput = gradOutputOf(shape);
    const { bias: _, ...unseen } = unseenParts(call);
    const inputs: Record<string, unknown> = { ...call.inputs };
    for (const [name, hidden] of Object.entries(unseen) as [TensorName, Hidden][]) {
      const tensor = call.inputs[name];
      if (tensor !== undefined) inputs[name] = map(tensor, (x, i) => hidden(i) ? NaN : x);
    }
    if (call.inputs.bias !== undefined) inputs.bias = poisonHiddenBias(call);
    const poisoned = await gradients(inputs as unknown as HostInputs, call.options, gradOutput);
    compare(poisoned, await gradients(call.inputs, call.options, gradOutput), close, "NaN in what nobody sees");
  });

/** However pairs are hidden, the gradients are the same. */
export const hidingIsHiding: GradientPropertyCheck = (gradients, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const call = randomCall(shape);
    const gradOutput = gradOutputOf(shape);
    const full = inOneBias(call);
    const { bias, ...others } = await gradients(call.inputs, call.options, gradOutput);
    const { bias: fullBias, ...expected } = await gradients(full.inputs, full.options, gradOutput);
    compare(others, expected, close, "all that hides as one bias");
    if (bias) close(reduced(fullBias!, bias.shape), bias, "all that hides as one bias: gradient of the bias");
  });

/** A rotary query part shared by all heads gathers the gradients of all heads. */
export const sharedRopeSumsHeads: GradientPropertyCheck = (gradients, options) =>
  forAll(problems(all(options)), options, async (drawn, close) => {
    const shape: ProblemShape = { ...drawn, rope: "shared", qkRopeHeadDim: Math.max(1, drawn.qkRopeHeadDim) };
    const { inputs: { bQ, ...inputs }, options: math } = randomCall(shape);
    const gradOutput = gradOutputOf(shape);
    const shared = await gradients({ ...inputs, bQ }, math, gradOutput);
    const wide = await gradients({ ...inputs, query: appendToHeads(inputs.query, bQ!) }, math, gradOutput);
    const { qkNopeHeadDim: P, qkRopeHeadDim: R } = shape;
    const rope = sumOver(take(wide.query!, 3, range(P, P + R)), 2);
    const expected = {
      ...wide,
      query: take(wide.query!, 3, range(0, P)),
      bQ: { data: rope.data, shape: bQ!.shape },
    };
    compare(shared, expected, close, "rope in every head");
  });

/** A KV head gathers the gradients of its query heads. */
export const kvHeadsSumTheirQueryHeads: GradientPropertyCheck = (gradients, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const { inputs, options: math } = randomCall(shape);
    const gradOutput = gradOutputOf(shape);
    const group = shape.headsPerKvHead;
    const owners = range(0, queryHeads(shape)).map((h) => Math.floor(h / group));
    const repeated = { ...inputs, wKc: take(inputs.wKc, 1, owners), wVc: take(inputs.wVc, 1, owners) };
    const apart = await gradients(repeated, math, gradOutput);
    const groups = (weight: Tensor) =>
      concatenate(
        range(0, shape.kvHeads).map((g) => sumOver(take(weight, 1, range(g * group, (g + 1) * group)), 1)),
        1,
      );
    const expected = { ...apart, wKc: groups(apart.wKc!), wVc: groups(apart.wVc!) };
    compare(await gradients(inputs, math, gradOutput), expected, close, "weights repeated per query head");
  });

/** A bias or sinks given once for all gather the gradients of all. */
export const broadcastSums: GradientPropertyCheck = (gradients, options) =>
  forAll(
    having(problems(all(options)), { bias: someTerm, softmaxAux: someSinks }),
    options,
    async (shape, close) => {
      const { inputs, options: math } = randomCall(shape);
      const gradOutput = gradOutputOf(shape);
      const heads = queryHeads(shape);
      const { bias, softmaxAux } = inputs;
      const sinks = sinksPerHead(softmaxAux!, heads);
      const own: Tensor = { data: Float32Array.from(sinks.flat()), shape: [heads, sinks[0].length] };
      const repeated = { ...repeatTerms(inputs, shape), softmaxAux: own };
      const apart = await gradients(repeated, math, gradOutput);
      const perHead = softmaxAux!.data.length === own.data.length;
      const sums = perHead ? apart.softmaxAux! : sumOver(apart.softmaxAux!, 0);
      const expected = {
        ...apart,
        bias: reduced(apart.bias!, bias!.shape),
        softmaxAux: { data: sums.data, shape: softmaxAux!.shape },
      };
      compare(await gradients(inputs, math, gradOutput), expected, close, "bias and sinks repeated");
    },
  );

/** A constant on all logits of a row is nothing, so that their gradients sum to zero; the sinks' belong to them. */
export const logitsSumToZero: GradientPropertyCheck = (gradients, options) =>
  forAll(problems(all(options)), options, async (shape, close) => {
    const call = inOneBias(randomCall(shape));
    const { bias, softmaxAux: aux } = await gradients(call.inputs, call.options, gradOutputOf(shape));
    const zeros = (tensor: Tensor) => map(tensor, () => 0);
    if (aux === undefined) {
      const rows = sumOver(bias!, 3);
      return close(rows, zeros(rows), "sums of the bias's gradient over keys");
    }
    const sum = bias!.data.reduce((sum, x) => sum + x, 0) + aux.data.reduce((sum, x) => sum + x, 0);
    const all: Tensor = { data: Float32Array.of(sum), shape: [1] };
    close(all, zeros(all), "the sum of all gradients of biases and sinks");
  });

/** Sinks of any size: far above the scores they leave no gradient, far below them all of it. */
export const sinksOfAnySize: GradientPropertyCheck = (gradients, options) =>
  forAll(having(problems(all(options)), { softmaxAux: someSinks }), options, async (shape, close) => {
    const { inputs: { softmaxAux, ...inputs }, options: math } = randomCall(shape);
    const gradOutput = gradOutputOf(shape);
    const bare = { ...await gradients(inputs, math, gradOutput), softmaxAux: map(softmaxAux!, () => 0) };
    const low = await gradients({ ...inputs, softmaxAux: map(softmaxAux!, (x) => x - 1e4) }, math, gradOutput);
    compare(low, bare, close, "sinks of -1e4");
    const high = await gradients({ ...inputs, softmaxAux: map(softmaxAux!, (x) => x + 1e4) }, math, gradOutput);
    compare(high, combine([bare], ([tensor]) => map(tensor, () => 0)), close, "sinks of 1e4");
  });

/** Batch items give their own gradients, and the weights, sinks and biases gather those of all. */
export const batchItemsSum: GradientPropertyCheck = (gradients, options) =>
  forAll(having(batchedProblems(all(options)), { dropout: () => null }), options, async (shape, close) => {
    if (shape.batch === 0) return;
    const call = randomCall(shape);
    const gradOutput = gradOutputOf(shape);
    const parts: Gradients[] = [];
    for (let b = 0; b < shape.batch; b++) {
      const item = cut(call, { items: [b], queries: range(0, shape.queryLength), keys: range(0, shape.keyLength) });
      parts.push(await gradients(item.inputs, call.options, take(gradOutput, 0, [b])));
    }
    const perItem = (name: TensorName) =>
      ["query", "keyValue", "bQ", "bK"].includes(name) || (name === "bias" && call.inputs.bias!.shape[0] > 1);
    const expected = combine(parts, (tensors, name) => perItem(name) ? concatenate(tensors, 0) : total(tensors));
    compare(await gradients(call.inputs, call.options, gradOutput), expected, close, "batch items one by one");
  });

/** Packed sequences give the gradients of separate calls, and the weights and sinks gather those of all. */
export const packedSequencesSum: GradientPropertyCheck = (gradients, options) =>
  forAll(having(packedProblems(all(options)), { dropout: () => null }), options, async (shape, close) => {
    const sequences = packedPositions(shape.cuSeqlens!);
    if (sequences.length === 0) return;
    const call = randomCall(shape);
    const gradOutput = gradOutputOf(shape);
    const parts: Gradients[] = [];
    for (const positions of sequences) {
      const { inputs } = cut(call, { items: [0], queries: positions, keys: positions });
      const alone = { ...inputs, cuSeqlens: undefined };
      parts.push(await gradients(alone, call.options, take(gradOutput, 1, positions)));
    }
    const expected = combine(parts, (tensors, name) => {
      if (name === "bias") return blockDiagonal(tensors, call.inputs.bias!.shape);
      return ["wKc", "wVc", "softmaxAux"].includes(name) ? total(tensors) : concatenate(tensors, 1);
    });
    compare(await gradients(call.inputs, call.options, gradOutput), expected, close, "sequences one by one");
  });

/** Every property that needs no second implementation, with a name for the test. */
export const gradientProperties: readonly { readonly name: string; readonly check: GradientPropertyCheck }[] = [
  { name: "every tensor has a finite gradient of its shape", check: everyTensorHasOne },
  { name: "gradients are linear in gradOutput", check: linearInGradOutput },
  { name: "two runs give the same bits", check: sameBitsTwice },
  { name: "what nobody sees has a gradient of zero", check: unseenHasNone },
  { name: "NaN in what nobody sees reaches no gradient", check: nanUnseenReachesNone },
  { name: "hiding is hiding, by whatever option", check: hidingIsHiding },
  { name: "shared rope gathers the gradients of all heads", check: sharedRopeSumsHeads },
  { name: "KV heads gather the gradients of their query heads", check: kvHeadsSumTheirQueryHeads },
  { name: "a broadcast bias or sink gathers what it is given to", check: broadcastSums },
  { name: "gradients of a row's logits sum to zero", check: logitsSumToZero },
  { name: "sinks of any size leave no gradient or all of it", check: sinksOfAnySize },
  { name: "batch items give their own gradients", check: batchItemsSum },
  { name: "packed sequences give the gradients of separate calls", check: packedSequencesSum },
];

/** The implementation agrees with another one on random problems with every feature. */
export function differentiatesLike(oracle: AttentionGradients): GradientPropertyCheck {
  return (gradients, options) =>
    forAll(problems(all(options)), options, async (shape, close) => {
      const { inputs, options: math } = randomCall(shape);
      const gradOutput = gradOutputOf(shape);
      const expected = await oracle(inputs, math, gradOutput);
      compare(await gradients(inputs, math, gradOutput), expected, close, "against the oracle");
    });
}

/**
 * Gradients are what central differences say: of Σ output · gradOutput, computed densely in double precision, along a random
 * direction and along a single element of each tensor. The tolerance is on the sum of what the elements contribute.
 */
export const gradientsAreDifferences: GradientPropertyCheck = (gradients, options) =>
  forAll(problems(all(options)), options, async (shape) => {
    const { inputs, options: math } = randomCall(shape);
    const gradOutput = gradOutputOf(shape);
    const result = await gradients(inputs, math, gradOutput);
    const random = normals(shape.seed ^ 0x64696666);
    for (const name of tensorNames) {
      const tensor = inputs[name];
      if (tensor === undefined || tensor.data.length === 0) continue;
      const single = pick(shape, tensor.data.length);
      const directions = [tensor.data.map(random), tensor.data.map((_, i) => i === single ? 1 : 0)];
      for (const direction of directions) {
        const along = (step: number) => {
          const moved = Float64Array.from(tensor.data, (x, i) => x + step * direction[i]);
          const { output } = denseAttention(
            { ...inputs, [name]: { data: moved, shape: tensor.shape } } as DenseInputs,
            math,
          );
          return output.reduce((sum, x, i) => sum + x * gradOutput.data[i], 0);
        };
        const quotient = (step: number) => (along(step) - along(-step)) / (2 * step);
        // Richardson's extrapolation: what is left of the error falls with the fourth power of the step.
        const step = 1e-3;
        const expected = (4 * quotient(step / 2) - quotient(step)) / 3;
        const terms = Array.from(result[name]!.data, (x, i) => direction[i] === 0 ? 0 : x * direction[i]);
        const got = terms.reduce((sum, x) => sum + x, 0);
        const size = terms.reduce((sum, x) => sum + Math.abs(x), 0);
        const length = direction.reduce((sum, x) => sum + Math.abs(x), 0);
        if (Math.abs(got - expected) <= options.tolerance * size + (options.absolute ?? 0) * length) continue;
        throw new Error(`the gradient of ${name} gives ${got} along a direction, differences give ${expected}`);
      }
    }
  });

/** A gradOutput for a problem, decided by its seed. */
export function gradOutputOf(shape: ProblemShape, variant = 0): Tensor {
  const axes = [shape.batch, shape.queryLength, queryHeads(shape), shape.vHeadDim];
  return randomTensor(axes, normals(shape.seed ^ (0x67726164 + variant)));
}

/** Whether an element of a tensor, by its index, is one that nobody sees. */
type Hidden = (index: number) => boolean;

/** The elements that no output depends on. */
function unseenParts({ inputs, options }: MlaCall): Partial<Record<TensorName, Hidden>> {
  const visible = sees(inputs, options);
  const [B, Sq, H, width] = inputs.query.shape;
  const [, Sk, L] = inputs.keyValue.shape;
  const keySeen = new Uint8Array(B * Sk);
  const querySeen = new Uint8Array(B * Sq * H);
  const positionSeen = new Uint8Array(B * Sq);
  const bias = inputs.bias;
  const pairSeen = new Uint8Array(bias === undefined ? 0 : bias.data.length);
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < H; h++) {
      for (let i = 0; i < Sq; i++) {
        for (let j = 0; j < Sk; j++) {
          if (!visible(b, h, i, j)) continue;
          keySeen[b * Sk + j] = querySeen[(b * Sq + i) * H + h] = positionSeen[b * Sq + i] = 1;
          if (bias === undefined) continue;
          const plane = (bias.shape[0] === 1 ? 0 : b) * bias.shape[1] + (bias.shape[1] === 1 ? 0 : h);
          pairSeen[(plane * Sq + i) * Sk + j] = 1;
        }
      }
    }
  }
  const R = inputs.bK?.shape[2] ?? 0;
  return {
    keyValue: (index) => keySeen[Math.floor(index / L)] === 0,
    bK: (index) => keySeen[Math.floor(index / R)] === 0,
    query: (index) => querySeen[Math.floor(index / width)] === 0,
    bQ: (index) => positionSeen[Math.floor(index / R)] === 0,
    bias: (index) => pairSeen[index] === 0,
  };
}

/** The call with one key hidden from all queries by its bias or mask; as it is without either. */
function hideColumn(call: MlaCall, key: number): MlaCall {
  const { bias, attentionMask } = call.inputs;
  const mask = attentionMask as MaskTensor | undefined;
  const keys = call.inputs.keyValue.shape[1];
  const hidden = (index: number) => index % keys === key;
  return {
    ...call,
    inputs: {
      ...call.inputs,
      ...(bias && { bias: map(bias, (x, i) => hidden(i) ? -Infinity : x) }),
      ...(mask && { attentionMask: { data: mask.data.map((x, i) => hidden(i) ? 0 : x), shape: mask.shape } }),
    },
  };
}

/** A full gradient of a bias summed over what a bias of another shape was given to. */
function reduced(full: Tensor, shape: readonly number[]): Tensor {
  return [0, 1].reduce((sum, axis) => shape[axis] === full.shape[axis] ? sum : sumOver(sum, axis), full);
}

/** Gradients of the biases of packed sequences as parts of one that is zero between sequences. */
function blockDiagonal(blocks: readonly Tensor[], shape: readonly number[]): Tensor {
  const data = new Float32Array(elementCount(shape));
  const keys = shape[3];
  let start = 0;
  for (const block of blocks) {
    const [items, heads, length] = block.shape;
    for (let row = 0; row < items * heads * length; row++) {
      const [plane, i] = [Math.floor(row / length), row % length];
      const to = (plane * keys + start + i) * keys + start;
      data.set(block.data.subarray(row * length, (row + 1) * length), to);
    }
    start += length;
  }
  return { data, shape };
}

/** Gradients made of several, tensor by tensor. */
function combine(
  parts: readonly Gradients[],
  join: (tensors: readonly Tensor[], name: TensorName) => Tensor,
): Gradients {
  const names = tensorNames.filter((name) => parts[0][name] !== undefined);
  return Object.fromEntries(names.map((name) => [name, join(parts.map((part) => part[name]!), name)]));
}

function compare(actual: Gradients, expected: Gradients, close: Close, what: string): void {
  for (const name of tensorNames) {
    const [got, wanted] = [actual[name], expected[name]];
    if ((got === undefined) !== (wanted === undefined)) throw new Error(`${what}: only one has a gradient of ${name}`);
    if (got && wanted) close(got, wanted, `${what}: gradient of ${name}`);
  }
}
