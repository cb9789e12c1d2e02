// The platform "reference": the oracle, as the registry sees it.

import type { AttentionState } from "../op/attention_state.ts";
import type { FlashMLAConfig } from "../op/config.ts";
import type { MlaImplementation, MlaTarget } from "../op/implementation.ts";
import { FlashMLAError } from "../op/errors.ts";
import { toFloats, toHalves, writeFloats } from "../op/half.ts";
import type { HostGradients, MlaGradients } from "../op/mla_gradients.ts";
import { floatInputs, mapTensors, type MlaInputs, type MlaProblem } from "../op/mla_problem.ts";
import { type AnyTensor, dtypeOf, type HostTensor, isGpuTensor, type Tensor } from "../op/tensor.ts";
import { tuningGradOutput } from "../op/tuning_grad_output.ts";
import { referenceMlaAttention, referenceMlaAttentionWithLse } from "./mla_attention.ts";
import { referenceMlaAttentionBackward } from "./mla_attention_backward.ts";

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
  matrixUnits: false,
  platform: "reference",
  backend: "any",
};

/** The oracle on inputs of any element type, in double precision and float32. */
function attention(problem: MlaProblem, inputs: MlaInputs): Tensor {
  return referenceMlaAttention(floatInputs(inputs), problem);
}

/** The oracle's result and log-sum-exp, the result in the query's element type or written to `out`. */
function run(problem: MlaProblem, inputs: MlaInputs, out?: AnyTensor): AttentionState<HostTensor, Tensor> {
  if (out !== undefined && isGpuTensor(out)) {
    throw new FlashMLAError(
      "invalid-input",
      'Cannot run MLA: out lies on a GPU, the reference computes on the host; pass a host tensor, or platform "webgpu"',
    );
  }
  const { output, lse } = referenceMlaAttentionWithLse(floatInputs(inputs), problem);
  if (out === undefined) return { output: likeTensor(output, inputs.query), lse };
  if (out.dtype !== "bf16") writeFloats(out, output.data);
  return { output: out, lse };
}

/** A result in the element type that goes with a tensor. */
function likeTensor(result: Tensor, tensor: AnyTensor): HostTensor {
  return dtypeOf(tensor) === "f16" ? toHalves(result) : result;
}

/** The oracle's gradients in float32: from the inputs alone, in double precision. */
function floatGradients(problem: MlaProblem, inputs: MlaInputs, gradOutput: AnyTensor): HostGradients {
  if (isGpuTensor(gradOutput)) {
    throw new FlashMLAError(
      "invalid-input",
      "Cannot compute gradients: gradOutput lies on a GPU, the reference computes on the host: pass await " +
        'toHost(gradOutput), or platform "webgpu"',
    );
  }
  return referenceMlaAttentionBackward(floatInputs(inputs), problem, toFloats(gradOutput));
}

/** The same, each like its tensor. */
function gradients(problem: MlaProblem, inputs: MlaInputs, gradOutput: AnyTensor): MlaGradients {
  const floats = floatGradients(problem, inputs, gradOutput);
  const { cuSeqlens: _, attentionMask: __, ...made } = mapTensors<AnyTensor, AnyTensor>(
    inputs,
    (tensor, name) => likeTensor(floats[name]!, tensor),
  );
  return made as MlaGradients;
}

const target: MlaTarget = {
  platform: "reference",
  description: "plain TypeScript on the CPU",
  fingerprint: "reference",
  whyInvalid: () => null,
  heuristicCfg: () => onlyConfig,
  candidateCfgs: () => [onlyConfig],
  run: (problem, inputs, _cfg, out) => new Promise((resolve) => resolve(run(problem, inputs, out).output)),
  runWithLse: (problem, inputs, _cfg, out) => new Promise((resolve) => resolve(run(problem, inputs, out))),
  backward: (problem, inputs, _cfg, _saved, gradOutput) =>
    new Promise((resolve) => resolve(gradients(problem, inputs, gradOutput))),
  trial: (problem, inputs, _cfg, { backward = false } = {}) => {
    const gradOutput = backward ? tuningGradOutput(problem) : null;
    return Promise.resolve({
      timingMethod: "wall",
      output: () => Promise.resolve(attention(problem, inputs)),
      ...(gradOutput && { gradients: () => Promise.resolve(floatGradients(problem, inputs, gradOutput)) }),
      time(repeats) {
        const start = performance.now();
        for (let i = 0; i < repeats; i++) {
          attention(problem, inputs);
          if (gradOutput !== null) floatGradients(problem, inputs, gradOutput);
        }
        return Promise.resolve(performance.now() - start);
      },
      dispose() {},
    });
  },
  probe: () => Promise.resolve(null),
};

/** The operation in plain TypeScript. */
export const referenceImplementation: MlaImplementation = {
  platform: "reference",
  backend: "any",
  isAvailable: () => Promise.resolve(true),
  open: () => Promise.resolve(target),
};
