// What a platform offers to the operation: a target to run on, and the configurations that it knows.

import type { AttentionState } from "./attention_state.ts";
import type { FlashMLAConfig } from "./config.ts";
import type { HostGradients, MlaGradients } from "./mla_gradients.ts";
import type { MlaInputs, MlaProblem } from "./mla_problem.ts";
import type { Backend, Platform } from "./platform.ts";
import type { MlaEvent } from "./mla_event.ts";
import type { AnyTensor, GpuTensor, Tensor } from "./tensor.ts";

/** One configuration made ready on a target, to be checked and timed. */
export interface MlaTrial {
  /** How {@link MlaTrial.time} reads its clock. */
  readonly timingMethod: "timestamp" | "wall";
  /** Runs once and returns the result in float32; a caller's output tensor is not touched. */
  output(): Promise<Tensor>;
  /**
   * The gradients in float32 for the output's gradient of `tuningGradOutput()`, the same one on every platform; missing
   * unless the trial was made with `backward`.
   */
  gradients?(): Promise<HostGradients>;
  /** Runs `repeats` times back to back, with `backward` forward and backward; milliseconds for all of them together. */
  time(repeats: number): Promise<number>;
  /** Frees what the trial holds. */
  dispose(): void;
}

/** How a trial is made. */
export interface TrialOptions {
  /** Whether it runs backward too. Default `false`. */
  readonly backward?: boolean;
}

/** A call recorded into a caller's encoder. */
export interface EncodedCall {
  /** The result, once the recorded work has run. */
  readonly output: GpuTensor;
  /** Gives back what the recorded work needs. */
  dispose(): void;
}

/** An opened device, or the processor itself, on which the operation can run. */
export interface MlaTarget {
  /** The platform it belongs to. */
  readonly platform: Platform;
  /** The device in a person's words. */
  readonly description: string;
  /** Whether it is an adapter that runs on the CPU, where compiling takes longest. */
  readonly software?: boolean;
  /** One line that two targets share exactly when they may share measured configurations. */
  readonly fingerprint: string;
  /** Why a configuration cannot run a problem here, naming the limit and the value; null when it can. */
  whyInvalid(problem: MlaProblem, cfg: FlashMLAConfig): string | null;
  /** A good configuration without measuring. */
  heuristicCfg(problem: MlaProblem): FlashMLAConfig;
  /** The configurations worth measuring for problems whose lengths fall in the same powers of two, the heuristic's first. */
  candidateCfgs(problem: MlaProblem): readonly FlashMLAConfig[];
  /** Runs a call. The result is `out`, written in place, or like the query: its element type, its side. */
  run(problem: MlaProblem, inputs: MlaInputs, cfg: FlashMLAConfig, out?: AnyTensor): Promise<AnyTensor>;
  /** Runs a call and keeps the log-sum-exp, which lies on the result's side. */
  runWithLse(problem: MlaProblem, inputs: MlaInputs, cfg: FlashMLAConfig, out?: AnyTensor): Promise<AttentionState>;
  /**
   * Computes the gradients of a call that was run.
   *
   * @param problem The problem.
   * @param inputs The call's tensors, with the data that they had.
   * @param cfg The configuration.
   * @param saved What {@link MlaTarget.runWithLse} gave, unchanged.
   * @param gradOutput The gradient of the output, of its shape; any element type, any side that the platform reads.
   * @returns One gradient for each tensor of numbers among the inputs, like its tensor; bfloat16 gives float32.
   */
  backward(
    problem: MlaProblem,
    inputs: MlaInputs,
    cfg: FlashMLAConfig,
    saved: AttentionState,
    gradOutput: AnyTensor,
  ): Promise<MlaGradients>;
  /** Records a call into a caller's encoder; missing where there is none. */
  encode?(
    encoder: GPUCommandEncoder,
    problem: MlaProblem,
    inputs: MlaInputs,
    cfg: FlashMLAConfig,
    out?: GpuTensor,
  ): Promise<EncodedCall>;
  /** Makes a configuration ready to be timed on a call; throws where it cannot run, backward when that is asked for. */
  trial(problem: MlaProblem, inputs: MlaInputs, cfg: FlashMLAConfig, options?: TrialOptions): Promise<MlaTrial>;
  /** Milliseconds of a piece of known work that follow the device's clock, or null where there is no such thing. */
  probe(): Promise<number | null>;
}

/** An implementation of the operation, as the registry holds it. */
export interface MlaImplementation {
  /** The platform it runs on. */
  readonly platform: Platform;
  /** The kind of processor it needs. */
  readonly backend: Backend;
  /** Whether this runtime can run it. Never throws. */
  isAvailable(): Promise<boolean>;
  /**
   * Opens its device.
   *
   * @param device The caller's WebGPU device, where the platform takes one; otherwise the process's own.
   * @param onEvent Hears of what the call's user may want to know; the console, once per process, when absent.
   */
  open(device?: GPUDevice, onEvent?: (event: MlaEvent) => void): Promise<MlaTarget>;
}
