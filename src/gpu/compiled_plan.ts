// Plans made ready on a device: kernels compiled, parameters and schedules in GPU memory. They depend on shapes, layouts and
// configuration alone and never change, so that calls alike share one: a warm call uploads nothing but its tensors.

import type { FlashMLAConfig } from "../op/config.ts";
import type { MlaProblem } from "../op/mla_problem.ts";
import { attentionPlan } from "./attention_plan.ts";
import { backwardPlan } from "./backward_plan.ts";
import { BufferUsage } from "./buffers.ts";
import { type GpuContext, unlessLost } from "./device.ts";
import type { DispatchPlan, Schedule } from "./dispatch_plan.ts";
import { inErrorScopes } from "./error_scopes.ts";
import type { OperandLayouts } from "./operand_layout.ts";

/** A plan with its kernels and its constant buffers. */
export interface CompiledPlan {
  /** The plan. */
  readonly plan: DispatchPlan;
  /** The compiled kernels. */
  readonly pipelines: Readonly<Record<string, GPUComputePipeline>>;
  /** The parameter blocks. */
  readonly params: GPUBuffer;
  /** The schedules, for each query range. */
  readonly schedules: Readonly<Partial<Record<Schedule, readonly GPUBuffer[]>>>;
}

/** What a plan computes: the output, or the gradients. */
export type PlanKind = "forward" | "backward";

const planners = { forward: attentionPlan, backward: backwardPlan } as const;

/** Plans that one device keeps. A model's layers share one; prefill lengths and decoding steps bring new ones. */
const keptPlans = 64;

/** The compiled plans of one device, those used last kept. */
export class PlanCache {
  readonly #context: GpuContext;
  readonly #kept = new Map<string, Promise<CompiledPlan>>();
  readonly #users = new WeakMap<Promise<CompiledPlan>, number>();

  /** @param context The device. */
  constructor(context: GpuContext) {
    this.#context = context;
  }

  /**
   * Borrows a plan, which stays as it is until `release` is called.
   *
   * @param problem The problem.
   * @param config The configuration.
   * @param layouts Where the tensors lie.
   * @param kind What it is a plan of.
   * @throws {FlashMLAError} When the call cannot be planned (`limit`) or a kernel does not compile (`device`).
   */
  async borrow(
    problem: MlaProblem,
    config: FlashMLAConfig,
    layouts: OperandLayouts,
    kind: PlanKind = "forward",
  ): Promise<{ readonly compiled: CompiledPlan; release(): void }> {
    const key = JSON.stringify([kind, problem, config, layouts]);
    const kept = this.#kept.get(key);
    const found = kept ?? this.#compile(planners[kind](problem, config, this.#context.capabilities, layouts));
    if (kept === undefined) found.catch(() => this.#kept.get(key) === found && this.#kept.delete(key));
    this.#kept.delete(key);
    this.#kept.set(key, found);
    this.#use(found, 1);
    this.#trim();
    let released = false;
    const release = () => {
      if (released) return;
      released = true;
      this.#use(found, -1);
      this.#trim();
    };
    try {
      return { compiled: await unlessLost(this.#context, () => found), release };
    } catch (error) {
      release();
      throw error;
    }
  }

  async #compile(plan: DispatchPlan): Promise<CompiledPlan> {
    const { pipelines } = this.#context;
    const names = Object.keys(plan.kernels);
    const compiled = await Promise.all(names.map((name) => pipelines.get(name, plan.kernels[name])));
    return await inErrorScopes(this.#context, "hold a plan", () => ({
      plan,
      pipelines: Object.fromEntries(names.map((name, i) => [name, compiled[i]])),
      params: this.#upload(BufferUsage.UNIFORM, plan.params),
      schedules: Object.fromEntries(
        Object.entries(plan.schedules).map(([name, ranges]) => [
          name,
          ranges.map((words) => this.#upload(BufferUsage.STORAGE, words.buffer)),
        ]),
      ),
    }));
  }

  #upload(usage: number, data: ArrayBuffer): GPUBuffer {
    const { device } = this.#context;
    const buffer = device.createBuffer({
      label: "flash-mla plan",
      size: data.byteLength,
      usage: usage | BufferUsage.COPY_DST,
    });
    device.queue.writeBuffer(buffer, 0, data);
    return buffer;
  }

  #use(plan: Promise<CompiledPlan>, change: number): void {
    this.#users.set(plan, (this.#users.get(plan) ?? 0) + change);
  }

  /** Forgets the plans used longest ago, those in use excepted. */
  #trim(): void {
    for (const [key, plan] of this.#kept) {
      if (this.#kept.size <= keptPlans) return;
      if ((this.#users.get(plan) ?? 0) > 0) continue;
      this.#kept.delete(key);
      plan.then(({ params, schedules }) => {
        for (const buffer of [params, ...Object.values(schedules).flat()]) buffer.destroy();
      }, () => {});
    }
  }
}

const caches = new WeakMap<GpuContext, PlanCache>();

/** The compiled plans of a device. */
export function planCache(context: GpuContext): PlanCache {
  let cache = caches.get(context);
  if (cache === undefined) caches.set(context, cache = new PlanCache(context));
  return cache;
}
