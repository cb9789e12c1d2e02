// The platform "webgpu": plans a call, brings its data to the device, runs the kernels and leaves the result where it
// belongs.

import type { FlashMLAConfig } from "../op/config.ts";
import { FlashMLAError } from "../op/errors.ts";
import { toFloats, writeFloats, zeros } from "../op/half.ts";
import type { AttentionState } from "../op/attention_state.ts";
import type { EncodedCall, MlaImplementation, MlaTarget, MlaTrial, TrialOptions } from "../op/implementation.ts";
import type { MlaEvent } from "../op/mla_event.ts";
import type { MlaGradients } from "../op/mla_gradients.ts";
import { lseShape, type MlaInputs, type MlaProblem, outputShape, tensorNames } from "../op/mla_problem.ts";
import { type Piece, pieces, type ResultTensors } from "../op/pieces.ts";
import {
  type AnyTensor,
  dtypeOf,
  type F16Tensor,
  type GpuTensor,
  isGpuTensor,
  type OwnedGpuTensor,
  type Tensor,
} from "../op/tensor.ts";
import { candidateConfigs } from "./attention_configs.ts";
import { checkBackward, gradientsOnGpu, preparePiece } from "./backward_call.ts";
import { backwardTrial, hasGradients, trialTensors } from "./backward_trial.ts";
import { attentionPlan, whyInvalid } from "./attention_plan.ts";
import { deviceFingerprint } from "./capabilities.ts";
import { planCache } from "./compiled_plan.ts";
import { type GpuContext, gpuContext, hasAdapter } from "./device.ts";
import { allocated } from "./gpu_tensor.ts";
import { type OperandLayouts, operandLayouts, type ResultPlaces, type StorageType } from "./operand_layout.ts";
import { mostKeyRows } from "./key_rows.ts";
import { PreparedAttention } from "./prepared_attention.ts";
import { ResidentCall } from "./resident_call.ts";
import { clockProbe, timingMethod } from "./timing.ts";
import { type CallMemory, ownCall, sharedBy } from "./call_memory.ts";

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

  get software(): boolean {
    return this.#context.capabilities.software;
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
    return (await this.#run(problem, inputs, cfg, out, false)).output;
  }

  async runWithLse(
    problem: MlaProblem,
    inputs: MlaInputs,
    cfg: FlashMLAConfig,
    out?: AnyTensor,
  ): Promise<{ output: AnyTensor; lse: AnyTensor }> {
    const { output, lse } = await this.#run(problem, inputs, cfg, out, true);
    return { output, lse: lse! };
  }

  async #run(
    problem: MlaProblem,
    inputs: MlaInputs,
    cfg: FlashMLAConfig,
    out: AnyTensor | undefined,
    withLse: boolean,
  ): Promise<{ output: AnyTensor; lse?: AnyTensor }> {
    const dtype = resultType(inputs, out);
    if (isGpuTensor(out ?? inputs.query)) {
      const given = out as GpuTensor | undefined;
      return await this.#onGpu(problem, inputs, cfg, { out: given, withLse }, async ({ prepared, dispose }) => {
        await prepared.submit().finally(dispose);
      });
    }
    const shape = outputShape(problem);
    const result = out as Tensor | F16Tensor | undefined ?? zeros(shape, dtype);
    const lse = withLse ? zeros(lseShape(problem), "f32") as Tensor : undefined;
    const parts = this.#plannedPieces(problem, inputs, cfg, { out: dtype, lse: withLse });
    // Pieces read the inputs one after another: a result in memory of theirs is written when all have been read.
    const apart = parts.length > 1 && sharesMemory(inputs, result);
    const target = apart ? zeros(shape, dtype) : result;
    for (const part of parts) {
      const { prepared, dispose } = await this.#prepare(part, cfg, { out: dtype, lse: withLse });
      const take = lse && ((rows: Float32Array) => writeLse(lse, rows, problem, part));
      await prepared.outputInto(target, part.queryRow * shape[2] * shape[3], take).finally(dispose);
    }
    if (apart) writeFloats(result, toFloats(target).data);
    return { output: result, lse };
  }

  async backward(
    problem: MlaProblem,
    inputs: MlaInputs,
    cfg: FlashMLAConfig,
    saved: AttentionState,
    gradOutput: AnyTensor,
  ): Promise<MlaGradients> {
    if (!this.#context.capabilities.f16) this.#tellConverted(inputs, "f32");
    return await gradientsOnGpu(this.#context, problem, inputs, cfg, saved, gradOutput);
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
      const { output } = await this.#onGpu(problem, inputs, cfg, { out, withLse: false }, async (ready) => {
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
    if (backward) return await this.#backwardTrial(problem, inputs, cfg);
    const [piece] = this.#pieces(problem, inputs);
    const timing = await timingMethod(this.#context);
    const { prepared, dispose } = await this.#prepare(piece, cfg, { out: resultType(inputs) }, { sharer: inputs });
    return {
      timingMethod: timing,
      output: () => prepared.output(),
      time: (repeats) => prepared.time(repeats),
      dispose,
    };
  }

  async #backwardTrial(problem: MlaProblem, inputs: MlaInputs, cfg: FlashMLAConfig): Promise<MlaTrial> {
    const context = this.#context;
    checkBackward(context, problem, cfg);
    const held: { dispose(): void }[] = [];
    const dispose = () => held.splice(0).reverse().forEach((part) => part.dispose());
    try {
      const shared = await sharedBy(
        inputs,
        "tensors",
        () => trialTensors(context, problem, inputs, resultType(inputs)),
      );
      held.push(shared);
      const tensors = shared.resident;
      const { piece, output, lse } = tensors;
      const forward = await this.#prepare(
        { problem: piece.problem, inputs: piece.inputs, queryRow: 0 },
        cfg,
        { out: output, lse },
        { sharer: tensors },
      );
      held.push(forward);
      const backward = !hasGradients(piece) ? null : await preparePiece(context, piece, cfg, (make) => {
        return sharedBy(tensors, cfg.matrixUnits ? "backward on matrix units" : "backward", make);
      });
      if (backward !== null) held.push(backward);
      return await backwardTrial(context, tensors, forward.prepared, backward && backward.prepared, dispose);
    } catch (error) {
      dispose();
      throw error;
    }
  }

  probe(): Promise<number | null> {
    return clockProbe(this.#context);
  }

  /** Does work on every piece of a call whose results stay on the GPU, and gives the results. */
  async #onGpu(
    problem: MlaProblem,
    inputs: MlaInputs,
    cfg: FlashMLAConfig,
    { out, withLse }: { readonly out?: GpuTensor; readonly withLse: boolean },
    work: (piece: Prepared) => Promise<void>,
    encoder?: GPUCommandEncoder,
  ): Promise<{ output: GpuTensor; lse?: GpuTensor }> {
    if (out !== undefined) checkBuffers(inputs, out);
    const dtype = resultType(inputs, out);
    // Limits are told before memory is taken.
    const planned = this.#plannedPieces(problem, inputs, cfg, { out: dtype, lse: withLse }, { out });
    const own: OwnedGpuTensor[] = [];
    const allocate = async (shape: readonly number[], type: StorageType) => {
      const tensor = await allocated(this.#context, shape, type);
      own.push(tensor);
      return tensor;
    };
    try {
      const output = out ?? await allocate(outputShape(problem), dtype);
      const lse = withLse ? await allocate(lseShape(problem), "f32") : undefined;
      const parts = own.length === 0 ? planned : this.#pieces(problem, inputs, { out: output, lse });
      for (const part of parts) {
        const places = { out: part.out as GpuTensor, lse: part.lse as GpuTensor | undefined };
        await work(await this.#prepare(part, cfg, places, { encoder }));
      }
      return { output, lse };
    } catch (error) {
      for (const tensor of own) tensor.dispose();
      throw error;
    }
  }

  /** The pieces of a call, each of which can be planned: a limit is told before any work on the first one. */
  #plannedPieces(
    problem: MlaProblem,
    inputs: MlaInputs,
    cfg: FlashMLAConfig,
    places: ResultPlaces,
    results: ResultTensors = {},
  ): Piece[] {
    const { capabilities } = this.#context;
    const parts = this.#pieces(problem, inputs, results);
    if (parts.length > 1) {
      for (const part of parts) {
        const place = { ...places, ...(part.out && { out: part.out as GpuTensor }) };
        attentionPlan(part.problem, cfg, capabilities, this.#layouts(part.problem, part.inputs, place));
      }
    }
    return parts;
  }

  #pieces(problem: MlaProblem, inputs: MlaInputs, results: ResultTensors = {}): Piece[] {
    const limit = this.#context.capabilities.limits.maxStorageBufferBindingSize;
    const parts = pieces(problem, inputs, mostKeyRows(problem, inputs, limit), results);
    return parts.filter(({ problem: { batch, queryLength } }) => batch * queryLength > 0);
  }

  #layouts(problem: MlaProblem, inputs: MlaInputs, places: ResultPlaces): OperandLayouts {
    return operandLayouts(problem, inputs, this.#context.capabilities.f16, places);
  }

  /**
   * Plans, compiles, uploads and binds one piece.
   *
   * @param places What takes the results.
   * @param sharing The encoder that the piece is recorded into, whose calls share scratch; or the inputs of a call that is
   * being tuned, whose trials share all memory.
   */
  async #prepare(
    piece: Piece,
    cfg: FlashMLAConfig,
    places: ResultPlaces,
    sharing: { readonly sharer?: object; readonly encoder?: GPUCommandEncoder } = {},
  ): Promise<Prepared> {
    const context = this.#context;
    const { problem, inputs } = piece;
    if (!context.capabilities.f16) this.#tellConverted(inputs, places.out);
    const { compiled, release } = await planCache(context).borrow(problem, cfg, this.#layouts(problem, inputs, places));
    let memory: CallMemory | undefined;
    const dispose = () => {
      memory?.dispose();
      release();
    };
    try {
      const { sharer, encoder } = sharing;
      const { out, lse } = places;
      const tensors = {
        inputs,
        out: typeof out === "string" ? undefined : out,
        lse: typeof lse === "object" ? lse : undefined,
      };
      const make = () => ResidentCall.create(context, problem, tensors, compiled.plan, encoder);
      const kind = cfg.matrixUnits ? "forward on matrix units" : "forward";
      memory = sharer === undefined ? ownCall(await make()) : await sharedBy(sharer, kind, make);
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

/** The devices whose users were told that halves are converted: once each. */
const told = new WeakSet<GpuContext>();

/** The element type of a result: that of the tensor that takes it, or of the query. bfloat16 gives float32. */
function resultType(inputs: MlaInputs, out: AnyTensor | undefined = undefined): StorageType {
  return dtypeOf(out ?? inputs.query) === "f16" ? "f16" : "f32";
}

/** Writes a piece's log-sum-exps, `[batch, queryHeads, queryLength]` of the piece, to their places in the whole. */
function writeLse(whole: Tensor, rows: Float32Array, { queryLength }: MlaProblem, { problem, queryRow }: Piece): void {
  const { batch, queryHeads, queryLength: length } = problem;
  const [item, position] = [Math.floor(queryRow / queryLength), queryRow % queryLength];
  for (let row = 0; row < batch * queryHeads; row++) {
    const start = (item * queryHeads + row) * queryLength + position;
    whole.data.set(rows.subarray(row * length, (row + 1) * length), start);
  }
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
