// The sinks that join a head's softmax.

import { sinksPerHead } from "../op/score_options.ts";
import type { Tensor } from "../op/tensor.ts";

/** The sink logits of one head, those of its own or those that all heads share; none without sinks. */
export function headSinks(softmaxAux: Tensor | undefined, queryHeads: number, head: number): Float32Array {
  if (softmaxAux === undefined) return new Float32Array(0);
  const { data, shape } = softmaxAux;
  if (!sinksPerHead(shape, queryHeads)) return data;
  const count = data.length / queryHeads;
  return data.subarray(head * count, (head + 1) * count);
}
