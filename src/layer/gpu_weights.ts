// A layer's weights as its kernels read them, uploaded once: projections transposed, those of the same input side by side,
// kv_b_proj taken apart, and constant factors multiplied into norms.

import type { GpuContext } from "../gpu/device.ts";
import { columnsOfRun, columnUnit, type DividedWeight } from "../gpu/divided_linear.ts";
import { toGpu } from "../gpu/gpu_tensor.ts";
import type { LinearWeight } from "../gpu/linear.ts";
import { checkBinding } from "../gpu/limit_checks.ts";
import type { MlaModelConfig } from "../model/attention_config.ts";
import { expansionWeights } from "../model/expansion_weights.ts";
import { halfBits, halfTensor, toFloats, toHalves } from "../op/half.ts";
import {
  dtypeOf,
  elementBytes,
  elementCount,
  type HostTensor,
  type OwnedGpuTensor,
  type Tensor,
} from "../op/tensor.ts";
import type { NamedWeights } from "./layer_weights.ts";

/** The weights of a layer on a GPU. */
export interface GpuLayerWeights {
  /** How projections are stored. */
  readonly dtype: "f32" | "f16";
  /** q_proj or q_a_proj and, beside it, kv_a_proj_with_mqa: `[hidden, width of the first + L + R]`. */
  readonly down: DividedWeight;
  /** q_b_proj, `[qLoraRank, H · (P + R)]`; null where one projection makes queries. */
  readonly queryUp: DividedWeight | null;
  /** Weights of the norms in float32: q_a_layernorm's, where there is one, then kv_a_layernorm's. */
  readonly norms: GPUBuffer;
  /** Key expansion weights, `[L, H, P]`. */
  readonly wKc: OwnedGpuTensor;
  /** Value expansion weights, `[L, H, V]`. */
  readonly wVc: OwnedGpuTensor;
  /** o_proj, `[H · V, hidden]`. */
  readonly output: DividedWeight;
  /** Gives the memory back. */
  dispose(): void;
}

/**
 * Uploads a layer's weights.
 *
 * @param context The device.
 * @param config The layer.
 * @param weights Its weights.
 * @param dtype What projections are rounded to. On a device without half precision they are stored in float32 all the same.
 * @throws {FlashMLAError} With code `limit` when half of kv_b_proj is larger than a binding, `device` when the memory is short.
 */
export async function gpuWeights(
  context: GpuContext,
  config: MlaModelConfig,
  weights: NamedWeights,
  dtype: "f32" | "f16",
): Promise<GpuLayerWeights> {
  const { device, capabilities } = context;
  const stored = dtype === "f16" && capabilities.f16 ? "f16" : "f32";
  const made: OwnedGpuTensor[] = [];
  const dispose = () => made.splice(0).forEach((tensor) => tensor.dispose());
  const upload = async (name: string, tensor: HostTensor) => {
    checkBinding(name, elementCount(tensor.shape) * elementBytes(dtypeOf(tensor)), capabilities.limits);
    const uploaded = await toGpu(tensor, device);
    made.push(uploaded);
    return uploaded;
  };
  const matrix = (tensor: Tensor): HostTensor => {
    if (dtype === "f32") return tensor;
    const halves = toHalves(tensor);
    return stored === "f16" ? halves : toFloats(halves);
  };
  const linear = async (name: string, parts: readonly HostTensor[], bias?: Float32Array): Promise<DividedWeight> => {
    const rounded = parts.map((part) => dtype === "f16" ? asHalves(part) : toFloats(part));
    const inputs = parts[0].shape[1];
    const outputs = parts.reduce((sum, { shape }) => sum + shape[0], 0);
    const most = columnsOfRun(inputs, outputs, elementBytes(stored), capabilities.limits.maxStorageBufferBindingSize);
    const runs: LinearWeight[] = [];
    for (let first = 0; first < outputs;) {
      // Where not even one unit fits, it is refused by its size.
      const count = Math.min(Math.max(most, columnUnit), outputs - first);
      const tensor = transposed(someOutputs(rounded, first, count));
      const { buffer } = await upload(name, stored === "f32" ? toFloats(tensor) : tensor);
      const own = bias && { data: bias.slice(first, first + count), shape: [count] };
      const added = own && await upload(`${name}'s bias`, own);
      runs.push({ buffer, dtype: stored, inputs, outputs: count, ...(added && { bias: added.buffer }) });
      first += count;
    }
    return { dtype: stored, inputs, outputs, runs };
  };
  try {
    const { qLoraRank } = config;
    const first = qLoraRank === null ? "q_proj" : "q_a_proj";
    const { wKc, wVc } = expansionWeights(toFloats(weights["kv_b_proj.weight"]), config);
    const outputBias = weights["o_proj.bias"];
    return {
      dtype: stored,
      down: await linear(
        `${first} and kv_a_proj_with_mqa`,
        [weights[`${first}.weight`], weights["kv_a_proj_with_mqa.weight"]],
        downBias(config, weights),
      ),
      queryUp: qLoraRank === null ? null : await linear("q_b_proj", [weights["q_b_proj.weight"]]),
      norms: (await upload("norms", normWeights(config, weights))).buffer,
      wKc: await upload("wKc", matrix(wKc)),
      wVc: await upload("wVc", matrix(wVc)),
      output: await linear("o_proj", [weights["o_proj.weight"]], outputBias && toFloats(outputBias).data),
      dispose,
    };
  } catch (error) {
    dispose();
    throw error;
  }
}

/** q_a_proj's bias and kv_a_proj_with_mqa's; q_proj never has one, which is zeros beside the other. */
function downBias(config: MlaModelConfig, weights: NamedWeights): Float32Array | undefined {
  const kv = weights["kv_a_proj_with_mqa.bias"];
  if (kv === undefined) return undefined;
  const { qLoraRank, queryHeads, qkNopeHeadDim, qkRopeHeadDim } = config;
  const width = qLoraRank ?? queryHeads * (qkNopeHeadDim + qkRopeHeadDim);
  const bias = new Float32Array(width + kv.shape[0]);
  const query = weights["q_a_proj.bias"];
  if (query !== undefined) bias.set(toFloats(query).data);
  bias.set(toFloats(kv).data, width);
  return bias;
}

function normWeights({ qLoraRank, queryScale, latentScale }: MlaModelConfig, weights: NamedWeights): Tensor {
  const scaled = (name: string, factor: number) => toFloats(weights[name]).data.map((value) => value * factor);
  const parts = [
    ...(qLoraRank === null ? [] : [scaled("q_a_layernorm.weight", queryScale)]),
    scaled("kv_a_layernorm.weight", latentScale),
  ];
  const data = Float32Array.from(parts.flatMap((part) => [...part]));
  return { data, shape: [data.length] };
}

function asHalves(tensor: HostTensor): HostTensor {
  return dtypeOf(tensor) === "f16" ? tensor : toHalves(toFloats(tensor));
}

/** Some of the outputs of weights that lie side by side: views. */
function someOutputs(parts: readonly HostTensor[], first: number, count: number): HostTensor[] {
  let start = 0;
  return parts.flatMap((part) => {
    const [outputs, inputs] = part.shape;
    const [from, to] = [Math.max(0, first - start), Math.min(outputs, first + count - start)];
    start += outputs;
    if (to <= from) return [];
    const data = (dtypeOf(part) === "f16" ? halfBits(part.data as Uint16Array) : part.data) as Float32Array;
    return [{ ...part, data: data.subarray(from * inputs, to * inputs), shape: [to - from, inputs] } as HostTensor];
  });
}

/** Columns and rows of a block that is transposed at a time, so that both sides stay in the processor's cache. */
const block = 64;

/** Weights `[outputs, inputs]` of the same input, transposed and side by side: `[inputs, all outputs]`. */
function transposed(parts: readonly HostTensor[]): HostTensor {
  const inputs = parts[0].shape[1];
  const columns = parts.reduce((sum, { shape }) => sum + shape[0], 0);
  const half = dtypeOf(parts[0]) === "f16";
  const into = half ? new Uint16Array(inputs * columns) : new Float32Array(inputs * columns);
  let first = 0;
  for (const part of parts) {
    const from = half ? halfBits(part.data as Uint16Array) : part.data as Float32Array;
    const [outputs] = part.shape;
    for (let o0 = 0; o0 < outputs; o0 += block) {
      for (let i0 = 0; i0 < inputs; i0 += block) {
        for (let o = o0; o < Math.min(o0 + block, outputs); o++) {
          for (let i = i0; i < Math.min(i0 + block, inputs); i++) into[i * columns + first + o] = from[o * inputs + i];
        }
      }
    }
    first += outputs;
  }
  const shape = [inputs, columns];
  return half ? halfTensor(into as Uint16Array, shape) : { data: into as Float32Array, shape };
}
