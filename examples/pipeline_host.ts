// The pipeline with everything in host arrays: the oracle with platform "reference", and what the same work costs when
// only the attention runs on a GPU.

import { mlaAttention, type MlaOptions, type Tensor, tensor } from "../mod.ts"; // in your project: "@flash-mla/webgpu"
import type { Model } from "./pipeline_model.ts";

export interface HostRun {
  /** The final hidden states, `[promptTokens + steps, hidden]`. */
  readonly output: Tensor;
  /** Milliseconds of each decoding step. */
  readonly stepMs: readonly number[];
  /** Those of them within `mlaAttention`. */
  readonly attentionMs: readonly number[];
}

export async function runOnHost(model: Model, options: MlaOptions): Promise<HostRun> {
  const { sizes: { hidden: width, heads, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, promptTokens, steps } } =
    model;
  const room = promptTokens + steps;
  const caches = model.layers.map(() => ({ latents: new Float32Array(room * L), keys: new Float32Array(room * R) }));
  const output = new Float32Array(room * width);
  const [stepMs, attentionMs]: [number[], number[]] = [[], []];

  let hidden = model.prompt.data.slice();
  for (let position = 0; position < room;) {
    const start = performance.now();
    let inAttention = 0;
    const rows = hidden.length / width;
    const length = position + rows;
    for (const [i, { gain, wQ, wKvA, wKc, wVc, wO }] of model.layers.entries()) {
      const { latents, keys } = caches[i];
      const x = rmsNorm(hidden, gain.data);
      const query = tensor(multiply(x, wQ), [1, rows, heads, P + R]);
      const appended = multiply(x, wKvA);
      for (let row = 0; row < rows; row++) {
        const from = row * (L + R);
        latents.set(appended.subarray(from, from + L), (position + row) * L);
        keys.set(appended.subarray(from + L, from + L + R), (position + row) * R);
      }
      const keyValue = tensor(latents.subarray(0, length * L), [1, length, L]);
      const bK = tensor(keys.subarray(0, length * R), [1, length, R]);
      const called = performance.now();
      const attended = await mlaAttention({ query, keyValue, wKc, wVc, bK }, { ...options, causal: true });
      inAttention += performance.now() - called;
      multiply(attended.data, wO).forEach((value, at) => hidden[at] += value);
    }
    output.set(rmsNorm(hidden, model.gain.data), position * width);
    if (position > 0) {
      stepMs.push(performance.now() - start);
      attentionMs.push(inAttention);
    }
    position = length;
    // Stands in for a token's embedding: the states that the token before it ended with.
    hidden = output.slice((position - 1) * width, position * width);
  }
  return { output: tensor(output, [room, width]), stepMs, attentionMs };
}

function rmsNorm(x: Float32Array, gain: Float32Array): Float32Array {
  const width = gain.length;
  const normed = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += width) {
    let squares = 0;
    for (let i = 0; i < width; i++) squares += x[start + i] ** 2;
    const factor = 1 / Math.sqrt(squares / width + 1e-6);
    for (let i = 0; i < width; i++) normed[start + i] = x[start + i] * factor * gain[i];
  }
  return normed;
}

/** `x · weight`; the weight's first axis is the inner one. */
function multiply(x: Float32Array, { data, shape: [inner] }: Tensor): Float32Array {
  const columns = data.length / inner;
  const rows = x.length / inner;
  const product = new Float32Array(rows * columns);
  const sums = new Float64Array(columns);
  for (let row = 0; row < rows; row++) {
    sums.fill(0);
    for (let k = 0; k < inner; k++) {
      const factor = x[row * inner + k];
      for (let column = 0; column < columns; column++) sums[column] += factor * data[k * columns + column];
    }
    product.set(sums, row * columns);
  }
  return product;
}
