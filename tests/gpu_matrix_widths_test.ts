// Every tile of attention that a card with matrix units may take, for the head widths of models: large tiles compile for
// minutes where the units are emulated.

import { describe, test } from "node:test";
import { assert } from "@std/assert";
import { type HostTensor, toFloats, toHalves } from "../mod.ts";
import { whyInvalid } from "../src/gpu/attention_plan.ts";
import { matrixTilings } from "../src/gpu/matrix_config.ts";
import { webgpuTarget } from "../src/gpu/webgpu_implementation.ts";
import { type HostInputs, mapTensors, mlaProblem } from "../src/op/mla_problem.ts";
import type { Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionWithLse } from "../src/reference/mla_attention.ts";
import { rounded } from "./support/dtype_attention.ts";
import { bounds, matrixConfig, matrixContext, skipNative } from "./support/matrix_units.ts";
import { assertClose } from "./support/metrics.ts";
import { normals, randomTensor } from "./support/random_problem.ts";

/** P, R and V: DeepSeek's heads, MiniCPM3's, GLM-4.7-Flash's, heads without a rotary part, and odd ones. */
const widths = [[128, 64, 128], [64, 32, 64], [192, 64, 256], [128, 0, 128], [72, 8, 40]] as const;

describe("attention on a card's matrix units", { skip: skipNative }, () => {
  for (const [P, R, V] of widths) {
    for (const causal of [true, false]) {
      test(`every tile agrees with the oracle, ${P} + ${R} wide, values ${V}, ${causal ? "causal" : "full"}`, async () => {
        const random = normals(P + V);
        const draw = (scale: number, ...shape: number[]): Tensor => {
          const { data, shape: same } = randomTensor(shape, random);
          return { data: data.map((x) => scale * x), shape: same };
        };
        const inputs: HostInputs = {
          query: draw(1, 1, 203, 4, P + R),
          keyValue: draw(1, 1, 301, 96),
          wKc: draw(0.1, 96, 2, P),
          wVc: draw(0.1, 96, 2, V),
          ...(R > 0 && { bK: draw(1, 1, 301, R) }),
        };
        const halves = mapTensors<Tensor, HostTensor>(inputs, toHalves);
        const problem = mlaProblem(halves, { causal });
        const expected = referenceMlaAttentionWithLse(rounded(inputs, "f16"), problem);
        const context = await matrixContext();
        let ran = 0;
        for (const tiling of matrixTilings) {
          const config = { ...matrixConfig, ...tiling };
          if (whyInvalid(config, problem, context.capabilities) !== null) continue;
          ran++;
          const { output, lse } = await webgpuTarget(context).runWithLse(problem, halves, config);
          const what = `${tiling.blockQ} × ${tiling.blockK}`;
          assertClose(toFloats(output as HostTensor), expected.output, bounds, what);
          assertClose(lse as Tensor, expected.lse, { relL2: 1e-3 }, `${what}, log-sum-exp`);
        }
        assert(ran > 0, "no tile fits this device");
      });
    }
  }
});
