// What a platform offers to decoding: caches of latent rows, and a target that attends over them.

import type { AttentionState } from "./attention_state.ts";
import type { DecodeConfig } from "./decode_config.ts";
import type { CacheLayout, DecodeProblem } from "./decode_problem.ts";
import type { EncodedCall, MlaTrial } from "./implementation.ts";
import type { AnyIndexTensor } from "./index_tensor.ts";
import type { MlaEvent } from "./mla_event.ts";
import type { Backend, Platform } from "./platform.ts";
import type { AnyTensor, GpuTensor } from "./tensor.ts";

/** Rows to be written to a cache. */
export interface AppendStep {
  /** The rows, `[batch, length, L + R]`. */
  readonly rows: AnyTensor;
  /** First row of each sequence, counted through both axes, and behind it the number of rows. */
  readonly rowStarts: readonly number[];
  /** Where each row goes, as page · pageSize + place in the page; null where the two below lie on a GPU. */
  readonly places: Uint32Array<ArrayBuffer> | null;
  /** Pages of each sequence. */
  readonly blockTable: AnyIndexTensor;
  /** Keys of each sequence before. */
  readonly seqLens: AnyIndexTensor;
  /** Pages that are copied first. */
  readonly copies: readonly (readonly [from: number, to: number])[];
}

/** The memory of one cache. */
export interface CacheStore {
  /** Bytes that it takes. */
  readonly bytes: number;
  /** Its device, on a GPU. */
  readonly device?: GPUDevice;
  /** Copies pages and writes rows. */
  append(step: AppendStep): Promise<void>;
  /** Records that into a caller's encoder; missing where there is none. */
  encodeAppend?(encoder: GPUCommandEncoder, step: AppendStep): Promise<{ dispose(): void }>;
  /**
   * The rows of some keys of one sequence in order, `[1, count, L + R]`, as a tensor to be disposed of.
   *
   * @param blockTable Pages of each sequence.
   * @param sequence Which sequence.
   * @param first First key.
   * @param count How many keys.
   */
  gather(
    blockTable: AnyIndexTensor,
    sequence: number,
    first: number,
    count: number,
  ): Promise<{ readonly rows: AnyTensor; dispose(): void }>;
  /**
   * Records the gathering of all keys of some sequences, `[sequences, count, L + R]`, into a caller's encoder; missing where
   * there is none. The tensor is to be disposed of after the submission.
   *
   * @param encoder The encoder, outside any pass.
   * @param blockTable Pages of each sequence.
   * @param sequences Which sequences.
   * @param count How many keys of each, from the first on.
   */
  encodeGather?(
    encoder: GPUCommandEncoder,
    blockTable: AnyIndexTensor,
    sequences: readonly number[],
    count: number,
  ): Promise<{ readonly rows: GpuTensor; dispose(): void }>;
  /** Gives the memory back. */
  dispose(): void;
}

/** What one call reads, held as it was when the call was made. */
export interface DecodeInputs {
  /** The query. */
  readonly query: AnyTensor;
  /** The cache: pages, or a tensor `[sequences, keyLength, L + R]`. */
  readonly cache: CacheStore | AnyTensor;
  /** Key expansion weights; none with an absorbed query. */
  readonly wKc?: AnyTensor;
  /** Value expansion weights. */
  readonly wVc?: AnyTensor;
  /** Sinks. */
  readonly softmaxAux?: AnyTensor;
  /** Pages of each sequence; none with a tensor. */
  readonly blockTable?: AnyIndexTensor;
  /** Keys of each sequence. */
  readonly seqLens: AnyIndexTensor;
}

/** The tensors of a call by name; of the cache only one without pages. */
export function namedTensors(
  { cache, ...tensors }: DecodeInputs,
  out?: AnyTensor,
): [name: string, tensor: AnyTensor | AnyIndexTensor][] {
  return Object.entries({ ...tensors, out, ...("append" in cache ? {} : { cache }) })
    .filter((entry): entry is [string, AnyTensor] => entry[1] !== undefined);
}

/** An opened device, or the processor itself, on which caches live and decoding runs. */
export interface DecodeTarget {
  /** The platform it belongs to. */
  readonly platform: Platform;
  /** The device in a person's words. */
  readonly description: string;
  /** One line that two targets share exactly when they may share measured configurations. */
  readonly fingerprint: string;
  /** Makes a cache. */
  createCache(layout: CacheLayout): Promise<CacheStore>;
  /** Why a configuration cannot run a problem here, naming the limit and the value; null when it can. */
  whyInvalid(problem: DecodeProblem, cfg: DecodeConfig): string | null;
  /** A good configuration without measuring. */
  heuristicCfg(problem: DecodeProblem): DecodeConfig;
  /** The configurations worth measuring, the heuristic's first. */
  candidateCfgs(problem: DecodeProblem): readonly DecodeConfig[];
  /** Runs a call. The result is `out`, written in place, or like the query; the log-sum-exp is on its side. */
  run(
    problem: DecodeProblem,
    inputs: DecodeInputs,
    cfg: DecodeConfig,
    options: { readonly out?: AnyTensor; readonly withLse: boolean },
  ): Promise<AttentionState | (Pick<AttentionState, "output"> & { readonly lse?: undefined })>;
  /** Records a call into a caller's encoder; missing where there is none. */
  encode?(
    encoder: GPUCommandEncoder,
    problem: DecodeProblem,
    inputs: DecodeInputs,
    cfg: DecodeConfig,
    out?: GpuTensor,
  ): Promise<EncodedCall>;
  /** Makes a configuration ready to be timed on a call; throws where it cannot run. */
  trial(problem: DecodeProblem, inputs: DecodeInputs, cfg: DecodeConfig): Promise<MlaTrial>;
  /** Milliseconds of a piece of known work that follow the device's clock, or null where there is no such thing. */
  probe(): Promise<number | null>;
}

/** An implementation of decoding, as the registry holds it. */
export interface DecodeImplementation {
  /** The platform it runs on. */
  readonly platform: Platform;
  /** The kind of processor it needs. */
  readonly backend: Backend;
  /** Opens its device; see `MlaImplementation.open`. */
  open(device?: GPUDevice, onEvent?: (event: MlaEvent) => void): Promise<DecodeTarget>;
}
