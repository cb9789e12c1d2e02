import type { Invocation } from "./invocation.ts";

/** One candidate made ready to be checked and timed: compiled, its buffers filled. */
export interface Trial<Out> {
  /** How {@link Trial.time} reads its clock. */
  readonly timingMethod: "timestamp" | "wall";
  /** Runs the candidate once on the caller's own inputs and returns its result. */
  output(): Promise<Out>;
  /**
   * Runs the candidate `repeats` times back to back.
   *
   * @returns Milliseconds for all of them together.
   */
  time(repeats: number): Promise<number>;
  /** Frees what the trial holds. */
  dispose(): void;
}

/** Whether a candidate's result agrees with the best known one. */
export interface OutputCheck {
  /** False rejects the candidate. */
  readonly ok: boolean;
  /** What was compared, for the record: a metric and its value. */
  readonly detail: string;
}

/**
 * An operation that can be run under several configurations. The pieces are ejkernel's: `run` does the work, the
 * heuristic guesses a configuration from the invocation, the candidates are what the tuner measures.
 */
export abstract class Kernel<Call, Cfg, Out> {
  /** Operation name, part of every cache key. */
  abstract readonly opId: string;
  /** Version of the kernels: raised when old measurements stop being valid. */
  abstract readonly version: string;

  /** Validates a call and describes it; throws before any work when the call is malformed. */
  abstract prepare(call: Call): Promise<Invocation<Call>>;
  /** Throws when this device or problem cannot run `cfg`, naming the limit and the value. */
  abstract checkCfg(invocation: Invocation<Call>, cfg: Cfg): void;
  /** Runs the operation. */
  abstract run(invocation: Invocation<Call>, cfg: Cfg): Promise<Out>;
  /** A good configuration without measuring. */
  abstract heuristicCfg(invocation: Invocation<Call>): Cfg;

  /**
   * The configurations worth measuring, all of them runnable; the heuristic's among them. They depend on the device and the
   * signature alone: the answer is remembered.
   */
  candidateCfgs(invocation: Invocation<Call>): readonly Cfg[] {
    return [this.heuristicCfg(invocation)];
  }

  /** Makes a candidate ready for measuring. The default runs {@link Kernel.run} under the host clock. */
  trial(invocation: Invocation<Call>, cfg: Cfg): Promise<Trial<Out>> {
    return Promise.resolve({
      timingMethod: "wall",
      output: () => this.run(invocation, cfg),
      time: async (repeats) => {
        const start = performance.now();
        for (let i = 0; i < repeats; i++) await this.run(invocation, cfg);
        return performance.now() - start;
      },
      dispose() {},
    });
  }

  /** A probe of known work whose time follows the device's clock, in milliseconds; null when there is none. */
  probe(_invocation: Invocation<Call>): Promise<number | null> {
    return Promise.resolve(null);
  }

  /** Compares a candidate's result with the best known one. The default accepts everything. */
  compare(_candidate: Out, _best: Out): OutputCheck {
    return { ok: true, detail: "not compared" };
  }
}
