// Lengths as far as tuning looks at them: up to the next power of two.

import type { MlaProblem } from "./mla_problem.ts";
import { reach } from "./segments.ts";

/** The smallest power of two that is not below `n`; 0 for 0. */
export function ceilPowerOfTwo(n: number): number {
  return n === 0 ? 0 : 2 ** Math.ceil(Math.log2(n));
}

/** Query rows of the longest sequence. */
export function longestSequence({ queryLength, cuSeqlens }: MlaProblem): number {
  if (cuSeqlens === null) return queryLength;
  return cuSeqlens.reduce((longest, end, i) => Math.max(longest, end - cuSeqlens[Math.max(i - 1, 0)]), 0);
}

/**
 * All that decides which configuration is best, in one readable line: head dimensions as they are, lengths and counts of
 * sequences rounded up to powers of two.
 */
export function lengthBucket(problem: MlaProblem): string {
  const { batch, queryLength, keyLength, queryHeads, kvHeads, cuSeqlens } = problem;
  const { kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim, rope, causal, dtype } = problem;
  const sequences = cuSeqlens === null
    ? ""
    : ` in ${ceilPowerOfTwo(cuSeqlens.length - 1)} of ${ceilPowerOfTwo(longestSequence(problem))}`;
  const stored = typeof dtype === "string"
    ? dtype
    : Object.entries(dtype).map(([name, type]) => `${name} ${type}`).join(" ");
  return [
    `${stored} B${ceilPowerOfTwo(batch)} Sq${ceilPowerOfTwo(queryLength)} Sk${ceilPowerOfTwo(keyLength)}${sequences}`,
    `Hq${queryHeads} Hkv${kvHeads} L${kvLoraRank} P${qkNopeHeadDim} R${qkRopeHeadDim} V${vHeadDim}`,
    `rope ${rope}`,
    causal ? "causal" : "full",
    ...extras(problem),
  ].join(", ");
}

/** The options that change what a kernel does, where a call has them. Their values do not, but for those of a window. */
function extras(problem: MlaProblem): string[] {
  const { logitsSoftCap, slidingWindow, scoreTerm, sinks, dropout, precision, keyLength } = problem;
  const side = (keys: number) => ceilPowerOfTwo(Math.min(keys, keyLength));
  const [left, right] = reach(problem);
  return [
    ...(slidingWindow === null ? [] : [`window ${side(left)} ${side(right)}`]),
    ...(logitsSoftCap === null ? [] : ["soft cap"]),
    ...(scoreTerm === "none" ? [] : [scoreTerm]),
    ...(sinks === 0 ? [] : [`${sinks} sinks`]),
    ...(dropout === null ? [] : ["dropout"]),
    ...(precision === "f32" ? [] : [`precision ${precision}`]),
  ];
}
