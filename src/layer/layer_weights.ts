// Which weights a layer has, found in a state dict by their names, with or without what comes before.

import type { MlaModelConfig } from "../model/attention_config.ts";
import { FlashMLAError } from "../op/errors.ts";
import { checkTensor, type HostTensor, isGpuTensor, kindOf } from "../op/tensor.ts";

/** Tensors by the names of a state dict: of one layer, with any prefix, with or without `.weight`. */
export type MlaWeights = Readonly<Record<string, HostTensor>> | ReadonlyMap<string, HostTensor>;

/** A layer's weights by their plain names: `q_a_proj.weight`, `kv_a_proj_with_mqa.bias`, and so on. */
export type NamedWeights = Readonly<Record<string, HostTensor>>;

/** Names to show of a state dict that lacks one. */
const shownNames = 12;

function fail(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot load the layer: ${why}`);
}

/**
 * The shapes of a layer's weights, by their plain names.
 *
 * @param config The layer.
 * @returns Shapes as a checkpoint has them: of a projection `[outputs, inputs]`.
 */
export function weightShapes(config: MlaModelConfig): Readonly<Record<string, readonly number[]>> {
  const { hiddenSize, queryHeads: H, qLoraRank, kvLoraRank: L, attentionBias } = config;
  const { qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = config;
  return {
    ...(qLoraRank === null ? { "q_proj.weight": [H * (P + R), hiddenSize] } : {
      "q_a_proj.weight": [qLoraRank, hiddenSize],
      ...(attentionBias && { "q_a_proj.bias": [qLoraRank] }),
      "q_a_layernorm.weight": [qLoraRank],
      "q_b_proj.weight": [H * (P + R), qLoraRank],
    }),
    "kv_a_proj_with_mqa.weight": [L + R, hiddenSize],
    ...(attentionBias && { "kv_a_proj_with_mqa.bias": [L + R] }),
    "kv_a_layernorm.weight": [L],
    "kv_b_proj.weight": [H * (P + V), L],
    "o_proj.weight": [hiddenSize, H * V],
    ...(attentionBias && { "o_proj.bias": [hiddenSize] }),
  };
}

/** Biases that some models have; one that the config does not speak of would be left out without a word. */
const biases = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
  .map((name) => `${name}.bias`);

/**
 * Finds a layer's weights.
 *
 * @param weights The state dict, or the part of it that is the layer's. Other tensors in it are left alone.
 * @param config The layer.
 * @returns The weights by their plain names; not copied.
 * @throws {FlashMLAError} With code `invalid-input`, when one is missing, is there twice, or has another shape than the config
 * says, naming it and the shape.
 */
export function layerWeights(weights: MlaWeights, config: MlaModelConfig): NamedWeights {
  if (typeof weights !== "object" || weights === null) {
    fail(`weights must be a map from the names of a state dict to tensors, got ${kindOf(weights)}`);
  }
  const given: ReadonlyMap<string, HostTensor> = isMap(weights) ? weights : new Map(Object.entries(weights));
  const shapes = weightShapes(config);
  for (const name of biases) {
    const [unexpected] = keysOf(given, name);
    if (unexpected === undefined || name in shapes) continue;
    fail(`found ${unexpected}, a bias that the config has not (attention_bias is ${config.attentionBias})`);
  }
  const found: Record<string, HostTensor> = {};
  for (const [name, shape] of Object.entries(shapes)) {
    const keys = keysOf(given, name);
    if (keys.length === 0) {
      fail(`the weight ${name} is missing; expected a tensor [${shape}]. Found were ${listed([...given.keys()])}`);
    }
    if (keys.length > 1) {
      fail(`${name} is there ${keys.length} times: ${listed(keys)}; pass the tensors of one layer`);
    }
    found[name] = checked(keys[0], given.get(keys[0])!, shape);
  }
  return found;
}

/** The keys that may be meant by a plain name. */
function keysOf(given: ReadonlyMap<string, unknown>, name: string): string[] {
  const names = name.endsWith(".weight") ? [name, name.slice(0, -".weight".length)] : [name];
  return [...given.keys()].filter((key) => names.some((name) => key === name || key.endsWith(`.${name}`)));
}

function checked(key: string, tensor: HostTensor, shape: readonly number[]): HostTensor {
  if (typeof tensor !== "object" || tensor === null) {
    fail(`${key} must be a tensor { data, shape }, got ${kindOf(tensor)}`);
  }
  checkTensor(key, tensor);
  if (isGpuTensor(tensor)) fail(`${key} lies on a GPU; weights are taken from the host`);
  if (tensor.shape.join() !== shape.join()) {
    fail(`${key} has shape [${tensor.shape}], expected [${shape}] by the config`);
  }
  return tensor;
}

function isMap(weights: MlaWeights): weights is ReadonlyMap<string, HostTensor> {
  return weights instanceof Map;
}

function listed(names: readonly string[]): string {
  if (names.length === 0) return "no tensors";
  const rest = names.length - shownNames;
  return `${names.slice(0, shownNames).join(", ")}${rest > 0 ? ` and ${rest} more` : ""}`;
}
