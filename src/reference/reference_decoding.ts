// Caches and decoding on the platform "reference": the oracle, as the registry sees it.

import type { DecodeConfig } from "../op/decode_config.ts";
import type {
  AppendStep,
  CacheStore,
  DecodeImplementation,
  DecodeInputs,
  DecodeTarget,
} from "../op/decode_implementation.ts";
import type { CacheLayout, DecodeProblem } from "../op/decode_problem.ts";
import { FlashMLAError } from "../op/errors.ts";
import { toFloats, toHalves, writeFloats } from "../op/half.ts";
import { type AnyIndexTensor, type IndexTensor, isGpuIndex } from "../op/index_tensor.ts";
import { placeOf } from "../op/sequence_places.ts";
import { type AnyTensor, dtypeOf, type HostTensor, isGpuTensor, type Tensor } from "../op/tensor.ts";
import { referenceDecode } from "./decode.ts";

/** Rows in memory of the host, in float32; those of a cache of halves are rounded to them. */
class HostStore implements CacheStore {
  readonly layout: CacheLayout;
  readonly width: number;
  #data: Float32Array;

  constructor(layout: CacheLayout) {
    this.layout = layout;
    this.width = layout.kvLoraRank + layout.qkRopeHeadDim;
    const elements = layout.pages * layout.pageSize * this.width;
    try {
      this.#data = new Float32Array(elements);
    } catch (cause) {
      const why = `${elements * 4} bytes for ${layout.pages} pages are more than an array can hold`;
      throw new FlashMLAError("limit", `Cannot create the cache: ${why}`, { cause });
    }
  }

  get bytes(): number {
    return this.#data.byteLength;
  }

  get data(): Float32Array {
    return this.#data;
  }

  append({ rows, places, copies }: AppendStep): Promise<void> {
    const { width, layout: { pageSize, dtype } } = this;
    const floats = toFloats(rows as HostTensor);
    const { data } = dtype === "f16" && dtypeOf(rows) !== "f16" ? toFloats(toHalves(floats)) : floats;
    const page = pageSize * width;
    for (const [from, to] of copies) this.#data.copyWithin(to * page, from * page, (from + 1) * page);
    places!.forEach((place, row) => this.#data.set(data.subarray(row * width, (row + 1) * width), place * width));
    return Promise.resolve();
  }

  gather(blockTable: AnyIndexTensor, sequence: number, first: number, count: number) {
    const { width, layout: { pageSize } } = this;
    const data = new Float32Array(count * width);
    for (let i = 0; i < count; i++) {
      const at = placeOf(blockTable as IndexTensor, sequence, first + i, pageSize) * width;
      data.set(this.#data.subarray(at, at + width), i * width);
    }
    return Promise.resolve({ rows: { data, shape: [1, count, width] }, dispose() {} });
  }

  dispose(): void {
    this.#data = new Float32Array(0);
  }
}

/** The oracle has no tiles. */
const onlyConfig: DecodeConfig = {
  blockRows: 1,
  blockK: 1,
  numWarps: 1,
  subgroups: false,
  matrixUnits: false,
  pinned: false,
  workgroups: 1,
  platform: "reference",
  backend: "any",
};

/** A tensor on the host in float32. */
function floats(name: string, tensor: AnyTensor): Tensor {
  if (!isGpuTensor(tensor)) return toFloats(tensor);
  throw new FlashMLAError(
    "invalid-input",
    `Cannot decode: ${name} lies on a GPU, the reference computes on the host: pass await toHost(${name}), or a cache of ` +
      'platform "webgpu"',
  );
}

function decode(problem: DecodeProblem, inputs: DecodeInputs) {
  const { query, wKc, wVc, softmaxAux, cache, blockTable, seqLens } = inputs;
  for (const [name, index] of Object.entries({ blockTable, seqLens })) {
    if (index === undefined || !isGpuIndex(index)) continue;
    throw new FlashMLAError(
      "invalid-input",
      `Cannot decode: ${name} lies on a GPU, the reference computes on the host`,
    );
  }
  const { kvLoraRank, qkRopeHeadDim, pageSize, keyLength } = problem.cache;
  const width = kvLoraRank + qkRopeHeadDim;
  const rows = cache instanceof HostStore ? cache.data : floats("cache", cache as AnyTensor).data;
  return referenceDecode({
    query: floats("query", query),
    ...(wKc && { wKc: floats("wKc", wKc) }),
    ...(wVc && { wVc: floats("wVc", wVc) }),
    ...(softmaxAux && { softmaxAux: floats("softmaxAux", softmaxAux) }),
    rows,
    rowAt: pageSize === 0
      ? (sequence, key) => (sequence * keyLength + key) * width
      : (sequence, key) => placeOf(blockTable as IndexTensor, sequence, key, pageSize) * width,
  }, problem);
}

const target: DecodeTarget = {
  platform: "reference",
  description: "plain TypeScript on the CPU",
  fingerprint: "reference",
  createCache: (layout) => new Promise((resolve) => resolve(new HostStore(layout))),
  whyInvalid: () => null,
  heuristicCfg: () => onlyConfig,
  candidateCfgs: () => [onlyConfig],
  run: (problem, inputs, _cfg, { out, withLse }) =>
    new Promise((resolve) => {
      if (out !== undefined && isGpuTensor(out)) {
        throw new FlashMLAError(
          "invalid-input",
          "Cannot decode: out lies on a GPU, the reference computes on the host; pass a host tensor",
        );
      }
      const { output, lse } = decode(problem, inputs);
      const result = out ?? (dtypeOf(inputs.query) === "f16" ? toHalves(output) : output);
      if (out !== undefined && out.dtype !== "bf16") writeFloats(out, output.data);
      resolve(withLse ? { output: result, lse } : { output: result });
    }),
  trial: (problem, inputs) =>
    Promise.resolve({
      timingMethod: "wall",
      output: () => Promise.resolve(decode(problem, inputs).output),
      time(repeats) {
        const start = performance.now();
        for (let i = 0; i < repeats; i++) decode(problem, inputs);
        return Promise.resolve(performance.now() - start);
      },
      dispose() {},
    }),
  probe: () => Promise.resolve(null),
};

/** Decoding in plain TypeScript. */
export const referenceDecoding: DecodeImplementation = {
  platform: "reference",
  backend: "any",
  open: () => Promise.resolve(target),
};
