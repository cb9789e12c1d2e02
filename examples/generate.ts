// A small language model generates text with the KV cache of Multi-head Latent Attention: a row of a latent and a rotary key
// for each token, in pages. The same tokens have to come out three ways: with the cache, with a cache whose pages were
// shuffled, and without one, running the model over the whole text for each token.
//
// The model is that of train.ts, with the weights of a checkpoint or random ones. What is cached and attended is in
// generate/cached_reader.ts, which is what to copy from; pipeline.ts shows how all of a step stays on the GPU.
//
//   deno run -A examples/generate.ts      or bun, or node 22.18 and later: WebGPU in those needs `npm install webgpu`
//     --checkpoint=PATH   what train.ts has written; --help has the rest
//
// Ends with 0 when the same tokens came out, with 1 when not.

import process from "node:process";
import { FlashMLAError } from "../mod.ts"; // in your project: "@flash-mla/webgpu"
import { type Agreement, agreement } from "./generate/agreement.ts";
import { type GenerateArguments, generateArguments, usage } from "./generate/generate_arguments.ts";
import type { Generated } from "./generate/generating.ts";
import { type FromCache, threeWays } from "./generate/three_ways.ts";
import type { Model } from "./generate/token_reader.ts";
import { libraryAttention } from "./train/attention.ts";
import { CheckpointError, loadCheckpoint } from "./train/checkpoint.ts";
import { type Corpus, prideAndPrejudice } from "./train/corpus.ts";
import type { ModelSizes } from "./train/model_sizes.ts";
import { parametersOf } from "./train/parameters.ts";
import { Random } from "./train/random.ts";
import { ArgumentError } from "./train/train_arguments.ts";
import { smallSettings } from "./train/training.ts";

async function main(): Promise<number> {
  const args = generateArguments(process.argv.slice(2));
  if (args.help) {
    console.log(usage);
    return 0;
  }
  const corpus = prideAndPrejudice();
  const prompt = tokensOf(args.prompt, corpus);
  const model = modelOf(args, corpus);
  const { sizes, parameters } = model;
  const { platform, adapter } = await libraryAttention(args.platform);
  const trained = args.checkpoint !== undefined;

  say("platform", platform === "reference" ? "reference, in plain TypeScript" : `webgpu, ${adapter}`);
  const weights = `${count(parameters.values.length)} ${trained ? "trained" : "random"} weights`;
  say("model", `${sizes.layers} layers, ${sizes.width} wide, ${sizes.heads} heads, ${weights}`);
  say("", `attention sees the last ${sizes.context} tokens, as in training`);
  if (!trained) say("", "random weights talk nonsense; --checkpoint=PATH takes what examples/train.ts has learned");

  const { cached, shuffled, recomputed } = await threeWays(model, { ...args, platform, prompt });
  const text = Array.from(cached.tokens, (token) => corpus.alphabet[token]).join("");
  say("prompt", args.prompt.replaceAll("\n", "¶"));
  say("text", text.replaceAll("\n", "¶"));

  const multiHeadBytes = multiHeadBytesPerToken(sizes);
  const times = (multiHeadBytes / cached.bytesPerToken).toFixed(1);
  say("cache", `${count(cached.bytesPerToken)} bytes a token; multi-head attention keeps ${times} times as much:`);
  say("", `${count(multiHeadBytes)} bytes of keys and values for ${sizes.heads} heads, also in float32`);
  say("pages", `of layer 0: ${firstPages(cached)}`);
  say("", `shuffled:   ${firstPages(shuffled)}`);
  say("speed", `with the cache           ${pace(cached)}`);
  say("", `with its pages shuffled  ${pace(shuffled)}`);
  say("", `recomputing everything   ${pace(recomputed)}`);

  const agreements = { shuffled: agreement(cached, shuffled), recomputed: agreement(cached, recomputed) };
  say("same", `with its pages shuffled  ${inWords(agreements.shuffled)}`);
  say("", `recomputing everything   ${inWords(agreements.recomputed)}`);
  const unchecked = args.tokens - recomputed.tokens.length;
  if (unchecked > 0) say("", `(its minute was up: the last ${unchecked} tokens were not recomputed)`);
  const ok = agreements.shuffled.ok && agreements.recomputed.ok;
  const ties = [agreements.shuffled, agreements.recomputed].some(({ same, tokens }) => same < tokens);
  if (ok) say("ok", `the same tokens come out three ways${ties ? ", but for ties within rounding" : ""}`);
  else say("FAILED", "the three ways differ by more than rounding");
  if (args.json) {
    console.log(JSON.stringify({
      ...{ ok, platform, adapter, trained, prompt: args.prompt, text },
      ...{ cacheBytesPerToken: cached.bytesPerToken, multiHeadBytesPerToken: multiHeadBytes },
      ...{ tokens: cached.tokens, tokensPerSecond: cached.tokensPerSecond, pages: pagesByLayer(cached) },
      shuffled: { tokensPerSecond: shuffled.tokensPerSecond, pages: pagesByLayer(shuffled), ...agreements.shuffled },
      recomputed: { tokensPerSecond: recomputed.tokensPerSecond, ...agreements.recomputed },
    }));
  }
  return ok ? 0 : 1;
}

/** The trained model of a checkpoint, or a random one of the same kind. */
function modelOf({ checkpoint, seed }: GenerateArguments, corpus: Corpus): Model {
  if (checkpoint !== undefined) {
    const { settings: { sizes }, parameters } = loadCheckpoint(checkpoint, corpus);
    return { sizes, parameters };
  }
  const { sizes } = smallSettings;
  return { sizes, parameters: parametersOf(sizes, corpus.alphabet.length, new Random(seed)) };
}

function tokensOf(text: string, { alphabet }: Corpus): Uint8Array {
  return Uint8Array.from(text, (character) => {
    const token = alphabet.indexOf(character);
    if (token >= 0) return token;
    throw new ArgumentError(
      `Cannot generate: the model knows no ${JSON.stringify(character)}; --prompt may use ${alphabet.join("").trim()}`,
    );
  });
}

/** Bytes of a cache of keys and values in float32, as plain multi-head attention with such heads has one. */
function multiHeadBytesPerToken({ layers, heads, qkNopeHeadDim, qkRopeHeadDim, vHeadDim }: ModelSizes): number {
  return layers * heads * (qkNopeHeadDim + qkRopeHeadDim + vHeadDim) * 4;
}

function pagesByLayer({ blockTable: { data, shape: [layers, columns] } }: FromCache): number[][] {
  return Array.from({ length: layers }, (_, layer) => [...data.subarray(layer * columns, (layer + 1) * columns)]);
}

function firstPages(cached: FromCache): string {
  const [pages] = pagesByLayer(cached);
  return `${pages.slice(0, 12).join(" ")}${pages.length > 12 ? " …" : ""}`;
}

function pace({ tokensPerSecond }: Generated): string {
  return `${tokensPerSecond.toFixed(tokensPerSecond < 100 ? 1 : 0)} tokens/s`;
}

function inWords({ tokens, same, logitDifference, largestLogit }: Agreement): string {
  return `${same} of ${tokens} tokens; logits differ by at most ${logitDifference.toExponential(1)} of ` +
    `${largestLogit.toFixed(1)}`;
}

function say(name: string, text: string): void {
  console.log(`${name.padEnd(9)}${text}`);
}

function count(number: number): string {
  return number.toLocaleString("en-US");
}

try {
  process.exitCode = await main();
} catch (error) {
  // What the user can put right is said in a line.
  if (!(error instanceof ArgumentError || error instanceof CheckpointError || error instanceof FlashMLAError)) {
    throw error;
  }
  console.error(error.message);
  process.exitCode = error instanceof ArgumentError ? 2 : 1;
}
