// The recorded cases of tests/golden: inputs, options and the output of an implementation that is not ours.

import { readdirSync, readFileSync } from "node:fs";
import type { HostInputs, MlaMathOptions } from "../../src/op/mla_problem.ts";
import { type Tensor, tensor } from "../../src/op/tensor.ts";
import { parseSafetensors, type Safetensors } from "./safetensors.ts";

/** A part of the operation that a case needs beyond {@link MlaMathOptions}. */
export type GoldenFeature = "attentionMask" | "bias" | "softmaxAux" | "logitsSoftCap" | "slidingWindow";

/** One recorded call. */
export interface GoldenCase {
  /** File name without its ending. */
  readonly name: string;
  /** The tensors of the call. */
  readonly inputs: HostInputs;
  /** The options of the call. */
  readonly options: MlaMathOptions;
  /** What the other implementation answered. */
  readonly expected: Tensor;
  /** Features without which the answer would be another one; empty for most cases. */
  readonly needs: readonly GoldenFeature[];
  /** The whole file: masks, biases, gradients. */
  readonly file: Safetensors;
}

/**
 * Reads every operation case of tests/golden, by name.
 *
 * @param supported The features that the implementation under test has; cases that need others are left out.
 */
export function goldenCases(supported: readonly GoldenFeature[] = []): GoldenCase[] {
  const directory = new URL("../golden/", import.meta.url);
  return readdirSync(directory)
    .filter((name) => name.endsWith(".safetensors"))
    .sort()
    .map((name) => goldenCase(name.replace(".safetensors", ""), readFileSync(new URL(name, directory))))
    .filter(({ needs }) => needs.every((feature) => supported.includes(feature)));
}

function goldenCase(name: string, bytes: Uint8Array): GoldenCase {
  const file = parseSafetensors(bytes);
  const read = (key: string) => float32(file, name, key);
  const optional = (key: string) => file.tensors.has(key) ? read(key) : undefined;
  const { softmax_scale, causal, ...rest } = JSON.parse(file.metadata.params);

  const needs: GoldenFeature[] = [];
  if (file.tensors.has("attention_mask")) needs.push("attentionMask");
  if (file.tensors.has("bias")) needs.push("bias");
  if (file.tensors.has("softmax_aux")) needs.push("softmaxAux");
  for (const key of Object.keys(rest)) {
    if (key === "logits_soft_cap") needs.push("logitsSoftCap");
    else if (key === "sliding_window") needs.push("slidingWindow");
    else throw new Error(`Cannot read golden case ${name}: unknown parameter ${key}`);
  }
  return {
    name,
    inputs: {
      query: read("query"),
      keyValue: read("key_value"),
      wKc: read("w_kc"),
      wVc: read("w_vc"),
      bQ: optional("b_q"),
      bK: optional("b_k"),
    },
    options: { softmaxScale: softmax_scale, causal },
    expected: read("output"),
    needs,
    file,
  };
}

function float32(file: Safetensors, name: string, key: string): Tensor {
  const entry = file.tensors.get(key);
  if (!(entry?.data instanceof Float32Array)) {
    throw new Error(`Cannot read golden case ${name}: ${key} is ${entry?.dtype ?? "missing"}, expected F32`);
  }
  return tensor(entry.data, entry.shape);
}
