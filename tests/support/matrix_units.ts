// Calls on matrix units against the oracle; on devices without units they are emulated.

import { assertEquals } from "@std/assert";
import { type HostTensor, openDevice, toFloats } from "../../mod.ts";
import { type GpuContext, gpuContext } from "../../src/gpu/device.ts";
import { subgroupMatrixFeature } from "../../src/gpu/request_device.ts";
import { webgpuTarget } from "../../src/gpu/webgpu_implementation.ts";
import type { FlashMLAConfig } from "../../src/op/config.ts";
import { mapTensors, mlaProblem, type TensorName, tensorNames } from "../../src/op/mla_problem.ts";
import type { AnyTensor, Tensor } from "../../src/op/tensor.ts";
import { referenceMlaAttentionWithLse } from "../../src/reference/mla_attention.ts";
import { referenceMlaAttentionBackward } from "../../src/reference/mla_attention_backward.ts";
import { rounded, type Stored, stored } from "./dtype_attention.ts";
import { skipEmulation, smallConfig, testContext } from "./gpu.ts";
import { assertClose } from "./metrics.ts";
import { type MlaCall, normals, randomTensor } from "./random_problem.ts";

/** A device with matrix units, where there is one. */
const native = skipEmulation === false
  ? await openDevice({ features: [subgroupMatrixFeature] }).then((device) => gpuContext(device), () => null)
  : null;

/** Why tests of the units themselves are skipped, or false. */
export const skipNative: string | false = native?.capabilities.matrixUnits
  ? false
  : "this adapter has no matrix units; deno task test:gpu runs these on one that has";

/** A context whose kernels find matrix units: a device's own, or emulated ones. */
export async function matrixContext(limits: Partial<GpuContext["capabilities"]["limits"]> = {}): Promise<GpuContext> {
  const context = native?.capabilities.matrixUnits ? native : await testContext();
  context.buffers.poison = true;
  const { capabilities } = context;
  const matrixUnits = capabilities.matrixUnits ?? "emulated";
  return { ...context, capabilities: { ...capabilities, matrixUnits, limits: { ...capabilities.limits, ...limits } } };
}

/** Few fragments to a subgroup: the emulation compiles in seconds. */
export const matrixConfig: FlashMLAConfig = {
  ...smallConfig,
  blockQ: 32,
  blockK: 32,
  numWarps: 2,
  rowsPerThread: 32,
  matrixUnits: true,
};

/** Widths that are no multiples of a fragment, lengths that are none of a tile, and grouped heads. */
export function drawn(rope: "in_query" | "shared", packed: boolean): MlaCall {
  const random = normals(packed ? 3 : 4);
  const draw = (...shape: number[]) => randomTensor(shape, random);
  const [batch, queryLength, keyLength] = packed ? [1, 75, 75] : [2, 41, 67];
  const shared = rope === "shared";
  return {
    inputs: {
      query: draw(batch, queryLength, 4, shared ? 12 : 20),
      keyValue: draw(batch, keyLength, 24),
      wKc: draw(24, 2, 12),
      wVc: draw(24, 2, 20),
      ...(shared && { bQ: draw(batch, queryLength, 8) }),
      bK: draw(batch, keyLength, 8),
      softmaxAux: draw(4),
      ...(packed && { cuSeqlens: [0, 9, 9, 50, 75] }),
    },
    options: packed ? { slidingWindow: [30, 6], logitsSoftCap: 4 } : { causal: true, dropout: { rate: 0.2, seed: 7 } },
  };
}

/** What results in halves, or of products in halves, may be off. */
export const bounds = { cosDiff: 5e-6, relL2: 3e-3 };

/** How {@link checkCall} checks. */
export interface CallCheck {
  /** The factor on the gradient of the output. Default 1. */
  readonly gradScale?: number;
  /** What the tensors are stored in. Default halves. */
  readonly stored?: Stored;
}

/** Checks output, log-sum-exp and gradients of a call against the oracle's on its inputs rounded to halves. */
export async function checkCall(
  context: GpuContext,
  { inputs, options }: MlaCall,
  { gradScale = 1, stored: dtype = "f16" }: CallCheck = {},
): Promise<void> {
  const exact = rounded(rounded(inputs, dtype), "f16");
  const given = mapTensors<Tensor, HostTensor>(inputs, (tensor) => stored(tensor, dtype));
  const problem = mlaProblem(given, { ...options, ...(dtype !== "f16" && { precision: "f16" }) });
  const target = webgpuTarget(context);
  assertEquals(target.whyInvalid(problem, matrixConfig), null);
  const expected = referenceMlaAttentionWithLse(exact, problem);
  const saved = await target.runWithLse(problem, given, matrixConfig);
  assertClose(toFloats(saved.output as HostTensor), expected.output, bounds, "output");
  assertClose(saved.lse as Tensor, expected.lse, { relL2: 1e-3 }, "log-sum-exp");

  const gradOutput = randomTensor(expected.output.shape, normals(9));
  for (let i = 0; i < gradOutput.data.length; i++) gradOutput.data[i] *= gradScale;
  const gradients = await target.backward(problem, given, matrixConfig, saved, gradOutput);
  const wanted = referenceMlaAttentionBackward(exact, problem, gradOutput);
  const byName = <T extends AnyTensor>(of: Readonly<Partial<Record<TensorName, T>>>, name: TensorName) => of[name];
  for (const name of tensorNames) {
    const got = byName(gradients as Partial<Record<TensorName, AnyTensor>>, name);
    assertEquals(got === undefined, byName(wanted, name) === undefined, name);
    if (got === undefined) continue;
    // What gradients in halves lose below 6e-5 is theirs, not the kernels'.
    const scaled = (tensor: Tensor) => ({ ...tensor, data: tensor.data.map((x) => x / gradScale) });
    const absolute = gradScale < 1 && dtype === "f16" ? 2 ** -25 / gradScale : 0;
    assertClose(scaled(toFloats(got as HostTensor)), scaled(byName(wanted, name)!), { relL2: 3e-3, absolute }, name);
  }
}
