import { describe, test } from "node:test";
import { type HostInputs, type MlaMathOptions, mlaProblem } from "../src/op/mla_problem.ts";
import { referenceMlaAttentionWithLse } from "../src/reference/mla_attention.ts";
import { denseAttentionWithLse } from "./support/dense_attention.ts";
import { attendsLike, lseProperties, optionProperties } from "./support/option_properties.ts";

const reference = (inputs: HostInputs, options: MlaMathOptions) =>
  referenceMlaAttentionWithLse(inputs, mlaProblem(inputs, options));

describe("referenceMlaAttentionWithLse()", () => {
  test("agrees with a dense formula on random problems with every option", () =>
    attendsLike(denseAttentionWithLse)(reference, { runs: 500, tolerance: 1e-6 }));

  for (const { name, check } of [...optionProperties, ...lseProperties]) {
    test(`holds: ${name}`, () => check(reference, { runs: 150, tolerance: 1e-6, absolute: 1e-6 }));
  }
});
