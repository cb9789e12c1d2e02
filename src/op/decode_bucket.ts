// Calls of decoding as far as tuning looks at them.

import type { DecodeProblem } from "./decode_problem.ts";
import { ceilPowerOfTwo } from "./length_bucket.ts";
import { reach } from "./segments.ts";

/** Queries of the sequence that has most. */
export function mostTokens({ tokenStarts }: DecodeProblem): number {
  return tokenStarts.reduce((most, start, i) => Math.max(most, start - tokenStarts[Math.max(0, i - 1)]), 0);
}

/** A call's exact shapes and options, but for where its sequences lie and how long they are: those are values. */
export function decodeSignature(problem: DecodeProblem): unknown {
  const { seqLens, tokenStarts, ...dimensions } = problem;
  return {
    ...dimensions,
    seqLens: seqLens === null ? "on the GPU" : "on the host",
    tokens: tokenStarts[tokenStarts.length - 1],
  };
}

/** Lengths below this one are alike: generating passes many powers of two there, and each would be measured. */
const shortKeys = 1024;

/** All that decides which configuration is best; with fixed splits nothing of the batch. */
export function decodeBucket(problem: DecodeProblem): string {
  const { sequences, queryHeads, kvHeads, kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim } = problem;
  const { cache, dtype, causal, logitsSoftCap, sinks, splitKeys, seqLens, capacity, slidingWindow } = problem;
  const longest = seqLens === null ? capacity : seqLens.reduce((most, keys) => Math.max(most, keys), 0);
  const average = seqLens === null ? capacity : seqLens.reduce((sum, keys) => sum + keys, 0) / Math.max(1, sequences);
  const side = (keys: number) => Number.isFinite(keys) ? `${ceilPowerOfTwo(keys)}` : "all";
  const length = (keys: number) => ceilPowerOfTwo(Math.max(shortKeys, Math.ceil(keys)));
  const batch = splitKeys === null
    ? `B${ceilPowerOfTwo(sequences)} Sq${ceilPowerOfTwo(mostTokens(problem))} Sk${length(longest)}, ` +
      `${length(average)} on average${seqLens === null ? ", on the GPU" : ""}`
    : `splits of ${splitKeys}`;
  return [
    `${Object.values(dtype).join(" ")} over ${cache.dtype} ${batch}`,
    `Hq${queryHeads} Hkv${kvHeads} L${kvLoraRank} P${qkNopeHeadDim ?? "absorbed"} R${qkRopeHeadDim} V${vHeadDim}`,
    cache.pageSize === 0 ? "no pages" : `pages of ${cache.pageSize}`,
    causal ? "causal" : "full",
    ...(slidingWindow === null ? [] : [`window ${reach(problem).map(side).join(" ")}`]),
    ...(logitsSoftCap === null ? [] : ["soft cap"]),
    ...(sinks === 0 ? [] : ["sinks"]),
  ].join(", ");
}
