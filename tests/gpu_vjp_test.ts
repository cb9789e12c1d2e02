// mlaAttentionVjp() where the tensors lie on a GPU: who owns what, and what it says of mistakes.

import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects } from "@std/assert";
import { type AnyTensor, FlashMLAError, type HostTensor, mlaAttentionVjp, type OwnedGpuTensor, toGpu } from "../mod.ts";
import { toFloats, toHalves } from "../src/op/half.ts";
import { mapTensors, mlaProblem } from "../src/op/mla_problem.ts";
import { isGpuTensor, type Tensor } from "../src/op/tensor.ts";
import { toHost } from "../src/gpu/gpu_tensor.ts";
import { referenceMlaAttentionBackward } from "../src/reference/mla_attention_backward.ts";
import { skip, smallConfig, testContext } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { normals, randomTensor } from "./support/random_problem.ts";

const options = { causal: true, platform: "webgpu", cfg: smallConfig } as const;
const random = normals(21);
const draw = (...shape: number[]) => randomTensor(shape, random);
const inputs = {
  query: draw(2, 19, 4, 12),
  keyValue: draw(2, 23, 12),
  wKc: draw(12, 2, 8),
  wVc: draw(12, 2, 8),
  bK: draw(2, 23, 4),
};
const gradOutput = draw(2, 19, 4, 8);
const problem = mlaProblem(inputs, options);

/** The inputs on the GPU, and what gives them back. */
async function upload(): Promise<[Record<keyof typeof inputs, OwnedGpuTensor>, () => void]> {
  const made: [string, OwnedGpuTensor][] = [];
  for (const [name, tensor] of Object.entries(inputs)) made.push([name, await toGpu(tensor)]);
  const dispose = () => made.forEach(([, tensor]) => tensor.dispose());
  return [Object.fromEntries(made) as Record<keyof typeof inputs, OwnedGpuTensor>, dispose];
}

async function onHost(tensor: AnyTensor): Promise<Tensor> {
  return toFloats(isGpuTensor(tensor) ? await toHost(tensor) : tensor);
}

describe("mlaAttentionVjp() on the GPU", { skip }, () => {
  test("keeps gradients where their tensors lie, and gives every buffer back", async () => {
    const { buffers } = await testContext();
    const before = buffers.lent;
    const [onGpu, dispose] = await upload();
    const mixed = { ...onGpu, wKc: inputs.wKc, wVc: toHalves(inputs.wVc) };
    const call = await mlaAttentionVjp(mixed, options);
    const grads = await call.vjp(gradOutput);
    assertEquals(
      [grads.query, grads.keyValue, grads.wKc, grads.wVc, grads.bK].map((grad) => isGpuTensor(grad)),
      [true, true, false, false, true],
    );
    assertEquals((grads.wVc as HostTensor).dtype, "f16");
    const rounded = { ...inputs, wVc: toFloats(toHalves(inputs.wVc)) };
    const expected = referenceMlaAttentionBackward(rounded, problem, gradOutput);
    for (const name of ["query", "keyValue", "wKc", "wVc", "bK"] as const) {
      assertClose(await onHost(grads[name]), expected[name]!, { relL2: name === "wVc" ? 1e-3 : 1e-5 }, name);
    }
    for (const tensor of [...Object.values(grads), call.output, call.lse]) {
      if (isGpuTensor(tensor as AnyTensor)) (tensor as OwnedGpuTensor).dispose();
    }
    call.dispose();
    dispose();
    assertEquals(buffers.lent, before);
  });

  test("gives the same bits each time, whichever side gradOutput lies on", async () => {
    await testContext();
    using call = await mlaAttentionVjp(inputs, options);
    const grad = await toGpu(gradOutput);
    const first = await call.vjp(gradOutput);
    assertEquals(await call.vjp(gradOutput), first);
    assertEquals(await call.vjp(grad), first);
    grad.dispose();
  });

  test("names residuals that were disposed of, and a gradOutput that was", async () => {
    await testContext();
    const [onGpu, dispose] = await upload();
    const { output, lse, vjp } = await mlaAttentionVjp(onGpu, options);
    const grad = await toGpu(gradOutput);
    grad.dispose();
    await assertRejects(() => vjp(grad), FlashMLAError, "gradOutput as a tensor: it was disposed of");
    (lse as OwnedGpuTensor).dispose();
    await assertRejects(() => vjp(gradOutput), FlashMLAError, "lse was disposed of");
    output.dispose();
    dispose();
  });

  test("gives halves for halves", async () => {
    await testContext();
    const halves = mapTensors<Tensor, HostTensor>(inputs, toHalves);
    const { vjp } = await mlaAttentionVjp(halves, options);
    const grads = await vjp(toHalves(gradOutput));
    assert([grads.query, grads.wKc, grads.bK!].every((grad) => (grad as HostTensor).dtype === "f16"));
  });
});
