import { ConfigSelectorChain, Executor, mlaAttention, type MlaExecutor, type Platform } from "../../mod.ts"; // in your project: "@flash-mla/webgpu"
import { lastLogits, type Model, type TokenReader, window } from "./token_reader.ts";

/** A reader that keeps nothing but the tokens, and runs the model over all of them each time. */
export function recomputingReader(model: Model, platform: Platform): TokenReader {
  // Without measuring, as where the cache is used.
  const executor: MlaExecutor = new Executor(new ConfigSelectorChain({ policy: { cacheMissFallback: "heuristics" } }));
  const options = { causal: true, slidingWindow: window(model.sizes), platform, executor };
  let text = new Uint8Array();
  return {
    async read(tokens) {
      text = Uint8Array.of(...text, ...tokens);
      return await lastLogits(model, text, (inputs) => mlaAttention(inputs, options));
    },
    dispose() {},
  };
}
