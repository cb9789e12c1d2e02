// The oracle of decoding: absorbed attention over a cache of latent rows, in double precision.

import { decodedLseShape, decodedShape, type DecodeProblem } from "../op/decode_problem.ts";
import { visibleKeys } from "../op/segments.ts";
import { elementCount, type Tensor } from "../op/tensor.ts";
import { absorbedAttend } from "./absorbed_attend.ts";
import { absorbQuery, projectOutput } from "./absorb.ts";
import { headSinks } from "./sinks.ts";

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

  problem.seqLens!.forEach((keys, sequence) => {
    const cached = { data: rows, at: (key: number) => rowAt(sequence, key) };
    const [start, end] = [tokenStarts[sequence], tokenStarts[sequence + 1]];
    const segment = { queryStart: start, queryEnd: end, keyStart: 0, keyEnd: keys, item: sequence };
    for (let token = start; token < end; token++) {
      const range = visibleKeys(segment, token, problem);
      for (let h = 0; h < H; h++) {
        const at = (token * H + h) * width;
        if (wKc === undefined) absorbed.set(query.data.subarray(at, at + L + R));
        else {
          absorbQuery(query.data, at, wKc, Math.floor(h * kvHeads / H), absorbed);
          absorbed.set(query.data.subarray(at + width - R, at + width), L);
        }
        const sinks = headSinks(softmaxAux, H, h);
        const logSum = absorbedAttend(absorbed, cached, range, problem, sinks, attended);
        if (wVc !== undefined) projectOutput(attended, wVc, Math.floor(h * kvHeads / H), projected);
        output.set(wVc === undefined ? attended : projected, (token * H + h) * V);
        lse[(Math.floor(token / queryLength) * H + h) * queryLength + token % queryLength] = logSum;
      }
    }
  });
  return { output: { data: output, shape: shapes.output }, lse: { data: lse, shape: shapes.lse } };
}
