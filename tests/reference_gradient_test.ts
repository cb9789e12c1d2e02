import { describe, test } from "node:test";
import { type HostInputs, type MlaMathOptions, mlaProblem } from "../src/op/mla_problem.ts";
import type { Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionBackward } from "../src/reference/mla_attention_backward.ts";
import { gradientProperties, gradientsAreDifferences } from "./support/gradient_properties.ts";

const reference = (inputs: HostInputs, options: MlaMathOptions, gradOutput: Tensor) =>
  referenceMlaAttentionBackward(inputs, mlaProblem(inputs, options), gradOutput);

describe("referenceMlaAttentionBackward()", () => {
  test("agrees with central differences in double precision, over every option", () =>
    gradientsAreDifferences(reference, {
      runs: 400,
      tolerance: 1e-6,
      absolute: 1e-7,
      limits: {
        batch: 2,
        length: 5,
        sequences: 3,
        kvHeads: 2,
        headsPerKvHead: 2,
        kvLoraRank: 5,
        qkNopeHeadDim: 5,
        qkRopeHeadDim: 3,
        vHeadDim: 5,
      },
    }));

  for (const { name, check } of gradientProperties) {
    test(`holds: ${name}`, () => check(reference, { runs: 150, tolerance: 1e-6, absolute: 2e-6 }));
  }
});
