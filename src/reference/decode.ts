// The oracle of decoding: absorbed attention over a cache of latent rows, in double precision.

import { decodedLseShape, decodedShape, type DecodeProblem } from "../op/decode_problem.ts";
import { sinksPerHead } from "../op/score_options.ts";
import { elementCount, type Tensor } from "../op/tensor.ts";
import { absorbedAttend } from "./absorbed_attend.ts";
import { absorbQuery, projectOutput } from "./absorb.ts";

/** What a call reads, in float32 on the host. */
export interface HostDecodeTensors {
  /** The query. */
  readonly query: Tensor;
  /** Key expansion weights; none with an absorbed query. */
  readonly wKc?: Tensor;
  /** Value expansion weights. */
  readonly wVc?: Tensor;
  /** Sinks. */
  readonly softmaxAux?: Tensor;
  /** The cache's elements. */
  readonly rows: Float32Array;
  /** Index of the first element of a key's row. */
  rowAt(sequence: number, key: number): number;
}

/**
 * The keys that a token sees: the first, and one past the last.
 *
 * @param problem The call's dimensions.
 * @param keys Keys of the token's sequence.
 * @param fromLast Tokens from this one to the sequence's last one, which stands on the last key.
 */
export function visibleRange(
  { causal, slidingWindow }: Pick<DecodeProblem, "causal" | "slidingWindow">,
  keys: number,
  fromLast: number,
): [first: number, last: number] {
  const position = keys - 1 - fromLast;
  const [left, right] = slidingWindow ?? [Infinity, Infinity];
  const last = Math.min(keys, position + (causal ? 0 : right) + 1);
  return [Math.max(0, position - left), Math.max(0, last)];
}

/**
 * Decodes on the processor that runs the script.
 *
 * @param tensors The tensors.
 * @param problem Their dimensions; lengths are on the host.
 * @returns The result `[batch, queryLength, queryHeads, vHeadDim]` and the log-sum-exp `[batch, queryHeads, queryLength]`.
 */
export function referenceDecode(
  tensors: HostDecodeTensors,
  problem: DecodeProblem,
): { readonly output: Tensor; readonly lse: Tensor } {
  const { queryHeads: H, queryLength, kvHeads, kvLoraRank: L, qkRopeHeadDim: R, vHeadDim: V, tokenStarts } = problem;
  const { query, wKc, wVc, softmaxAux, rows, rowAt } = tensors;
  const width = query.shape[3];
  const shapes = { output: decodedShape(problem), lse: decodedLseShape(problem) };
  const output = new Float32Array(elementCount(shapes.output));
  const lse = new Float32Array(elementCount(shapes.lse));
  const absorbed = new Float64Array(L + R);
  const attended = new Float64Array(L);
  const projected = new Float64Array(V);
  const none = new Float32Array(0);

  problem.seqLens!.forEach((keys, sequence) => {
    const cached = { data: rows, at: (key: number) => rowAt(sequence, key) };
    const end = tokenStarts[sequence + 1];
    for (let token = tokenStarts[sequence]; token < end; token++) {
      const range = visibleRange(problem, keys, end - 1 - token);
      for (let h = 0; h < H; h++) {
        const start = (token * H + h) * width;
        if (wKc === undefined) absorbed.set(query.data.subarray(start, start + L + R));
        else {
          absorbQuery(query.data, start, wKc, Math.floor(h * kvHeads / H), absorbed);
          absorbed.set(query.data.subarray(start + width - R, start + width), L);
        }
        const sinks = softmaxAux === undefined ? none : headSinks(softmaxAux, H, h);
        const logSum = absorbedAttend(absorbed, cached, range, problem, sinks, attended);
        if (wVc !== undefined) projectOutput(attended, wVc, Math.floor(h * kvHeads / H), projected);
        output.set(wVc === undefined ? attended : projected, (token * H + h) * V);
        lse[(Math.floor(token / queryLength) * H + h) * queryLength + token % queryLength] = logSum;
      }
    }
  });
  return { output: { data: output, shape: shapes.output }, lse: { data: lse, shape: shapes.lse } };
}

/** The sink logits of one head. */
export function headSinks({ data, shape }: Tensor, queryHeads: number, head: number): Float32Array {
  if (!sinksPerHead(shape, queryHeads)) return data;
  const count = data.length / queryHeads;
  return data.subarray(head * count, (head + 1) * count);
}
