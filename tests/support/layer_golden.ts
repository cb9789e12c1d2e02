// The recorded layers of tests/golden/layers: a model's config, weights, hidden states, and the output of an implementation
// that is not ours.

import { readdirSync, readFileSync } from "node:fs";
import type { ModelConfigFile } from "../../src/model/config_fields.ts";
import { type Tensor, tensor } from "../../src/op/tensor.ts";
import { parseSafetensors } from "./safetensors.ts";

/** One recorded layer. */
export interface LayerGolden {
  /** File name without its ending. */
  readonly name: string;
  /** The model's config.json. */
  readonly config: ModelConfigFile;
  /** Weights by their names in the checkpoint. */
  readonly weights: Readonly<Record<string, Tensor>>;
  /** Input, `[batch, prefill + decodeSteps, hidden]`. */
  readonly hiddenStates: Tensor;
  /** What the other implementation answered, of the same shape. */
  readonly expected: Tensor;
  /** Tokens that it ran at once. */
  readonly prefill: number;
  /** The softmax scale that it used. */
  readonly scaling: number;
}

/** Reads every layer of tests/golden/layers, by name. */
export function layerGoldens(): LayerGolden[] {
  const directory = new URL("../golden/layers/", import.meta.url);
  return readdirSync(directory).filter((name) => name.endsWith(".safetensors")).sort().map((name) => {
    const { metadata, tensors } = parseSafetensors(readFileSync(new URL(name, directory)));
    const float32 = (key: string) => {
      const entry = tensors.get(key);
      if (!(entry?.data instanceof Float32Array)) throw new Error(`Cannot read layer ${name}: ${key} is no F32 tensor`);
      return tensor(entry.data, entry.shape);
    };
    const weights = [...tensors.keys()].filter((key) => key.startsWith("weight."));
    return {
      name: name.replace(".safetensors", ""),
      config: JSON.parse(metadata.config),
      weights: Object.fromEntries(weights.map((key) => [key.replace("weight.", ""), float32(key)])),
      hiddenStates: float32("hidden_states"),
      expected: float32("output"),
      prefill: Number(metadata.prefill),
      scaling: Number(metadata.scaling),
    };
  });
}
