// One copy between halves in a caller's buffer and dense float32 in memory of ours, ready to be recorded.

import { denseStrides, type GpuTensor, type OwnedGpuTensor } from "../op/tensor.ts";
import { BufferUsage } from "./buffers.ts";
import { type GpuContext, gpuContext, unlessLost } from "./device.ts";
import { inErrorScopes } from "./error_scopes.ts";
import { allocated } from "./gpu_tensor.ts";
import { type HalfCopyDirection, wgsl, workgroupSize } from "./kernels/half_copy.ts";
import { residentLayout, rowWindow } from "./operand_layout.ts";
import type { RowRange } from "./schedule.ts";

/** A copy with its pipeline and bindings. */
export interface HalfCopy {
  /** Records the copy into a pass. */
  encode(pass: GPUComputePassEncoder): void;
  /** Frees the copy's own memory. */
  dispose(): void;
}

/** The kernel that copies in one direction. */
export function halfPipeline(context: GpuContext, direction: HalfCopyDirection): Promise<GPUComputePipeline> {
  return context.pipelines.get(`half ${direction}`, wgsl(direction));
}

/**
 * Prepares a copy of some rows of a tensor of halves.
 *
 * @param context The device.
 * @param pipeline The kernel of {@link halfPipeline}: from halves to float32, or back.
 * @param tensor The halves, of three or four axes.
 * @param rows Rows, counted through the first two axes.
 * @param dense The float32 side.
 */
export function halfCopy(
  context: GpuContext,
  pipeline: GPUComputePipeline,
  tensor: GpuTensor,
  rows: RowRange,
  dense: GPUBuffer,
): HalfCopy {
  const { device, capabilities } = context;
  const { shape, strides = denseStrides(shape) } = tensor;
  const inner = shape.slice(2);
  const width = inner.reduce((span, length, i) => span + (length - 1) * strides[i + 2], 1);
  const { offset, size, base } = rowWindow(residentLayout(tensor), shape[1], rows.start, rows.end, width);
  const [heads, columns] = shape.length === 4 ? inner : [1, inner[0]];
  const count = (rows.end - rows.start) * heads * columns;
  const first = rows.start % shape[1];
  const [item, position, head] = strides;
  const words = Uint32Array.from(
    [count, base - first * position, first, shape[1], heads, columns, item, position, shape.length === 4 ? head : 0],
    (word) => word >>> 0,
  );
  const params = device.createBuffer({ size: words.byteLength, usage: BufferUsage.UNIFORM | BufferUsage.COPY_DST });
  device.queue.writeBuffer(params, 0, words);
  const maxBinding = capabilities.limits.maxStorageBufferBindingSize;
  const bindGroup = device.createBindGroup({
    layout: pipeline.getBindGroupLayout(0),
    entries: [
      { binding: 0, resource: { buffer: params } },
      { binding: 1, resource: { buffer: tensor.buffer, offset, size } },
      { binding: 2, resource: { buffer: dense, size: Math.min(dense.size, Math.floor(maxBinding / 4) * 4) } },
    ],
  });
  const workgroups = Math.min(
    Math.ceil(count / workgroupSize),
    capabilities.limits.maxComputeWorkgroupsPerDimension,
  );
  return {
    encode(pass) {
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, bindGroup);
      pass.dispatchWorkgroups(workgroups);
    },
    dispose: () => params.destroy(),
  };
}

/**
 * A dense tensor of four axes, rounded to halves in memory of its own.
 *
 * @param floats The tensor, float32.
 * @throws {FlashMLAError} With code `device` when the device fails.
 */
export async function halvesOnGpu(floats: OwnedGpuTensor): Promise<OwnedGpuTensor> {
  const context = await gpuContext(floats.device);
  const pipeline = await halfPipeline(context, "pack");
  const halves = await allocated(context, floats.shape, "f16");
  const [batch, length] = floats.shape;
  try {
    await unlessLost(context, () =>
      inErrorScopes(context, "round a tensor to halves", () => {
        const copy = halfCopy(context, pipeline, halves, { start: 0, end: batch * length }, floats.buffer);
        const encoder = context.device.createCommandEncoder({ label: "flash-mla halves" });
        const pass = encoder.beginComputePass();
        copy.encode(pass);
        pass.end();
        context.device.queue.submit([encoder.finish()]);
        copy.dispose();
      }));
    return halves;
  } catch (error) {
    halves.dispose();
    throw error;
  }
}
