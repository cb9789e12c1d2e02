// A layer on a GPU. One call is one encoder and one submission:
//
//   hidden ─ down ─┬─ norm ─ q_b_proj ─ rotate ─ query ───────────────┐
//                  └─ norm, rotate ─ rows ─ append ─ (cache, gather) ─┴─ attention ─ o_proj ─ output
//
// `down` is q_a_proj, or q_proj, and kv_a_proj_with_mqa side by side: both read the hidden states. It is float32 whatever the
// storage, so that norms work in place on full precision.

import { type GpuContext, gpuContext } from "../gpu/device.ts";
import { dividedLinearSteps } from "../gpu/divided_linear.ts";
import { foreignBuffer, inErrorScopes } from "../gpu/error_scopes.ts";
import { allocated } from "../gpu/gpu_tensor.ts";
import { halfCopy, halfPipeline } from "../gpu/half_copy.ts";
import { KernelSteps } from "../gpu/kernel_steps.ts";
import { bytesOf } from "../gpu/layer_steps.ts";
import { linearBytes, type LinearRows, plainRows } from "../gpu/linear.ts";
import { batchGap, residentLayout, rowWindow } from "../gpu/operand_layout.ts";
import { ownEncoder } from "../gpu/recording.ts";
import { submit, submitAndRead } from "../gpu/submission.ts";
import type { MlaModelConfig } from "../model/attention_config.ts";
import { FlashMLAError } from "../op/errors.ts";
import { halfTensor, toFloats, zeros } from "../op/half.ts";
import {
  type AnyTensor,
  dtypeOf,
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
import { layerProjections } from "./layer_projections.ts";
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
  /** What has memory, in the order in which it took it. */
  readonly held: { dispose(): void }[];
}

class GpuLayer implements LayerTarget {
  readonly platform = "webgpu";
  readonly #context: GpuContext;
  readonly #config: MlaModelConfig;
  readonly #weights: GpuLayerWeights;
  #disposed = false;

  constructor(context: GpuContext, config: MlaModelConfig, weights: GpuLayerWeights) {
    this.#context = context;
    this.#config = config;
    this.#weights = weights;
  }

  get device(): GPUDevice {
    return this.#context.device;
  }

  dispose(): void {
    this.#disposed = true;
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
    const encoder = ownEncoder(context.device, "flash-mla layer");
    const recorded: Recorded = { encoder, held: [] };
    let output: OwnedGpuTensor | undefined;
    try {
      output = await allocated(context, hiddenStates.shape, dtype);
      await this.#record(recorded, hiddenStates, call, cache, tuning, output);
      const checkAlive = () => this.#checkAlive(hiddenStates, cache);
      if (resident) {
        await submit(context, encoder, "run the layer", checkAlive);
        return output;
      }
      const bytes = await submitAndRead(context, encoder, "run the layer", output, checkAlive);
      output.dispose();
      return dtype === "f16"
        ? halfTensor(new Uint16Array(bytes, 0, elementCount(output.shape)), output.shape)
        : { data: new Float32Array(bytes, 0, elementCount(output.shape)), shape: output.shape };
    } catch (error) {
      output?.dispose();
      // Any of the buffers may be one that the device refused: nobody may get it from the pool.
      for (const part of recorded.held) if (part instanceof KernelSteps) part.discard();
      // What is gone is the reason, whoever stumbled over it.
      this.#checkAlive(hiddenStates, cache);
      throw foreignBuffer("run the layer", error) ?? error;
    } finally {
      // The other way round, so that the next call finds everything where this one did.
      for (const part of recorded.held.reverse()) part.dispose();
    }
  }

  /**
   * Throws when something was disposed of meanwhile: its memory may be another tensor's by now. To be asked in the turn of the
   * submission, which the memory outlives.
   */
  #checkAlive(hiddenStates: AnyTensor, cache: MlaLayerCache | undefined): void {
    const gone = [
      ...(isGpuTensor(hiddenStates) && hiddenStates.disposed === true ? ["hiddenStates"] : []),
      ...(cache?.disposed ? ["cache"] : []),
      ...(this.#disposed ? ["the layer"] : []),
    ];
    if (gone.length === 0) return;
    const why = `${gone[0]} was disposed of while the call was under way; await it first`;
    throw new FlashMLAError("invalid-input", `Cannot run the layer: ${why}`);
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
    const { query, rows, kernels } = layerProjections(before, this.#context, this.#config, this.#weights, {
      input,
      call,
      rowDtype: cache?.dtype,
    });
    await before.bind("run the layer", kernels);
    await before.record(encoder, "run the layer");

    if (cache !== undefined) {
      const { latents, blockTable } = layerCacheInside(cache);
      const { before: seqLens, cuSeqlens } = call;
      held.push(await latents.encodeAppend(encoder, rows, { blockTable, seqLens, cuSeqlens }));
    }
    const after = this.#steps(recorded);
    // Attention writes whole words.
    const attendedType = H * V % 2 === 0 ? dtype : "f32";
    const attended: GpuTensor = {
      buffer: after.borrow(bytesOf(count * H * V, attendedType)),
      shape: [call.batch, call.length, H, V],
      dtype: attendedType,
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

    const attendedRows = plainRows(attended.buffer, attendedType, count, H * V);
    // Without half precision results in halves are packed behind.
    const packed = output.dtype === "f16" && !capabilities.f16;
    const result = packed
      ? { buffer: after.borrow(linearBytes(count, this.#weights.output, "f32")), dtype: "f32" as const }
      : output;
    await after.bind(
      "run the layer",
      dividedLinearSteps(after, capabilities, "o_proj", attendedRows, this.#weights.output, result),
    );
    await after.record(encoder, "run the layer");
    if (packed) await this.#copyHalves(recorded, "pack", output, result.buffer);
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

  #steps({ held }: Recorded): KernelSteps {
    const made = new KernelSteps(this.#context);
    held.push(made);
    return made;
  }
}
