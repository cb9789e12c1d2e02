// Random problems of few kinds. What a call has decides which WGSL is generated, and a software adapter compiles each
// backward kernel for seconds: a kind fixes all of that and leaves lengths, heads, windows and shapes of terms as drawn.

import type { RopeMode } from "../../src/op/mla_problem.ts";
import { someSinks, someTerm } from "./option_properties.ts";
import type { ProblemFeatures, ProblemShape } from "./random_problem.ts";

/** What a call's kernels depend on. */
export interface KernelKind {
  readonly rope: RopeMode;
  /** Whether all widths are multiples of four; otherwise none is. */
  readonly quads: boolean;
  readonly term: "none" | "bias" | "mask";
  readonly softCap: boolean;
  readonly dropout: boolean;
  readonly sinks: boolean;
}

/** Few kinds that meet every feature, every rope mode and both ways to load, and many pairs of them. */
export const kernelKinds = {
  plain: { rope: "in_query", quads: true, term: "none", softCap: false, dropout: false, sinks: true },
  biased: { rope: "in_query", quads: true, term: "bias", softCap: true, dropout: true, sinks: true },
  masked: { rope: "shared", quads: true, term: "mask", softCap: false, dropout: true, sinks: false },
  odd: { rope: "none", quads: false, term: "none", softCap: true, dropout: false, sinks: true },
  oddBiased: { rope: "shared", quads: false, term: "bias", softCap: false, dropout: false, sinks: true },
} as const satisfies Record<string, KernelKind>;

/** A map of problems to some kinds, each problem to one that its seed decides. */
export function narrowedTo(...kinds: readonly KernelKind[]): (shape: ProblemShape) => ProblemShape {
  return (shape) => {
    const { rope, quads, term, softCap, dropout, sinks } = kinds[(shape.seed >>> 5) % kinds.length];
    const width = (drawn: number) => {
      const whole = Math.max(4, Math.ceil(drawn / 4) * 4);
      return quads ? whole : whole - 1;
    };
    const { bias, attentionMask, logitsSoftCap, slidingWindow, softmaxAux } = shape.features ?? {};
    const drawnTerm = bias ?? attentionMask;
    const features: ProblemFeatures = {
      slidingWindow,
      ...(term === "bias" && { bias: someTerm(drawnTerm) }),
      ...(term === "mask" && { attentionMask: someTerm(drawnTerm) }),
      ...(softCap && { logitsSoftCap: logitsSoftCap ?? 1.5 }),
      ...(dropout && { dropout: { rate: 0.3, seed: shape.seed >>> 0 } }),
      ...(sinks && { softmaxAux: someSinks(softmaxAux) }),
    };
    return {
      ...shape,
      rope,
      kvLoraRank: width(shape.kvLoraRank),
      qkNopeHeadDim: width(shape.qkNopeHeadDim),
      qkRopeHeadDim: rope === "none" ? 0 : width(shape.qkRopeHeadDim),
      vHeadDim: width(shape.vHeadDim),
      features,
    };
  };
}
