// The oracle of a model's attention layer, from hidden states to hidden states:
//
//   q = q_b(norm(q_a(x))) · queryScale  or  q_proj(x) · queryScale          [T, H, P + R], its last R columns rotated
//   c = norm(kv_a(x)[:L]) · latentScale,  k = kv_a(x)[L:] rotated           both cached, [T, L + R]
//   y = o_proj(attention(q, c, k))
//
// Sums are of double precision, what passes from step to step is float32.

import type { MlaModelConfig } from "../model/attention_config.ts";
import { expansionWeights } from "../model/expansion_weights.ts";
import { rotaryTable, rotate } from "../model/rotary.ts";
import { decodeProblem, tensorLayout } from "../op/decode_problem.ts";
import { cannotRun } from "../op/errors.ts";
import { mlaProblem } from "../op/mla_problem.ts";
import type { Formulation } from "../op/formulation.ts";
import type { Tensor } from "../op/tensor.ts";
import { referenceDecode } from "./decode.ts";
import { referenceMlaAttention } from "./mla_attention.ts";

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
  /** Positions of the tokens, `[tokens]`. Default: from the number of cached rows on. */
  readonly positions?: ArrayLike<number>;
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
  const positions = call.positions ?? Array.from({ length: tokens }, (_, i) => before + i);
  if (positions.length !== tokens) {
    cannotRun(`positions has ${positions.length} entries, hiddenStates ${tokens} tokens`);
  }

  const query = queries(call, config, positions);
  const cached = joined(call.cached, latentRows(call, config, positions), batch);
  const attended = attend(query, cached, call, config);
  const output = linear(attended, weights, "o_proj", config.queryHeads * config.vHeadDim, width, config.attentionBias);
  return { output: { data: output, shape: [batch, tokens, width] }, cached };
}

function queries(
  { hiddenStates, weights }: MlaLayerCall,
  config: MlaModelConfig,
  positions: ArrayLike<number>,
): Tensor {
  const { hiddenSize, queryHeads: H, qLoraRank, qkNopeHeadDim: P, qkRopeHeadDim: R, queryTemperature } = config;
  const [batch, tokens] = hiddenStates.shape;
  let rows: Float32Array;
  if (qLoraRank === null) rows = linear(hiddenStates.data, weights, "q_proj", hiddenSize, H * (P + R), false);
  else {
    const narrow = linear(hiddenStates.data, weights, "q_a_proj", hiddenSize, qLoraRank, config.attentionBias);
    rows = linear(
      normed(narrow, weights, "q_a_layernorm", qLoraRank, config),
      weights,
      "q_b_proj",
      qLoraRank,
      H * (P + R),
      false,
    );
  }
  turnColumns(rows, P, H, batch, config, positions);
  for (let row = 0; row < batch * tokens; row++) {
    const position = positions[row % tokens];
    const warmth = queryTemperature === null
      ? 1
      : 1 + queryTemperature.beta * Math.log(1 + Math.floor(position / queryTemperature.length));
    for (let i = row * H * (P + R); i < (row + 1) * H * (P + R); i++) rows[i] *= config.queryScale * warmth;
  }
  return { data: rows, shape: [batch, tokens, H, P + R] };
}

/** What the call's tokens add to the cache, `[batch, tokens, L + R]`. */
function latentRows(
  { hiddenStates, weights }: MlaLayerCall,
  config: MlaModelConfig,
  positions: ArrayLike<number>,
): Tensor {
  const { hiddenSize, kvLoraRank: L, qkRopeHeadDim: R, attentionBias, latentScale } = config;
  const [batch, tokens] = hiddenStates.shape;
  const rows = linear(hiddenStates.data, weights, "kv_a_proj_with_mqa", hiddenSize, L + R, attentionBias);
  const latents = new Float32Array(batch * tokens * L);
  for (let row = 0; row < batch * tokens; row++) latents.set(rows.subarray(row * (L + R), row * (L + R) + L), row * L);
  const scaled = normed(latents, weights, "kv_a_layernorm", L, config).map((value) => value * latentScale);
  for (let row = 0; row < batch * tokens; row++) rows.set(scaled.subarray(row * L, (row + 1) * L), row * (L + R));
  turnColumns(rows, L, 1, batch, config, positions);
  return { data: rows, shape: [batch, tokens, L + R] };
}

/** Rotates, in place, the last R of the `before + R` columns of each head of each token. */
function turnColumns(
  rows: Float32Array,
  before: number,
  heads: number,
  batch: number,
  { rope, qkRopeHeadDim: R }: MlaModelConfig,
  positions: ArrayLike<number>,
): void {
  if (rope === null) return;
  const tokens = positions.length;
  const table = rotaryTable(rope, positions);
  const columns = new Float32Array(tokens * heads * R);
  for (let item = 0; item < batch; item++) {
    const at = (i: number) => (item * tokens * heads + i) * (before + R) + before;
    for (let i = 0; i < tokens * heads; i++) columns.set(rows.subarray(at(i), at(i) + R), i * R);
    const turned = rotate(columns, table, rope.layout);
    for (let i = 0; i < tokens * heads; i++) rows.set(turned.subarray(i * R, (i + 1) * R), at(i));
  }
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
  { weights, formulation }: MlaLayerCall,
  config: MlaModelConfig,
): Float32Array {
  const { kvLoraRank: L, qkRopeHeadDim: R, softmaxScale } = config;
  const { wKc, wVc } = expansionWeights(weightOf(weights, "kv_b_proj.weight"), config);
  const [batch, keys, width] = cached.shape;
  if (formulation === "absorbed") {
    const problem = decodeProblem({ query, wKc, wVc }, tensorLayout(cached, { query }), { softmaxScale });
    const rowAt = (sequence: number, key: number) => (sequence * keys + key) * width;
    return referenceDecode({ query, wKc, wVc, rows: cached.data, rowAt }, problem).output.data;
  }
  const keyValue = columnsOf(cached, 0, L);
  const bK = R === 0 ? undefined : columnsOf(cached, L, R);
  const inputs = { query, keyValue: { data: keyValue, shape: [batch, keys, L] }, wKc, wVc };
  const all = bK === undefined ? inputs : { ...inputs, bK: { data: bK, shape: [batch, keys, R] } };
  return referenceMlaAttention(all, mlaProblem(all, { causal: true, softmaxScale })).data;
}

function columnsOf({ data, shape }: Tensor, from: number, count: number): Float32Array {
  const [batch, keys, width] = shape;
  const columns = new Float32Array(batch * keys * count);
  for (let row = 0; row < batch * keys; row++) {
    columns.set(data.subarray(row * width + from, row * width + from + count), row * count);
  }
  return columns;
}

/** Rows times a weight `[to, from]`, plus its bias. */
function linear(
  rows: Float32Array,
  weights: MlaLayerWeights,
  name: string,
  from: number,
  to: number,
  biased: boolean,
): Float32Array {
  const weight = weightOf(weights, `${name}.weight`, [to, from]).data;
  const bias = biased ? weightOf(weights, `${name}.bias`, [to]).data : new Float32Array(to);
  const count = rows.length / from;
  const result = new Float32Array(count * to);
  for (let row = 0; row < count; row++) {
    for (let o = 0; o < to; o++) {
      let sum = bias[o];
      for (let i = 0; i < from; i++) sum += rows[row * from + i] * weight[o * from + i];
      result[row * to + o] = sum;
    }
  }
  return result;
}

/** Rows over their root mean square, times the norm's weight. */
function normed(
  rows: Float32Array,
  weights: MlaLayerWeights,
  name: string,
  width: number,
  { latentNormEps }: MlaModelConfig,
): Float32Array {
  const weight = weightOf(weights, `${name}.weight`, [width]).data;
  const result = new Float32Array(rows.length);
  for (let start = 0; start < rows.length; start += width) {
    let squares = 0;
    for (let i = 0; i < width; i++) squares += rows[start + i] ** 2;
    const factor = 1 / Math.sqrt(squares / width + latentNormEps);
    for (let i = 0; i < width; i++) result[start + i] = rows[start + i] * factor * weight[i];
  }
  return result;
}

function weightOf(weights: MlaLayerWeights, name: string, shape?: readonly number[]): Tensor {
  const weight = weights[name];
  if (weight === undefined) cannotRun(`the weight ${name} is missing`);
  if (shape !== undefined && weight.shape.join() !== shape.join()) {
    cannotRun(`${name} has shape [${weight.shape}], expected [${shape}]`);
  }
  return weight;
}
