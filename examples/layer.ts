// The attention layer of a model, from a checkpoint on disk: a prompt of hidden states at once, then token after token with the
// cache, and the same on the reference platform, which has to agree.
//
//   deno run -A examples/layer.ts      or bun, or node 22.18 and later: WebGPU in those needs `npm install webgpu`
//     --checkpoint=PATH   a model's folder; a small one is written without. --help has the rest
//
// What to copy from is in layer/checkpoint_layer.ts, which reads the tensors, and in layer/running.ts, which runs them.
//
// Ends with 0 when the outputs agree, with 1 when not.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { describe, FlashMLAError, MlaAttention, type Tensor } from "../mod.ts"; // in your project: "@flash-mla/webgpu"
import { progress } from "./generate/progress.ts";
import { CheckpointError, checkpointLayer } from "./layer/checkpoint_layer.ts";
import { layerArguments, usage } from "./layer/layer_arguments.ts";
import { type Ran, run } from "./layer/running.ts";
import { writeSmallCheckpoint } from "./layer/small_checkpoint.ts";
import { relL2 } from "./relative_error.ts";
import { libraryAttention } from "./train/attention.ts";
import { Random } from "./train/random.ts";
import { ArgumentError } from "./train/train_arguments.ts";

/** How far the output may be from the reference's: design bounds of float32 and of halves. */
const bounds = { f32: 1e-5, f16: 3e-3 };

/** Tokens that the reference takes at once, so that its time limit is kept. */
const referenceChunk = 16;

async function main(): Promise<number> {
  const args = layerArguments(process.argv.slice(2));
  if (args.help) {
    console.log(usage);
    return 0;
  }
  const { platform, adapter } = await libraryAttention(args.platform);
  const written = args.checkpoint === undefined ? mkdtempSync(join(tmpdir(), "flash-mla-layer-")) : null;
  try {
    if (written !== null) writeSmallCheckpoint(written, args.seed);
    const { config, weights } = await checkpointLayer(args.checkpoint ?? written!, args.layer);
    using layer = await MlaAttention.load(config, weights, { platform, dtype: args.dtype });
    const { hiddenSize } = layer.config;
    const tokens = args.prompt + args.steps;
    const hiddenStates = randomStates(tokens, hiddenSize, args.seed);

    const [head, ...costs] = describe(layer.config, { contextLength: tokens }).text.split("\n");
    say("platform", platform === "reference" ? "reference, in plain TypeScript" : `webgpu, ${adapter}`);
    say("layer", `${args.layer} of ${written === null ? args.checkpoint : "a small checkpoint, written for this run"}`);
    say("", head);
    for (const line of costs) say("", line.trim());

    const compiling = progress(process.stderr, "compiling              ", tokens);
    const warm = { hiddenStates: part(hiddenStates, args.prompt + 1), prompt: args.prompt, chunk: args.prompt };
    await run(layer, { ...warm, limitMs: Infinity, onTokens: () => {} });
    compiling.end();
    const ran = await shown(
      "layer                  ",
      (onTokens) => run(layer, { hiddenStates, prompt: args.prompt, chunk: args.prompt, limitMs: Infinity, onTokens }),
      tokens,
    );
    using reference = await MlaAttention.load(config, weights, { platform: "reference", dtype: args.dtype });
    const expected = await shown("reference              ", (onTokens) => {
      const limitMs = args.seconds * 1000;
      return run(reference, { hiddenStates, prompt: args.prompt, chunk: referenceChunk, limitMs, onTokens });
    }, tokens);

    const error = relL2(ran.output.subarray(0, expected.output.length), expected.output);
    const ok = error < bounds[args.dtype];
    const { cacheBytesPerToken, plainCacheBytesPerToken, cacheReduction } = describe(layer.config);
    const bytes = { cache: cacheBytesPerToken[args.dtype], multiHead: plainCacheBytesPerToken[args.dtype] };
    say(
      "speed",
      `prompt of ${args.prompt}: ${pace(ran.prefillPerSecond)}; ${args.steps} steps: ${pace(ran.decodePerSecond)}`,
    );
    say(
      "cache",
      `${count(bytes.cache * tokens)} bytes of ${tokens} tokens; multi-head attention keeps ` +
        `${cacheReduction.toFixed(1)} times as much: ${count(bytes.multiHead * tokens)}`,
    );
    say("error", `${error.toExponential(1)} against the reference, relative, over ${expected.tokens} tokens`);
    if (expected.tokens < tokens) {
      say("", `(its ${args.seconds} s were up: the last ${tokens - expected.tokens} tokens were not compared)`);
    }
    say(ok ? "ok" : "FAILED", ok ? "the layer agrees with the reference" : `the error passes ${bounds[args.dtype]}`);
    if (args.json) {
      console.log(JSON.stringify({
        ...{ ok, platform, adapter, modelType: layer.config.modelType, layer: args.layer, dtype: args.dtype },
        ...{ prompt: args.prompt, steps: args.steps, compared: expected.tokens, relL2: error },
        cacheBytesPerToken: bytes.cache,
        multiHeadBytesPerToken: bytes.multiHead,
        tokensPerSecond: { prefill: ran.prefillPerSecond, decode: ran.decodePerSecond },
      }));
    }
    return ok ? 0 : 1;
  } finally {
    if (written !== null) rmSync(written, { recursive: true });
  }
}

/** Runs with its progress on stderr. */
async function shown(
  way: string,
  work: (onTokens: (tokens: number) => void) => Promise<Ran>,
  tokens: number,
): Promise<Ran> {
  const line = progress(process.stderr, way, tokens);
  const ran = await work((done) => line.show(done));
  line.end();
  return ran;
}

function randomStates(tokens: number, width: number, seed: number): Tensor {
  const random = new Random(seed + 1);
  return { data: Float32Array.from({ length: tokens * width }, () => random.normal()), shape: [1, tokens, width] };
}

/** The first tokens. */
function part({ data, shape: [, , width] }: Tensor, tokens: number): Tensor {
  return { data: data.subarray(0, tokens * width), shape: [1, tokens, width] };
}

function pace(tokensPerSecond: number): string {
  return `${tokensPerSecond.toFixed(tokensPerSecond < 100 ? 1 : 0)} tokens/s`;
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
