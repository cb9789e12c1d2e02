// kv_b_proj taken apart: a checkpoint keeps the weights that rebuild keys and values in one matrix, head by head, with P rows
// of keys before V rows of values.
//
//   wKc[l, h, p] = W[h·(P + V) + p, l]          wVc[l, h, v] = W[h·(P + V) + P + v, l]

import { cannotRun } from "../op/errors.ts";
import type { Tensor } from "../op/tensor.ts";
import type { MlaModelConfig } from "./attention_config.ts";

/** The weights that `mlaAttention` and `mlaDecode` take. */
export interface ExpansionWeights {
  /** Key expansion weights, `[kvLoraRank, queryHeads, qkNopeHeadDim]`. */
  readonly wKc: Tensor;
  /** Value expansion weights, `[kvLoraRank, queryHeads, vHeadDim]`. */
  readonly wVc: Tensor;
}

/**
 * Takes a checkpoint's kv_b_proj apart.
 *
 * @param kvBProj Its weight, `[queryHeads · (qkNopeHeadDim + vHeadDim), kvLoraRank]`.
 * @param config The layer.
 * @returns Both parts, in new memory.
 * @throws {FlashMLAError} With code `invalid-input`, when the weight has another shape.
 */
export function expansionWeights(
  kvBProj: Tensor,
  { queryHeads: H, kvLoraRank: L, qkNopeHeadDim: P, vHeadDim: V }: MlaModelConfig,
): ExpansionWeights {
  const [rows, columns] = kvBProj.shape;
  if (kvBProj.shape.length !== 2 || rows !== H * (P + V) || columns !== L) {
    cannotRun(`kv_b_proj.weight has shape [${kvBProj.shape}], expected [${H * (P + V)},${L}]`);
  }
  const wKc = new Float32Array(L * H * P);
  const wVc = new Float32Array(L * H * V);
  for (let h = 0; h < H; h++) {
    for (let row = 0; row < P + V; row++) {
      const from = (h * (P + V) + row) * L;
      for (let l = 0; l < L; l++) {
        if (row < P) wKc[(l * H + h) * P + row] = kvBProj.data[from + l];
        else wVc[(l * H + h) * V + row - P] = kvBProj.data[from + l];
      }
    }
  }
  return { wKc: { data: wKc, shape: [L, H, P] }, wVc: { data: wVc, shape: [L, H, V] } };
}
