// How many key rows a call may have before it is cut into pieces.

import type { MlaInputs, MlaProblem } from "../op/mla_problem.ts";
import { isGpuTensor } from "../op/tensor.ts";
import { residentLayout, rowWindow, windowSlack } from "./operand_layout.ts";

/**
 * The most key rows, counted through all batch items, whose tensors and expanded keys and values each fit a binding.
 *
 * @param problem The call's dimensions.
 * @param inputs The call's tensors.
 * @param limit Bytes that one binding may cover.
 * @returns Rows of whole batch items, or of packed sequences; at least those of one item, which cannot be cut.
 */
export function mostKeyRows(problem: MlaProblem, inputs: MlaInputs, limit: number): number {
  return mostRows(problem, inputs, limit, () => true);
}

/** The same for a call's gradients, which are computed in float32 for each head, the rotary part among them. */
export function mostBackwardKeyRows(problem: MlaProblem, inputs: MlaInputs, limit: number): number {
  const { kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim } = problem;
  const heads = (count: number) =>
    [qkNopeHeadDim, vHeadDim, qkRopeHeadDim].reduce((bytes, width) => bytes + Math.ceil(count * width / 64) * 256, 0);
  return mostRows(
    problem,
    inputs,
    limit,
    (count) => Math.max(heads(count), count * kvLoraRank * 4 + windowSlack) <= limit,
  );
}

function mostRows(
  problem: MlaProblem,
  inputs: MlaInputs,
  limit: number,
  alsoFits: (count: number) => boolean,
): number {
  const { batch, keyLength, kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim } = problem;
  const rows = batch * keyLength;
  const fits = (count: number): boolean => {
    // Keys and values of one head lie in one buffer, the values from a multiple of 256 bytes on.
    if (Math.ceil(count * qkNopeHeadDim / 64) * 256 + count * vHeadDim * 4 > limit) return false;
    if (!alsoFits(count)) return false;
    return ([[inputs.keyValue, kvLoraRank], [inputs.bK, qkRopeHeadDim]] as const).every(([tensor, width]) => {
      if (tensor === undefined || width === 0) return true;
      // Uploads are counted as float32, which halves may have to become.
      if (!isGpuTensor(tensor)) return count * width * 4 <= limit;
      const { size } = rowWindow(residentLayout(tensor), keyLength, 0, count, width);
      // A later piece may begin within its window.
      return size + (count < rows ? windowSlack : 0) <= limit;
    });
  };
  if (fits(rows)) return rows;
  // Packed sequences may end anywhere; batch items are whole.
  const unit = problem.cuSeqlens === null ? keyLength : 1;
  let [most, least] = [rows / unit, 1];
  while (least < most) {
    const middle = Math.ceil((least + most) / 2);
    if (fits(middle * unit)) least = middle;
    else most = middle - 1;
  }
  return least * unit;
}
