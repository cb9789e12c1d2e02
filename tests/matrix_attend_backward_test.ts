// Gradients on matrix units against the oracle, with emulated products: of attention, and of the expansion, which come from
// ∂K and ∂V. ∂rope is summed over heads here.

import { describe, test } from "node:test";
import { assert } from "@std/assert";
import { type HostInputs, mlaProblem } from "../src/op/mla_problem.ts";
import type { MlaMathOptions } from "../src/op/mla_problem.ts";
import type { MaskTensor, Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionBackward } from "../src/reference/mla_attention_backward.ts";
import { skipEmulation as skip, testContext } from "./support/gpu.ts";
import { MatrixCall, type MatrixSetup } from "./support/matrix_call.ts";
import { relL2 } from "./support/metrics.ts";
import { normals, randomTensor } from "./support/random_problem.ts";

const tile = { rows: 32, columns: 32, rowFragments: 2, pinned: true };
const projection = { blockM: 32, blockN: 32, depth: 32, rowFragments: 1, columnFragments: 1 };
const setup: MatrixSetup = {
  backend: "emulated",
  half: false,
  attend: { blockQ: 32, blockK: 32, subgroups: 2, rowFragments: 1, pinned: true },
  expand: { blockM: 32, blockN: 32, depth: 16, rowFragments: 1, columnFragments: 2 },
  grad: { query: tile, keys: tile },
  project: { latents: projection, weights: { ...projection, blockM: 16, blockN: 64, columnFragments: 2 } },
};
const [L, P, R, V] = [24, 20, 12, 24];

function callOf(batch: number, queryLength: number, keyLength: number, seed: number): HostInputs {
  const random = normals(seed);
  const draw = (...shape: number[]) => randomTensor(shape, random);
  return {
    query: draw(batch, queryLength, 4, P + R),
    keyValue: draw(batch, keyLength, L),
    wKc: draw(L, 2, P),
    wVc: draw(L, 2, V),
    bK: draw(batch, keyLength, R),
  };
}

/** The gradients that follow from the kernels' results. */
async function computed(
  inputs: HostInputs,
  options: MlaMathOptions,
  gradOutput: Tensor,
): Promise<Record<string, Float32Array>> {
  const problem = mlaProblem(inputs, options);
  const { batch, queryLength, keyLength, kvHeads: G, queryHeads: H } = problem;
  const call = await MatrixCall.create(await testContext(), problem, { ...inputs, ...options } as HostInputs, setup);
  try {
    await call.backward(gradOutput);
    await call.projections();
    call.run();
    const rows = batch * keyLength;
    const query = new Float32Array(await call.read("∂query")).subarray(0, batch * queryLength * H * (P + R));
    const expanded = new Float32Array(await call.read("∂expanded"));
    const bK = new Float32Array(rows * R);
    for (let i = 0; i < rows * G * R; i++) {
      bK[Math.floor(i / (G * R)) * R + i % R] += expanded[rows * G * (P + V) + i];
    }
    const read = async (name: string, count: number) => new Float32Array(await call.read(name)).subarray(0, count);
    return {
      ...{ query, bK, keyValue: await read("∂keyValue", rows * L) },
      ...{ wKc: await read("∂wKc", L * G * P), wVc: await read("∂wVc", L * G * V) },
    };
  } finally {
    call.dispose();
  }
}

async function agrees(inputs: HostInputs, options: MlaMathOptions, scale = 1): Promise<void> {
  const { batch, queryLength } = mlaProblem(inputs, options);
  const gradOutput = randomTensor([batch, queryLength, 4, V], normals(99));
  gradOutput.data.forEach((x, i, data) => data[i] = scale * x);
  const actual = await computed(inputs, options, gradOutput);
  const all = { ...inputs, ...options } as HostInputs;
  const expected = referenceMlaAttentionBackward(all, mlaProblem(inputs, options), gradOutput);
  for (const name of ["query", "keyValue", "wKc", "wVc", "bK"] as const) {
    const error = relL2(actual[name], expected[name]!.data);
    assert(error < 5e-3, `∂${name} is off by ${error}`);
  }
}

describe("gradients of attention on emulated matrix units", { skip }, () => {
  test("agree with the oracle under a causal mask, for tiny and for huge ∂out", async () => {
    await agrees(callOf(2, 37, 70, 1), { causal: true, softmaxScale: 0.02 });
    await agrees(callOf(1, 70, 37, 2), { causal: true, softmaxScale: 0.05 }, 1e-12);
    await agrees(callOf(1, 33, 33, 3), { softmaxScale: 0.05 }, 1e12);
  });

  test("agree within packed sequences", async () => {
    await agrees({ ...callOf(1, 80, 80, 4), cuSeqlens: [0, 5, 5, 45, 80] }, { causal: true, softmaxScale: 0.05 });
  });

  test("keep NaN of keys that nobody sees out", async () => {
    const inputs = callOf(1, 37, 70, 5);
    const options = { causal: true, slidingWindow: 20, softmaxScale: 0.05 };
    const clean = { ...inputs, keyValue: { ...inputs.keyValue, data: inputs.keyValue.data.slice() } };
    clean.keyValue.data.fill(0, 0, 10 * L);
    inputs.keyValue.data.fill(NaN, 0, 10 * L);
    const gradOutput = randomTensor([1, 37, 4, V], normals(98));
    const actual = await computed(inputs, options, gradOutput);
    const expected = referenceMlaAttentionBackward(clean, mlaProblem(clean, options), gradOutput);
    for (const name of ["query", "keyValue", "wKc", "wVc", "bK"] as const) {
      const error = relL2(actual[name], expected[name]!.data);
      assert(error < 5e-3, `∂${name} is off by ${error}`);
    }
  });

  test("agree with windows, sinks, a soft cap, a mask and dropout together", async () => {
    const random = normals(6);
    const attentionMask: MaskTensor = {
      data: Uint8Array.from({ length: 37 * 70 }, () => random() > -1 ? 1 : 0),
      shape: [1, 1, 37, 70],
    };
    const inputs = { ...callOf(2, 37, 70, 7), softmaxAux: randomTensor([4], random) };
    const options = { slidingWindow: [20, 9] as const, logitsSoftCap: 3, dropout: { rate: 0.2, seed: 9 } };
    await agrees(inputs, { ...options, attentionMask });
  });
});
