// Integers that lie on a GPU, read back to be checked.

import { type AnyIndexTensor, isGpuIndex } from "../op/index_tensor.ts";
import { elementCount } from "../op/tensor.ts";
import { gpuContext } from "./device.ts";
import { toHost } from "./gpu_tensor.ts";

/**
 * The integers of a tensor, wherever it lies.
 *
 * @param index The tensor. On a GPU its buffer needs usage `COPY_SRC`.
 * @param device The device, where the tensor does not name it.
 * @throws {FlashMLAError} When the tensor cannot be read (`invalid-input`) or the device fails (`device`).
 */
export async function readIndices(index: AnyIndexTensor, device?: GPUDevice): Promise<Int32Array> {
  if (!isGpuIndex(index)) return index.data;
  const { buffer, shape, offset } = index;
  const owner = index.device ?? device ?? (await gpuContext()).device;
  // The same four bytes each: they are copied, not converted.
  const { data } = await toHost({ buffer, shape: [elementCount(shape)], dtype: "f32", offset, device: owner }, owner);
  return new Int32Array((data as Float32Array).buffer);
}
