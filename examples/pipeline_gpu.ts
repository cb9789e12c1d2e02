// The pipeline with everything on the GPU: weights are uploaded once, every step is one submission, and only the final
// hidden states are read back.

import { encodeMlaAttention, type GpuTensor, type MlaExecutor, type Tensor, toGpu, toHost } from "../mod.ts"; // in your project: "@flash-mla/webgpu"
import { type BoundKernel, pipelineKernels } from "./pipeline_kernels.ts";
import type { LayerWeights, Model } from "./pipeline_model.ts";

export interface GpuRun {
  /** The final hidden states, `[promptTokens + steps, hidden]`. */
  readonly output: Tensor;
  readonly submissions: number;
  readonly bytesReadBack: number;
  /** Milliseconds of the prompt. */
  readonly promptMs: number;
  /** Milliseconds of a decoding step, the mean of all. */
  readonly stepMs: number;
}

export interface GpuPipeline {
  /** Runs prompt and decoding steps from an empty cache. */
  run(): Promise<GpuRun>;
  /** Frees all that it allocated. */
  dispose(): void;
}

/** A layer's kernels, and its attention's tensors. */
interface GpuLayer {
  readonly weights: LayerWeights<GpuTensor>;
  readonly cache: GPUBuffer;
  readonly before: readonly BoundKernel[];
  readonly after: readonly BoundKernel[];
}

// Numbers, since GPUBufferUsage is no global in Bun and Node.
const UNIFORM = 0x40 | 0x8; // UNIFORM | COPY_DST
const STORAGE = 0x80 | 0x4 | 0x8; // STORAGE | COPY_SRC | COPY_DST

/** Uploads the weights, and allocates caches with room for all tokens. */
export async function gpuPipeline(
  model: Model,
  { device, executor }: { readonly device: GPUDevice; readonly executor: MlaExecutor },
): Promise<GpuPipeline> {
  const { hidden: width, heads, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = model.sizes;
  const { promptTokens, steps } = model.sizes;
  const room = promptTokens + steps;

  const buffers: GPUBuffer[] = [];
  const allocate = (size: number, usage: number) => {
    const buffer = device.createBuffer({ size, usage });
    buffers.push(buffer);
    return buffer;
  };
  const floats = (count: number) => allocate(count * 4, STORAGE);
  const tensors: { dispose(): void }[] = [];
  const upload = async (tensor: Tensor) => {
    const uploaded = await toGpu(tensor, device);
    tensors.push(uploaded);
    return uploaded;
  };

  // What the layers hand on to each other is there once: they run one after another.
  const tokensBefore = allocate(4, UNIFORM);
  const hidden = floats(promptTokens * width);
  const normed = floats(promptTokens * width);
  const query = floats(promptTokens * heads * (P + R));
  const attended = floats(promptTokens * heads * V);
  const output = floats(room * width);
  const kernels = pipelineKernels(device, tokensBefore);

  const layers: GpuLayer[] = [];
  for (const { gain, wQ, wKvA, wKc, wVc, wO } of model.layers) {
    const weights = {
      gain: await upload(gain),
      wQ: await upload(wQ),
      wKvA: await upload(wKvA),
      wKc: await upload(wKc),
      wVc: await upload(wVc),
      wO: await upload(wO),
    };
    const cache = floats(room * (L + R));
    layers.push({
      weights,
      cache,
      before: [
        kernels.norm(width, { x: hidden, weight: weights.gain.buffer, result: normed }),
        kernels.product({ inner: width, columns: heads * (P + R) }, {
          x: normed,
          weight: weights.wQ.buffer,
          result: query,
        }),
        kernels.product({ inner: width, columns: L + R, append: true }, {
          x: normed,
          weight: weights.wKvA.buffer,
          result: cache,
        }),
      ],
      after: [
        kernels.product({ inner: heads * V, columns: width, add: true }, {
          x: attended,
          weight: weights.wO.buffer,
          result: hidden,
        }),
      ],
    });
  }
  const gain = await upload(model.gain);
  const finalNorm = kernels.norm(width, { x: hidden, weight: gain.buffer, result: normed });

  function encode(encoder: GPUCommandEncoder, kernels: readonly BoundKernel[], rows: number): void {
    const pass = encoder.beginComputePass();
    for (const kernel of kernels) kernel.encode(pass, rows);
    pass.end();
  }

  /** All layers for the next `rows` tokens, which stand in `hidden`, behind `position` tokens that the caches hold. */
  async function submitStep(rows: number, position: number): Promise<void> {
    const length = position + rows;
    const encoder = device.createCommandEncoder();
    const calls: { dispose(): void }[] = [];
    for (const { weights: { wKc, wVc }, cache, before, after } of layers) {
      encode(encoder, before, rows);
      // One cache row is a token's latent row and its rope key: two views with the same strides.
      const strides = [room * (L + R), L + R, 1];
      const call = await encodeMlaAttention(encoder, {
        query: { buffer: query, shape: [1, rows, heads, P + R], dtype: "f32" },
        keyValue: { buffer: cache, shape: [1, length, L], strides, dtype: "f32" },
        bK: { buffer: cache, shape: [1, length, R], strides, offset: L * 4, dtype: "f32" },
        wKc,
        wVc,
      }, {
        device,
        executor,
        causal: true,
        out: { buffer: attended, shape: [1, rows, heads, V], dtype: "f32" },
      });
      calls.push(call);
      encode(encoder, after, rows);
    }
    encode(encoder, [finalNorm], rows);
    encoder.copyBufferToBuffer(normed, 0, output, position * width * 4, rows * width * 4);
    // Stands in for a token's embedding: the states that the token before it ended with.
    encoder.copyBufferToBuffer(normed, (rows - 1) * width * 4, hidden, 0, width * 4);
    device.queue.writeBuffer(tokensBefore, 0, Uint32Array.of(position));
    device.queue.submit([encoder.finish()]);
    for (const call of calls) call.dispose();
  }

  async function run(): Promise<GpuRun> {
    device.queue.writeBuffer(hidden, 0, model.prompt.data as Float32Array<ArrayBuffer>);
    await device.queue.onSubmittedWorkDone();
    const start = performance.now();
    await submitStep(promptTokens, 0);
    await device.queue.onSubmittedWorkDone();
    const prompted = performance.now();
    // Steps are submitted without waiting for the ones before: the GPU keeps the order.
    for (let i = 0; i < steps; i++) await submitStep(1, promptTokens + i);
    await device.queue.onSubmittedWorkDone();
    const decoded = performance.now();
    const result = await toHost({ buffer: output, shape: [room, width], dtype: "f32" }, device);
    return {
      output: result as Tensor,
      submissions: 1 + steps,
      bytesReadBack: result.data.byteLength,
      promptMs: prompted - start,
      stepMs: (decoded - prompted) / steps,
    };
  }

  return {
    run,
    dispose() {
      for (const tensor of tensors) tensor.dispose();
      for (const buffer of buffers) buffer.destroy();
    },
  };
}
