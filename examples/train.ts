// Trains a small language model whose attention, forward and backward, is this library's: two layers of Multi-head Latent
// Attention learn the opening chapters of Pride and Prejudice, character by character. Everything but attention is plain
// code in train/; attention.ts there is what to copy from. It takes a few minutes without a GPU.
//
//   deno run -A examples/train.ts      or bun, or node 22.18 and later: WebGPU in those needs `npm install webgpu`
//     --steps=400           how long to train
//     --seed=1              decides the first weights and what is read
//     --platform=auto       or webgpu, or reference
//     --out=FOLDER          where checkpoint.safetensors and loss.svg go; else a folder for temporary files
//     --resume              goes on from the checkpoint in that folder; Ctrl-C leaves one
//     --json                the last line of stdout is one JSON object
//
// Ends with 0 when the loss on text that training never saw is below the unigram entropy, with 1 when not.

import { mkdirSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { FlashMLAError } from "../mod.ts"; // in your project: "@flash-mla/webgpu"
import { libraryAttention } from "./train/attention.ts";
import { CheckpointError, loadCheckpoint, saveCheckpoint } from "./train/checkpoint.ts";
import { prideAndPrejudice } from "./train/corpus.ts";
import { lossCurve } from "./train/loss_curve.ts";
import { clock, progressBar } from "./train/progress_bar.ts";
import { sample } from "./train/sampling.ts";
import { ArgumentError, trainArguments } from "./train/train_arguments.ts";
import { measureHeldOut, newTraining, smallSettings, trainStep } from "./train/training.ts";

/** Steps between looks at the text held out, and between checkpoints. */
const interval = 50;

async function main(): Promise<number> {
  const args = trainArguments(process.argv.slice(2));
  const folder = args.out ?? join(tmpdir(), "flash-mla-train");
  const files = { checkpoint: join(folder, "checkpoint.safetensors"), curve: join(folder, "loss.svg") };
  const corpus = prideAndPrejudice();
  const training = args.resume
    ? loadCheckpoint(files.checkpoint, corpus, args)
    : newTraining({ ...smallSettings, ...given(args) }, corpus);
  const { settings: { sizes, batch, steps }, losses, heldOut, parameters } = training;
  mkdirSync(folder, { recursive: true });
  const { attention, platform, adapter } = await libraryAttention(args.platform);

  say("platform", platform === "reference" ? "reference, in plain TypeScript" : `${platform}, ${adapter}`);
  say(
    "text",
    `Pride and Prejudice, chapters 1 to 10: ${count(corpus.training.length)} characters to learn from, ` +
      `${count(corpus.heldOut.length)} held out`,
  );
  say(
    "model",
    `${sizes.layers} layers, ${sizes.width} wide, ${sizes.heads} heads; ${count(parameters.values.length)} weights`,
  );
  if (args.resume) say("resumed", `after step ${losses.length} of ${steps}`);

  const interruption = listenForInterruption();
  const progress = progressBar(process.stderr);
  const before = losses.length;
  const start = performance.now();
  const seconds = () => (performance.now() - start) / 1000;
  const measureIfDue = async () => {
    const isDue = losses.length % interval === 0 || losses.length === steps;
    if (isDue && heldOut.at(-1)?.step !== losses.length) await measureHeldOut(training, corpus, attention);
    return isDue;
  };
  try {
    await measureIfDue();
    while (losses.length < steps && !interruption.came) {
      await trainStep(training, corpus, attention);
      const here = { steps: losses.length - before, seconds: seconds() };
      progress.show({ step: losses.length, steps, loss: recent(losses), here, tokensPerStep: batch * sizes.context });
      if (await measureIfDue()) saveCheckpoint(files.checkpoint, training, corpus);
      // Lets Ctrl-C through: on the reference nothing else waits for the outside, and Deno's setImmediate() does not.
      await new Promise((resolve) => setTimeout(resolve, 0));
    }
  } finally {
    progress.end();
    interruption.stopListening();
  }
  const trained = seconds();
  saveCheckpoint(files.checkpoint, training, corpus);
  const stopped = losses.length < steps;
  const held = heldOut.at(-1)!.loss;
  const ok = !stopped && held < corpus.unigramEntropy;
  const curve = lossCurve({
    title: "A small MLA language model learns Pride and Prejudice",
    subtitle: `${count(losses.length)} steps of ${count(batch * sizes.context)} characters, ` +
      `${count(parameters.values.length)} weights, on ${
        platform === "webgpu" ? adapter : "the reference"
      }; in the end ${recent(losses).toFixed(2)}, ` +
      `and ${held.toFixed(2)} on text held out`,
    losses,
    heldOut,
    unigramEntropy: corpus.unigramEntropy,
  });
  writeFileSync(files.curve, curve);

  const tokensPerSecond = (losses.length - before) * batch * sizes.context / trained;
  const samples = ok ? await sample(training, corpus, attention) : [];
  say(
    "loss",
    `${losses[0].toFixed(3)} at first, ${recent(losses).toFixed(3)} at last, ${held.toFixed(3)} on text held out; ` +
      `unigram entropy ${corpus.unigramEntropy.toFixed(3)} (nats per character)`,
  );
  say("time", `${clock(trained)}, ${count(Math.round(tokensPerSecond))} characters/s`);
  samples.slice(0, 5).forEach((text, i) => say(i === 0 ? "sample" : "", text));
  say("files", `${files.curve}`);
  say("", `${files.checkpoint}`);
  if (stopped) say("stopped", `after step ${losses.length}; --resume goes on`);
  else say(ok ? "ok" : "FAILED", `the loss on text held out is ${ok ? "" : "not "}below the unigram entropy`);
  if (args.json) {
    console.log(JSON.stringify({
      ok,
      stopped,
      platform,
      adapter,
      steps: losses.length,
      firstLoss: losses[0],
      lastLoss: recent(losses),
      heldOutLoss: held,
      unigramEntropy: corpus.unigramEntropy,
      seconds: trained,
      tokensPerSecond,
      ...files,
      sample: samples,
      losses,
      heldOut,
    }));
  }
  return stopped ? 130 : ok ? 0 : 1;
}

/** The settings that the command line decides. */
function given({ steps = smallSettings.steps, seed = smallSettings.seed }: { steps?: number; seed?: number }) {
  return { steps, seed };
}

/** The mean of the last 20 losses. */
function recent(losses: readonly number[]): number {
  const last = losses.slice(-20);
  return last.reduce((sum, loss) => sum + loss, 0) / last.length;
}

/** The first Ctrl-C lets the step end and the checkpoint be written; a second one ends the process. */
function listenForInterruption(): { readonly came: boolean; stopListening(): void } {
  let came = false;
  const listener = () => {
    came = true;
    process.off("SIGINT", listener);
  };
  process.on("SIGINT", listener);
  return {
    get came() {
      return came;
    },
    stopListening: () => process.off("SIGINT", listener),
  };
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
