// The platform "webgpu": plans a call, brings its data to the device, runs the kernels and reads the result back.

import type { FlashMLAConfig } from "../op/config.ts";
import type { MlaImplementation, MlaTarget, MlaTrial } from "../op/implementation.ts";
import { type MlaInputs, type MlaProblem, outputShape } from "../op/mla_problem.ts";
import { type Piece, pieces } from "../op/pieces.ts";
import { elementCount, type Tensor } from "../op/tensor.ts";
import { candidateConfigs } from "./attention_configs.ts";
import { type AttentionPlan, attentionPlan, whyInvalid } from "./attention_plan.ts";
import { deviceFingerprint } from "./capabilities.ts";
import { type GpuContext, gpuContext, hasAdapter } from "./device.ts";
import { PreparedAttention } from "./prepared_attention.ts";
import { ResidentCall } from "./resident_call.ts";
import { clockProbe, timingMethod } from "./timing.ts";

/** The operation in WGSL, on the process's own device or the caller's. */
export const webgpuImplementation: MlaImplementation = {
  platform: "webgpu",
  backend: "gpu",
  isAvailable: hasAdapter,
  open: async (device) => webgpuTarget(await gpuContext(device)),
};

/** The operation on one open device. */
export function webgpuTarget(context: GpuContext): MlaTarget {
  return new WebGpuTarget(context);
}

class WebGpuTarget implements MlaTarget {
  readonly platform = "webgpu";
  readonly #context: GpuContext;

  constructor(context: GpuContext) {
    this.#context = context;
  }

  get description(): string {
    const { adapter, engine } = this.#context.capabilities;
    return `${adapter}, ${engine}`;
  }

  get fingerprint(): string {
    return deviceFingerprint(this.#context.capabilities);
  }

  whyInvalid(problem: MlaProblem, cfg: FlashMLAConfig): string | null {
    return whyInvalid(cfg, problem, this.#context.capabilities.limits);
  }

  heuristicCfg(problem: MlaProblem): FlashMLAConfig {
    return candidateConfigs(problem, this.#context.capabilities)[0];
  }

  candidateCfgs(problem: MlaProblem): readonly FlashMLAConfig[] {
    return candidateConfigs(problem, this.#context.capabilities).slice(0, isEmpty(problem) ? 1 : undefined);
  }

  async run(problem: MlaProblem, inputs: MlaInputs, cfg: FlashMLAConfig): Promise<Tensor> {
    const shape = outputShape(problem);
    const data = new Float32Array(elementCount(shape));
    if (isEmpty(problem)) return { data, shape };
    const parts = this.#pieces(problem, inputs);
    // Every piece is planned before the first one runs: a limit is told before any work.
    if (parts.length > 1) { for (const part of parts) this.#plan(part.problem, cfg); }
    for (const part of parts) {
      const result = await this.#runPiece(part, cfg);
      if (part.problem === problem) return result;
      data.set(result.data, part.queryRow * shape[2] * shape[3]);
    }
    return { data, shape };
  }

  /** A call too large for one piece is timed by its first piece. Trials of one call share its memory. */
  async trial(problem: MlaProblem, inputs: MlaInputs, cfg: FlashMLAConfig): Promise<MlaTrial> {
    const [piece] = this.#pieces(problem, inputs);
    const plan = this.#plan(piece.problem, cfg);
    const call = this.#share(inputs, () => new ResidentCall(this.#context, piece.problem, piece.inputs, plan));
    try {
      const method = await timingMethod(this.#context);
      const prepared = await PreparedAttention.create(this.#context, piece.problem, plan, call.resident);
      return {
        timingMethod: method,
        output: () => prepared.output(),
        time: (repeats) => prepared.time(repeats),
        dispose() {
          prepared.dispose();
          call.release();
        },
      };
    } catch (error) {
      call.release();
      throw error;
    }
  }

  probe(): Promise<number | null> {
    return clockProbe(this.#context);
  }

  #pieces(problem: MlaProblem, inputs: MlaInputs): Piece[] {
    const { kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim } = problem;
    const widest = Math.max(kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim);
    const parts = pieces(
      problem,
      inputs,
      Math.floor(this.#context.capabilities.limits.maxStorageBufferBindingSize / (4 * widest)),
    );
    return parts.filter((part) => !isEmpty(part.problem));
  }

  async #runPiece({ problem, inputs }: Piece, cfg: FlashMLAConfig): Promise<Tensor> {
    const plan = this.#plan(problem, cfg);
    const call = new ResidentCall(this.#context, problem, inputs, plan);
    try {
      const prepared = await PreparedAttention.create(this.#context, problem, plan, call);
      try {
        return await prepared.output();
      } finally {
        prepared.dispose();
      }
    } finally {
      call.dispose();
    }
  }

  #plan(problem: MlaProblem, cfg: FlashMLAConfig): AttentionPlan {
    return attentionPlan(problem, cfg, this.#context.capabilities.limits);
  }

  #sharedCalls(): WeakMap<MlaInputs, SharedCall> {
    const known = tunedCalls.get(this.#context) ?? new WeakMap<MlaInputs, SharedCall>();
    tunedCalls.set(this.#context, known);
    return known;
  }

  #share(inputs: MlaInputs, make: () => ResidentCall): { readonly resident: ResidentCall; release(): void } {
    const sharedCalls = this.#sharedCalls();
    const shared = sharedCalls.get(inputs) ?? { resident: make(), users: 0 };
    sharedCalls.set(inputs, shared);
    shared.users++;
    let released = false;
    return {
      resident: shared.resident,
      release() {
        if (released) return;
        released = true;
        if (--shared.users > 0) return;
        sharedCalls.delete(inputs);
        shared.resident.dispose();
      },
    };
  }
}

interface SharedCall {
  readonly resident: ResidentCall;
  users: number;
}

/** The memory of calls that are being tuned, by device. */
const tunedCalls = new WeakMap<GpuContext, WeakMap<MlaInputs, SharedCall>>();

function isEmpty({ batch, queryLength, keyLength }: MlaProblem): boolean {
  return batch * queryLength * keyLength === 0;
}
