// Where the example uses the cache: a prompt is appended and attended at once, then tokens one by one. This is what to copy
// from.
//
// One cache serves all layers, and the block table has a row for each: one pool of pages to run out of, and one reserve() a
// step. A cache for each layer would do as well, and lets layers differ in their sizes.

import {
  ConfigSelectorChain,
  Executor,
  type HostInputs,
  type IndexTensor,
  LatentCache,
  mlaDecode,
  type MlaDecodeExecutor,
  type MlaExecutor,
  mlaPrefillWithCache,
  type Platform,
  type Tensor,
  tensor,
} from "../../mod.ts"; // in your project: "@flash-mla/webgpu"
import type { Random } from "../train/random.ts";
import { lastLogits, type Model, type TokenReader, window } from "./token_reader.ts";
import { turned, turns } from "./turn.ts";

/** Tokens of a page; small, so that this small text lies in many. */
const pageSize = 16;

/** How a text is cached. */
export interface CachedReaderOptions {
  readonly platform: Platform;
  /** Tokens that there is to be room for. */
  readonly capacity: number;
  /** Puts the pages into an order that it draws; when absent, layers take the next free ones as they grow. */
  readonly shuffle?: Random;
}

/** A {@link TokenReader} that caches latents, and the pages that they lie in. */
export interface CachedReader extends TokenReader {
  /** Page numbers of each layer, `[layers, columns]`. */
  readonly blockTable: IndexTensor;
  /** Bytes of the cache for each token, in all layers. */
  readonly bytesPerToken: number;
}

/** Makes a reader with an empty cache. */
export async function cachedReader(
  model: Model,
  { platform, capacity, shuffle }: CachedReaderOptions,
): Promise<CachedReader> {
  const { layers, kvLoraRank, qkRopeHeadDim, qkNopeHeadDim } = model.sizes;
  const columns = Math.ceil(capacity / pageSize);
  const cache = await LatentCache.create({ platform, pages: layers * columns, pageSize, kvLoraRank, qkRopeHeadDim });
  const blockTable = { data: new Int32Array(layers * columns), shape: [layers, columns] };
  if (shuffle !== undefined) blockTable.data.set(shuffled(cache.allocate(layers * columns), shuffle));

  const slidingWindow = window(model.sizes);
  const turnsOf = turns(capacity, qkRopeHeadDim);
  let length = 0;

  /** Attention of one layer: new tokens join the cache, then see what is in it. */
  async function attend(layer: number, { query, keyValue, bK, wKc, wVc }: HostInputs): Promise<Tensor> {
    const turn = turnsOf.subarray(length * qkRopeHeadDim, (length + 1) * qkRopeHeadDim);
    const keys = turned(bK!.data, qkRopeHeadDim, turn);
    const added = {
      query: tensor(turned(query.data, qkNopeHeadDim + qkRopeHeadDim, turn), query.shape),
      rows: cacheRows(keyValue, tensor(keys, bK!.shape)),
    };
    const row = { data: blockTable.data.subarray(layer * columns, (layer + 1) * columns), shape: [1, columns] };
    const cached = { cache, blockTable: row, wKc, wVc };
    if (query.shape[1] > 1) {
      return await mlaPrefillWithCache({ ...added, ...cached, seqLens: [length] }, { slidingWindow, ...executors });
    }
    await cache.append(added.rows, { blockTable: row, seqLens: [length] });
    return await mlaDecode({ query: added.query, ...cached, seqLens: [length + 1] }, {
      slidingWindow,
      executor: executors.decodeExecutor,
    });
  }

  return {
    blockTable,
    bytesPerToken: cache.bytes / (cache.pages * pageSize) * layers,
    async read(tokens) {
      const seqLens = new Array<number>(layers).fill(length);
      if (shuffle === undefined) cache.reserve({ blockTable, seqLens, newTokens: tokens.length });
      let layer = 0;
      const logits = await lastLogits(model, tokens, (inputs) => attend(layer++, inputs));
      length += tokens.length;
      return logits;
    },
    dispose: () => cache.dispose(),
  };
}

// Without measuring, which is worth its time where the same kernels run for hours: a software adapter measures for 18 s here,
// and is no faster then.
const policy = { cacheMissFallback: "heuristics" } as const;
const executors: { readonly executor: MlaExecutor; readonly decodeExecutor: MlaDecodeExecutor } = {
  executor: new Executor(new ConfigSelectorChain({ policy })),
  decodeExecutor: new Executor(new ConfigSelectorChain({ policy })),
};

/** Rows of a cache: latents and, behind them, rotated key parts. */
function cacheRows(latents: Tensor, keys: Tensor): Tensor {
  const [batch, length, rank] = latents.shape;
  const rotated = keys.shape[2];
  const width = rank + rotated;
  const rows = new Float32Array(batch * length * width);
  for (let row = 0; row < batch * length; row++) {
    rows.set(latents.data.subarray(row * rank, (row + 1) * rank), row * width);
    rows.set(keys.data.subarray(row * rotated, (row + 1) * rotated), row * width + rank);
  }
  return tensor(rows, [batch, length, width]);
}

/** Pages in an order that is drawn, each as likely as any other (Fisher and Yates). */
function shuffled(pages: Int32Array, random: Random): Int32Array {
  for (let left = pages.length; left > 1; left--) {
    const drawn = random.below(left);
    [pages[left - 1], pages[drawn]] = [pages[drawn], pages[left - 1]];
  }
  return pages;
}
