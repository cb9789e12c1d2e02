// What stands between a raw product of query and key and the softmax, in WGSL: scale, soft cap, bias or mask, dropout.
// Every attention kernel, forward and backward, scores through these functions, so that they agree to the bit.
//
// Scores are in units of log2(e): exp2 of them is the exponential of the score. Hidden pairs carry the sentinel MASKED;
// whatever is at or below UNSEEN counts as hidden. Both are finite: compilers may assume that there is no infinity.

import { threefryParity, threefryRotations } from "../../op/dropout.ts";
import type { MlaProblem } from "../../op/mla_problem.ts";
import { hidingBias } from "../../op/score_options.ts";
import { unroll } from "./register_tile.ts";

/** What of a call's options the generated WGSL depends on. */
export interface ScoreTerms extends Pick<MlaProblem, "scoreTerm"> {
  /** Whether scores are capped. */
  readonly softCap: boolean;
  /** Whether a window bounds what rows see on the left. */
  readonly window: boolean;
  /** The element type of the bias. */
  readonly bias: "f32" | "f16";
  /** Whether probabilities are dropped. */
  readonly dropout: boolean;
}

/** The score terms of a problem. */
export function scoreTerms(problem: MlaProblem, bias: "f32" | "f16"): ScoreTerms {
  const { scoreTerm, logitsSoftCap, slidingWindow, dropout } = problem;
  return {
    scoreTerm,
    softCap: logitsSoftCap !== null,
    window: slidingWindow !== null,
    bias: scoreTerm === "bias" ? bias : "f32",
    dropout: dropout !== null,
  };
}

/** WGSL fields of the parameter block, f32 first: see {@link scoreFloats} and {@link scoreWords}. */
export const scoreFloatFields = `  scaleLog2: f32,     // softmaxScale · log2(e)
  capLog2: f32,       // logitsSoftCap · log2(e)
  scaleOverCap: f32,  // softmaxScale / logitsSoftCap
  keptFactor: f32,    // 1 / (1 − dropout rate)
  minusInfinity: f32, // WGSL has no literal for it
  softmaxScale: f32,`;

/** WGSL fields of the parameter block that are words. */
export const scoreWordFields =
  `  firstRow: u32,      // query row, counted through all batch items, that row 0 of this dispatch is
  queryLength: u32,
  keyLength: u32,
  queryHeads: u32,    // of the whole call
  // Bias or mask: elements from the binding's start to the first one, from one item, head and query to the next; modulo
  // 2^32.
  termBase: u32,
  termItem: u32,
  termHead: u32,
  termRow: u32,
  dropBelow: u32,     // dropout: bits below this are dropped
  seed0: u32,
  seed1: u32,
  firstItem: u32,     // batch item and position, within the whole call, of this piece's first ones
  firstPosition: u32,`;

/** The values of {@link scoreFloatFields}. */
export function scoreFloats({ softmaxScale, logitsSoftCap, dropout }: MlaProblem): number[] {
  const cap = logitsSoftCap ?? 1;
  return [
    softmaxScale * Math.LOG2E,
    cap * Math.LOG2E,
    softmaxScale / cap,
    dropout === null ? 1 : 1 / (1 - dropout.rate),
    -Infinity,
    softmaxScale,
  ];
}

/** Constants that the functions and kernels share. */
export const scoreConstants = `const MASKED = -3.4e38;
const UNSEEN = -3.0e38;
const LOG2E = 1.4426950408889634;
const LN2 = 0.6931471805599453;`;

/** WGSL of the binding of the bias or mask; empty without either. */
export function termBinding({ scoreTerm, bias }: ScoreTerms, binding: number): string {
  if (scoreTerm === "none") return "";
  // Bytes of a mask come four to a word.
  const element = scoreTerm === "mask" ? "u32" : bias;
  return `@group(0) @binding(${binding}) var<storage, read> term: array<${element}>;`;
}

/** Whether the bias is stored in halves. */
export function storesHalves({ scoreTerm, bias }: ScoreTerms): boolean {
  return scoreTerm === "bias" && bias === "f16";
}

/**
 * WGSL functions over `params` and `term`:
 *
 * - `scoreOf(raw)`: scaled and capped, four at a time.
 * - `withTerm(score, item, head, position, keyPosition)`: the bias added, or MASKED where it or the mask hides.
 * - `capSlope(score)`: ∂(capped)/∂(scaled) at a score that `scoreOf` gave.
 * - `dropoutKey(item, head)` and `keptFactor(key, position, keyPosition)`: what a probability is multiplied by.
 *
 * Positions count within the batch item; the caller asks only for pairs that exist.
 */
export function scoreFunctions(terms: ScoreTerms): string {
  return [
    terms.softCap ? cappedScore : plainScore,
    terms.scoreTerm === "none" ? "" : termFunction(terms),
    terms.dropout ? dropoutFunctions() : "",
  ].filter((part) => part !== "").join("\n\n");
}

const plainScore = `fn scoreOf(raw: vec4<f32>) -> vec4<f32> { return raw * params.scaleLog2; }`;

// Not WGSL's tanh: engines may be off by 1e-5, which a cap of 50 makes 5e-4 of a logit. Near zero 1 − e cancels, so a
// series takes over; at 0.25 both are good to 3e-7 of the value.
const cappedScore = `fn scoreOf(raw: vec4<f32>) -> vec4<f32> {
  let x = raw * params.scaleOverCap;
  let e = exp2(-2.0 * LOG2E * abs(x));
  let far = sign(x) * (1.0 - e) / (1.0 + e);
  let y = x * x;
  let near = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))));
  return params.capLog2 * select(far, near, abs(x) < vec4<f32>(0.25));
}

fn capSlope(score: vec4<f32>) -> vec4<f32> {
  let t = score / params.capLog2;
  return 1.0 - t * t;
}`;

function termFunction({ scoreTerm }: ScoreTerms): string {
  const at =
    "params.termBase + item * params.termItem + head * params.termHead + position * params.termRow + keyPosition";
  const body = scoreTerm === "bias"
    ? `  let bias = f32(term[${at}]);
  return select(score + bias * LOG2E, MASKED, bias <= ${hidingBias});`
    : `  let at = ${at};
  let visible = (term[at / 4u] >> (8u * (at % 4u))) & 0xffu;
  return select(MASKED, score, visible != 0u);`;
  return `fn withTerm(score: f32, item: u32, head: u32, position: u32, keyPosition: u32) -> f32 {
${body}
}`;
}

function dropoutFunctions(): string {
  const rounds = unroll(20, (round) => {
    const by = threefryRotations[round % 8];
    const mix = `  x.x += x.y; x.y = ((x.y << ${by}u) | (x.y >> ${32 - by}u)) ^ x.x;`;
    if (round % 4 !== 3) return mix;
    const group = (round + 1) / 4;
    return `${mix}\n  x.x += k${group % 3}; x.y += k${(group + 1) % 3} + ${group}u;`;
  });
  return `// Threefry-2x32, 20 rounds.
fn threefry(key: vec2<u32>, counter: vec2<u32>) -> vec2<u32> {
  let k0 = key.x;
  let k1 = key.y;
  let k2 = key.x ^ key.y ^ ${threefryParity}u;
  var x = counter + key;
${rounds}
  return x;
}

fn dropoutKey(item: u32, head: u32) -> vec2<u32> {
  return threefry(vec2<u32>(params.seed0, params.seed1), vec2<u32>(params.firstItem + item, head));
}

fn keptFactor(key: vec2<u32>, position: u32, keyPosition: u32) -> f32 {
  let counter = vec2<u32>(params.firstPosition + position, params.firstPosition + keyPosition);
  return select(0.0, params.keptFactor, threefry(key, counter).x >= params.dropBelow);
}`;
}
