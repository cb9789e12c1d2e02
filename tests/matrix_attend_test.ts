// Attention on matrix units against the oracle. The products are emulated, so that every adapter tests what is around them:
// tiles, masks, softmax, lazy rescaling, layout. Few kernels: a software adapter compiles each for many seconds.

import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { mlaProblem } from "../src/op/mla_problem.ts";
import type { HostInputs, MlaMathOptions } from "../src/op/mla_problem.ts";
import type { MaskTensor, Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionWithLse } from "../src/reference/mla_attention.ts";
import { skipEmulation as skip, testContext } from "./support/gpu.ts";
import { MatrixCall, type MatrixSetup } from "./support/matrix_call.ts";
import { relL2 } from "./support/metrics.ts";
import { normals, randomTensor } from "./support/random_problem.ts";
import { workgroupVariables } from "./support/workgroup_variables.ts";

const setup: MatrixSetup = {
  backend: "emulated",
  half: false,
  attend: { blockQ: 32, blockK: 32, subgroups: 2, rowFragments: 1, pinned: true },
  expand: { blockM: 32, blockN: 32, depth: 16, rowFragments: 1, columnFragments: 2 },
};
/** Subgroups that share rows and several row fragments each. */
const shared: MatrixSetup = {
  ...setup,
  attend: { blockQ: 32, blockK: 32, subgroups: 2, rowFragments: 2, pinned: false },
};

/** Four invocations to a row, and subgroups that share rows: as the tile of wide heads has them. */
const four: MatrixSetup = {
  ...setup,
  attend: { blockQ: 32, blockK: 32, subgroups: 4, rowFragments: 1, pinned: true },
};

interface Widths {
  readonly P: number;
  readonly R: number;
  readonly V: number;
}

interface Dimensions extends Widths {
  readonly batch: number;
  readonly queryLength: number;
  readonly keyLength: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
}

const widths: Widths = { P: 20, R: 12, V: 24 };
const base: Dimensions = { ...widths, batch: 2, queryLength: 37, keyLength: 70, queryHeads: 4, kvHeads: 2 };

function inputsOf(
  { P, R, V, batch, queryLength, keyLength, queryHeads, kvHeads }: Dimensions,
  seed: number,
): HostInputs {
  const random = normals(seed);
  const draw = (...shape: number[]) => randomTensor(shape, random);
  const L = 24;
  return {
    query: draw(batch, queryLength, queryHeads, P + R),
    keyValue: draw(batch, keyLength, L),
    wKc: draw(L, kvHeads, P),
    wVc: draw(L, kvHeads, V),
    ...(R > 0 && { bK: draw(batch, keyLength, R) }),
  };
}

async function compute(inputs: HostInputs, options: MlaMathOptions, how = setup): Promise<[Tensor, Tensor]> {
  const context = await testContext();
  const problem = mlaProblem(inputs, options);
  const call = await MatrixCall.create(context, problem, { ...inputs, ...options } as HostInputs, how);
  try {
    call.run();
    const { output, lse } = referenceMlaAttentionWithLse({ ...inputs, ...options } as HostInputs, problem);
    const read = async (name: string, { data, shape }: Tensor) => ({
      data: new Float32Array(await call.read(name)).slice(0, data.length),
      shape,
    });
    return [await read("output", output), await read("lse", lse)];
  } finally {
    call.dispose();
  }
}

async function agrees(inputs: HostInputs, options: MlaMathOptions, how = setup): Promise<void> {
  const [output, lse] = await compute(inputs, options, how);
  const all = { ...inputs, ...options } as HostInputs;
  const expected = referenceMlaAttentionWithLse(all, mlaProblem(inputs, options));
  // Inputs, keys, values and probabilities are rounded to halves on the way.
  const error = relL2(output.data, expected.output.data);
  assert(error < 3e-3, `output is off by ${error}`);
  expected.lse.data.forEach((value, i) => {
    const off = Math.abs(lse.data[i] - value);
    assert(
      value === lse.data[i] || off < 2e-2 * Math.max(1, Math.abs(value)),
      `lse ${i}: ${lse.data[i]}, not ${value}`,
    );
  });
}

describe("attention on emulated matrix units", { skip }, () => {
  test("agrees with the oracle under a causal mask, with odd lengths, batches and grouped heads", async () => {
    await agrees(inputsOf(base, 1), { causal: true, softmaxScale: 0.02 });
    await agrees(inputsOf({ ...base, queryLength: 70, keyLength: 37 }, 2), { causal: true, softmaxScale: 0.1 });
    await agrees(inputsOf({ ...base, keyLength: 0 }, 3), {});
  });

  test("rescales when maxima grow at the last block that is met, and for logits of thousands", async () => {
    const inputs = inputsOf(base, 4);
    // Blocks are met last first: the largest scores come last.
    inputs.keyValue.data.forEach((_, i, data) => data[i] *= 40 / (1 + Math.floor(i / 24) % 70));
    await agrees(inputs, { softmaxScale: 0.05 });
    const bK = inputs.bK!.data.map((x) => 100 * x);
    await agrees({ ...inputs, bK: { ...inputs.bK!, data: bK } }, { softmaxScale: 10 });
  });

  test("keeps NaN of unseen keys out, and hands on that of seen ones", async () => {
    const inputs = inputsOf(base, 5);
    for (const row of [69, 70 + 69]) inputs.keyValue.data.fill(NaN, row * 24, (row + 1) * 24);
    const [output] = await compute(inputs, { causal: true });
    const isNaNRow = (row: number) => output.data.subarray(row * 4 * 24, (row + 1) * 4 * 24).every(Number.isNaN);
    const hasNaN = (row: number) => output.data.subarray(row * 4 * 24, (row + 1) * 4 * 24).some(Number.isNaN);
    for (let row = 0; row < 74; row++) {
      if (row % 37 === 36) assert(isNaNRow(row), `row ${row} sees a NaN key`);
      else assert(!hasNaN(row), `row ${row} sees no NaN key`);
    }
  });

  test("attends within packed sequences", async () => {
    const inputs = inputsOf({ ...base, batch: 1, queryLength: 80, keyLength: 80 }, 6);
    await agrees({ ...inputs, cuSeqlens: [0, 5, 5, 45, 80] }, { causal: true });
  });

  test("agrees with windows, sinks, a soft cap and dropout together, where subgroups share rows", async () => {
    const inputs = { ...inputsOf(base, 7), softmaxAux: randomTensor([4], normals(8)) };
    const options = { slidingWindow: [20, 9] as const, logitsSoftCap: 3, dropout: { rate: 0.2, seed: 9 } };
    await agrees(inputs, options, shared);
  });

  test("agrees where four invocations share a row", async () => {
    await agrees(inputsOf(base, 13), { causal: true, softmaxScale: 0.1 }, four);
  });

  test("agrees with a mask", async () => {
    const random = normals(10);
    const attentionMask: MaskTensor = {
      data: Uint8Array.from({ length: 37 * 70 }, () => random() > 0 ? 1 : 0),
      shape: [1, 1, 37, 70],
    };
    attentionMask.data.fill(0, 0, 70);
    await agrees(inputsOf(base, 11), { attentionMask, causal: true });
  });
});

test("every workgroup variable is a whole number of 16 bytes", async () => {
  const attend = await import("../src/gpu/kernels/matrix_attend.ts");
  const code = attend.wgsl({ blockQ: 128, blockK: 32, subgroups: 8, rowFragments: 2, pinned: true }, {
    ...{ qkNopeHeadDim: 128, qkRopeHeadDim: 64, vHeadDim: 128, rope: "in_query", query: "vec4<f16>" },
    ...{ output: "vec4<f16>", ropeQuery: "f32", sinkQuads: 0, lse: true },
    terms: { scoreTerm: "none", softCap: false, window: false, bias: "f32", dropout: false },
  }, "template");
  const variables = workgroupVariables(code);
  assertEquals([...variables.keys()].sort(), ["keys", "probs", "rescale", "rowFactor", "scores", "values"]);
  for (const [name, bytes] of variables) assertEquals(bytes % 16, 0, name);
});
