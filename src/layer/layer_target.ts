// What a platform makes of a layer.

import type { MlaDecodeExecutor } from "../decode_kernel.ts";
import type { MlaExecutor } from "../flash_mla.ts";
import type { FlashMLAConfig } from "../op/config.ts";
import type { DecodeConfig } from "../op/decode_config.ts";
import type { MlaEvent } from "../op/mla_event.ts";
import type { Platform } from "../op/platform.ts";
import type { AnyTensor } from "../op/tensor.ts";
import type { MlaLayerCache } from "./layer_cache.ts";
import type { LayerCall } from "./layer_call.ts";

/** What chooses the configurations of a call's attention. */
export interface LayerTuning {
  /** The configuration of attention over rebuilt keys, for this call only. */
  readonly cfg?: FlashMLAConfig;
  /** The configuration of absorbed attention, for this call only. */
  readonly decodeCfg?: DecodeConfig;
  /** What chooses the configuration of attention over rebuilt keys. */
  readonly executor?: MlaExecutor;
  /** What chooses that of absorbed attention. */
  readonly decodeExecutor?: MlaDecodeExecutor;
  /** Hears of what the call's user may want to know. */
  readonly onEvent?: (event: MlaEvent) => void;
}

/** A layer on one platform. */
export interface LayerTarget {
  /** The platform. */
  readonly platform: Platform;
  /** Its device, on a GPU. */
  readonly device?: GPUDevice;
  /** Runs a call: appends to the cache and attends. Lengths are the caller's to raise afterwards. */
  forward(
    hiddenStates: AnyTensor,
    call: LayerCall,
    cache: MlaLayerCache | undefined,
    tuning: LayerTuning,
  ): Promise<AnyTensor>;
  /** Gives the weights back. */
  dispose(): void;
}
