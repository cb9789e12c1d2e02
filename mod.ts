/**
 * Multi-head Latent Attention for TypeScript: WGSL kernels on WebGPU, verified against a plain-TypeScript reference, with
 * configurations that are measured once and remembered.
 *
 * @module
 */

export { defaultExecutor, FlashMLA, flashMLA, mlaAttention, MlaInvocation } from "./src/flash_mla.ts";
export type { MlaCall, MlaExecutor } from "./src/flash_mla.ts";
export type { MlaCallOptions, MlaOptions } from "./src/mla_options.ts";

export { mlaAttentionWithLse } from "./src/mla_attention_with_lse.ts";
export { mlaAttentionVjp } from "./src/mla_attention_vjp.ts";
export type { MlaVjp } from "./src/mla_attention_vjp.ts";
export { mergeAttentionStates } from "./src/merge_attention_states.ts";
export type { MergeOptions } from "./src/merge_attention_states.ts";
export type { AttentionState, LseLike } from "./src/op/attention_state.ts";
export type { HostGradients, MlaGradients } from "./src/op/mla_gradients.ts";
export { LatentCache } from "./src/latent_cache.ts";
export type { EncodedAppend, LatentCacheOptions, ReserveOptions } from "./src/latent_cache.ts";
export type { AppendWhere } from "./src/op/append_problem.ts";
export type { AnyIndexTensor, GpuIndexTensor, IndexTensor, OwnedGpuIndexTensor } from "./src/op/index_tensor.ts";
export { defaultDecodeExecutor, encodeMlaDecode, mlaDecode, mlaDecodeWithLse } from "./src/mla_decode.ts";
export type { EncodedDecode } from "./src/mla_decode.ts";
export { MlaDecode, MlaDecodeInvocation, mlaDecodeKernel } from "./src/decode_kernel.ts";
export type { MlaDecodeCall, MlaDecodeExecutor } from "./src/decode_kernel.ts";
export type { MlaDecodeInputs, MlaDecodeOptions } from "./src/decode_options.ts";
export { mlaPrefillWithCache } from "./src/mla_prefill_with_cache.ts";
export type { MlaPrefillInputs, MlaPrefillOptions } from "./src/mla_prefill_with_cache.ts";
export type { Formulation } from "./src/op/formulation.ts";
export type { CacheLayout, DecodeMathOptions, DecodeProblem, DecodeTensors } from "./src/op/decode_problem.ts";
export type { SeqLens } from "./src/op/sequence_places.ts";
export type { AppendStep, CacheStore, DecodeInputs, DecodeTarget } from "./src/op/decode_implementation.ts";
export type { DecodeConfig } from "./src/op/decode_config.ts";
export { encodeMlaAttention } from "./src/encode_mla_attention.ts";
export type { EncodedAttention } from "./src/encode_mla_attention.ts";

export { tensor } from "./src/op/tensor.ts";
export type {
  AnyMask,
  AnyTensor,
  Bf16Tensor,
  DType,
  F16Tensor,
  Float16Elements,
  GpuMaskTensor,
  GpuTensor,
  HostTensor,
  MaskTensor,
  OwnedGpuMask,
  OwnedGpuTensor,
  ResultLike,
  Tensor,
} from "./src/op/tensor.ts";
export { toFloats, toHalves } from "./src/op/half.ts";
export { emptyOnGpu, toGpu, toHost, viewOnGpu } from "./src/gpu/gpu_tensor.ts";
export type { EmptyOptions, ViewOptions } from "./src/gpu/gpu_tensor.ts";
export { readSafetensors } from "./src/checkpoint/read_safetensors.ts";
export type { SafetensorsOptions, SafetensorsSource, ShardSource } from "./src/checkpoint/read_safetensors.ts";
export type { Checkpoint, StoredTensor } from "./src/checkpoint/checkpoint.ts";
export type { RangeReader } from "./src/checkpoint/byte_source.ts";
export type { FetchRange } from "./src/checkpoint/http_source.ts";
export type { SafetensorsIndex } from "./src/checkpoint/sharded_index.ts";
export { mlaProblem } from "./src/op/mla_problem.ts";
export type { HostInputs, MlaInputs, MlaMathOptions, MlaProblem, RopeMode, TensorName } from "./src/op/mla_problem.ts";
export type { Dropout, DropoutOptions } from "./src/op/dropout.ts";
export type { MlaEvent, MlaEventCode } from "./src/op/mla_event.ts";
export type { FlashMLAConfig } from "./src/op/config.ts";
export { FlashMLAError } from "./src/op/errors.ts";
export type { FlashMLAErrorCode } from "./src/op/errors.ts";
export { Backend, Platform } from "./src/op/platform.ts";
export type { EncodedCall, MlaImplementation, MlaTarget, MlaTrial, TrialOptions } from "./src/op/implementation.ts";

export { deviceCapabilities, openDevice } from "./src/gpu/device.ts";
export type { DeviceOptions } from "./src/gpu/request_device.ts";
export type { EngineName } from "./src/gpu/engine.ts";
export { describeCapabilities } from "./src/gpu/capabilities.ts";
export type { Capabilities, GpuLimits, SubgroupMatrixConfig, Subgroups } from "./src/gpu/capabilities.ts";
export { detectPlatform, kernelRegistry } from "./src/platforms.ts";
export { KernelRegistry } from "./src/registry.ts";
export type { ImplementationQuery, RegisterOptions, Registration } from "./src/registry.ts";

export { hashJson, Invocation } from "./src/tune/invocation.ts";
export type { InvocationInit, MeasuringOptions } from "./src/tune/invocation.ts";
export { Kernel } from "./src/tune/kernel.ts";
export type { Forward, OutputCheck, Trial } from "./src/tune/kernel.ts";
export { Executor } from "./src/tune/executor.ts";
export type { Compiled, Differentiated, ExecuteOptions } from "./src/tune/executor.ts";
export { ConfigSelectorChain } from "./src/tune/selector_chain.ts";
export type { Choice, ChooseOptions, SelectorChainOptions } from "./src/tune/selector_chain.ts";
export type { ConfigStore } from "./src/tune/autotune_once.ts";
export type {
  AutotuneCandidateEvent,
  AutotuneFinishEvent,
  AutotuneJoinEvent,
  AutotuneStartEvent,
  ConfigSource,
  HitEvent,
  MemoryHitEvent,
  MissEvent,
  RejectedEvent,
  SelectionContext,
  SelectionDetail,
  SelectionErrorEvent,
  SelectionEvent,
} from "./src/tune/selection_event.ts";
export { autotunePolicy, policyOverride, ScopedPolicy } from "./src/tune/policy.ts";
export type { AutotunePolicy, PolicyOwner, PolicySurroundings } from "./src/tune/policy.ts";
export { Tuner } from "./src/tune/tuner.ts";
export type { TuneOptions, TunerOptions } from "./src/tune/tuner.ts";

export { ConfigCache, heuristicConfig, measuredConfig } from "./src/cache/config_cache.ts";
export type { CachedConfig } from "./src/cache/config_cache.ts";
export { overlayCache } from "./src/cache/overlay_cache.ts";
export type { OverlayEntries } from "./src/cache/overlay_cache.ts";
export type { CacheEvent, CacheEventCode } from "./src/cache/cache_event.ts";
export type { StoreFault } from "./src/cache/kv_session.ts";
export type { KvEntry, KvKey, KvOpener, KvStore } from "./src/cache/kv_store.ts";
export { PersistentCache } from "./src/cache/persistent_cache.ts";
export type { CacheHealth, PersistentCacheOptions } from "./src/cache/persistent_cache.ts";
export type { CacheKey, CacheRecord, CandidateTiming } from "./src/cache/cache_record.ts";

export { MlaAttention } from "./src/mla_attention_layer.ts";
export type { MlaAttentionOptions, MlaForwardOptions } from "./src/mla_attention_layer.ts";
export { MlaLayerCache } from "./src/layer/layer_cache.ts";
export type { MlaLayerCacheOptions } from "./src/layer/layer_cache.ts";
export type { LayerCallOptions, MlaPositions } from "./src/layer/layer_call.ts";
export type { LayerTuning } from "./src/layer/layer_target.ts";
export type { MlaWeights } from "./src/layer/layer_weights.ts";
export { mlaModelConfig } from "./src/model/attention_config.ts";
export type { MlaModelConfig, MlaModelType, QueryTemperature } from "./src/model/attention_config.ts";
export type { ModelConfigFile } from "./src/model/config_fields.ts";
export { describe } from "./src/model/describe.ts";
export type { CacheBytes, DescribeOptions, MlaDescription } from "./src/model/describe.ts";
export { presets } from "./src/model/presets.ts";
export type { ModelPreset, PresetName } from "./src/model/presets.ts";
export type { RopeConfig, RopeLayout, RopeType } from "./src/model/rope_config.ts";
