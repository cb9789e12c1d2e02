// A layer on the platform "reference": the oracle, sequence by sequence, over rows that lie in a cache of its own platform.

import type { MlaModelConfig } from "../model/attention_config.ts";
import { expansionWeights } from "../model/expansion_weights.ts";
import { FlashMLAError } from "../op/errors.ts";
import { toFloats, toHalves, writeFloats, zeros } from "../op/half.ts";
import { type AnyTensor, dtypeOf, type HostTensor, isGpuTensor, type Tensor } from "../op/tensor.ts";
import { referenceMlaLayer } from "../reference/mla_layer.ts";
import { layerCacheInside, type MlaLayerCache, storeOf } from "./layer_cache.ts";
import type { LayerCall } from "./layer_call.ts";
import type { LayerTarget } from "./layer_target.ts";
import type { NamedWeights } from "./layer_weights.ts";

/**
 * Loads a layer.
 *
 * @param config The layer.
 * @param named Its weights.
 * @param dtype What weights are rounded to; the arithmetic is double precision all the same.
 */
export function referenceLayer(config: MlaModelConfig, named: NamedWeights, dtype: "f32" | "f16"): LayerTarget {
  const weights = Object.fromEntries(
    Object.entries(named).map(([name, tensor]) => [name, rounded(tensor, isMatrix(tensor) ? dtype : "f32")]),
  );
  const expansion = expansionWeights(weights["kv_b_proj.weight"], config);
  return {
    platform: "reference",
    async forward(hiddenStates, call, cache) {
      if (isGpuTensor(hiddenStates)) {
        const why = 'hiddenStates lies on a GPU, the layer is of platform "reference"; pass await toHost(hiddenStates)';
        throw new FlashMLAError("invalid-input", `Cannot run the layer: ${why}`);
      }
      const { data } = toFloats(hiddenStates);
      const output = zeros(hiddenStates.shape, dtypeOf(hiddenStates) === "f16" ? "f16" : "f32");
      const width = config.kvLoraRank + config.qkRopeHeadDim;
      const added = new Float32Array(call.batch * call.length * width);
      for (let s = 0; s + 1 < call.tokenStarts.length; s++) {
        const [start, end] = [call.tokenStarts[s], call.tokenStarts[s + 1]];
        if (start === end) continue;
        const { output: own, cached } = referenceMlaLayer({
          hiddenStates: rowsOf(data, start, end, config.hiddenSize),
          weights,
          expansion,
          cached: await prefix(cache, call, s),
          positions: call.positions.subarray(start, end),
          causal: call.causal,
          formulation: call.formulations[s],
        }, config);
        writeFloats(output, own.data, start * config.hiddenSize);
        added.set(cached.data.subarray(call.before[s] * width), start * width);
      }
      if (cache !== undefined) await append(cache, call, { data: added, shape: [call.batch, call.length, width] });
      return output;
    },
    dispose() {},
  };
}

/** Norms are small and stay what they are; matrices are stored as the layer's element type. */
function isMatrix({ shape }: HostTensor): boolean {
  return shape.length === 2;
}

function rounded(tensor: HostTensor, dtype: "f32" | "f16"): Tensor {
  const floats = toFloats(tensor);
  return dtype === "f16" && dtypeOf(tensor) !== "f16" ? toFloats(toHalves(floats)) : floats;
}

function rowsOf(data: Float32Array, start: number, end: number, width: number): Tensor {
  return { data: data.subarray(start * width, end * width), shape: [1, end - start, width] };
}

/** The rows that a sequence has in the cache. */
async function prefix(cache: MlaLayerCache | undefined, { before }: LayerCall, sequence: number) {
  if (cache === undefined || before[sequence] === 0) return undefined;
  const { rows } = await storeOf(cache).gather(layerCacheInside(cache).blockTable, sequence, 0, before[sequence]);
  return rows as AnyTensor as Tensor;
}

async function append(cache: MlaLayerCache, { before, cuSeqlens }: LayerCall, rows: Tensor): Promise<void> {
  const { latents, blockTable } = layerCacheInside(cache);
  await latents.append(rows, { blockTable, seqLens: before, cuSeqlens });
}
