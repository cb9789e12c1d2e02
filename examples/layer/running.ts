// A prompt and then token after token through one layer, timed.

import { type AnyTensor, type MlaAttention, type Tensor, toFloats, toGpu, toHost } from "../../mod.ts";
import type { OwnedGpuTensor } from "../../mod.ts";

/** What a layer made of the tokens. */
export interface Ran {
  /** Its output, `[tokens · hiddenSize]`, of as many tokens as there was time for. */
  readonly output: Float32Array;
  /** How many tokens that is. */
  readonly tokens: number;
  /** Tokens of the prompt a second. */
  readonly prefillPerSecond: number;
  /** Tokens behind it a second; NaN where there was no time for one. */
  readonly decodePerSecond: number;
}

/** The tokens, and how to go through them. */
export interface Running {
  /** Hidden states, `[1, tokens, hiddenSize]`. */
  readonly hiddenStates: Tensor;
  /** Tokens of the prompt. */
  readonly prompt: number;
  /** Tokens of the prompt that run at once. */
  readonly chunk: number;
  /** When to stop, in milliseconds from now. */
  readonly limitMs: number;
  /** Hears how many tokens are done. */
  readonly onTokens: (tokens: number) => void;
}

/** Runs them. What stays on the GPU is read when all is done. */
export async function run(
  layer: MlaAttention,
  { hiddenStates, prompt, chunk, limitMs, onTokens }: Running,
): Promise<Ran> {
  const [, tokens, width] = hiddenStates.shape;
  using cache = await layer.createCache({ batch: 1, length: tokens });
  const outputs: AnyTensor[] = [];
  const begin = performance.now();
  let done = 0;
  const upTo = async (end: number) => {
    const from = done;
    const states = { data: hiddenStates.data.subarray(from * width, end * width), shape: [1, end - from, width] };
    // Timed is the layer with tensors on its own side, as a model's layers follow each other.
    const resident = layer.device === undefined ? null : await toGpu(states, layer.device);
    outputs.push(await layer.forward(resident ?? states, { cache }));
    resident?.dispose();
    onTokens(done = end);
  };
  /** Waits for the device. */
  const settle = async () => await layer.device?.queue.onSubmittedWorkDone();

  while (done < prompt && (done === 0 || performance.now() - begin < limitMs)) {
    await upTo(Math.min(prompt, done + chunk));
  }
  await settle();
  const middle = performance.now();
  const prefilled = done;
  while (done >= prompt && done < tokens && performance.now() - begin < limitMs) await upTo(done + 1);
  await settle();
  const end = performance.now();

  const output = new Float32Array(done * width);
  let at = 0;
  for (const part of outputs) {
    const host = "buffer" in part && !("data" in part) ? toFloats(await toHost(part)) : part as Tensor;
    output.set(host.data, at);
    at += host.data.length;
    if (host !== part) (part as OwnedGpuTensor).dispose();
  }
  return {
    output,
    tokens: done,
    prefillPerSecond: prefilled / (middle - begin) * 1000,
    decodePerSecond: done === prefilled ? NaN : (done - prefilled) / (end - middle) * 1000,
  };
}
