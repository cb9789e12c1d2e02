// The platform "reference": the oracle, as the registry sees it.

import type { FlashMLAConfig } from "../op/config.ts";
import type { MlaImplementation, MlaTarget } from "../op/implementation.ts";
import { FlashMLAError } from "../op/errors.ts";
import { toHalves, writeFloats } from "../op/half.ts";
import { floatInputs, type MlaInputs, type MlaProblem } from "../op/mla_problem.ts";
import { type AnyTensor, dtypeOf, type HostTensor, isGpuTensor, type Tensor } from "../op/tensor.ts";
import { referenceMlaAttention } from "./mla_attention.ts";

/** The oracle has no tiles: one row against one key at a time, in order. */
const onlyConfig: FlashMLAConfig = {
  blockQ: 1,
  blockK: 1,
  numWarps: 1,
  numStages: 1,
  rowsPerThread: 1,
  blockDepth: 1,
  probKeys: 1,
  unrollDepth: false,
  subgroups: false,
  expandBlock: 1,
  gradBlock: 1,
  platform: "reference",
  backend: "any",
};

/** The oracle on inputs of any element type, in double precision and float32. */
function attention(problem: MlaProblem, inputs: MlaInputs): Tensor {
  return referenceMlaAttention(floatInputs(inputs), problem);
}

/** The oracle's result in the query's element type, or written to `out`. */
function run(problem: MlaProblem, inputs: MlaInputs, out?: AnyTensor): HostTensor {
  if (out !== undefined && isGpuTensor(out)) {
    throw new FlashMLAError(
      "invalid-input",
      'Cannot run MLA: out lies on a GPU, the reference computes on the host; pass a host tensor, or platform "webgpu"',
    );
  }
  const result = attention(problem, inputs);
  if (out === undefined) return dtypeOf(inputs.query) === "f16" ? toHalves(result) : result;
  if (out.dtype !== "bf16") writeFloats(out, result.data);
  return out;
}

const target: MlaTarget = {
  platform: "reference",
  description: "plain TypeScript on the CPU",
  fingerprint: "reference",
  whyInvalid: () => null,
  heuristicCfg: () => onlyConfig,
  candidateCfgs: () => [onlyConfig],
  run: (problem, inputs, _cfg, out) => new Promise((resolve) => resolve(run(problem, inputs, out))),
  trial: (problem, inputs) =>
    Promise.resolve({
      timingMethod: "wall",
      output: () => Promise.resolve(attention(problem, inputs)),
      time(repeats) {
        const start = performance.now();
        for (let i = 0; i < repeats; i++) attention(problem, inputs);
        return Promise.resolve(performance.now() - start);
      },
      dispose() {},
    }),
  probe: () => Promise.resolve(null),
};

/** The operation in plain TypeScript. */
export const referenceImplementation: MlaImplementation = {
  platform: "reference",
  backend: "any",
  isAvailable: () => Promise.resolve(true),
  open: () => Promise.resolve(target),
};
