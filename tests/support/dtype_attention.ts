// The public function under test with tensors of a chosen element type on a chosen side, as an implementation that the
// checks over float32 host tensors can drive.

import { type AnyTensor, type GpuTensor, type HostTensor, mlaAttention, toGpu, toHost } from "../../mod.ts";
import type { FlashMLAConfig } from "../../src/op/config.ts";
import { toFloats, toHalves } from "../../src/op/half.ts";
import { type HostInputs, mapTensors, tensorNames } from "../../src/op/mla_problem.ts";
import type { OwnedGpuTensor, Tensor } from "../../src/op/tensor.ts";
import type { Attention } from "./attention_properties.ts";

/** Where the tensors of a call lie. */
export type Side = "host" | "gpu";

/** An element type that tensors are stored in. */
export type Stored = "f32" | "f16" | "bf16";

/** The nearest tensor of another element type; ties of bfloat16 are cut off. */
export function stored(tensor: Tensor, dtype: Stored): HostTensor {
  if (dtype === "f32") return tensor;
  if (dtype === "f16") return toHalves(tensor);
  const words = new Uint32Array(tensor.data.buffer, tensor.data.byteOffset, tensor.data.length);
  const bits = Uint16Array.from(words, (word) => word >>> 16);
  return { data: bits, shape: tensor.shape, dtype: "bf16" };
}

/** The inputs rounded to an element type, in float32: what the oracle is given. */
export function rounded(inputs: HostInputs, dtype: Stored): HostInputs {
  return mapTensors(inputs, (tensor) => toFloats(stored(tensor, dtype)));
}

/** The public function on the GPU with all tensors of one element type on one side. */
export function attentionOn(
  side: Side,
  dtype: Stored,
  options: { readonly cfg: FlashMLAConfig; readonly device?: GPUDevice },
): Attention {
  return async (inputs, math) => {
    const uploaded: OwnedGpuTensor[] = [];
    const call = { ...math, platform: "webgpu" as const, ...options };
    try {
      const placed = new Map<string, AnyTensor>();
      for (const name of tensorNames) {
        const tensor = inputs[name];
        if (tensor === undefined) continue;
        const half = stored(tensor, dtype);
        if (side === "gpu") uploaded.push(await toGpu(half, options.device));
        placed.set(name, side === "gpu" ? uploaded[uploaded.length - 1] : half);
      }
      const result: AnyTensor = await mlaAttention(
        mapTensors<AnyTensor, AnyTensor>(inputs, (_, name) => placed.get(name)!),
        call,
      );
      if (side === "host") return toFloats(result as HostTensor);
      uploaded.push(result as OwnedGpuTensor);
      return toFloats(await toHost(result as GpuTensor));
    } finally {
      for (const tensor of uploaded) tensor.dispose();
    }
  };
}
