// Merging partial results that lie on a GPU: nothing is read back, but sinks that lie there, which are a few numbers.

import { FlashMLAError } from "../op/errors.ts";
import {
  type AnyTensor,
  denseStrides,
  elementBytes,
  elementCount,
  type GpuTensor,
  type OwnedGpuTensor,
  spanElements,
} from "../op/tensor.ts";
import { BufferUsage } from "./buffers.ts";
import { type GpuContext, gpuContext, unlessLost } from "./device.ts";
import { inErrorScopes } from "./error_scopes.ts";
import { allocated } from "./gpu_tensor.ts";
import { halfCopy, halfPipeline } from "./half_copy.ts";
import { wgsl, workgroupSize } from "./kernels/merge_attention_states.ts";
import { checkBinding } from "./limit_checks.ts";
import { sinkSums } from "./sink_sums.ts";

/** A partial result on a GPU. */
export interface GpuAttentionState {
  /** The output, `[batch, queryLength, queryHeads, vHeadDim]`. */
  readonly output: GpuTensor;
  /** The log-sum-exp, `[batch, queryHeads, queryLength]`, float32. */
  readonly lse: GpuTensor;
}

/** A merged result on a GPU, the caller's to dispose of. */
export interface OwnedGpuAttentionState {
  /** The output, of the element type of the first part's. */
  readonly output: OwnedGpuTensor;
  /** The log-sum-exp. */
  readonly lse: OwnedGpuTensor;
}

/**
 * Merges two partial results over disjoint keys.
 *
 * @param a The first part.
 * @param b The second part, of the same shapes on the same device.
 * @param softmaxAux Sinks that join at the end.
 * @throws {FlashMLAError} With code `limit` when a part passes a binding, `device` when the device fails.
 */
export async function mergeOnGpu(
  a: GpuAttentionState,
  b: GpuAttentionState,
  softmaxAux?: AnyTensor,
): Promise<OwnedGpuAttentionState> {
  const context = await gpuContext([a.output, a.lse, b.output, b.lse].find(({ device }) => device)?.device);
  const { shape } = a.output;
  const sinks = softmaxAux === undefined ? null : await sinkSums(softmaxAux, shape[2]);
  const half = a.output.dtype === "f16";
  const code = wgsl({ halvesA: half, halvesB: b.output.dtype === "f16", sinks: sinks !== null });
  const pipeline = await context.pipelines.get("merge attention states", code);
  const pack = half ? await halfPipeline(context, "pack") : null;

  const output = await allocated(context, shape, a.output.dtype);
  const lse = await allocated(context, a.lse.shape, "f32").catch((error) => {
    output.dispose();
    throw error;
  });
  if (elementCount(shape) === 0) return { output, lse };
  const floats = half ? context.buffers.acquire("storage", elementCount(shape) * 4) : output.buffer;
  const temporary: GPUBuffer[] = [];
  try {
    await unlessLost(context, () =>
      inErrorScopes(context, "merge attention states", () => {
        const uploaded = (data: ArrayBuffer | Float32Array<ArrayBuffer>, usage: number) => {
          const { device } = context;
          const buffer = device.createBuffer({ size: data.byteLength, usage: usage | BufferUsage.COPY_DST });
          device.queue.writeBuffer(buffer, 0, data);
          temporary.push(buffer);
          return { buffer };
        };
        const bound = [
          uploaded(params(a, b), BufferUsage.UNIFORM),
          ...[a.output, a.lse, b.output, b.lse].map((tensor) => binding(context, tensor)),
          { buffer: floats },
          { buffer: lse.buffer },
          ...(sinks === null ? [] : [uploaded(sinks, BufferUsage.STORAGE)]),
        ];
        const bindGroup = context.device.createBindGroup({
          layout: pipeline.getBindGroupLayout(0),
          entries: bound.map((resource, index) => ({ binding: index, resource })),
        });
        const encoder = context.device.createCommandEncoder({ label: "flash-mla merge" });
        const pass = encoder.beginComputePass();
        pass.setPipeline(pipeline);
        pass.setBindGroup(0, bindGroup);
        const { maxComputeWorkgroupsPerDimension: most } = context.capabilities.limits;
        pass.dispatchWorkgroups(Math.min(Math.ceil(elementCount(shape) / workgroupSize), most));
        const rows = { start: 0, end: shape[0] * shape[1] };
        const copy = pack && halfCopy(context, pack, output, rows, floats);
        copy?.encode(pass);
        pass.end();
        context.device.queue.submit([encoder.finish()]);
        copy?.dispose();
      }));
    return { output, lse };
  } catch (error) {
    output.dispose();
    lse.dispose();
    throw error;
  } finally {
    // The queue keeps what submitted work needs.
    for (const buffer of temporary) buffer.destroy();
    if (half) context.buffers.release("storage", floats);
  }
}

function params(a: GpuAttentionState, b: GpuAttentionState): ArrayBuffer {
  const [batch, queryLength, queryHeads, vHeadDim] = a.output.shape;
  const packed = new ArrayBuffer(32 + 4 * 16);
  new Float32Array(packed).set([-Infinity]);
  const words = new Uint32Array(packed);
  words.set([batch, queryLength, queryHeads, vHeadDim], 1);
  [a.output, b.output, a.lse, b.lse].forEach((tensor, i) => {
    const { strides = denseStrides(tensor.shape) } = tensor;
    const [item, second, third] = strides;
    const [row, head] = tensor.shape.length === 4 ? [second, third] : [third, second];
    words.set([start(tensor).base, item, row, head], 8 + 4 * i);
  });
  return packed;
}

/** Where a tensor's binding begins, and the elements from there to its first one. */
function start({ offset = 0, dtype }: GpuTensor): { readonly offset: number; readonly base: number } {
  const aligned = Math.floor(offset / 256) * 256;
  return { offset: aligned, base: (offset - aligned) / elementBytes(dtype) };
}

function binding(context: GpuContext, tensor: GpuTensor): GPUBufferBinding {
  const { offset, base } = start(tensor);
  const size = Math.ceil((base + spanElements(tensor)) * elementBytes(tensor.dtype) / 4) * 4;
  checkBinding("an attention state", size, context.capabilities.limits);
  return { buffer: tensor.buffer, offset, size };
}

/** Throws unless both parts lie on one device, as far as they name it. */
export function checkOneDevice(tensors: readonly GpuTensor[]): void {
  const devices = new Set(tensors.map(({ device }) => device).filter((device) => device !== undefined));
  if (devices.size <= 1) return;
  throw new FlashMLAError("invalid-input", "Cannot merge attention states: they lie on different devices");
}
