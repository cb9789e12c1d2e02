// A decoder of DeepSeek-V2's kind in small: Multi-head Latent Attention with RoPE, RMSNorm, SwiGLU, tied embeddings.
//
//   x = embedding[tokens]
//   each layer   x += attention(norm(x)) · wO
//                x += swiglu(norm(x) · wGate, norm(x) · wUp) · wDown
//   logits = norm(x) · embeddingᵀ
//
// The library computes attention, on any of its platforms; everything else is plain code in this folder.

import type { Attention } from "./attention.ts";
import { embed, embedBackward, unembed } from "./embedding.ts";
import { plus } from "./layer.ts";
import { linear } from "./linear.ts";
import type { ModelSizes } from "./model_sizes.ts";
import type { LayerParameters, Parameters } from "./parameters.ts";
import { rmsNorm } from "./rms_norm.ts";
import { rotary } from "./rotary.ts";
import { swiglu } from "./swiglu.ts";
import { tensor } from "../../mod.ts"; // in your project: "@flash-mla/webgpu"

/** One pass through the model. */
export interface Pass {
  /** What the model expects after each token, `[batch, context, kinds]`. */
  readonly logits: Float32Array;
  /** Writes the gradient of every weight, for ∂logits. */
  backward(gradLogits: Float32Array): Promise<void>;
  /** Frees what {@link backward} needs. */
  dispose(): void;
}

/**
 * Runs the model.
 *
 * @param parameters Its weights.
 * @param sizes Its sizes.
 * @param tokens `[batch, context]`.
 * @param attention What computes attention.
 */
export async function forward(
  parameters: Parameters,
  sizes: ModelSizes,
  tokens: Uint8Array,
  attention: Attention,
): Promise<Pass> {
  const { embedding, layers, finalNorm } = parameters;
  let x = embed(tokens, embedding, sizes.width);
  const branches: Branch[] = [];
  for (const weights of layers) {
    for (const branch of [attentionBranch, mlpBranch]) {
      const added = await branch(x, weights, sizes, attention);
      x = plus(x, added.output);
      branches.push(added);
    }
  }
  const norm = rmsNorm(x, finalNorm);
  const head = unembed(norm.output, embedding, sizes.width);
  return {
    logits: head.output,
    async backward(gradLogits) {
      let grad = norm.backward(head.backward(gradLogits));
      for (const branch of branches.toReversed()) grad = plus(grad, await branch.backward(grad));
      embedBackward(tokens, embedding, grad);
    },
    dispose: () => branches.forEach((branch) => branch.dispose?.()),
  };
}

/** What half a layer adds to the residual stream. */
interface Branch {
  readonly output: Float32Array;
  backward(gradOutput: Float32Array): Float32Array | Promise<Float32Array>;
  dispose?(): void;
}

async function attentionBranch(
  x: Float32Array,
  weights: LayerParameters,
  sizes: ModelSizes,
  attention: Attention,
): Promise<Branch> {
  const { width, heads, kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim, context } = sizes;
  const batch = x.length / (width * context);
  const headWidth = qkNopeHeadDim + qkRopeHeadDim;

  const norm = rmsNorm(x, weights.attentionNorm);
  const query = linear(norm.output, weights.wQ, heads * headWidth);
  const turnedQuery = rotary(query.output, { heads, width: headWidth, rotated: qkRopeHeadDim, length: context });
  const down = linear(norm.output, weights.wDkv, kvLoraRank);
  const latent = rmsNorm(down.output, weights.latentNorm);
  const key = linear(norm.output, weights.wKr, qkRopeHeadDim);
  const turnedKey = rotary(key.output, { heads: 1, width: qkRopeHeadDim, rotated: qkRopeHeadDim, length: context });
  const attended = await attention({
    query: tensor(turnedQuery.output, [batch, context, heads, headWidth]),
    keyValue: tensor(latent.output, [batch, context, kvLoraRank]),
    wKc: tensor(weights.wKc.value, weights.wKc.shape),
    wVc: tensor(weights.wVc.value, weights.wVc.shape),
    bK: tensor(turnedKey.output, [batch, context, qkRopeHeadDim]),
  });
  const out = linear(attended.output.data, weights.wO, width);
  return {
    output: out.output,
    async backward(gradOutput) {
      const gradAttended = out.backward(gradOutput);
      const grads = await attended.vjp(tensor(gradAttended, [batch, context, heads, vHeadDim]));
      weights.wKc.grad.set(grads.wKc.data);
      weights.wVc.grad.set(grads.wVc.data);
      const gradQuery = query.backward(turnedQuery.backward(grads.query.data));
      const gradLatent = down.backward(latent.backward(grads.keyValue.data));
      const gradKey = key.backward(turnedKey.backward(grads.bK!.data));
      return norm.backward(plus(plus(gradQuery, gradLatent), gradKey));
    },
    dispose: () => attended.dispose(),
  };
}

function mlpBranch(x: Float32Array, weights: LayerParameters, { width, mlpWidth }: ModelSizes): Branch {
  const norm = rmsNorm(x, weights.mlpNorm);
  const gate = linear(norm.output, weights.wGate, mlpWidth);
  const up = linear(norm.output, weights.wUp, mlpWidth);
  const gated = swiglu(gate.output, up.output);
  const down = linear(gated.output, weights.wDown, width);
  return {
    output: down.output,
    backward(gradOutput) {
      const [gradGate, gradUp] = gated.backward(down.backward(gradOutput));
      return norm.backward(plus(gate.backward(gradGate), up.backward(gradUp)));
    },
  };
}
