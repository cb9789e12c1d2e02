// New tokens of a batch of sequences against what is cached of each: append, then attend in the formulation that is cheaper.

import { emptyOnGpu, toGpu, viewOnGpu } from "./gpu/gpu_tensor.ts";
import { halvesOnGpu } from "./gpu/half_copy.ts";
import { insideOf, LatentCache } from "./latent_cache.ts";
import { mergeAttentionStates } from "./merge_attention_states.ts";
import { mlaAttention, type MlaExecutor } from "./flash_mla.ts";
import { mlaAttentionWithLse } from "./mla_attention_with_lse.ts";
import type { MlaDecodeExecutor } from "./decode_kernel.ts";
import { mlaDecode } from "./mla_decode.ts";
import type { AttentionState } from "./op/attention_state.ts";
import type { FlashMLAConfig } from "./op/config.ts";
import type { DecodeConfig } from "./op/decode_config.ts";
import { type DecodeMathOptions, type DecodeProblem, decodeProblem } from "./op/decode_problem.ts";
import { checkSeqLens, type SeqLens } from "./op/sequence_places.ts";
import { FlashMLAError } from "./op/errors.ts";
import { fewerFlops, type Formulation, visiblePairs } from "./op/formulation.ts";
import { toFloats, writeFloats, zeros } from "./op/half.ts";
import { type AnyIndexTensor, type IndexTensor, isGpuIndex } from "./op/index_tensor.ts";
import type { MlaEvent } from "./op/mla_event.ts";
import {
  type AnyTensor,
  denseStrides,
  dtypeOf,
  elementBytes,
  type F16Tensor,
  type GpuTensor,
  type HostTensor,
  isGpuTensor,
  kindOf,
  type OwnedGpuTensor,
  type ResultLike,
  type Tensor,
} from "./op/tensor.ts";

/**
 * The tensors of one call of {@link mlaPrefillWithCache}.
 *
 * @typeParam Query What the query is: the result is like it.
 */
export interface MlaPrefillInputs<Query extends AnyTensor = AnyTensor> {
  /** Queries, `[batch, length, queryHeads, qkNopeHeadDim + qkRopeHeadDim]`, or `[1, total, …]` packed by `cuSeqlens`. */
  readonly query: Query;
  /** The new tokens' rows, `[batch, length, kvLoraRank + qkRopeHeadDim]`, or packed in the same way. */
  readonly rows: AnyTensor;
  /** The cache. */
  readonly cache: LatentCache;
  /** Page numbers of each sequence, `[sequences, maxPages]`, with room for the new tokens; see `LatentCache.reserve`. */
  readonly blockTable: AnyIndexTensor;
  /** Keys of each sequence before the new ones, on the host. */
  readonly seqLens: SeqLens;
  /** Key expansion weights, `[kvLoraRank, kvHeads, qkNopeHeadDim]`. */
  readonly wKc: AnyTensor;
  /** Value expansion weights, `[kvLoraRank, kvHeads, vHeadDim]`. */
  readonly wVc: AnyTensor;
  /** Offsets `[sequences + 1]` of sequences packed along the sequence axis of batch 1. */
  readonly cuSeqlens?: Int32Array | Uint32Array | readonly number[];
}

/** The options of one call of {@link mlaPrefillWithCache}. */
export interface MlaPrefillOptions extends Omit<DecodeMathOptions, "kvLoraRank" | "splitKeys"> {
  /**
   * How to compute: over latents alone, or with keys and values rebuilt; `auto`, the default, takes for each sequence what
   * needs fewer FLOPs.
   */
  readonly formulation?: Formulation | "auto";
  /**
   * Keys that are rebuilt at a time; longer prefixes are cut and merged by their log-sum-exp. Default 8192. New tokens are
   * never cut from each other.
   */
  readonly chunkKeys?: number;
  /** The configuration of absorbed attention, for this call only. */
  readonly decodeCfg?: DecodeConfig;
  /** The configuration of attention over rebuilt keys, for this call only. */
  readonly cfg?: FlashMLAConfig;
  /** What chooses the configuration of absorbed attention. */
  readonly decodeExecutor?: MlaDecodeExecutor;
  /** What chooses that of attention over rebuilt keys. */
  readonly executor?: MlaExecutor;
  /** Hears of what the call's user may want to know. */
  readonly onEvent?: (event: MlaEvent) => void;
}

function fail(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot prefill: ${why}`);
}

const knownOptions = [
  ...["softmaxScale", "causal", "logitsSoftCap", "slidingWindow", "softmaxAux", "formulation", "chunkKeys"],
  ...["decodeCfg", "cfg", "decodeExecutor", "executor", "onEvent"],
];

/** Sequences next to each other that are computed alike. */
interface Run {
  readonly formulation: Formulation;
  readonly first: number;
  readonly end: number;
}

/**
 * Attention of new tokens against cached prefixes: appends the tokens' rows to the cache, then attends with their queries over
 * everything that their sequences have. Sequences may have any number of new tokens, one of them as in decoding or thousands
 * of a prompt, in one call.
 *
 * @param inputs The tensors and the cache.
 * @param options Mask, scale, and how to compute.
 * @returns The result, `[batch, length, queryHeads, vHeadDim]`, like the query: a new tensor.
 * @throws {FlashMLAError} As `LatentCache.append` and `mlaDecode` do; lengths are the caller's to raise.
 *
 * @example A prompt of five tokens, then three more
 * ```ts
 * import { LatentCache, mlaPrefillWithCache } from "@flash-mla/webgpu";
 *
 * const ones = (...shape: number[]) => ({ data: new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape });
 * const cache = await LatentCache.create({ platform: "reference", pages: 4, pageSize: 4, kvLoraRank: 16, qkRopeHeadDim: 4 });
 * const blockTable = { data: cache.allocate(2), shape: [1, 2] };
 * const weights = { wKc: ones(16, 3, 8), wVc: ones(16, 3, 6) };
 * const tokens = (count: number) => ({ query: ones(1, count, 3, 12), rows: ones(1, count, 20) });
 *
 * await mlaPrefillWithCache({ ...tokens(5), ...weights, cache, blockTable, seqLens: [0] });
 * const output = await mlaPrefillWithCache({ ...tokens(3), ...weights, cache, blockTable, seqLens: [5] });
 * console.log(output.shape); // [1, 3, 3, 6]
 * ```
 */
export async function mlaPrefillWithCache<Query extends AnyTensor>(
  inputs: MlaPrefillInputs<Query>,
  options: MlaPrefillOptions = {},
): Promise<ResultLike<Query>> {
  const call = new Prefill(inputs, options);
  await inputs.cache.append(inputs.rows, inputs);
  return await call.attend() as ResultLike<Query>;
}

class Prefill {
  readonly #inputs: MlaPrefillInputs;
  readonly #options: MlaPrefillOptions;
  readonly #problem: DecodeProblem;
  /** Keys of each sequence, the new ones among them. */
  readonly #keys: readonly number[];
  readonly #asked: Formulation | "auto";
  /** Keys that are rebuilt at a time. */
  readonly #chunkKeys: number;

  constructor(inputs: MlaPrefillInputs, options: MlaPrefillOptions) {
    if (typeof inputs !== "object" || inputs === null) {
      fail(`inputs must be an object of tensors, got ${kindOf(inputs)}`);
    }
    if (typeof options !== "object" || options === null) fail(`options must be an object, got ${kindOf(options)}`);
    for (const name of Object.keys(options)) {
      if (!knownOptions.includes(name)) fail(`unknown option "${name}"; known are ${knownOptions.join(", ")}`);
    }
    const { query, rows, cache, wKc, wVc, blockTable, cuSeqlens } = inputs;
    if (!(cache instanceof LatentCache)) fail(`cache must be a LatentCache, got ${kindOf(cache)}`);
    if (wKc === undefined || wVc === undefined) {
      fail("wKc and wVc are needed; for an absorbed query, append and mlaDecode");
    }
    const { formulation = "auto", chunkKeys = 8192 } = options;
    this.#asked = formulation;
    this.#chunkKeys = chunkKeys;
    if (!["auto", "absorbed", "expanded"].includes(formulation)) {
      fail(`formulation must be "auto", "absorbed" or "expanded", got ${kindOf(formulation)}`);
    }
    if (!Number.isSafeInteger(chunkKeys) || chunkKeys < 1) {
      fail(`chunkKeys must be a whole number from 1, got ${kindOf(chunkKeys)}`);
    }
    const [batch, length] = query?.shape ?? [];
    if (rows?.shape?.[0] !== batch || rows.shape[1] !== length) {
      fail(`query has shape [${query?.shape}], rows [${rows?.shape}]: expected as many rows as queries`);
    }
    const { layout } = insideOf(cache);
    const sequences = cuSeqlens === undefined ? batch : cuSeqlens.length - 1;
    const before = checkSeqLens(inputs.seqLens, sequences, Infinity, "the cache", fail);
    if (before === null) fail("seqLens lie on a GPU; how to compute depends on them, so pass them on the host");
    const counts = (i: number) => cuSeqlens === undefined ? length : cuSeqlens[i + 1] - cuSeqlens[i];
    this.#keys = before.map((keys, i) => keys + counts(i));
    const width = layout.kvLoraRank + layout.qkRopeHeadDim;
    const { softmaxScale, causal, logitsSoftCap, slidingWindow, softmaxAux } = options;
    const math = { softmaxScale, causal, logitsSoftCap, slidingWindow, softmaxAux };
    const tensors = { query, wKc, wVc, blockTable, seqLens: this.#keys, cuSeqlens };
    this.#problem = decodeProblem(tensors, { ...layout, width }, math);
    // As they are now: the call goes on after others may have changed the objects.
    const held = isGpuIndex(blockTable) ? blockTable : { data: blockTable.data, shape: [...blockTable.shape] };
    this.#inputs = { ...inputs, blockTable: held };
    this.#options = { ...options };
  }

  async attend(): Promise<AnyTensor> {
    const { query, cache } = this.#inputs;
    const { batch, queryLength, queryHeads, vHeadDim } = this.#problem;
    const runs = this.#runs();
    if (runs.length === 1 && runs[0].formulation === "absorbed") return await this.#absorbed(runs[0]);
    const shape = [batch, queryLength, queryHeads, vHeadDim];
    const dtype = dtypeOf(query) === "f16" ? "f16" : "f32";
    // Kernels write whole words: tokens of an odd number of halves are rounded when all are there.
    const isOdd = isGpuTensor(query) && dtype === "f16" && queryHeads * vHeadDim % 2 === 1;
    const output = isGpuTensor(query)
      ? await emptyOnGpu(shape, { dtype: isOdd ? "f32" : dtype, device: cache.device })
      : zeros(shape, dtype);
    const lent: OwnedGpuTensor[] = [];
    try {
      // One upload serves all runs and chunks.
      const resident = async (tensor: AnyTensor) => {
        if (cache.device === undefined || isGpuTensor(tensor)) return tensor;
        const placed = await toGpu(tensor as Tensor, cache.device);
        lent.push(placed);
        return placed;
      };
      const weights = { wKc: await resident(this.#inputs.wKc), wVc: await resident(this.#inputs.wVc) };
      for (const run of runs) {
        if (run.formulation === "absorbed") await this.#absorbed(run, this.#part(output, run), weights);
        for (let s = run.first; run.formulation === "expanded" && s < run.end; s++) {
          await this.#expanded(s, this.#part(output, { first: s, end: s + 1 }), weights);
        }
      }
      if (!isOdd) return output;
      lent.push(output as OwnedGpuTensor);
      return await halvesOnGpu(output as OwnedGpuTensor);
    } catch (error) {
      if (isGpuTensor(output)) (output as OwnedGpuTensor).dispose();
      throw error;
    } finally {
      for (const tensor of lent) tensor.dispose();
    }
  }

  #queries(sequence: number): number {
    const { tokenStarts } = this.#problem;
    return tokenStarts[sequence + 1] - tokenStarts[sequence];
  }

  #runs(): Run[] {
    const runs: Run[] = [];
    for (let s = 0; s < this.#problem.sequences; s++) {
      const formulation = this.#formulation(s);
      const last = runs.at(-1);
      if (last?.formulation === formulation) runs[runs.length - 1] = { ...last, end: s + 1 };
      else runs.push({ formulation, first: s, end: s + 1 });
    }
    return runs.length === 0 ? [{ formulation: "absorbed", first: 0, end: 0 }] : runs;
  }

  #formulation(sequence: number): Formulation {
    const [queries, keys] = [this.#queries(sequence), this.#keys[sequence]];
    // A window over several chunks would be another one for each.
    const windowed = this.#problem.slidingWindow !== null && this.#seen(sequence) > Math.max(queries, this.#chunkKeys);
    if (windowed || queries === 0 || keys === 0) return "absorbed";
    if (this.#asked !== "auto") return this.#asked;
    const widths = { ...this.#problem, qkNopeHeadDim: this.#problem.qkNopeHeadDim! };
    return fewerFlops(widths, queries, keys, visiblePairs(queries, keys, this.#problem));
  }

  /** Keys from the first one that a query sees. */
  #seen(sequence: number): number {
    const [left] = this.#problem.slidingWindow ?? [Infinity];
    return Math.min(this.#keys[sequence], this.#queries(sequence) + left);
  }

  /** The tokens of some sequences in the query or the result: a view. */
  #part(tensor: AnyTensor, { first, end }: Pick<Run, "first" | "end">): AnyTensor {
    const { tokenStarts } = this.#problem;
    const packed = this.#inputs.cuSeqlens !== undefined;
    const axis = packed ? 1 : 0;
    const from = packed ? tokenStarts[first] : first;
    const count = packed ? tokenStarts[end] - from : end - first;
    const shape = tensor.shape.map((length, i) => i === axis ? count : length);
    if (isGpuTensor(tensor)) {
      const { strides = denseStrides(tensor.shape) } = tensor;
      const dense = denseStrides(shape);
      // Of packed tokens there is one item, whose distance to a next one does not matter.
      const own = packed ? [dense[0], ...strides.slice(1)] : strides;
      return viewOnGpu(tensor, {
        shape,
        offset: from * strides[axis],
        strides: own.join() === dense.join() ? undefined : own,
      });
    }
    const row = denseStrides(tensor.shape)[axis];
    const data = (tensor.data as Float32Array).subarray(from * row, (from + count) * row);
    return { ...tensor, data, shape } as HostTensor;
  }

  async #absorbed(
    run: Run,
    out?: AnyTensor,
    weights: { readonly wKc: AnyTensor; readonly wVc: AnyTensor } = this.#inputs,
  ): Promise<AnyTensor> {
    const { cache, blockTable, cuSeqlens, query } = this.#inputs;
    const { first, end } = run;
    const { softmaxScale, causal, logitsSoftCap, slidingWindow, softmaxAux } = this.#options;
    const { decodeCfg, decodeExecutor, onEvent } = this.#options;
    const { tokenStarts } = this.#problem;
    return await mlaDecode({
      query: out === undefined ? query : this.#part(query, run),
      cache,
      ...weights,
      blockTable: tableRows(blockTable, first, end),
      seqLens: this.#keys.slice(first, end),
      ...(cuSeqlens && {
        cuSeqlens: tokenStarts.slice(first, end + 1).map((start) => start - tokenStarts[first]),
      }),
    }, {
      ...{ softmaxScale, causal, logitsSoftCap, slidingWindow, softmaxAux },
      ...{ cfg: decodeCfg, executor: decodeExecutor, onEvent },
      ...(out && { out }),
    });
  }

  /** One sequence over rebuilt keys and values, its prefix in chunks. */
  async #expanded(
    sequence: number,
    out: AnyTensor,
    weights: { readonly wKc: AnyTensor; readonly wVc: AnyTensor },
  ): Promise<void> {
    const { cache } = this.#inputs;
    const { softmaxAux, executor, cfg, onEvent } = this.#options;
    const { causal, softmaxScale, logitsSoftCap, slidingWindow } = this.#problem;
    const query = this.#part(this.#inputs.query, { first: sequence, end: sequence + 1 });
    const [queries, keys] = [this.#queries(sequence), this.#keys[sequence]];
    const begin = keys - this.#seen(sequence);
    // The last chunk holds all new tokens, so that the causal mask is its alone.
    const last = Math.max(begin, keys - Math.max(queries, this.#chunkKeys));
    const options = {
      ...{ softmaxScale, executor, cfg, onEvent, platform: cache.platform, device: cache.device },
      ...(logitsSoftCap !== null && { logitsSoftCap }),
    };
    const ends = { causal, ...(slidingWindow && { slidingWindow }) };
    if (last === begin) {
      await this.#over(sequence, begin, keys - begin, async (latents) => {
        const inputs = { query, ...latents, ...weights };
        await mlaAttention(inputs, { ...options, ...ends, softmaxAux, out: out as Tensor });
      });
      return;
    }
    let state: AttentionState | null = null;
    const dispose = (done: AttentionState | null) => {
      for (const tensor of done === null ? [] : [done.output, done.lse]) {
        if (isGpuTensor(tensor)) (tensor as OwnedGpuTensor).dispose();
      }
    };
    try {
      for (let first = begin; first < keys;) {
        const isLast = first >= last;
        const count = isLast ? keys - first : Math.min(this.#chunkKeys, last - first);
        const part = await this.#over(
          sequence,
          first,
          count,
          (latents) => mlaAttentionWithLse({ query, ...latents, ...weights }, { ...options, ...(isLast && ends) }),
        ) as AttentionState;
        if (state === null) state = part;
        else {
          const before = state;
          const sinks = isLast && softmaxAux ? { softmaxAux } : {};
          state = await mergeAttentionStates(before, part, sinks).finally(() => dispose(part)) as AttentionState;
          dispose(before);
        }
        first += count;
      }
      this.#store(state!.output, out);
    } finally {
      dispose(state);
    }
  }

  /** Does something over the latents of some keys. */
  async #over<Result>(
    sequence: number,
    first: number,
    count: number,
    work: (latents: { readonly keyValue: AnyTensor; readonly bK?: AnyTensor }) => Promise<Result>,
  ): Promise<Result> {
    const { store, layout: { kvLoraRank, qkRopeHeadDim } } = insideOf(this.#inputs.cache);
    const { rows, dispose } = await store.gather(this.#inputs.blockTable, sequence, first, count);
    try {
      return await work({
        keyValue: columns(rows, 0, kvLoraRank),
        ...(qkRopeHeadDim > 0 && { bK: columns(rows, kvLoraRank, qkRopeHeadDim) }),
      });
    } finally {
      dispose();
    }
  }

  /** Copies a result to where it belongs. */
  #store(from: AnyTensor, to: AnyTensor): void {
    if (!isGpuTensor(from) && !isGpuTensor(to)) return writeFloats(to as Tensor | F16Tensor, toFloats(from).data);
    const { buffer, offset = 0, shape, dtype } = to as GpuTensor;
    const size = shape.reduce((product, axis) => product * axis, elementBytes(dtype));
    const device = this.#inputs.cache.device!;
    const encoder = device.createCommandEncoder({ label: "flash-mla prefill" });
    encoder.copyBufferToBuffer((from as GpuTensor).buffer, (from as GpuTensor).offset ?? 0, buffer, offset, size);
    device.queue.submit([encoder.finish()]);
  }
}

/** Some rows of a block table. */
function tableRows(table: AnyIndexTensor, first: number, end: number): AnyIndexTensor {
  const columns = table.shape[1];
  if (!isGpuIndex(table)) {
    return {
      data: (table as IndexTensor).data.subarray(first * columns, end * columns),
      shape: [end - first, columns],
    };
  }
  return { ...table, shape: [end - first, columns], offset: (table.offset ?? 0) + 4 * first * columns };
}

/** Some columns of rows `[1, count, width]`: a view on a GPU, a copy on the host. */
function columns(rows: AnyTensor, first: number, count: number): AnyTensor {
  const [, length, width] = rows.shape;
  if (isGpuTensor(rows)) {
    return viewOnGpu(rows, { shape: [1, length, count], offset: first, strides: [...rows.strides!] });
  }
  const { data } = toFloats(rows);
  const part = new Float32Array(length * count);
  for (let row = 0; row < length; row++) {
    part.set(data.subarray(row * width + first, row * width + first + count), row * count);
  }
  return { data: part, shape: [1, length, count] };
}
