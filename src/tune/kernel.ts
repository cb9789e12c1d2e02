import { FlashMLAError } from "../op/errors.ts";
import type { TrialOptions } from "../op/implementation.ts";
import type { Invocation } from "./invocation.ts";

/** One candidate made ready to be checked and timed: compiled, its buffers filled. */
export interface Trial<Out, Gradients = unknown> {
  /** How {@link Trial.time} reads its clock. */
  readonly timingMethod: "timestamp" | "wall";
  /** Runs the candidate once on the caller's own inputs and returns its result. */
  output(): Promise<Out>;
  /**
   * The gradients of the same inputs, of an output's gradient that is the same for all candidates; missing unless the trial
   * was made with `backward`.
   */
  gradients?(): Promise<Gradients>;
  /**
   * Runs the candidate `repeats` times back to back, with `backward` forward and backward.
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

/** A result, and what gradients are computed from. */
export interface Forward<Out, Residuals> {
  /** The result. */
  readonly output: Out;
  /** What {@link Kernel.vjp} needs beside the invocation. */
  readonly residuals: Residuals;
}

/**
 * An operation that can be run under several configurations. The pieces are ejkernel's: `run` does the work, the
 * heuristic guesses a configuration from the invocation, the candidates are what the tuner measures; `fwdWithResiduals`
 * and `vjp` are run and its gradients, for operations that have any.
 *
 * @typeParam Call The call's tensors and options.
 * @typeParam Cfg The configuration.
 * @typeParam Out The result.
 * @typeParam Residuals What gradients are computed from.
 * @typeParam Gradients The gradients.
 */
export abstract class Kernel<Call, Cfg, Out, Residuals = unknown, Gradients = unknown> {
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

  /**
   * The configuration whose results those of the others are checked against while they are measured: the one whose kernels
   * are trusted most. It is measured as well.
   */
  baselineCfg(invocation: Invocation<Call>): Cfg {
    return this.heuristicCfg(invocation);
  }

  /**
   * Whether the operation has gradients, so that candidates are timed forward and backward and their gradients compared
   * where the policy's `validateBackward` says so. The default has none.
   */
  get hasGradients(): boolean {
    return false;
  }

  /**
   * Whether calls that ask for no gradients are tuned backward, too, where the policy says so. Not worth it where compiling
   * takes longest: they are tuned forward only there. The default is that they are.
   */
  tunesBackward(_invocation: Invocation<Call>): boolean {
    return true;
  }

  /**
   * Runs the operation and keeps what its gradients need.
   *
   * @param invocation A prepared call.
   * @param _cfg The configuration.
   * @returns The result and the residuals.
   * @throws {FlashMLAError} With code `invalid-input` when the operation has no gradients: that is the default.
   */
  fwdWithResiduals(invocation: Invocation<Call>, _cfg: Cfg): Promise<Forward<Out, Residuals>> {
    return Promise.reject(withoutGradients(invocation));
  }

  /**
   * Computes the gradients of a call that {@link Kernel.fwdWithResiduals} ran. May be called any number of times.
   *
   * @param invocation The call.
   * @param _cfg The configuration.
   * @param _residuals What the run kept.
   * @param _gradOutput The gradient of the result, like the result.
   * @returns The gradients.
   * @throws {FlashMLAError} With code `invalid-input` when the operation has no gradients: that is the default.
   */
  vjp(invocation: Invocation<Call>, _cfg: Cfg, _residuals: Residuals, _gradOutput: Out): Promise<Gradients> {
    return Promise.reject(withoutGradients(invocation));
  }

  /**
   * Makes a candidate ready for measuring. The default runs {@link Kernel.run} under the host clock, and no gradients.
   *
   * @param invocation A prepared call.
   * @param cfg The candidate.
   * @param _options Whether it is measured backward too.
   */
  trial(invocation: Invocation<Call>, cfg: Cfg, _options?: TrialOptions): Promise<Trial<Out, Gradients>> {
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

  /**
   * Compares a candidate's result with the best known one of the same call, which came from these configurations. The
   * default accepts everything.
   */
  compare(_candidate: Out, _best: Out, _invocation?: Invocation<Call>, _cfgs?: readonly Cfg[]): OutputCheck {
    return { ok: true, detail: "not compared" };
  }

  /** Compares a candidate's gradients with the best known ones in the same way. The default accepts everything. */
  compareGradients(
    _invocation: Invocation<Call>,
    _candidate: Gradients,
    _best: Gradients,
    _cfgs?: readonly Cfg[],
  ): OutputCheck {
    return { ok: true, detail: "not compared" };
  }
}

function withoutGradients(invocation: Invocation<unknown>): FlashMLAError {
  return new FlashMLAError("invalid-input", `Cannot differentiate ${invocation.op}: it has no gradients`);
}
