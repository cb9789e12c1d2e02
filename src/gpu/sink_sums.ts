// The sinks of each head as one number, on the host.

import { toFloats } from "../op/half.ts";
import { sinksPerHead } from "../op/score_options.ts";
import { type AnyTensor, isGpuTensor } from "../op/tensor.ts";
import { toHost } from "./gpu_tensor.ts";

/** Base-2 logarithms of the sum of each head's sinks; those on a GPU are read back. */
export async function sinkSums(softmaxAux: AnyTensor, queryHeads: number): Promise<Float32Array<ArrayBuffer>> {
  const { data, shape } = toFloats(isGpuTensor(softmaxAux) ? await toHost(softmaxAux) : softmaxAux);
  const perHead = sinksPerHead(shape, queryHeads);
  const count = perHead ? data.length / queryHeads : data.length;
  return Float32Array.from({ length: queryHeads }, (_, head) => {
    const own = data.subarray(perHead ? head * count : 0, perHead ? (head + 1) * count : count);
    // Finite, as kernels want it, where all sinks are minus infinity or there are none.
    const most = own.reduce((max, sink) => Math.max(max, sink), -2e38);
    return (most + Math.log(own.reduce((sum, sink) => sum + Math.exp(sink - most), 1e-45))) * Math.LOG2E;
  });
}
