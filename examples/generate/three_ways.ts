import process from "node:process";
import type { IndexTensor, Platform } from "../../mod.ts"; // in your project: "@flash-mla/webgpu"
import { Random } from "../train/random.ts";
import { cachedReader } from "./cached_reader.ts";
import { chooser } from "./choosing.ts";
import { generate, type Generated, type GeneratingOptions } from "./generating.ts";
import { progress } from "./progress.ts";
import { recomputingReader } from "./recomputing_reader.ts";
import type { Model, TokenReader } from "./token_reader.ts";

/** Recomputing takes longer with every token; it ends when this time is up, with fewer of them. */
const recomputingSeconds = 60;

/** What to generate, and where. */
export interface Task {
  readonly platform: Platform;
  readonly prompt: Uint8Array;
  /** How many tokens. */
  readonly tokens: number;
  readonly temperature: number;
  readonly seed: number;
}

/** What came out of a cache. */
export interface FromCache extends Generated {
  /** The pages that each layer lay in, `[layers, columns]`. */
  readonly blockTable: IndexTensor;
  /** Bytes of the cache for each token, in all layers. */
  readonly bytesPerToken: number;
}

/** The same text, computed three ways. */
export interface ThreeWays {
  /** With the cache. */
  readonly cached: FromCache;
  /** With a cache whose pages were shuffled. */
  readonly shuffled: FromCache;
  /** Without one. */
  readonly recomputed: Generated;
}

/** Generates three times. The second and third time read what the first has chosen. */
export async function threeWays(model: Model, task: Task): Promise<ThreeWays> {
  // Kernels on a GPU, and the runtime its hot loops on the reference: what is timed begins warm.
  await fromCache(model, { ...task, tokens: Math.min(task.tokens, 200) }, { name: "compiling" });
  const cached = await fromCache(model, task, { name: "with the cache" });
  const follow = cached.tokens;
  return {
    cached,
    shuffled: await fromCache(model, task, {
      name: "with its pages shuffled",
      follow,
      shuffle: new Random(task.seed + 2),
    }),
    recomputed: await run(recomputingReader(model, task.platform), task, {
      name: "recomputing everything",
      follow,
      seconds: recomputingSeconds,
    }),
  };
}

interface RunOptions extends Pick<GeneratingOptions, "follow" | "seconds"> {
  /** What progress is shown as. */
  readonly name: string;
}

async function fromCache(
  model: Model,
  task: Task,
  { shuffle, ...options }: RunOptions & { readonly shuffle?: Random },
): Promise<FromCache> {
  // The last token is not read any more.
  const capacity = task.prompt.length + task.tokens - 1;
  const reader = await cachedReader(model, { platform: task.platform, capacity, shuffle });
  const { blockTable, bytesPerToken } = reader;
  return { ...await run(reader, task, options), blockTable, bytesPerToken };
}

async function run(
  reader: TokenReader,
  { prompt, tokens, temperature, seed }: Task,
  { name, ...options }: RunOptions,
): Promise<Generated> {
  const shown = progress(process.stderr, name.padEnd(23), tokens);
  try {
    // Not the generator of random weights.
    const choose = chooser(temperature, seed + 1);
    return await generate(reader, { prompt, tokens, choose, onToken: shown.show, ...options });
  } finally {
    shown.end();
    reader.dispose();
  }
}
