// The work of an operation: FLOPs, and bytes that have to move whatever the kernels do. With the letters of MlaProblem,
// N visible (query, key, head) triples, and e bytes an element:
//
//   expand    FLOPs 2·B·Sk·L·Hkv·(P+V)           bytes e·( latents + weights + expanded keys and values )
//   attend    FLOPs 2·N·(P+R+V)                  bytes e·( query + expanded keys and values + rotary keys + output )
//   forward   both                               bytes e·( query + latents + weights + rotary keys + output )
//   backward  FLOPs 2·N·(3(P+R)+2V) + 2·expand   bytes e·( what forward reads + output + its gradient ) + 4·( gradients )
//
// Masked pairs and padding are no work, and backward's scores are counted once, though its two kernels both compute them.
// Expanded keys and values count in the inputs' element type, whatever the scratch really holds.

import type { MlaProblem } from "../src/op/mla_problem.ts";
import { segments, visibleKeys } from "../src/op/segments.ts";

/** What is measured of a call. */
export type WorkStep = "expand" | "attend" | "forward" | "forward+backward";

/** FLOPs and bytes of a step. */
export interface Work {
  readonly flops: number;
  /** Bytes that have to move between memory and the kernels. */
  readonly bytes: number;
}

/** Visible (query, key) pairs, times query heads. */
export function visibleTriples(problem: MlaProblem): number {
  let pairs = 0;
  for (const segment of segments(problem)) {
    for (let row = segment.queryStart; row < segment.queryEnd; row++) {
      const { start, end } = visibleKeys(segment, row, problem);
      pairs += end - start;
    }
  }
  return pairs * problem.queryHeads;
}

/** FLOPs of a product of all latents with weights of so many columns a head. */
export function expansionFlops({ batch, keyLength, kvLoraRank, kvHeads }: MlaProblem, width: number): number {
  return 2 * batch * keyLength * kvLoraRank * kvHeads * width;
}

/**
 * The work of a step.
 *
 * @param step Which.
 * @param problem The call's dimensions.
 * @param elementBytes Bytes of an element of inputs and output.
 */
export function workOf(step: WorkStep, problem: MlaProblem, elementBytes: number): Work {
  const { batch, queryLength, keyLength, queryHeads, kvHeads, rope, kvLoraRank: L } = problem;
  const { qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = problem;
  const [queryRows, keyRows] = [batch * queryLength, batch * keyLength];
  const latents = keyRows * L;
  const weights = L * kvHeads * (P + V);
  const expanded = keyRows * kvHeads * (P + V);
  const ropeKeys = keyRows * R;
  const query = queryRows * (queryHeads * P + (rope === "shared" ? R : queryHeads * R));
  const output = queryRows * queryHeads * V;
  const reads = query + latents + weights + ropeKeys;

  const expandFlops = expansionFlops(problem, P + V);
  const triples = visibleTriples(problem);
  const attendFlops = 2 * triples * (P + R + V);
  switch (step) {
    case "expand":
      return { flops: expandFlops, bytes: elementBytes * (latents + weights + expanded) };
    case "attend":
      return { flops: attendFlops, bytes: elementBytes * (query + expanded + ropeKeys + output) };
    case "forward":
      return { flops: expandFlops + attendFlops, bytes: elementBytes * (reads + output) };
    case "forward+backward": {
      const backwardFlops = 2 * triples * (3 * (P + R) + 2 * V) + 2 * expandFlops;
      // Read again backward: the inputs, the output and its gradient. Gradients are sums in float32.
      const backwardBytes = elementBytes * (reads + 2 * output) + 4 * reads;
      return {
        flops: expandFlops + attendFlops + backwardFlops,
        bytes: elementBytes * (reads + output) + backwardBytes,
      };
    }
  }
}
