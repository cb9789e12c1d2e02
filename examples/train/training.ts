// One run of training: what it has reached, and the step that takes it further.

import { adamW, type Moments, noMoments, type OptimizerSettings } from "./adamw.ts";
import type { Attention } from "./attention.ts";
import type { Corpus } from "./corpus.ts";
import { crossEntropy } from "./cross_entropy.ts";
import { forward } from "./model.ts";
import type { ModelSizes } from "./model_sizes.ts";
import { type Parameters, parametersOf } from "./parameters.ts";
import { Random } from "./random.ts";

/** What decides a run, beside its text and its platform. */
export interface TrainingSettings {
  readonly sizes: ModelSizes;
  readonly optimizer: OptimizerSettings;
  /** Excerpts a step, each as long as the model's context. */
  readonly batch: number;
  /** Steps in all. */
  readonly steps: number;
  /** Decides the first weights, and the excerpts. */
  readonly seed: number;
}

/** A loss after some steps. */
export interface Measured {
  readonly step: number;
  readonly loss: number;
}

/** A run, as far as it has come. All of it is in a checkpoint. */
export interface Training {
  readonly settings: TrainingSettings;
  readonly parameters: Parameters;
  readonly moments: Moments;
  /** Chooses the excerpts. */
  readonly random: Random;
  /** The loss of every step so far, in nats per character, before its weights moved. */
  readonly losses: number[];
  /** Losses on the text that training does not see. */
  readonly heldOut: Measured[];
}

/** A model of two layers and 88,000 weights, which learns in a few minutes on a processor. */
export const smallSettings: TrainingSettings = {
  sizes: {
    layers: 2,
    width: 64,
    heads: 4,
    kvLoraRank: 32,
    qkNopeHeadDim: 16,
    qkRopeHeadDim: 8,
    vHeadDim: 16,
    mlpWidth: 128,
    context: 64,
  },
  optimizer: { learningRate: 6e-3, warmup: 20, finalRate: 0.05, betas: [0.9, 0.98], weightDecay: 0.05, clip: 1 },
  // On a processor half the excerpts for twice the steps learn more in the same time (1.92 nats, not 2.05); on a software
  // adapter, where a call costs more than its size says, they take nearly twice the time.
  batch: 8,
  steps: 400,
  seed: 1,
};

/** A run that has not begun. */
export function newTraining(settings: TrainingSettings, { alphabet }: Corpus): Training {
  const random = new Random(settings.seed);
  const parameters = parametersOf(settings.sizes, alphabet.length, random);
  return { settings, parameters, moments: noMoments(parameters), random, losses: [], heldOut: [] };
}

/**
 * Takes one step on excerpts of the text.
 *
 * @returns The loss of the step, before the weights moved.
 * @throws {Error} When the loss is no number any more.
 */
export async function trainStep(training: Training, corpus: Corpus, attention: Attention): Promise<number> {
  const { settings: { sizes, optimizer, batch, steps }, parameters, moments, random, losses } = training;
  const starts = Array.from({ length: batch }, () => random.below(corpus.training.length - sizes.context));
  const { tokens, targets } = excerpts(corpus.training, starts, sizes.context);
  const pass = await forward(parameters, sizes, tokens, attention);
  try {
    const { loss, gradLogits } = crossEntropy(pass.logits, targets);
    if (!Number.isFinite(loss)) throw new Error(`Training failed: the loss of step ${losses.length + 1} is ${loss}`);
    await pass.backward(gradLogits);
    adamW(parameters, moments, losses.length, steps, optimizer);
    losses.push(loss);
    return loss;
  } finally {
    pass.dispose();
  }
}

/** Measures the loss on excerpts spread evenly over the text that training does not see, always the same ones. */
export async function measureHeldOut(training: Training, corpus: Corpus, attention: Attention): Promise<number> {
  const { settings: { sizes, batch }, parameters, losses, heldOut } = training;
  const batches = Math.ceil(32 / batch);
  const last = corpus.heldOut.length - sizes.context - 1;
  let total = 0;
  for (let i = 0; i < batches; i++) {
    const starts = Array.from({ length: batch }, (_, j) => Math.floor(last * (i * batch + j) / (batches * batch - 1)));
    const { tokens, targets } = excerpts(corpus.heldOut, starts, sizes.context);
    const pass = await forward(parameters, sizes, tokens, attention);
    total += crossEntropy(pass.logits, targets).loss;
    pass.dispose();
  }
  heldOut.push({ step: losses.length, loss: total / batches });
  return total / batches;
}

/** Excerpts of a text, and what comes after each of their characters. */
function excerpts(text: Uint8Array, starts: readonly number[], length: number) {
  const [tokens, targets] = [new Uint8Array(starts.length * length), new Uint8Array(starts.length * length)];
  starts.forEach((start, i) => {
    tokens.set(text.subarray(start, start + length), i * length);
    targets.set(text.subarray(start + 1, start + 1 + length), i * length);
  });
  return { tokens, targets };
}
