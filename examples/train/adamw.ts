// AdamW (Loshchilov and Hutter, 2019) with clipped gradients and a learning rate that warms up, then falls as a cosine.

import type { Parameters } from "./parameters.ts";

/** How weights follow their gradients. */
export interface OptimizerSettings {
  /** The learning rate at its highest. */
  readonly learningRate: number;
  /** Steps until it is reached. */
  readonly warmup: number;
  /** What remains of it at the end, as a part of the highest. */
  readonly finalRate: number;
  /** Decay of the means of gradients and of their squares. */
  readonly betas: readonly [mean: number, square: number];
  /** How fast matrices shrink, per step and learning rate. */
  readonly weightDecay: number;
  /** The longest gradient, as a Euclidean norm over all weights. */
  readonly clip: number;
}

/** Running means of the gradients and of their squares, one number a weight. */
export interface Moments {
  readonly mean: Float32Array<ArrayBuffer>;
  readonly square: Float32Array<ArrayBuffer>;
}

/** Moments of a model that has seen nothing. */
export function noMoments({ values }: Parameters): Moments {
  return { mean: new Float32Array(values.length), square: new Float32Array(values.length) };
}

/** The learning rate of a step, counted from 0. */
export function learningRateAt(step: number, steps: number, settings: OptimizerSettings): number {
  const { learningRate, warmup, finalRate } = settings;
  if (step < warmup) return learningRate * (step + 1) / warmup;
  const passed = (step - warmup) / Math.max(1, steps - warmup);
  return learningRate * (finalRate + (1 - finalRate) * (1 + Math.cos(Math.PI * passed)) / 2);
}

/**
 * Moves the weights one step along their gradients.
 *
 * @param parameters The weights, and the gradients to follow.
 * @param moments Their running means, which are brought up to date.
 * @param step The step, counted from 0.
 * @param steps How many there will be.
 * @param settings Rates.
 */
export function adamW(
  parameters: Parameters,
  moments: Moments,
  step: number,
  steps: number,
  settings: OptimizerSettings,
): void {
  const { values, grads } = parameters;
  const { mean, square } = moments;
  const [beta1, beta2] = settings.betas;
  const rate = learningRateAt(step, steps, settings);
  // The means begin at zero; this is by how much they are too small yet.
  const [part1, part2] = [1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)];
  const factor = Math.min(1, settings.clip / (norm(grads) + 1e-12));
  for (const { offset, value, decays } of parameters.all) {
    const kept = decays ? 1 - rate * settings.weightDecay : 1;
    for (let i = offset; i < offset + value.length; i++) {
      const grad = grads[i] * factor;
      mean[i] = beta1 * mean[i] + (1 - beta1) * grad;
      square[i] = beta2 * square[i] + (1 - beta2) * grad * grad;
      values[i] = kept * values[i] - rate * (mean[i] / part1) / (Math.sqrt(square[i] / part2) + 1e-8);
    }
  }
}

function norm(grads: Float32Array): number {
  let squares = 0;
  for (let i = 0; i < grads.length; i++) squares += grads[i] * grads[i];
  return Math.sqrt(squares);
}
