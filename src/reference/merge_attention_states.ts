// Attention over all of some keys, from attention over disjoint parts of them.
//
//   lse = log( exp(lse_a) + exp(lse_b) + Σ_n exp(aux_n) )
//   out = exp(lse_a − lse) · out_a + exp(lse_b − lse) · out_b
//
// A part that saw no key has lse −∞ and takes no part, whatever stands in its row. If neither saw one the row is zero and
// lse −∞, with sinks too.

import type { AttentionState } from "../op/attention_state.ts";
import { elementCount, type Tensor } from "../op/tensor.ts";
import { headSinks } from "./sinks.ts";

/** A state on the host in float32: output `[batch, queryLength, queryHeads, vHeadDim]`, lse `[batch, queryHeads, queryLength]`. */
export type HostState = AttentionState<Tensor, Tensor>;

/**
 * Merges two states, in double precision.
 *
 * @param a The first part's state, without sinks.
 * @param b The second part's, of the same shapes.
 * @param softmaxAux Sink logits that join the denominator: `[queryHeads]`, `[n]`, `[queryHeads, n]` or `[1, n]`.
 * @returns The state of both together, in memory of its own.
 */
export function referenceMergeAttentionStates(a: HostState, b: HostState, softmaxAux?: Tensor): HostState {
  const [batch, queryLength, queryHeads, vHeadDim] = a.output.shape;
  const output = { data: new Float32Array(elementCount(a.output.shape)), shape: [...a.output.shape] };
  const lse = { data: new Float32Array(elementCount(a.lse.shape)), shape: [...a.lse.shape] };
  for (let item = 0; item < batch; item++) {
    for (let h = 0; h < queryHeads; h++) {
      const sinks = headSinks(softmaxAux, queryHeads, h);
      for (let i = 0; i < queryLength; i++) {
        const at = (item * queryHeads + h) * queryLength + i;
        const parts = [a, b].filter((part) => part.lse.data[at] !== -Infinity);
        lse.data[at] = -Infinity;
        if (parts.length === 0) continue;
        const max = Math.max(...parts.map((part) => part.lse.data[at]), ...sinks);
        const weights = parts.map((part) => Math.exp(part.lse.data[at] - max));
        const sum = [...weights, ...Array.from(sinks, (sink) => Math.exp(sink - max))].reduce((x, y) => x + y);
        const row = ((item * queryLength + i) * queryHeads + h) * vHeadDim;
        for (let v = row; v < row + vHeadDim; v++) {
          output.data[v] = parts.reduce((value, part, n) => value + weights[n] * part.output.data[v], 0) / sum;
        }
        lse.data[at] = max + Math.log(sum);
      }
    }
  }
  return { output, lse };
}
