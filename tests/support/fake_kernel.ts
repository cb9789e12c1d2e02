// An operation on a made-up device with a made-up clock: what a configuration costs is written down, time passes only
// when something runs, and everything that happens is noted.

import { FlashMLAError } from "../../src/op/errors.ts";
import type { TrialOptions } from "../../src/op/implementation.ts";
import { Invocation } from "../../src/tune/invocation.ts";
import { Kernel, type OutputCheck, type Trial } from "../../src/tune/kernel.ts";

/** A configuration: one tile size. */
export interface FakeCfg {
  readonly tile: number;
}

/** A call: a length and what is computed on. */
export interface FakeCall {
  readonly length: number;
  readonly value: number;
}

/** How the device behaves; all optional. */
export interface FakeBehaviour {
  /** The candidates' tiles. Default 1, 2, 4. */
  readonly tiles?: readonly number[];
  /** The heuristic's tile. Default: the first. */
  readonly heuristic?: number;
  /** The tile whose results others are checked against. Default: the heuristic's. */
  readonly baseline?: number;
  /** Milliseconds of one run at full clock. Default: the tile. */
  readonly cost?: (tile: number) => number;
  /** The device's clock at a time, 1 at full speed. Default always 1. */
  readonly speed?: (now: number) => number;
  /** The time of a sample as it is read. Default: exact. */
  readonly read?: (ms: number) => number;
  /** How trials are timed. Default `timestamp`. */
  readonly timingMethod?: "timestamp" | "wall";
  /** Whether a probe shows the clock. Default false. */
  readonly probe?: boolean;
  /** Milliseconds of compiling. Default 0. */
  readonly compileMs?: number;
  /** The largest tile that a length can run under. Default: any. */
  readonly limit?: (length: number) => number;
  /** What a trial computes instead of tile-independent results. */
  readonly output?: (tile: number) => number;
  /** What a trial computes as gradient; with it the operation has gradients, and a run backward takes as long again. */
  readonly gradient?: (tile: number) => number;
  /** Milliseconds of one run backward at full clock. Default: the tile. */
  readonly backwardCost?: (tile: number) => number;
  /** Throws to make a step of a trial fail; `differentiate` is compiling backward. */
  readonly trouble?: (step: Step, tile: number, now: number) => void;
}

/** What a trial does. */
export type Step = "compile" | "differentiate" | "output" | "gradients" | "time";

export class FakeKernel extends Kernel<FakeCall, FakeCfg, number, number, number> {
  readonly opId = "fake";
  readonly version = "1";
  /** What happened, in order: `compile 2`, `output 2`, `time 2`, `dispose 2`, `run 2`; backward `differentiate 2`, … */
  readonly log: string[] = [];
  /** Trials that are not disposed. */
  open = 0;
  /** The time, in milliseconds. */
  now = 0;
  readonly #does: FakeBehaviour;

  constructor(behaviour: FakeBehaviour = {}) {
    super();
    this.#does = behaviour;
  }

  /** The tiles that a step was done for, in order. */
  did(step: string): number[] {
    return this.log.filter((line) => line.startsWith(`${step} `)).map((line) => Number(line.slice(step.length + 1)));
  }

  prepare(call: FakeCall): Promise<Invocation<FakeCall>> {
    if (call.length < 0) return Promise.reject(new FlashMLAError("invalid-input", `length is ${call.length}`));
    return Promise.resolve(
      new Invocation({
        opId: this.opId,
        version: this.version,
        call,
        device: "fake device",
        signature: { length: call.length },
        bucket: `length ≤ ${2 ** Math.ceil(Math.log2(call.length))}`,
      }),
    );
  }

  checkCfg({ call }: Invocation<FakeCall>, { tile }: FakeCfg): void {
    const limit = this.#does.limit?.(call.length) ?? Infinity;
    if (tile > limit) throw new FlashMLAError("invalid-config", `tile is ${tile}, the limit ${limit}`);
  }

  run({ call }: Invocation<FakeCall>, { tile }: FakeCfg): Promise<number> {
    this.log.push(`run ${tile}`);
    return Promise.resolve(call.value);
  }

  override get hasGradients(): boolean {
    return this.#does.gradient !== undefined;
  }

  /** The residual is what was computed on. */
  override fwdWithResiduals(
    invocation: Invocation<FakeCall>,
    cfg: FakeCfg,
  ): Promise<{ readonly output: number; readonly residuals: number }> {
    if (!this.hasGradients) return super.fwdWithResiduals(invocation, cfg);
    this.log.push(`forward ${cfg.tile}`);
    return Promise.resolve({ output: invocation.call.value, residuals: invocation.call.value });
  }

  override vjp(
    invocation: Invocation<FakeCall>,
    cfg: FakeCfg,
    residuals: number,
    gradOutput: number,
  ): Promise<number> {
    if (!this.hasGradients) return super.vjp(invocation, cfg, residuals, gradOutput);
    this.log.push(`backward ${cfg.tile}`);
    return Promise.resolve(residuals * gradOutput);
  }

  heuristicCfg(): FakeCfg {
    return { tile: this.#does.heuristic ?? this.#does.tiles?.[0] ?? 1 };
  }

  override baselineCfg(invocation: Invocation<FakeCall>): FakeCfg {
    return this.#does.baseline === undefined ? super.baselineCfg(invocation) : { tile: this.#does.baseline };
  }

  override candidateCfgs(): readonly FakeCfg[] {
    return (this.#does.tiles ?? [1, 2, 4]).map((tile) => ({ tile }));
  }

  override async trial(
    { call }: Invocation<FakeCall>,
    { tile }: FakeCfg,
    { backward = false }: TrialOptions = {},
  ): Promise<Trial<number, number>> {
    await this.#step("compile", tile);
    if (backward) await this.#step("differentiate", tile);
    this.now += this.#does.compileMs ?? 0;
    this.open++;
    return {
      timingMethod: this.#does.timingMethod ?? "timestamp",
      output: async () => {
        await this.#step("output", tile);
        this.#pass(tile);
        return this.#does.output?.(tile) ?? call.value;
      },
      ...(backward && {
        gradients: async () => {
          await this.#step("gradients", tile);
          this.#passBackward(tile);
          return this.#does.gradient!(tile);
        },
      }),
      time: async (repeats) => {
        await this.#step("time", tile);
        let ms = 0;
        for (let i = 0; i < repeats; i++) ms += this.#pass(tile) + (backward ? this.#passBackward(tile) : 0);
        return this.#does.read?.(ms) ?? ms;
      },
      dispose: () => {
        this.log.push(`dispose ${tile}`);
        this.open--;
      },
    };
  }

  override probe(): Promise<number | null> {
    if (!this.#does.probe) return Promise.resolve(null);
    const ms = 0.1 / this.#speed();
    this.now += ms;
    return Promise.resolve(ms);
  }

  override compare(candidate: number, best: number): OutputCheck {
    return { ok: candidate === best, detail: `${candidate} is not ${best}` };
  }

  override compareGradients(_: Invocation<FakeCall>, candidate: number, best: number): OutputCheck {
    return { ok: candidate === best, detail: `${candidate} is not ${best}` };
  }

  /** One run: time passes at the device's clock. */
  #pass(tile: number): number {
    return this.#spend(this.#does.cost?.(tile) ?? tile);
  }

  /** One run backward. */
  #passBackward(tile: number): number {
    return this.#spend(this.#does.backwardCost?.(tile) ?? tile);
  }

  #spend(atFullClock: number): number {
    const ms = atFullClock / this.#speed();
    this.now += ms;
    return ms;
  }

  #speed(): number {
    return this.#does.speed?.(this.now) ?? 1;
  }

  async #step(step: Step, tile: number): Promise<void> {
    this.log.push(`${step} ${tile}`);
    await Promise.resolve();
    this.#does.trouble?.(step, tile, this.now);
  }
}
