// A layer on a GPU. One call is one encoder and one submission:
//
//   hidden ─ down ─┬─ norm ─ q_b_proj ─ rotate ─ query ───────────────┐
//                  └─ norm, rotate ─ rows ─ append ─ (cache, gather) ─┴─ attention ─ o_proj ─ output
//
// `down` is q_a_proj, or q_proj, and kv_a_proj_with_mqa side by side: both read the hidden states. It is float32 whatever the
// storage, so that norms work in place on full precision.

import { BufferUsage } from "../gpu/buffers.ts";
import { type GpuContext, gpuContext, unlessLost } from "../gpu/device.ts";
import { foreignBuffer, inErrorScopes } from "../gpu/error_scopes.ts";
import { allocated } from "../gpu/gpu_tensor.ts";
import { halfCopy, halfPipeline } from "../gpu/half_copy.ts";
import { type KernelStep, KernelSteps } from "../gpu/kernel_steps.ts";
import { bytesOf, normStep, rotateStep, type RotateWork } from "../gpu/layer_steps.ts";
import { linearBytes, type LinearRows, linearSteps } from "../gpu/linear.ts";
import { batchGap, residentLayout, rowWindow } from "../gpu/operand_layout.ts";
import { settled } from "../gpu/settled.ts";
import type { MlaModelConfig } from "../model/attention_config.ts";
import { queryFactors } from "../model/query_factors.ts";
import { rotaryTable } from "../model/rotary.ts";
import { FlashMLAError } from "../op/errors.ts";
import { halfTensor, toFloats, toHalves, zeros } from "../op/half.ts";
import {
  type AnyTensor,
  dtypeOf,
  elementBytes,
  elementCount,
  type GpuTensor,
  type HostTensor,
  isGpuTensor,
  type OwnedGpuTensor,
} from "../op/tensor.ts";
import { type GpuLayerWeights, gpuWeights } from "./gpu_weights.ts";
import { encodeLayerAttention } from "./layer_attention.ts";
import { layerCacheInside, type MlaLayerCache } from "./layer_cache.ts";
import type { LayerCall } from "./layer_call.ts";
import type { LayerTarget, LayerTuning } from "./layer_target.ts";
import type { NamedWeights } from "./layer_weights.ts";

/**
 * Loads a layer.
 *
 * @param config The layer.
 * @param weights Its weights.
 * @param dtype How projections, and what passes between the steps, are stored.
 * @param device The device; the process's own when absent.
 */
export async function gpuLayer(
  config: MlaModelConfig,
  weights: NamedWeights,
  dtype: "f32" | "f16",
  device?: GPUDevice,
): Promise<LayerTarget> {
  const context = await gpuContext(device);
  return new GpuLayer(context, config, await gpuWeights(context, config, weights, dtype));
}

/** What one call holds until its submission. */
interface Recorded {
  readonly encoder: GPUCommandEncoder;
  readonly steps: KernelSteps[];
  readonly held: { dispose(): void }[];
}

class GpuLayer implements LayerTarget {
  readonly platform = "webgpu";
  readonly #context: GpuContext;
  readonly #config: MlaModelConfig;
  readonly #weights: GpuLayerWeights;

  constructor(context: GpuContext, config: MlaModelConfig, weights: GpuLayerWeights) {
    this.#context = context;
    this.#config = config;
    this.#weights = weights;
  }

  get device(): GPUDevice {
    return this.#context.device;
  }

  dispose(): void {
    this.#weights.dispose();
  }

  async forward(
    hiddenStates: AnyTensor,
    call: LayerCall,
    cache: MlaLayerCache | undefined,
    tuning: LayerTuning,
  ): Promise<AnyTensor> {
    const context = this.#context;
    const resident = isGpuTensor(hiddenStates);
    const dtype = dtypeOf(hiddenStates) === "f16" ? "f16" : "f32";
    if (elementCount(hiddenStates.shape) === 0) {
      return resident ? await allocated(context, hiddenStates.shape, dtype) : zeros(hiddenStates.shape, dtype);
    }
    const encoder = context.device.createCommandEncoder({ label: "flash-mla layer" });
    const recorded: Recorded = { encoder, steps: [], held: [] };
    let output: OwnedGpuTensor | undefined;
    try {
      output = await allocated(context, hiddenStates.shape, dtype);
      await this.#record(recorded, hiddenStates, call, cache, tuning, output);
      const checkAlive = () => {
        if (resident && hiddenStates.disposed === true) {
          const why = "hiddenStates was disposed of while the call was under way; await it first";
          throw new FlashMLAError("invalid-input", `Cannot run the layer: ${why}`);
        }
        if (cache?.disposed) layerCacheInside(cache);
      };
      if (resident) {
        await submit(context, encoder, checkAlive);
        return output;
      }
      const bytes = await submitAndRead(context, encoder, output, checkAlive);
      output.dispose();
      return dtype === "f16"
        ? halfTensor(new Uint16Array(bytes, 0, elementCount(output.shape)), output.shape)
        : { data: new Float32Array(bytes, 0, elementCount(output.shape)), shape: output.shape };
    } catch (error) {
      output?.dispose();
      // Any of the buffers may be one that the device refused: nobody may get it from the pool.
      recorded.steps.splice(0).forEach((steps) => steps.discard());
      throw foreignBuffer("run the layer", error) ?? error;
    } finally {
      for (
        const { dispose } of [...recorded.steps, ...recorded.held].map((part) => ({ dispose: () => part.dispose() }))
      ) {
        dispose();
      }
    }
  }

  /** Records the whole layer. */
  async #record(
    recorded: Recorded,
    hiddenStates: AnyTensor,
    call: LayerCall,
    cache: MlaLayerCache | undefined,
    tuning: LayerTuning,
    output: GpuTensor,
  ): Promise<void> {
    const { encoder, held } = recorded;
    const { queryHeads: H, vHeadDim: V } = this.#config;
    const { dtype } = this.#weights;
    const { capabilities } = this.#context;
    const count = call.batch * call.length;
    const input = await this.#input(recorded, hiddenStates);
    const before = this.#steps(recorded);
    const { query, rows, kernels } = this.#project(before, input, call, cache);
    await before.bind("run the layer", kernels);
    await before.record(encoder, "run the layer");

    if (cache !== undefined) {
      const { latents, blockTable } = layerCacheInside(cache);
      const { before: seqLens, cuSeqlens } = call;
      held.push(await latents.encodeAppend(encoder, rows, { blockTable, seqLens, cuSeqlens }));
    }
    const after = this.#steps(recorded);
    // Attention writes whole words.
    const attended: GpuTensor = {
      buffer: after.borrow(bytesOf(count * H * V, "f32")),
      shape: [call.batch, call.length, H, V],
      dtype: H * V % 2 === 0 ? dtype : "f32",
      device: this.device,
    };
    const { wKc, wVc } = this.#weights;
    await encodeLayerAttention(
      encoder,
      { query, rows, cache, wKc, wVc, out: attended },
      call,
      this.#config,
      tuning,
      held,
    );

    const attendedRows = { ...plainRows(attended.buffer, attended.dtype, count, H * V) };
    // Without half precision results in halves are packed behind.
    const packed = output.dtype === "f16" && !capabilities.f16;
    const result = packed
      ? { buffer: after.borrow(linearBytes(count, this.#weights.output, "f32")), dtype: "f32" as const }
      : output;
    await after.bind(
      "run the layer",
      linearSteps(after, capabilities, "o_proj", attendedRows, this.#weights.output, result),
    );
    await after.record(encoder, "run the layer");
    if (packed) await this.#copyHalves(recorded, "pack", output, result.buffer);
  }

  /** Projections, norms and rotations: what attention reads. */
  #project(
    steps: KernelSteps,
    input: LinearRows,
    call: LayerCall,
    cache: MlaLayerCache | undefined,
  ): { readonly query: GpuTensor; readonly rows: GpuTensor; readonly kernels: KernelStep[] } {
    const { capabilities } = this.#context;
    const { limits } = capabilities;
    const { queryHeads: H, qLoraRank, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, rope, latentNormEps } =
      this.#config;
    const { down, queryUp, norms, dtype } = this.#weights;
    const { batch, length } = call;
    const count = batch * length;
    const [width, first] = [down.outputs, down.outputs - L - R];

    const wide = { buffer: steps.borrow(linearBytes(count, down, "f32")), dtype: "f32" as const };
    const parts = [
      ...(qLoraRank === null ? [] : [{ first: 0, width: qLoraRank, weight: 0 }]),
      { first, width: L, weight: qLoraRank ?? 0 },
    ];
    const kernels = [
      ...linearSteps(steps, capabilities, "down projections", input, down, wide),
      normStep(steps, { buffer: wide.buffer, count, row: width }, parts, norms, latentNormEps),
    ];
    let source: RotateWork["source"] = { ...wide, base: 0, row: width };
    if (queryUp !== null) {
      const latent = { ...plainRows(wide.buffer, "f32", count, width) };
      const result = { buffer: steps.borrow(linearBytes(count, queryUp, dtype)), dtype };
      kernels.push(...linearSteps(steps, capabilities, "q_b_proj", latent, queryUp, result));
      source = { ...result, base: 0, row: queryUp.outputs };
    }

    const turns = this.#turns(steps, call);
    const layout = rope && rope.layout;
    const queryRow = padded(H * (P + R));
    const query = { buffer: steps.borrow(bytesOf(count * queryRow, dtype)), dtype, row: queryRow };
    kernels.push(
      rotateStep(steps, "rotate queries", {
        ...{ source, result: query, count, heads: H, before: P, dim: R, layout, turns },
        factors: this.#factors(steps, call),
      }, limits),
    );
    const rowDtype = (cache?.dtype ?? dtype) === "f16" && capabilities.f16 ? "f16" : "f32";
    const row = padded(L + R);
    const rows = { buffer: steps.borrow(bytesOf(count * row, rowDtype)), dtype: rowDtype, row } as const;
    kernels.push(
      rotateStep(steps, "rotate keys", {
        ...{ source: { ...wide, base: first, row: width }, result: rows },
        ...{ count, heads: 1, before: L, dim: R, layout, turns, factors: null },
      }, limits),
    );
    const { device } = this;
    return {
      kernels,
      query: {
        ...{ buffer: query.buffer, dtype, device, shape: [batch, length, H, P + R] },
        strides: [length * queryRow, queryRow, P + R, 1],
      },
      rows: {
        ...{ buffer: rows.buffer, dtype: rowDtype, device, shape: [batch, length, L + R] },
        strides: [length * row, row, 1],
      },
    };
  }

  /** Cosines and sines of every token; each sequence's by itself, since stretched positions depend on how long it is. */
  #turns(steps: KernelSteps, { tokenStarts, positions }: LayerCall): GPUBufferBinding | null {
    const { rope } = this.#config;
    if (rope === null) return null;
    const pairs = rope.dim / 2;
    const turns = new Float32Array(Math.max(4, positions.length * pairs * 2));
    for (let s = 0; s + 1 < tokenStarts.length; s++) {
      const { cos, sin } = rotaryTable(rope, positions.subarray(tokenStarts[s], tokenStarts[s + 1]));
      const at = tokenStarts[s] * pairs * 2;
      for (let i = 0; i < cos.length; i++) {
        turns[at + 2 * i] = cos[i];
        turns[at + 2 * i + 1] = sin[i];
      }
    }
    return { buffer: steps.upload(turns.buffer), size: turns.byteLength };
  }

  #factors(steps: KernelSteps, { positions }: LayerCall): GPUBufferBinding | null {
    const { qLoraRank, queryScale, queryTemperature } = this.#config;
    // Behind a norm the constant factor is in its weight.
    const constant = qLoraRank === null ? queryScale : 1;
    const factors = queryFactors({ queryScale: constant, queryTemperature }, positions) ??
      (constant === 1 ? null : new Float32Array(positions.length).fill(constant));
    if (factors === null) return null;
    const data = new Float32Array(Math.ceil(factors.length / 4) * 4);
    data.set(factors);
    return { buffer: steps.upload(data.buffer), size: data.byteLength };
  }

  /** The hidden states as the first projection reads them. */
  async #input(recorded: Recorded, hiddenStates: AnyTensor): Promise<LinearRows> {
    const { f16 } = this.#context.capabilities;
    const [batch, length, width] = hiddenStates.shape;
    const count = batch * length;
    if (!isGpuTensor(hiddenStates)) {
      const steps = this.#steps(recorded);
      const tensor = dtypeOf(hiddenStates) === "f16" && f16 ? hiddenStates : toFloats(hiddenStates as HostTensor);
      const { data } = tensor;
      const bytes = new Uint8Array(bytesOf(count * width, dtypeOf(tensor) === "f16" ? "f16" : "f32"));
      bytes.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
      return plainRows(steps.upload(bytes.buffer), dtypeOf(tensor) === "f16" ? "f16" : "f32", count, width);
    }
    if (hiddenStates.dtype === "f16" && !f16) {
      const buffer = this.#steps(recorded).borrow(bytesOf(count * width, "f32"));
      await this.#copyHalves(recorded, "unpack", hiddenStates, buffer);
      return plainRows(buffer, "f32", count, width);
    }
    const layout = residentLayout(hiddenStates);
    const { offset, size, base } = rowWindow(layout, length, 0, count, width);
    const { buffer, dtype } = hiddenStates;
    return {
      buffer,
      dtype,
      offset,
      size,
      base,
      row: layout.row,
      count,
      perItem: length,
      gap: batchGap(layout, length),
    };
  }

  /** Records a copy between halves and float32, for devices without half precision. */
  async #copyHalves(
    { encoder, held }: Recorded,
    direction: "pack" | "unpack",
    halves: GpuTensor,
    floats: GPUBuffer,
  ): Promise<void> {
    const context = this.#context;
    const pipeline = await halfPipeline(context, direction);
    const [batch, length] = halves.shape;
    await inErrorScopes(context, "run the layer", () => {
      const copy = halfCopy(context, pipeline, halves, { start: 0, end: batch * length }, floats);
      held.push(copy);
      const pass = encoder.beginComputePass({ label: `flash-mla ${direction}` });
      copy.encode(pass);
      pass.end();
    });
  }

  #steps({ steps }: Recorded): KernelSteps {
    const made = new KernelSteps(this.#context);
    steps.push(made);
    return made;
  }
}

/** Rows that begin at whole quads of 16 bytes, in halves too. */
function padded(width: number): number {
  return Math.ceil(width / 8) * 8;
}

/** Dense rows from a buffer's start on. */
function plainRows(buffer: GPUBuffer, dtype: "f32" | "f16", count: number, row: number): LinearRows {
  return { buffer, dtype, size: Math.min(buffer.size, bytesOf(count * row, dtype)), base: 0, row, count };
}

async function submit(context: GpuContext, encoder: GPUCommandEncoder, check: () => void): Promise<void> {
  await unlessLost(context, () =>
    inErrorScopes(context, "run the layer", () => {
      check();
      context.device.queue.submit([encoder.finish()]);
    }));
}

/** Submits, with a copy of the result to the host. */
async function submitAndRead(
  context: GpuContext,
  encoder: GPUCommandEncoder,
  { buffer, shape, dtype }: GpuTensor,
  check: () => void,
): Promise<ArrayBuffer> {
  const size = Math.ceil(elementCount(shape) * elementBytes(dtype) / 4) * 4;
  const readback = context.buffers.acquire("readback", size);
  try {
    encoder.copyBufferToBuffer(buffer, 0, readback, 0, size);
    await submit(context, encoder, check);
    return await unlessLost(context, async () => {
      await settled(context.device, readback.mapAsync(1, 0, size));
      const bytes = readback.getMappedRange(0, size).slice(0);
      readback.unmap();
      context.buffers.release("readback", readback);
      return bytes;
    });
  } catch (error) {
    // It may be mapped or waiting for it: nobody may get it from the pool.
    context.buffers.discard(readback);
    throw error;
  }
}
