// Attention of a layer's call, recorded into its encoder. Sequences that are computed alike go together; where lengths differ
// and keys have to be rebuilt from a cache, each sequence is gathered by itself.

import { encodeMlaAttention } from "../encode_mla_attention.ts";
import { defaultExecutor } from "../flash_mla.ts";
import { viewOnGpu } from "../gpu/gpu_tensor.ts";
import { defaultDecodeExecutor, encodeMlaDecode } from "../mla_decode.ts";
import type { MlaModelConfig } from "../model/attention_config.ts";
import type { Formulation } from "../op/formulation.ts";
import { denseStrides, type GpuTensor } from "../op/tensor.ts";
import { policyOverride, type PolicyOwner } from "../tune/policy.ts";
import { layerCacheInside, type MlaLayerCache, storeOf } from "./layer_cache.ts";
import type { LayerCall } from "./layer_call.ts";
import type { LayerTuning } from "./layer_target.ts";

/** What attention reads and writes, on the GPU. */
export interface LayerAttention {
  /** Rotated queries, `[batch, length, H, P + R]`. */
  readonly query: GpuTensor;
  /** The call's own latents and rotated keys, `[batch, length, L + R]`. */
  readonly rows: GpuTensor;
  /** The cache, which has them by then. */
  readonly cache: MlaLayerCache | undefined;
  /** Key expansion weights. */
  readonly wKc: GpuTensor;
  /** Value expansion weights. */
  readonly wVc: GpuTensor;
  /** Takes the attended values, `[batch, length, H, V]`. */
  readonly out: GpuTensor;
}

/** Sequences next to each other that are computed alike. */
interface Run {
  readonly formulation: Formulation;
  readonly first: number;
  readonly end: number;
}

/** Something recorded that holds memory until its submission. */
type Held = { dispose(): void };

/**
 * Records attention.
 *
 * @param encoder The encoder.
 * @param tensors The tensors.
 * @param call The call.
 * @param config The layer.
 * @param tuning What chooses configurations. Default: what was measured before, else a guess; nothing is measured here, where
 * the tensors have no elements yet.
 * @param held Takes what is to be disposed of after the submission.
 */
export async function encodeLayerAttention(
  encoder: GPUCommandEncoder,
  tensors: LayerAttention,
  call: LayerCall,
  config: MlaModelConfig,
  tuning: LayerTuning,
  held: Held[],
): Promise<void> {
  const recording = new Recording(encoder, tensors, call, config, tuning, held);
  for (const run of runsOf(call)) {
    if (run.formulation === "absorbed") await recording.absorbed(run);
    else await recording.expanded(run);
  }
}

function runsOf({ formulations, tokenStarts }: LayerCall): Run[] {
  const runs: Run[] = [];
  formulations.forEach((formulation, s) => {
    const last = runs.at(-1);
    // Sequences without new tokens go with their neighbours.
    const alike = last !== undefined && (last.formulation === formulation || tokenStarts[s + 1] === tokenStarts[s]);
    if (alike) runs[runs.length - 1] = { ...last, end: s + 1 };
    else runs.push({ formulation, first: s, end: s + 1 });
  });
  return runs;
}

class Recording {
  readonly #encoder: GPUCommandEncoder;
  readonly #tensors: LayerAttention;
  readonly #call: LayerCall;
  readonly #config: MlaModelConfig;
  readonly #tuning: LayerTuning;
  readonly #held: Held[];

  constructor(
    encoder: GPUCommandEncoder,
    tensors: LayerAttention,
    call: LayerCall,
    config: MlaModelConfig,
    tuning: LayerTuning,
    held: Held[],
  ) {
    this.#encoder = encoder;
    this.#tensors = tensors;
    this.#call = call;
    this.#config = config;
    this.#tuning = tuning;
    this.#held = held;
  }

  /** Over latents alone. */
  async absorbed(run: Run): Promise<void> {
    const { cache, rows } = this.#tensors;
    const { cuSeqlens, before } = this.#call;
    if (cache !== undefined) {
      const { latents, blockTable } = layerCacheInside(cache);
      const columns = blockTable.shape[1];
      const table = blockTable.data.subarray(run.first * columns, run.end * columns);
      const keys = Array.from(
        { length: run.end - run.first },
        (_, i) => before[run.first + i] + this.#added(run.first + i),
      );
      return await this.#decode(run, {
        cache: latents,
        blockTable: { data: table, shape: [run.end - run.first, columns] },
        seqLens: keys,
      });
    }
    if (cuSeqlens === undefined) return await this.#decode(run, { cache: this.#part(rows, run) });
    for (const one of this.#each(run)) {
      await this.#decode(one, { cache: this.#part(rows, one) });
    }
  }

  /** Over rebuilt keys and values. */
  async expanded(run: Run): Promise<void> {
    const { cache, rows } = this.#tensors;
    const { before, cuSeqlens } = this.#call;
    const prefixes = before.slice(run.first, run.end);
    if (cache === undefined || prefixes.every((keys) => keys === 0)) {
      return await this.#attend(run, this.#part(rows, run), this.#offsets(run));
    }
    const alike = cuSeqlens === undefined && prefixes.every((keys) => keys === prefixes[0]);
    for (const part of alike ? [run] : this.#each(run)) {
      const { blockTable } = layerCacheInside(cache);
      const sequences = Array.from({ length: part.end - part.first }, (_, i) => part.first + i);
      const keys = before[part.first] + this.#added(part.first);
      const gathered = await storeOf(cache).encodeGather!(this.#encoder, blockTable, sequences, keys);
      this.#held.push(gathered);
      await this.#attend(part, gathered.rows);
    }
  }

  /** The sequences of a run that have new tokens, one by one. */
  #each({ formulation, first, end }: Run): Run[] {
    return Array.from({ length: end - first }, (_, i) => ({ formulation, first: first + i, end: first + i + 1 }))
      .filter((one) => this.#added(one.first) > 0);
  }

  #added(sequence: number): number {
    const { tokenStarts } = this.#call;
    return tokenStarts[sequence + 1] - tokenStarts[sequence];
  }

  async #decode(
    run: Run,
    keys: Pick<Parameters<typeof encodeMlaDecode>[1], "cache" | "blockTable" | "seqLens">,
  ): Promise<void> {
    const { query, wKc, wVc, out } = this.#tensors;
    const { decodeCfg, decodeExecutor, onEvent } = this.#tuning;
    const cuSeqlens = this.#offsets(run);
    const packed = cuSeqlens !== undefined && keys.blockTable !== undefined;
    const inputs = { ...keys, query: this.#part(query, run), wKc, wVc, ...(packed && { cuSeqlens }) };
    const options = {
      ...this.#math(),
      ...(decodeCfg && { cfg: decodeCfg }),
      ...(decodeExecutor && { executor: decodeExecutor }),
      ...(onEvent && { onEvent }),
      out: this.#part(out, run),
    };
    this.#held.push(
      await withoutMeasuring(
        decodeExecutor ? null : defaultDecodeExecutor().chain,
        () => encodeMlaDecode(this.#encoder, inputs, options),
      ),
    );
  }

  async #attend(run: Run, rows: GpuTensor, cuSeqlens?: readonly number[]): Promise<void> {
    const { query, wKc, wVc, out } = this.#tensors;
    const { cfg, executor, onEvent } = this.#tuning;
    const { kvLoraRank: L, qkRopeHeadDim: R } = this.#config;
    const inputs = {
      query: this.#part(query, run),
      keyValue: columns(rows, 0, L),
      ...(R > 0 && { bK: columns(rows, L, R) }),
      wKc,
      wVc,
      ...(cuSeqlens && { cuSeqlens }),
    };
    const options = {
      ...this.#math(),
      ...(cfg && { cfg }),
      ...(executor && { executor }),
      ...(onEvent && { onEvent }),
      out: this.#part(out, run),
    };
    this.#held.push(
      await withoutMeasuring(
        executor ? null : defaultExecutor().chain,
        () => encodeMlaAttention(this.#encoder, inputs, options),
      ),
    );
  }

  #math() {
    const { device } = this.#tensors.query;
    return { softmaxScale: this.#config.softmaxScale, causal: this.#call.causal, device };
  }

  /** The offsets of a run of packed sequences, from its own first token on. */
  #offsets({ first, end }: Run): readonly number[] | undefined {
    const { cuSeqlens } = this.#call;
    return cuSeqlens?.slice(first, end + 1).map((start) => start - cuSeqlens[first]);
  }

  /** The tokens of a run: a view. */
  #part(tensor: GpuTensor, { first, end }: Run): GpuTensor {
    const { tokenStarts, cuSeqlens } = this.#call;
    const { strides = denseStrides(tensor.shape) } = tensor;
    const packed = cuSeqlens !== undefined;
    const axis = packed ? 1 : 0;
    const [from, to] = packed ? [tokenStarts[first], tokenStarts[end]] : [first, end];
    const shape = tensor.shape.map((length, i) => i === axis ? to - from : length);
    return viewOnGpu(tensor, { shape, offset: from * strides[axis], strides });
  }
}

/** Starts work while a chain measures nothing; it has read its policy when the work first waits. */
async function withoutMeasuring<Result>(chain: PolicyOwner | null, work: () => Promise<Result>): Promise<Result> {
  if (chain === null) return await work();
  return await policyOverride(chain, { allowAutotune: false, cacheMissFallback: "heuristics" }, work);
}

/** Some columns of rows: a view. */
function columns(rows: GpuTensor, first: number, count: number): GpuTensor {
  const [batch, length] = rows.shape;
  return viewOnGpu(rows, { shape: [batch, length, count], offset: first, strides: rows.strides });
}
