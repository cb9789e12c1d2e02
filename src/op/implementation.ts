// What a platform offers to the operation: a target to run on, and the configurations that it knows.

import type { FlashMLAConfig } from "./config.ts";
import type { MlaInputs, MlaProblem } from "./mla_problem.ts";
import type { Backend, Platform } from "./platform.ts";
import type { Tensor } from "./tensor.ts";

/** One configuration made ready on a target, to be checked and timed. */
export interface MlaTrial {
  /** How {@link MlaTrial.time} reads its clock. */
  readonly timingMethod: "timestamp" | "wall";
  /** Runs once and returns the result. */
  output(): Promise<Tensor>;
  /** Runs `repeats` times back to back; milliseconds for all of them together. */
  time(repeats: number): Promise<number>;
  /** Frees what the trial holds. */
  dispose(): void;
}

/** An opened device, or the processor itself, on which the operation can run. */
export interface MlaTarget {
  /** The platform it belongs to. */
  readonly platform: Platform;
  /** The device in a person's words. */
  readonly description: string;
  /** One line that two targets share exactly when they may share measured configurations. */
  readonly fingerprint: string;
  /** Why a configuration cannot run a problem here, naming the limit and the value; null when it can. */
  whyInvalid(problem: MlaProblem, cfg: FlashMLAConfig): string | null;
  /** A good configuration without measuring. */
  heuristicCfg(problem: MlaProblem): FlashMLAConfig;
  /** The configurations worth measuring for problems whose lengths fall in the same powers of two, the heuristic's first. */
  candidateCfgs(problem: MlaProblem): readonly FlashMLAConfig[];
  /** Runs a call. */
  run(problem: MlaProblem, inputs: MlaInputs, cfg: FlashMLAConfig): Promise<Tensor>;
  /** Makes a configuration ready to be timed on a call. */
  trial(problem: MlaProblem, inputs: MlaInputs, cfg: FlashMLAConfig): Promise<MlaTrial>;
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
   */
  open(device?: GPUDevice): Promise<MlaTarget>;
}
