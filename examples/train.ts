// Trains a small language model whose attention, forward and backward, is this library's: two layers of Multi-head Latent
// Attention learn the opening chapters of Pride and Prejudice, character by character. Everything but attention is plain
// code in train/; attention.ts there is what to copy from. It takes a few minutes without a GPU; on a software adapter the
// first run compiles kernels for another one or two, which Mesa remembers.
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
import { libraryAttention, type RunningAttention } from "./train/attention.ts";
import { CheckpointError, loadCheckpoint, saveCheckpoint } from "./train/checkpoint.ts";
import { type Corpus, prideAndPrejudice } from "./train/corpus.ts";
import { lossCurve } from "./train/loss_curve.ts";
import { clock, progressBar } from "./train/progress_bar.ts";
import { sample } from "./train/sampling.ts";
import { ArgumentError, trainArguments } from "./train/train_arguments.ts";
import { measureHeldOut, newTraining, smallSettings, type Training, trainStep } from "./train/training.ts";

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
  const { settings: { sizes, steps }, losses, heldOut, parameters } = training;
  try {
    mkdirSync(folder, { recursive: true });
  } catch (error) {
    throw new ArgumentError(`Cannot train: --out=${folder} cannot be made a folder: ${(error as Error).message}`);
  }
  const running = await libraryAttention(args.platform);
  const place = running.platform === "reference" ? "the reference" : running.adapter;

  say("platform", running.platform === "reference" ? "reference, in plain TypeScript" : `webgpu, ${place}`);
  const [seen, unseen] = [corpus.training, corpus.heldOut].map(({ length }) => count(length));
  say("text", `Pride and Prejudice, chapters 1 to 10: ${seen} characters to learn from, ${unseen} held out`);
  const weights = count(parameters.values.length);
  say("model", `${sizes.layers} layers, ${sizes.width} wide, ${sizes.heads} heads; ${weights} weights`);
  if (args.resume) say("resumed", `after step ${losses.length} of ${steps}`);

  const pace = await trainToEnd(training, corpus, running, files.checkpoint);
  if (losses.length === 0) {
    say("stopped", "before the first step");
    return 130;
  }
  const [first, last, held] = [losses[0], recent(losses), heldOut.at(-1)!.loss];
  const stopped = losses.length < steps;
  const ok = !stopped && held < corpus.unigramEntropy;
  const title = "A small MLA language model learns Pride and Prejudice";
  const subtitle = `${count(losses.length)} steps, ${weights} weights, attention on ${place}; ` +
    `in the end ${last.toFixed(2)}, on text held out ${held.toFixed(2)}`;
  const { unigramEntropy } = corpus;
  writeFileSync(files.curve, lossCurve({ title, subtitle, losses, heldOut, unigramEntropy }));

  const perCharacter = [first, last, held, unigramEntropy].map((loss) => loss.toFixed(3));
  say(
    "loss",
    `${perCharacter[0]} at first, ${perCharacter[1]} at last, ${perCharacter[2]} on text held out; ` +
      `unigram entropy ${perCharacter[3]} (nats per character)`,
  );
  say("time", `${clock(pace.seconds)}, ${count(Math.round(pace.tokensPerSecond))} tokens/s`);
  const samples = ok ? await sample(training, corpus, running.attention) : [];
  samples.slice(0, 5).forEach((text, i) => say(i === 0 ? "sample" : "", text));
  say("files", files.curve);
  say("", files.checkpoint);
  if (stopped) say("stopped", `after step ${losses.length}; --resume goes on`);
  else say(ok ? "ok" : "FAILED", `the loss on text held out is ${ok ? "" : "not "}below the unigram entropy`);
  if (args.json) {
    const { platform, adapter } = running;
    const end = { steps: losses.length, firstLoss: first, lastLoss: last, heldOutLoss: held, unigramEntropy };
    console.log(
      JSON.stringify({ ok, stopped, platform, adapter, ...end, ...pace, ...files, samples, losses, heldOut }),
    );
  }
  return stopped ? 130 : ok ? 0 : 1;
}

/** How long training took in this process, and how fast it was. */
interface Pace {
  readonly seconds: number;
  readonly tokensPerSecond: number;
}

/** Takes the steps that are left, until Ctrl-C, and leaves a checkpoint. */
async function trainToEnd(
  training: Training,
  corpus: Corpus,
  { attention }: RunningAttention,
  checkpoint: string,
): Promise<Pace> {
  const { settings: { sizes, batch, steps }, losses, heldOut } = training;
  const interruption = listenForInterruption();
  const bar = progressBar(process.stderr);
  const tokensPerStep = batch * sizes.context;
  const before = losses.length;
  const start = performance.now();
  const here = () => ({ steps: losses.length - before, seconds: (performance.now() - start) / 1000 });
  const show = () => bar.show({ step: losses.length, steps, loss: recent(losses), here: here(), tokensPerStep });
  const measureIfDue = async () => {
    const isDue = losses.length % interval === 0 || losses.length === steps;
    if (isDue && heldOut.at(-1)?.step !== losses.length) await measureHeldOut(training, corpus, attention);
    return isDue;
  };
  try {
    show();
    await measureIfDue();
    while (losses.length < steps && !interruption.came) {
      await trainStep(training, corpus, attention);
      show();
      if (await measureIfDue()) saveCheckpoint(checkpoint, training, corpus);
      // Lets Ctrl-C through: on the reference nothing else waits for the outside, and Deno's setImmediate() does not.
      await new Promise((resolve) => setTimeout(resolve, 0));
    }
  } finally {
    bar.end();
    interruption.stopListening();
  }
  if (losses.length > 0) saveCheckpoint(checkpoint, training, corpus);
  const taken = here();
  return { seconds: taken.seconds, tokensPerSecond: taken.steps * tokensPerStep / taken.seconds };
}

/** The settings that the command line decides. */
function given({ steps = smallSettings.steps, seed = smallSettings.seed }: { steps?: number; seed?: number }) {
  return { steps, seed };
}

/** The mean of the last 20 losses; NaN of none. */
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
