// The recorded cases of tests/golden: inputs, options, the output of an implementation that is not ours, and its gradients.

import { readdirSync, readFileSync } from "node:fs";
import type { HostInputs, MlaMathOptions, TensorName } from "../../src/op/mla_problem.ts";
import { type MaskTensor, type Tensor, tensor } from "../../src/op/tensor.ts";
import type { Feature } from "./random_problem.ts";
import { parseSafetensors, type Safetensors } from "./safetensors.ts";

/** One recorded call. */
export interface GoldenCase {
  /** File name without its ending. */
  readonly name: string;
  /** The tensors of the call, its mask, bias and sinks among them. */
  readonly inputs: HostInputs;
  /** The options of the call. */
  readonly options: MlaMathOptions;
  /** What the other implementation answered. */
  readonly expected: Tensor;
  /** ∂output, where the file has gradients. */
  readonly gradOutput?: Tensor;
  /** The other implementation's gradients, by the names of our inputs; none without {@link GoldenCase.gradOutput}. */
  readonly expectedGradients: Readonly<Partial<Record<TensorName, Tensor>>>;
  /** Features without which the answer would be another one. */
  readonly needs: readonly Feature[];
}

/** The file's name of each tensor of numbers. */
const namesInFile: Readonly<Record<TensorName, string>> = {
  query: "query",
  keyValue: "key_value",
  wKc: "w_kc",
  wVc: "w_vc",
  bQ: "b_q",
  bK: "b_k",
  bias: "bias",
  softmaxAux: "softmax_aux",
};

/**
 * Reads every operation case of tests/golden, by name.
 *
 * @param supported The features that the implementation under test has; cases that need others are left out.
 */
export function goldenCases(supported: readonly Feature[] = []): GoldenCase[] {
  const directory = new URL("../golden/", import.meta.url);
  return readdirSync(directory)
    .filter((name) => name.endsWith(".safetensors"))
    .sort()
    .map((name) => goldenCase(name.replace(".safetensors", ""), readFileSync(new URL(name, directory))))
    .filter(({ needs }) => needs.every((feature) => supported.includes(feature)));
}

function goldenCase(name: string, bytes: Uint8Array): GoldenCase {
  const file = parseSafetensors(bytes);
  const { softmax_scale, causal, logits_soft_cap, sliding_window, ...rest } = JSON.parse(file.metadata.params);
  const [unknown] = Object.keys(rest);
  if (unknown !== undefined) throw new Error(`Cannot read golden case ${name}: unknown parameter ${unknown}`);

  const { query, keyValue, wKc, wVc, ...others } = namedTensors(file, name, "");
  if (!query || !keyValue || !wKc || !wVc) throw new Error(`Cannot read golden case ${name}: a tensor is missing`);
  const attentionMask = mask(file, name);
  const present: Record<Feature, boolean> = {
    attentionMask: attentionMask !== undefined,
    bias: others.bias !== undefined,
    softmaxAux: others.softmaxAux !== undefined,
    logitsSoftCap: logits_soft_cap !== undefined,
    slidingWindow: sliding_window !== undefined,
    dropout: false,
  };
  return {
    name,
    inputs: { query, keyValue, wKc, wVc, ...others, ...(attentionMask && { attentionMask }) },
    options: {
      ...(softmax_scale !== undefined && { softmaxScale: softmax_scale }),
      ...(causal !== undefined && { causal }),
      ...(logits_soft_cap !== undefined && { logitsSoftCap: logits_soft_cap }),
      ...(sliding_window !== undefined && { slidingWindow: sliding_window }),
    },
    expected: float32(file, name, "output"),
    ...(file.tensors.has("grad_output") && { gradOutput: float32(file, name, "grad_output") }),
    expectedGradients: namedTensors(file, name, "grad_"),
    needs: (Object.keys(present) as Feature[]).filter((feature) => present[feature]),
  };
}

/** Those tensors of a file whose names begin with `prefix`, by the names of our inputs. */
function namedTensors(file: Safetensors, name: string, prefix: string): Partial<Record<TensorName, Tensor>> {
  const found: Partial<Record<TensorName, Tensor>> = {};
  for (const [ours, theirs] of Object.entries(namesInFile) as [TensorName, string][]) {
    if (file.tensors.has(prefix + theirs)) found[ours] = float32(file, name, prefix + theirs);
  }
  return found;
}

function mask(file: Safetensors, name: string): MaskTensor | undefined {
  const entry = file.tensors.get("attention_mask");
  if (entry === undefined) return undefined;
  if (entry.dtype === "U8" && entry.data instanceof Uint8Array) return { data: entry.data, shape: entry.shape };
  throw new Error(`Cannot read golden case ${name}: attention_mask is ${entry.dtype}, expected U8`);
}

function float32(file: Safetensors, name: string, key: string): Tensor {
  const entry = file.tensors.get(key);
  if (!(entry?.data instanceof Float32Array)) {
    throw new Error(`Cannot read golden case ${name}: ${key} is ${entry?.dtype ?? "missing"}, expected F32`);
  }
  return tensor(entry.data, entry.shape);
}
