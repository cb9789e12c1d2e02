// The platform "webgpu": plans a call, brings its data to the device, runs the kernels and leaves the result where it
// belongs.

import type { FlashMLAConfig } from "../op/config.ts";
import { FlashMLAError } from "../op/errors.ts";
import { toFloats, writeFloats, zeros } from "../op/half.ts";
import type { AttentionState } from "../op/attention_state.ts";
import type { EncodedCall, MlaImplementation, MlaTarget, MlaTrial, TrialOptions } from "../op/implementation.ts";
import type { MlaEvent } from "../op/mla_event.ts";
import type { MlaGradients } from "../op/mla_gradients.ts";
import { type MlaInputs, type MlaProblem, outputShape, tensorNames } from "../op/mla_problem.ts";
import { type Piece, pieces } from "../op/pieces.ts";
import { type AnyTensor, dtypeOf, type F16Tensor, type GpuTensor, isGpuTensor, type Tensor } from "../op/tensor.ts";
import { candidateConfigs } from "./attention_configs.ts";
import { attentionPlan, whyInvalid } from "./attention_plan.ts";
import { deviceFingerprint } from "./capabilities.ts";
import { planCache } from "./compiled_plan.ts";
import { type GpuContext, gpuContext, hasAdapter } from "./device.ts";
import { allocated } from "./gpu_tensor.ts";
import { type OperandLayouts, operandLayouts, type StorageType } from "./operand_layout.ts";
import { mostKeyRows } from "./key_rows.ts";
import { PreparedAttention } from "./prepared_attention.ts";
import { ResidentCall } from "./resident_call.ts";
import { clockProbe, timingMethod } from "./timing.ts";
import { type CallMemory, ownCall, sharedCall } from "./call_memory.ts";

/** The operation in WGSL, on the process's own device or the caller's. */
export const webgpuImplementation: MlaImplementation = {
  platform: "webgpu",
  backend: "gpu",
  isAvailable: hasAdapter,
  open: async (device, onEvent) => webgpuTarget(await gpuContext(device), onEvent),
};

/** The operation on one open device. */
export function webgpuTarget(context: GpuContext, onEvent?: (event: MlaEvent) => void): MlaTarget {
  return new WebGpuTarget(context, onEvent);
}

/** A piece of a call made ready. */
interface Prepared {
  readonly prepared: PreparedAttention;
  /** Gives back what it borrowed. */
  dispose(): void;
}

class WebGpuTarget implements MlaTarget {
  readonly platform = "webgpu";
  readonly #context: GpuContext;
  readonly #onEvent: ((event: MlaEvent) => void) | undefined;

  constructor(context: GpuContext, onEvent?: (event: MlaEvent) => void) {
    this.#context = context;
    this.#onEvent = onEvent;
  }

  get description(): string {
    const { adapter, engine } = this.#context.capabilities;
    return `${adapter}, ${engine}`;
  }

  get fingerprint(): string {
    return deviceFingerprint(this.#context.capabilities);
  }

  whyInvalid(problem: MlaProblem, cfg: FlashMLAConfig): string | null {
    return whyInvalid(cfg, problem, this.#context.capabilities);
  }

  heuristicCfg(problem: MlaProblem): FlashMLAConfig {
    return candidateConfigs(problem, this.#context.capabilities)[0];
  }

  candidateCfgs(problem: MlaProblem): readonly FlashMLAConfig[] {
    const { batch, queryLength, keyLength } = problem;
    const nothing = batch * queryLength * keyLength === 0;
    return candidateConfigs(problem, this.#context.capabilities).slice(0, nothing ? 1 : undefined);
  }

  async run(problem: MlaProblem, inputs: MlaInputs, cfg: FlashMLAConfig, out?: AnyTensor): Promise<AnyTensor> {
    const dtype = resultType(inputs, out);
    if (isGpuTensor(out ?? inputs.query)) {
      return await this.#onGpu(problem, inputs, cfg, out as GpuTensor | undefined, async ({ prepared, dispose }) => {
        await prepared.submit().finally(dispose);
      });
    }
    const shape = outputShape(problem);
    const result = out as Tensor | F16Tensor | undefined ?? zeros(shape, dtype);
    const parts = this.#plannedPieces(problem, inputs, cfg, dtype);
    // Pieces read the inputs one after another: a result in memory of theirs is written when all have been read.
    const apart = parts.length > 1 && sharesMemory(inputs, result);
    const target = apart ? zeros(shape, dtype) : result;
    for (const part of parts) {
      const { prepared, dispose } = await this.#prepare(part, cfg, dtype);
      await prepared.outputInto(target, part.queryRow * shape[2] * shape[3]).finally(dispose);
    }
    if (apart) writeFloats(result, toFloats(target).data);
    return result;
  }

  runWithLse(): Promise<AttentionState> {
    return Promise.reject(missing("the log-sum-exp"));
  }

  backward(): Promise<MlaGradients> {
    return Promise.reject(missing("the backward pass"));
  }

  async encode(
    encoder: GPUCommandEncoder,
    problem: MlaProblem,
    inputs: MlaInputs,
    cfg: FlashMLAConfig,
    out?: GpuTensor,
  ): Promise<EncodedCall> {
    const held: Prepared[] = [];
    const dispose = () => held.splice(0).forEach((ready) => ready.dispose());
    try {
      const output = await this.#onGpu(problem, inputs, cfg, out, async (ready) => {
        held.push(ready);
        await ready.prepared.record(encoder);
      }, encoder);
      return { output, dispose };
    } catch (error) {
      dispose();
      throw error;
    }
  }

  /** A call too large for one piece is timed by its first piece. Trials of one call share its memory. */
  async trial(
    problem: MlaProblem,
    inputs: MlaInputs,
    cfg: FlashMLAConfig,
    { backward = false }: TrialOptions = {},
  ): Promise<MlaTrial> {
    if (backward) throw missing("the backward pass");
    const [piece] = this.#pieces(problem, inputs);
    const timing = await timingMethod(this.#context);
    const { prepared, dispose } = await this.#prepare(piece, cfg, resultType(inputs), { sharer: inputs });
    return {
      timingMethod: timing,
      output: () => prepared.output(),
      time: (repeats) => prepared.time(repeats),
      dispose,
    };
  }

  probe(): Promise<number | null> {
    return clockProbe(this.#context);
  }

  /** Does work on every piece of a call whose result stays on the GPU, and gives the result. */
  async #onGpu(
    problem: MlaProblem,
    inputs: MlaInputs,
    cfg: FlashMLAConfig,
    out: GpuTensor | undefined,
    work: (piece: Prepared) => Promise<void>,
    encoder?: GPUCommandEncoder,
  ): Promise<GpuTensor> {
    if (out !== undefined) checkBuffers(inputs, out);
    const dtype = resultType(inputs, out);
    // Limits are told before memory is taken.
    const planned = this.#plannedPieces(problem, inputs, cfg, dtype, out);
    const own = out === undefined ? await allocated(this.#context, outputShape(problem), dtype) : null;
    const result = out ?? own!;
    try {
      for (const part of own === null ? planned : this.#pieces(problem, inputs, own)) {
        await work(await this.#prepare(part, cfg, part.out as GpuTensor, { encoder }));
      }
      return result;
    } catch (error) {
      own?.dispose();
      throw error;
    }
  }

  /** The pieces of a call, each of which can be planned: a limit is told before any work on the first one. */
  #plannedPieces(
    problem: MlaProblem,
    inputs: MlaInputs,
    cfg: FlashMLAConfig,
    dtype: StorageType,
    out?: GpuTensor,
  ): Piece[] {
    const { capabilities } = this.#context;
    const parts = this.#pieces(problem, inputs, out);
    if (parts.length > 1) {
      for (const part of parts) {
        const place = part.out as GpuTensor | undefined ?? dtype;
        attentionPlan(part.problem, cfg, capabilities, this.#layouts(part.problem, part.inputs, place));
      }
    }
    return parts;
  }

  #pieces(problem: MlaProblem, inputs: MlaInputs, out?: GpuTensor): Piece[] {
    const limit = this.#context.capabilities.limits.maxStorageBufferBindingSize;
    const parts = pieces(problem, inputs, mostKeyRows(problem, inputs, limit), out);
    return parts.filter(({ problem: { batch, queryLength } }) => batch * queryLength > 0);
  }

  #layouts(problem: MlaProblem, inputs: MlaInputs, out: GpuTensor | StorageType): OperandLayouts {
    return operandLayouts(problem, inputs, this.#context.capabilities.f16, out);
  }

  /**
   * Plans, compiles, uploads and binds one piece.
   *
   * @param out What takes the result on the GPU, or the element type of a result in memory of ours.
   * @param sharing The encoder that the piece is recorded into, whose calls share scratch; or the inputs of a call that is
   * being tuned, whose trials share all memory.
   */
  async #prepare(
    piece: Piece,
    cfg: FlashMLAConfig,
    out: GpuTensor | StorageType,
    sharing: { readonly sharer?: MlaInputs; readonly encoder?: GPUCommandEncoder } = {},
  ): Promise<Prepared> {
    const context = this.#context;
    const { problem, inputs } = piece;
    if (!context.capabilities.f16) this.#tellConverted(inputs, out);
    const { compiled, release } = await planCache(context).borrow(problem, cfg, this.#layouts(problem, inputs, out));
    let memory: CallMemory | undefined;
    const dispose = () => {
      memory?.dispose();
      release();
    };
    try {
      const { sharer, encoder } = sharing;
      const tensors = { inputs, out: typeof out === "string" ? undefined : out };
      const make = () => ResidentCall.create(context, problem, tensors, compiled.plan, encoder);
      memory = sharer === undefined ? ownCall(await make()) : await sharedCall(sharer, make);
      return { prepared: await PreparedAttention.create(context, problem, compiled, memory.resident), dispose };
    } catch (error) {
      dispose();
      throw error;
    }
  }

  #tellConverted(inputs: MlaInputs, out: GpuTensor | StorageType): void {
    const halves = tensorNames.some((name) => inputs[name]?.dtype === "f16") ||
      (typeof out === "string" ? out : out.dtype) === "f16";
    if (!halves || told.has(this.#context)) return;
    told.add(this.#context);
    const message =
      `The GPU device "${this.#context.capabilities.adapter}" has no half precision (shader-f16): tensors ` +
      "of halves are computed with as float32, in twice the memory. Results are the same to within rounding.";
    if (this.#onEvent === undefined) return console.warn(message);
    try {
      this.#onEvent({ code: "f16-converted", message });
    } catch {
      // A listener's failure is no reason to stop computing.
    }
  }
}

function missing(what: string): FlashMLAError {
  return new FlashMLAError("device", `Cannot run MLA on platform "webgpu": ${what} is not implemented yet`);
}

/** The devices whose users were told that halves are converted: once each. */
const told = new WeakSet<GpuContext>();

/** The element type of a result: that of the tensor that takes it, or of the query. bfloat16 gives float32. */
function resultType(inputs: MlaInputs, out: AnyTensor | undefined = undefined): StorageType {
  return dtypeOf(out ?? inputs.query) === "f16" ? "f16" : "f32";
}

/** Whether a host tensor lies in the same memory as an input. */
function sharesMemory(inputs: MlaInputs, result: Tensor | F16Tensor): boolean {
  return tensorNames.some((name) => {
    const tensor = inputs[name];
    return tensor !== undefined && !isGpuTensor(tensor) && tensor.data.buffer === result.data.buffer;
  });
}

/** Throws when a result would be written to a buffer that is also read. */
function checkBuffers(inputs: MlaInputs, out: GpuTensor): void {
  for (const name of tensorNames) {
    const tensor = inputs[name];
    if (tensor === undefined || !isGpuTensor(tensor) || tensor.buffer !== out.buffer) continue;
    throw new FlashMLAError(
      "invalid-input",
      `Cannot run MLA: out lies in the buffer of ${name}; WebGPU does not let a kernel read and write one buffer, ` +
        "so out needs a buffer of its own",
    );
  }
}
