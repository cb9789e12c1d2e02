// The main job: at each length a configuration is chosen, warm calls are timed, and the result is compared with the
// oracle's.

import {
  type AnyTensor,
  ConfigSelectorChain,
  type ConfigSource,
  Executor,
  flashMLA,
  type FlashMLAConfig,
  type HostInputs,
  mlaAttention,
  type MlaCall,
  type MlaOptions,
  PersistentCache,
  type Platform,
  type SelectionEvent,
  type Tensor,
} from "../../mod.ts";
import { relL2 } from "../relative_error.ts";
import { Oracle } from "./oracle.ts";
import { v2LiteInputs } from "./v2_lite.ts";

/** relL2 up to which float32 may differ from the oracle, which computes in double precision. */
export const tolerance = 1e-5;

/** What was measured at one length. Times are in milliseconds. */
export interface Row {
  readonly tokens: number;
  /** The configuration; null on the reference platform, which has none. */
  readonly config: FlashMLAConfig | null;
  readonly source: ConfigSource | null;
  /** How many configurations were timed, of how many, when that was done just now. */
  readonly timed: readonly [timed: number, candidates: number] | null;
  /** One warm call, the median of three. */
  readonly ms: number;
  /** The oracle; null past the length at which it takes too long. */
  readonly oracleMs: number | null;
  /** ‖result − oracle's‖ / ‖oracle's‖; null without the oracle. */
  readonly relL2: number | null;
}

const warmCalls = 3;
/** The oracle is always asked up to this length, which takes it about a second. */
const oracleLength = 256;
/** Past it, the oracle is asked as long as it is likely to answer within this many milliseconds. */
const oraclePatience = 2000;

/** Measures, and remembers from one run to the next which configurations won. */
export class Measurement {
  readonly #onStep: (step: string) => void;
  /** How many configurations were timed, of how many, since this was last set to null. */
  #timed: [timed: number, candidates: number] | null = null;
  readonly #executor = new Executor<MlaCall, FlashMLAConfig, AnyTensor>(
    new ConfigSelectorChain({
      persistent: new PersistentCache("mla"),
      policy: { validateBackward: false }, // the page asks for no gradients
      onEvent: (event) => this.#hear(event),
    }),
  );

  /** @param onStep Hears, in words, what is being done. What it throws ends the run. */
  constructor(onStep: (step: string) => void) {
    this.#onStep = onStep;
  }

  /**
   * Measures one length after another.
   *
   * @param platform Where.
   * @param lengths Sequence lengths, growing by factors of two.
   */
  async *run(platform: Platform, lengths: readonly number[]): AsyncGenerator<Row> {
    const oracle = new Oracle();
    try {
      this.#onStep("warming the oracle up");
      await oracle.ask(v2LiteInputs(lengths[0]), 2);
      let oracleMs = 0;
      for (const tokens of lengths) {
        // Twice the tokens take at least twice as long.
        const isAsked = tokens <= oracleLength || 2 * oracleMs <= oraclePatience;
        const inputs = v2LiteInputs(tokens);
        if (platform !== "webgpu") {
          if (!isAsked) return;
          this.#onStep("three calls of the reference");
          oracleMs = median((await oracle.ask(inputs, warmCalls)).times);
          yield { tokens, config: null, source: null, timed: null, ms: oracleMs, oracleMs: null, relL2: null };
          continue;
        }
        const { output, ...figures } = await this.#call(inputs, { platform });
        if (!isAsked) {
          yield { tokens, ...figures, oracleMs: null, relL2: null };
          continue;
        }
        this.#onStep("asking the oracle");
        const answer = await oracle.ask(inputs, 1);
        oracleMs = answer.times[0];
        yield { tokens, ...figures, oracleMs, relL2: relL2(output.data, answer.output.data) };
      }
    } finally {
      oracle.close();
    }
  }

  async #call(
    inputs: HostInputs,
    math: MlaOptions,
  ): Promise<Pick<Row, "config" | "source" | "timed" | "ms"> & { output: Tensor }> {
    this.#timed = null;
    this.#onStep("choosing a configuration");
    const { cfg, source } = await this.#executor.choose(flashMLA, { inputs, options: math });
    const options = { ...math, executor: this.#executor, cfg };
    this.#onStep("first call, which compiles what is not compiled yet");
    let output = await mlaAttention(inputs, options);
    const times: number[] = [];
    for (let i = 1; i <= warmCalls; i++) {
      this.#onStep(`timing call ${i} of ${warmCalls}`);
      const start = performance.now();
      output = await mlaAttention(inputs, options);
      times.push(performance.now() - start);
    }
    return { config: cfg, source, timed: this.#timed, ms: median(times), output };
  }

  #hear(event: SelectionEvent<FlashMLAConfig>): void {
    if (event.type === "autotune_start") this.#onStep(`compiling and measuring ${event.candidates} configurations`);
    if (event.type !== "autotune_finish") return;
    this.#timed = [event.timings.filter(({ ms }) => ms !== null).length, event.timings.length];
  }
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1];
}
