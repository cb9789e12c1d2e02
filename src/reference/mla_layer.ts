// The oracle of a model's attention layer, from hidden states to hidden states:
//
//   q = q_b(norm(q_a(x))) · queryScale  or  q_proj(x) · queryScale          [T, H, P + R], its last R columns rotated
//   c = norm(kv_a(x)[:L]) · latentScale,  k = kv_a(x)[L:] rotated           both cached, [T, L + R]
//   y = o_proj(attention(q, c, k))
//
// Sums are of double precision, what passes from step to step is float32.

import type { MlaModelConfig } from "../model/attention_config.ts";
import { type ExpansionWeights, expansionWeights } from "../model/expansion_weights.ts";
import { queryFactors } from "../model/query_factors.ts";
import { type RotaryTable, rotaryTable } from "../model/rotary.ts";
import { decodeProblem, tensorLayout } from "../op/decode_problem.ts";
import { cannotRun } from "../op/errors.ts";
import { mlaProblem } from "../op/mla_problem.ts";
import type { Formulation } from "../op/formulation.ts";
import type { Tensor } from "../op/tensor.ts";
import { referenceDecode } from "./decode.ts";
import { linear } from "./linear.ts";
import { referenceMlaAttention } from "./mla_attention.ts";
import { rmsNorm } from "./rms_norm.ts";
import { rotateHeads } from "./rotate.ts";

/** Weights by their names in the checkpoint, without what comes before: `q_a_proj.weight`, `kv_b_proj.weight`, and so on. */
export type MlaLayerWeights = Readonly<Record<string, Tensor>>;

/** One call of the layer. */
export interface MlaLayerCall {
  /** Input, `[batch, tokens, hiddenSize]`. */
  readonly hiddenStates: Tensor;
  /** The layer's weights. */
  readonly weights: MlaLayerWeights;
  /** Rows of the tokens before, `[batch, keys, kvLoraRank + qkRopeHeadDim]`, as an earlier call returned them. */
  readonly cached?: Tensor;
  /** Positions of the tokens, `[tokens]` or `[batch · tokens]`. Default: from the number of cached rows on. */
  readonly positions?: ArrayLike<number>;
  /** Whether a token sees those behind it, too. Default `true`: it does not. */
  readonly causal?: boolean;
  /** kv_b_proj taken apart, where the caller has done so. */
  readonly expansion?: ExpansionWeights;
  /** How attention is computed. Default `expanded`. */
  readonly formulation?: Formulation;
}

/**
 * Runs a model's attention layer on the processor that runs the script. A token sees the cached rows and the call's tokens up
 * to itself.
 *
 * @param call The tensors.
 * @param config The layer.
 * @returns The output, `[batch, tokens, hiddenSize]`, and all rows so far, for the next call.
 */
export function referenceMlaLayer(
  call: MlaLayerCall,
  config: MlaModelConfig,
): { readonly output: Tensor; readonly cached: Tensor } {
  const { hiddenStates, weights } = call;
  const [batch, tokens, width] = hiddenStates.shape;
  if (hiddenStates.shape.length !== 3 || width !== config.hiddenSize) {
    cannotRun(`hiddenStates has shape [${hiddenStates.shape}], expected [batch, tokens, ${config.hiddenSize}]`);
  }
  const before = call.cached?.shape[1] ?? 0;
  const given = call.positions ?? Array.from({ length: tokens }, (_, i) => before + i);
  if (given.length !== tokens && given.length !== batch * tokens) {
    cannotRun(`positions has ${given.length} entries, hiddenStates ${tokens} tokens`);
  }
  const positions = Array.from({ length: batch * tokens }, (_, i) => given[i % given.length]);

  const query = queries(call, config, positions);
  const cached = joined(call.cached, latentRows(call, config, positions), batch);
  const attended = attend(query, cached, call, config);
  const output = project(attended, weights, "o_proj", config.queryHeads * config.vHeadDim, width, config.attentionBias);
  return { output: { data: output, shape: [batch, tokens, width] }, cached };
}

function queries(
  { hiddenStates, weights }: MlaLayerCall,
  config: MlaModelConfig,
  positions: readonly number[],
): Tensor {
  const { hiddenSize, queryHeads: H, qLoraRank, qkNopeHeadDim: P, qkRopeHeadDim: R, attentionBias, rope } = config;
  const [batch, tokens] = hiddenStates.shape;
  const width = H * (P + R);
  let rows: Float32Array;
  if (qLoraRank === null) rows = project(hiddenStates.data, weights, "q_proj", hiddenSize, width, false);
  else {
    const narrow = project(hiddenStates.data, weights, "q_a_proj", hiddenSize, qLoraRank, attentionBias);
    const normed = rmsNorm(narrow, normWeight(weights, "q_a_layernorm", qLoraRank), config.latentNormEps);
    rows = project(normed, weights, "q_b_proj", qLoraRank, width, false);
  }
  const factors = queryFactors(config, positions) ?? positions.map(() => config.queryScale);
  const table = tableOf(config, positions, batch);
  const turned = rotateHeads(rows, { heads: H, before: P, dim: R, layout: rope && rope.layout, table, factors });
  return { data: turned, shape: [batch, tokens, H, P + R] };
}

/** What the call's tokens add to the cache, `[batch, tokens, L + R]`. */
function latentRows(
  { hiddenStates, weights }: MlaLayerCall,
  config: MlaModelConfig,
  positions: readonly number[],
): Tensor {
  const { hiddenSize, kvLoraRank: L, qkRopeHeadDim: R, attentionBias, latentScale, rope } = config;
  const [batch, tokens] = hiddenStates.shape;
  const rows = project(hiddenStates.data, weights, "kv_a_proj_with_mqa", hiddenSize, L + R, attentionBias);
  const latents = new Float32Array(batch * tokens * L);
  for (let row = 0; row < batch * tokens; row++) latents.set(rows.subarray(row * (L + R), row * (L + R) + L), row * L);
  const scaled = rmsNorm(latents, normWeight(weights, "kv_a_layernorm", L), config.latentNormEps)
    .map((value) => value * latentScale);
  for (let row = 0; row < batch * tokens; row++) rows.set(scaled.subarray(row * L, (row + 1) * L), row * (L + R));
  const table = tableOf(config, positions, batch);
  const turned = rotateHeads(rows, { heads: 1, before: L, dim: R, layout: rope && rope.layout, table });
  return { data: turned, shape: [batch, tokens, L + R] };
}

/** The turns of all tokens; of a batch each item's by itself, since stretched positions depend on how many there are. */
function tableOf({ rope }: MlaModelConfig, positions: readonly number[], batch: number): RotaryTable | null {
  if (rope === null) return null;
  const tokens = positions.length / batch;
  const parts = Array.from(
    { length: batch },
    (_, item) => rotaryTable(rope, positions.slice(item * tokens, (item + 1) * tokens)),
  );
  const joined = (name: "cos" | "sin") => {
    const whole = new Float32Array(positions.length * rope.dim / 2);
    parts.forEach((part, item) => whole.set(part[name], item * tokens * rope.dim / 2));
    return whole;
  };
  return { cos: joined("cos"), sin: joined("sin"), positions: positions.length, dim: rope.dim };
}

function joined(cached: Tensor | undefined, added: Tensor, batch: number): Tensor {
  if (cached === undefined) return added;
  const [items, keys, width] = cached.shape;
  const [, tokens, expected] = added.shape;
  if (items !== batch || width !== expected) {
    cannotRun(`cached has shape [${cached.shape}], expected [${batch}, keys, ${expected}]`);
  }
  const data = new Float32Array(batch * (keys + tokens) * width);
  for (let item = 0; item < batch; item++) {
    const at = item * (keys + tokens) * width;
    data.set(cached.data.subarray(item * keys * width, (item + 1) * keys * width), at);
    data.set(added.data.subarray(item * tokens * width, (item + 1) * tokens * width), at + keys * width);
  }
  return { data, shape: [batch, keys + tokens, width] };
}

/** Attended values, `[batch, tokens, H · V]`. */
function attend(
  query: Tensor,
  cached: Tensor,
  { weights, formulation, causal = true, expansion }: MlaLayerCall,
  config: MlaModelConfig,
): Float32Array {
  const { kvLoraRank: L, qkRopeHeadDim: R, softmaxScale } = config;
  const { wKc, wVc } = expansion ?? expansionWeights(weightOf(weights, "kv_b_proj.weight"), config);
  const [batch, keys, width] = cached.shape;
  if (formulation === "absorbed") {
    const problem = decodeProblem({ query, wKc, wVc }, tensorLayout(cached, { query }), { softmaxScale, causal });
    const rowAt = (sequence: number, key: number) => (sequence * keys + key) * width;
    return referenceDecode({ query, wKc, wVc, rows: cached.data, rowAt }, problem).output.data;
  }
  const keyValue = columnsOf(cached, 0, L);
  const bK = R === 0 ? undefined : columnsOf(cached, L, R);
  const inputs = { query, keyValue: { data: keyValue, shape: [batch, keys, L] }, wKc, wVc };
  const all = bK === undefined ? inputs : { ...inputs, bK: { data: bK, shape: [batch, keys, R] } };
  return referenceMlaAttention(all, mlaProblem(all, { causal, softmaxScale })).data;
}

function columnsOf({ data, shape }: Tensor, from: number, count: number): Float32Array {
  const [batch, keys, width] = shape;
  const columns = new Float32Array(batch * keys * count);
  for (let row = 0; row < batch * keys; row++) {
    columns.set(data.subarray(row * width + from, row * width + from + count), row * count);
  }
  return columns;
}

function project(
  rows: Float32Array,
  weights: MlaLayerWeights,
  name: string,
  from: number,
  to: number,
  biased: boolean,
): Float32Array<ArrayBuffer> {
  const bias = biased ? weightOf(weights, `${name}.bias`, [to]).data : undefined;
  return linear(rows, weightOf(weights, `${name}.weight`, [to, from]).data, from, bias);
}

function normWeight(weights: MlaLayerWeights, name: string, width: number): Float32Array {
  return weightOf(weights, `${name}.weight`, [width]).data;
}

function weightOf(weights: MlaLayerWeights, name: string, shape?: readonly number[]): Tensor {
  const weight = weights[name];
  if (weight === undefined) cannotRun(`the weight ${name} is missing`);
  if (shape !== undefined && weight.shape.join() !== shape.join()) {
    cannotRun(`${name} has shape [${weight.shape}], expected [${shape}]`);
  }
  return weight;
}
