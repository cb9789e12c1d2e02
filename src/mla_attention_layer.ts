import {
  createLayerCache,
  inTurn,
  layerCacheInside,
  MlaLayerCache,
  type MlaLayerCacheOptions,
  reserveTokens,
} from "./layer/layer_cache.ts";
import { heldOptions, layerCall, type LayerCallOptions } from "./layer/layer_call.ts";
import { gpuLayer } from "./layer/gpu_layer.ts";
import type { LayerTarget, LayerTuning } from "./layer/layer_target.ts";
import { layerWeights, type MlaWeights } from "./layer/layer_weights.ts";
import { referenceLayer } from "./layer/reference_layer.ts";
import { type MlaModelConfig, mlaModelConfig } from "./model/attention_config.ts";
import type { ModelConfigFile } from "./model/config_fields.ts";
import { FlashMLAError } from "./op/errors.ts";
import { holdTensor } from "./op/mla_problem.ts";
import type { Platform } from "./op/platform.ts";
import { type AnyTensor, isGpuTensor, kindOf, type ResultLike } from "./op/tensor.ts";
import { detectPlatform } from "./platforms.ts";

/** Where a layer lives, and how. */
export interface MlaAttentionOptions {
  /** Where to run; `auto`, the default, takes WebGPU where there is an adapter and the reference elsewhere. */
  readonly platform?: Platform | "auto";
  /** The WebGPU device; the process's own when absent. */
  readonly device?: GPUDevice;
  /**
   * How weights and what passes between the steps are stored. All sums are float32. Default `f32`. Halves are what a
   * device's matrix units multiply.
   */
  readonly dtype?: "f32" | "f16";
}

/** The options of one forward call. */
export interface MlaForwardOptions extends LayerCallOptions, LayerTuning {
  /**
   * What earlier calls left, and where this one's tokens go: they are appended, and see what is there. Without one, tokens
   * see only those of the call.
   */
  readonly cache?: MlaLayerCache;
  /**
   * Positions of the tokens for the rotary embedding: `[length]`, or `[batch, length]` flat, in rows, or as `{ data, shape }`.
   * Default: from the number of tokens on that a sequence has in the cache. What a token sees depends on the order of
   * tokens, not on these.
   */
  readonly positions?: LayerCallOptions["positions"];
  /** Offsets `[sequences + 1]` of sequences of different lengths, packed along the second axis of batch 1. */
  readonly cuSeqlens?: LayerCallOptions["cuSeqlens"];
  /** Whether a token sees those behind it, too. Default `true`: it does not. */
  readonly causal?: boolean;
  /**
   * How to compute: over latents alone, or with keys and values rebuilt; `auto`, the default, takes for each sequence what
   * needs fewer FLOPs. Both give the same answer.
   */
  readonly formulation?: LayerCallOptions["formulation"];
}

const knownOptions = [
  ...["cache", "positions", "cuSeqlens", "causal", "formulation"],
  ...["cfg", "decodeCfg", "executor", "decodeExecutor", "onEvent"],
];

function fail(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot run the layer: ${why}`);
}

/**
 * A model's attention layer, from hidden states to hidden states: projections, norms, rotary embedding, the paged cache of
 * latents, attention and the output projection, as the model's own code computes them. On a GPU everything in between stays
 * there, and a call is one submission.
 *
 * What is measured for `mlaAttention` and `mlaDecode` serves here, too; the layer itself never stops to measure, and guesses
 * where nothing is known. Pass executors to have it otherwise.
 *
 * @example A prompt of five tokens, and a sixth
 * ```ts
 * import { MlaAttention, presets } from "@flash-mla/webgpu";
 *
 * const config = {
 *   ...presets.youtuLlm.config,
 *   ...{ hidden_size: 8, num_attention_heads: 2, q_lora_rank: null, kv_lora_rank: 4 },
 *   ...{ qk_nope_head_dim: 4, qk_rope_head_dim: 2, v_head_dim: 3 },
 * };
 * const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
 * const weights = {
 *   "model.layers.0.self_attn.q_proj.weight": ones(2 * 6, 8),
 *   "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": ones(4 + 2, 8),
 *   "model.layers.0.self_attn.kv_a_layernorm.weight": ones(4),
 *   "model.layers.0.self_attn.kv_b_proj.weight": ones(2 * 7, 4),
 *   "model.layers.0.self_attn.o_proj.weight": ones(8, 2 * 3),
 * };
 * using layer = await MlaAttention.load(config, weights, { platform: "reference" });
 * using cache = await layer.createCache({ batch: 1, length: 16 });
 * await layer.forward(ones(1, 5, 8), { cache });
 * const output = await layer.forward(ones(1, 1, 8), { cache });
 * console.log(output.shape, cache.lengths[0]); // [1, 1, 8] 6
 * ```
 */
export class MlaAttention {
  /** What the config says. */
  readonly config: MlaModelConfig;
  /** Where the layer lives. */
  readonly platform: Platform;
  /** How weights are stored. */
  readonly dtype: "f32" | "f16";
  readonly #target: LayerTarget;
  #disposed = false;

  private constructor(config: MlaModelConfig, target: LayerTarget, dtype: "f32" | "f16") {
    this.config = config;
    this.platform = target.platform;
    this.dtype = dtype;
    this.#target = target;
  }

  /**
   * Loads a layer.
   *
   * @param config The model's parsed `config.json`; `model_type` decides how the layer computes. Or what `mlaModelConfig` made
   * of it.
   * @param weights The layer's tensors on the host in float32, halves or bfloat16, by the names of the state dict: `q_proj`, or
   * `q_a_proj`, `q_a_layernorm` and `q_b_proj`; `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj` and `o_proj`; with
   * `attention_bias` the biases of `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj`. Names may have a prefix, such as
   * `model.layers.0.self_attn.`, and `.weight` behind. Nothing of them is kept on a GPU.
   * @param options Where it is to live, and how.
   * @returns The layer. The caller disposes of it.
   * @throws {FlashMLAError} When the config or a weight does not fit or is missing (`invalid-input`), the platform is not to
   * be had (`unsupported-platform`), a weight is larger than the device can bind (`limit`), or it has no memory left
   * (`device`).
   */
  static async load(
    config: ModelConfigFile | MlaModelConfig,
    weights: MlaWeights,
    options: MlaAttentionOptions = {},
  ): Promise<MlaAttention> {
    const refuse = (why: string): never => {
      throw new FlashMLAError("invalid-input", `Cannot load the layer: ${why}`);
    };
    if (typeof options !== "object" || options === null) refuse(`options must be an object, got ${kindOf(options)}`);
    for (const name of Object.keys(options)) {
      if (["platform", "device", "dtype"].includes(name)) continue;
      refuse(`unknown option "${name}"; known are platform, device, dtype`);
    }
    const { platform = "auto", device, dtype = "f32" } = options;
    if (dtype !== "f32" && dtype !== "f16") refuse(`dtype must be "f32" or "f16", got ${kindOf(dtype)}`);
    const layer = isModelConfig(config) ? config : mlaModelConfig(config as ModelConfigFile);
    const named = layerWeights(weights, layer);
    const found = await detectPlatform("flash_mla", platform === "auto" && device !== undefined ? "webgpu" : platform);
    const target = found === "reference"
      ? referenceLayer(layer, named, dtype)
      : await gpuLayer(layer, named, dtype, device);
    return new MlaAttention(layer, target, dtype);
  }

  /** The layer's device; undefined on the reference. */
  get device(): GPUDevice | undefined {
    return this.#target.device;
  }

  /** True once it was disposed of. */
  get disposed(): boolean {
    return this.#disposed;
  }

  /**
   * Makes an empty cache for this layer's tokens.
   *
   * @param options How many sequences, how long they may become, and how rows are stored.
   * @returns The cache. The caller disposes of it.
   * @throws {FlashMLAError} When an option is none or the layer was disposed of (`invalid-input`), or the memory is not to be
   * had (`limit`, `device`).
   */
  async createCache(options: MlaLayerCacheOptions): Promise<MlaLayerCache> {
    this.#checkAlive();
    const { kvLoraRank, qkRopeHeadDim } = this.config;
    const { platform, device, dtype } = this;
    return await createLayerCache(options, this, { platform, device, kvLoraRank, qkRopeHeadDim, dtype });
  }

  /**
   * Runs the layer: the tokens are appended to the cache, and attend over all that their sequences have in it by then.
   * Prefill, chunks of a prefill and decoding are the same call. Calls on one cache run one after another.
   *
   * With `dynamic` and `longrope` embeddings the angles depend on the length of a sequence; they are those of the call's own
   * largest position, as in the models' code, and keys that were cached before keep theirs.
   *
   * @param hiddenStates The input, `[batch, length, hiddenSize]`, or `[1, total, hiddenSize]` packed by `cuSeqlens`; on the
   * host, or on the layer's GPU.
   * @param options Cache, positions, and how to compute.
   * @returns The output, of the same shape, element type and side; bfloat16 gives float32.
   * @throws {FlashMLAError} When something does not fit: the width, the batch, tokens or positions past what the cache has room
   * for, a layer or cache that was disposed of (`invalid-input`); when a limit of the device would be passed (`limit`); and
   * when it fails (`device`). The cache has the tokens that it had before, then.
   */
  async forward<Input extends AnyTensor>(
    hiddenStates: Input,
    options: MlaForwardOptions = {},
  ): Promise<ResultLike<Input>> {
    this.#checkAlive();
    if (typeof options !== "object" || options === null) fail(`options must be an object, got ${kindOf(options)}`);
    for (const name of Object.keys(options)) {
      if (!knownOptions.includes(name)) fail(`unknown option "${name}"; known are ${knownOptions.join(", ")}`);
    }
    const { cache, cfg, decodeCfg, executor, decodeExecutor, onEvent } = options;
    const tuning = { cfg, decodeCfg, executor, decodeExecutor, onEvent };
    const asked = heldOptions(options);
    const target = this.#target;
    if (cache === undefined) {
      const call = layerCall(hiddenStates, asked, this.config, this);
      checkDevice(hiddenStates, target);
      return await target.forward(holdTensor(hiddenStates), call, undefined, tuning) as ResultLike<Input>;
    }
    if (!(cache instanceof MlaLayerCache)) fail(`cache must be one that createCache() made, got ${kindOf(cache)}`);
    layerCacheInside(cache);
    return await inTurn(cache, async () => {
      this.#checkAlive();
      const call = layerCall(hiddenStates, asked, this.config, this);
      checkDevice(hiddenStates, target);
      const added = call.tokenStarts.slice(1).map((end, s) => end - call.tokenStarts[s]);
      const reserved = reserveTokens(cache, added);
      try {
        const output = await target.forward(holdTensor(hiddenStates), call, cache, tuning);
        reserved.keep();
        return output as ResultLike<Input>;
      } catch (error) {
        reserved.undo();
        throw error;
      }
    });
  }

  /** Gives the weights back; work that was submitted before still sees them. Calling it twice does no harm. */
  dispose(): void {
    if (!this.#disposed) this.#target.dispose();
    this.#disposed = true;
  }

  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  #checkAlive(): void {
    if (this.#disposed) fail("it was disposed of");
  }
}

function isModelConfig(config: ModelConfigFile | MlaModelConfig): config is MlaModelConfig {
  return typeof config === "object" && config !== null && "kvLoraRank" in config && "latentNormEps" in config;
}

/** Throws when the input lies on another device than the layer. */
function checkDevice(hiddenStates: AnyTensor, { device }: LayerTarget): void {
  if (!isGpuTensor(hiddenStates) || hiddenStates.device === undefined || device === undefined) return;
  if (hiddenStates.device !== device) fail("hiddenStates lies on another device than the layer");
}
