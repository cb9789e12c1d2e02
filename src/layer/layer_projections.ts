// What a layer does before attention: projections, norms and rotations, from hidden states to queries and cache rows.

import type { GpuContext } from "../gpu/device.ts";
import { dividedLinearSteps } from "../gpu/divided_linear.ts";
import type { KernelStep, KernelSteps } from "../gpu/kernel_steps.ts";
import { bytesOf, normStep, rotateStep, type RotateWork } from "../gpu/layer_steps.ts";
import { linearBytes, linearKernel, type LinearRows, plainRows } from "../gpu/linear.ts";
import type { MlaModelConfig } from "../model/attention_config.ts";
import { queryFactors } from "../model/query_factors.ts";
import type { GpuTensor } from "../op/tensor.ts";
import type { GpuLayerWeights } from "./gpu_weights.ts";
import type { LayerCall } from "./layer_call.ts";
import { rotaryTurns } from "./rotary_turns.ts";

/**
 * Plans them.
 *
 * @param steps Takes what is uploaded and borrowed: queries and rows live as long as it does.
 * @param context The device.
 * @param config The layer.
 * @param weights Its weights.
 * @param work The hidden states, the call, and how the cache stores its rows.
 * @returns Queries `[batch, length, H, P + R]`, rows `[batch, length, L + R]`, and the kernels that make them.
 * @throws {FlashMLAError} With code `limit` when rows pass a binding.
 */
export function layerProjections(
  steps: KernelSteps,
  { device, capabilities }: GpuContext,
  config: MlaModelConfig,
  weights: GpuLayerWeights,
  { input, call, rowDtype = weights.dtype }: {
    readonly input: LinearRows;
    readonly call: LayerCall;
    readonly rowDtype?: "f32" | "f16";
  },
): { readonly query: GpuTensor; readonly rows: GpuTensor; readonly kernels: KernelStep[] } {
  const { limits } = capabilities;
  const { queryHeads: H, qLoraRank, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, rope, latentNormEps } = config;
  const { down, queryUp, norms, dtype } = weights;
  const { batch, length } = call;
  const count = batch * length;
  const [width, first] = [down.outputs, down.outputs - L - R];

  const wide = { buffer: steps.borrow(linearBytes(count, down, "f32")), dtype: "f32" as const };
  const parts = [
    ...(qLoraRank === null ? [] : [{ first: 0, width: qLoraRank, weight: 0 }]),
    { first, width: L, weight: qLoraRank ?? 0 },
  ];
  // Matrix units read halves, and twice as fast where they lie as such.
  const onUnits = queryUp !== null && qLoraRank! % 8 === 0 && linearKernel(count, queryUp, capabilities) === "matrix";
  const halves = onUnits ? steps.borrow(bytesOf(count * qLoraRank!, "f16")) : undefined;
  const kernels = [
    ...dividedLinearSteps(steps, capabilities, "down projections", input, down, wide),
    normStep(steps, { buffer: wide.buffer, count, row: width }, parts, norms, latentNormEps, halves),
  ];
  let source: RotateWork["source"] = { ...wide, base: 0, row: width };
  if (queryUp !== null) {
    const latent = halves === undefined
      ? plainRows(wide.buffer, "f32", count, width)
      : plainRows(halves, "f16", count, qLoraRank!);
    const result = { buffer: steps.borrow(linearBytes(count, queryUp, dtype)), dtype };
    kernels.push(...dividedLinearSteps(steps, capabilities, "q_b_proj", latent, queryUp, result));
    source = { ...result, base: 0, row: queryUp.outputs };
  }

  const turns = turnsOf(steps, call, config);
  const layout = rope && rope.layout;
  const queryRow = padded(H * (P + R));
  const query = { buffer: steps.borrow(bytesOf(count * queryRow, dtype)), dtype, row: queryRow };
  kernels.push(
    rotateStep(steps, "rotate queries", {
      ...{ source, result: query, count, heads: H, before: P, dim: R, layout, turns },
      factors: factorsOf(steps, call, config),
    }, limits),
  );
  const stored = rowDtype === "f16" && capabilities.f16 ? "f16" : "f32";
  const row = padded(L + R);
  const rows = { buffer: steps.borrow(bytesOf(count * row, stored)), dtype: stored, row } as const;
  kernels.push(
    rotateStep(steps, "rotate keys", {
      ...{ source: { ...wide, base: first, row: width }, result: rows },
      ...{ count, heads: 1, before: L, dim: R, layout, turns, factors: null },
    }, limits),
  );
  return {
    kernels,
    query: {
      ...{ buffer: query.buffer, dtype, device, shape: [batch, length, H, P + R] },
      strides: [length * queryRow, queryRow, P + R, 1],
    },
    rows: {
      ...{ buffer: rows.buffer, dtype: stored, device, shape: [batch, length, L + R] },
      strides: [length * row, row, 1],
    },
  };
}

function turnsOf(steps: KernelSteps, call: LayerCall, { rope }: MlaModelConfig): GPUBufferBinding | null {
  if (rope === null) return null;
  const turns = rotaryTurns(rope, call);
  return { buffer: steps.upload(turns.buffer), size: turns.byteLength };
}

function factorsOf(
  steps: KernelSteps,
  { positions }: LayerCall,
  { qLoraRank, queryScale, queryTemperature }: MlaModelConfig,
): GPUBufferBinding | null {
  // Behind a norm the constant factor is in its weight.
  const constant = qLoraRank === null ? queryScale : 1;
  const factors = queryFactors({ queryScale: constant, queryTemperature }, positions) ??
    (constant === 1 ? null : new Float32Array(positions.length).fill(constant));
  if (factors === null) return null;
  const data = new Float32Array(Math.ceil(factors.length / 4) * 4);
  data.set(factors);
  return { buffer: steps.upload(data.buffer), size: data.byteLength };
}

/** Rows that begin at whole quads of 16 bytes, in halves too. */
function padded(width: number): number {
  return Math.ceil(width / 8) * 8;
}
