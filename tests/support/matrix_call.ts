// One call through the kernels on matrix units, packed by hand: dense tensors, one head group, one query range.

import { BufferUsage } from "../../src/gpu/buffers.ts";
import type { GpuContext } from "../../src/gpu/device.ts";
import { attendBindings } from "../../src/gpu/kernels/attend_operands.ts";
import * as attend from "../../src/gpu/kernels/matrix_attend.ts";
import type { MatrixAttendTile } from "../../src/gpu/kernels/matrix_attend_layout.ts";
import * as grad from "../../src/gpu/kernels/matrix_attend_backward.ts";
import * as expand from "../../src/gpu/kernels/matrix_expand.ts";
import * as project from "../../src/gpu/kernels/matrix_expand_backward.ts";
import * as magnitude from "../../src/gpu/kernels/matrix_magnitude.ts";
import * as rope from "../../src/gpu/kernels/matrix_rope.ts";
import * as maxima from "../../src/gpu/kernels/matrix_maxima.ts";
import { matrixScratch, paddedWidth } from "../../src/gpu/kernels/matrix_scratch.ts";
import * as stage from "../../src/gpu/kernels/matrix_stage.ts";
import { stagedBytes } from "../../src/gpu/kernels/matrix_staged.ts";
import type { MatrixBackend } from "../../src/gpu/kernels/matrix_unit.ts";
import * as rowStats from "../../src/gpu/kernels/row_stats.ts";
import { scoreFloats, scoreTerms } from "../../src/gpu/kernels/score_terms.ts";
import { type StorageElement, storageElement } from "../../src/gpu/kernels/storage_element.ts";
import { blockWords, schedule } from "../../src/gpu/schedule.ts";
import { settled } from "../../src/gpu/settled.ts";
import { timeOnGpu } from "../../src/gpu/timing.ts";
import { dropoutThreshold, seedWords } from "../../src/op/dropout.ts";
import { halfBits, toHalves } from "../../src/op/half.ts";
import { type HostInputs, lseShape, type MlaProblem, outputShape } from "../../src/op/mla_problem.ts";
import { sinksPerHead } from "../../src/op/score_options.ts";
import { elementCount, type MaskTensor, type Tensor } from "../../src/op/tensor.ts";

/** How to run the kernels. */
export interface MatrixSetup {
  readonly backend: MatrixBackend;
  readonly attend: MatrixAttendTile;
  readonly expand: expand.MatrixExpandTile;
  /** The tiles of ∂query and of ∂K and ∂V. */
  readonly grad?: Readonly<Record<grad.MatrixGradTarget, grad.MatrixGradTile>>;
  /** The tiles of the gradients of latents and of weights. */
  readonly project?: Readonly<Record<"latents" | "weights", expand.MatrixExpandTile>>;
  /** Whether tensors are uploaded as halves and the output stored so. */
  readonly half: boolean;
}

/** One kernel, ready to run. */
export interface MatrixStep {
  readonly name: string;
  readonly pipeline: GPUComputePipeline;
  readonly bindGroup: GPUBindGroup;
  readonly workgroups: readonly [number, number];
}

/** Values of a WGSL parameter block by name, in the order of its fields. */
export function packParams(struct: string, values: Readonly<Record<string, number>>): ArrayBuffer {
  const fields = [...struct.matchAll(/^ {2}(\w+): (f32|u32|i32),/gm)];
  const packed = new ArrayBuffer(Math.ceil(fields.length / 4) * 16);
  fields.forEach(([, name, type], i) => {
    const value = values[name];
    if (value === undefined) throw new Error(`no value for the parameter ${name}`);
    if (type === "f32") new Float32Array(packed, 4 * i, 1)[0] = value;
    else new Uint32Array(packed, 4 * i, 1)[0] = value >>> 0;
  });
  return packed;
}

/** Buffers and kernels of one call. */
export class MatrixCall {
  readonly steps: MatrixStep[] = [];
  readonly buffers: GPUBuffer[] = [];
  readonly named: Map<string, GPUBuffer> = new Map();
  readonly context: GpuContext;
  readonly problem: MlaProblem;
  readonly inputs: HostInputs;
  readonly setup: MatrixSetup;

  private constructor(context: GpuContext, problem: MlaProblem, inputs: HostInputs, setup: MatrixSetup) {
    this.context = context;
    this.problem = problem;
    this.inputs = inputs;
    this.setup = setup;
  }

  /** Compiles and binds expansion and attention. */
  static async create(
    context: GpuContext,
    problem: MlaProblem,
    inputs: HostInputs,
    setup: MatrixSetup,
  ): Promise<MatrixCall> {
    const call = new MatrixCall(context, problem, inputs, setup);
    await call.forward();
    return call;
  }

  element(...widths: number[]): StorageElement {
    return storageElement(this.setup.half ? "f16" : "f32", widths.every((width) => width % 4 === 0));
  }

  /** A buffer that starts out full of NaN, in halves and in floats. */
  buffer(name: string, bytes: number, usage: number = BufferUsage.STORAGE): GPUBuffer {
    const size = Math.max(16, Math.ceil(bytes / 16) * 16);
    const made = this.context.device.createBuffer({
      label: name,
      size,
      usage: usage | BufferUsage.COPY_DST | BufferUsage.COPY_SRC,
    });
    if (usage === BufferUsage.STORAGE) {
      this.context.device.queue.writeBuffer(made, 0, new Uint32Array(size / 4).fill(0x7fc07fc0));
    }
    this.buffers.push(made);
    this.named.set(name, made);
    return made;
  }

  upload(name: string, data: ArrayBuffer | ArrayBufferView, usage?: number): GPUBuffer {
    const bytes = new Uint8Array(Math.max(16, Math.ceil(data.byteLength / 16) * 16));
    bytes.set(
      data instanceof ArrayBuffer
        ? new Uint8Array(data)
        : new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
    );
    const made = this.buffer(name, bytes.byteLength, usage);
    this.context.device.queue.writeBuffer(made, 0, bytes);
    return made;
  }

  uploadTensor(name: string, tensor: Tensor): GPUBuffer {
    return this.upload(name, this.setup.half ? halfBits(toHalves(tensor).data) : tensor.data);
  }

  async step(
    name: string,
    code: string,
    params: Readonly<Record<string, number>>,
    bindings: Readonly<Record<number, GPUBuffer | undefined>>,
    workgroups: readonly [number, number],
  ): Promise<void> {
    const start = code.indexOf("struct Params {");
    const struct = code.slice(start, code.indexOf("\n}", start) + 2);
    const uniform = this.upload(`${name} params`, packParams(struct, params), BufferUsage.UNIFORM);
    const pipeline = await this.context.pipelines.get(name, code);
    const entries = Object.entries({ 0: uniform, ...bindings }).map(([binding, buffer]) => ({
      binding: Number(binding),
      resource: { buffer: buffer! },
    }));
    const bindGroup = this.context.device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries });
    this.steps.push({ name, pipeline, bindGroup, workgroups });
  }

  /** The parameters that score terms read. */
  scoreParams(): Record<string, number> {
    const { problem, inputs } = this;
    const { batch, queryHeads, queryLength, keyLength, dropout } = problem;
    const [scaleLog2, capLog2, scaleOverCap, keptFactor, minusInfinity, softmaxScale] = scoreFloats(problem);
    const term = problem.scoreTerm === "bias" ? inputs.bias! : inputs.attentionMask;
    const [items, heads] = (term as Tensor | undefined)?.shape ?? [1, 1];
    const [seed0, seed1] = seedWords(dropout?.seed ?? 0);
    return {
      ...{ scaleLog2, capLog2, scaleOverCap, keptFactor, minusInfinity, softmaxScale },
      ...{ firstRow: 0, queryLength, keyLength, queryHeads, termBase: 0 },
      termItem: items === 1 && batch > 1 ? 0 : heads * queryLength * keyLength,
      termHead: heads === 1 ? 0 : queryLength * keyLength,
      termRow: keyLength,
      dropBelow: dropoutThreshold(dropout?.rate ?? 0),
      ...{ seed0, seed1, firstItem: dropout?.firstItem ?? 0, firstPosition: dropout?.firstPosition ?? 0 },
    };
  }

  /** Sinks of each head as one logit in units of log2. */
  sinks(): Float32Array {
    const { problem: { queryHeads, sinks }, inputs } = this;
    const { data, shape } = inputs.softmaxAux!;
    return Float32Array.from({ length: Math.ceil(queryHeads / 4) * 4 }, (_, head) => {
      if (head >= queryHeads) return 0;
      const own = data.subarray(...sinksPerHead(shape, queryHeads) ? [head * sinks, (head + 1) * sinks] : [0, sinks]);
      const top = Math.max(...own);
      return (top + Math.log(own.reduce((sum, sink) => sum + Math.exp(sink - top), 0))) * Math.LOG2E;
    });
  }

  async forward(): Promise<void> {
    const { problem, inputs, setup } = this;
    const { batch, keyLength, queryLength, queryHeads: H, kvHeads: G, kvLoraRank: L } = problem;
    const { qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = problem;
    const keyRows = batch * keyLength;
    const rows = batch * queryLength;
    const scratch = matrixScratch(problem, keyRows, G);
    const expanded = this.buffer("expanded", scratch.bytes);
    const latents = this.uploadTensor("keyValue", inputs.keyValue);
    for (const [side, headDim, base] of [["Keys", P, 0], ["Values", V, scratch.valuesBase]] as const) {
      const weight = side === "Keys" ? inputs.wKc : inputs.wVc;
      const whole = setup.half && expand.isWhole(setup.expand, L, headDim);
      const element = (width: number) => whole ? "vec4<u32>" as const : this.element(width);
      const shape = { latent: element(L), weight: element(headDim), headDim, gapped: false };
      const columns = expand.paddedColumns(shape, G);
      await this.step(
        `expand${side}`,
        expand.wgsl(setup.expand, shape, setup.backend),
        {
          ...{ rows: keyRows, columns, firstColumn: 0, firstTile: 0, L },
          ...{ weightStride: G * headDim, latentBase: 0, latentRow: L, latentRows: keyLength, latentGap: 0 },
          ...{ weightBase: 0, expandedBase: base },
        },
        { 1: latents, 2: this.uploadTensor(side, weight), 3: expanded },
        [Math.ceil(keyRows / setup.expand.blockM), Math.ceil(columns / setup.expand.blockN)],
      );
    }
    if (R > 0) {
      await this.step(
        "rope",
        rope.wgsl({ ropeKey: this.element(R), qkRopeHeadDim: R }),
        {
          ...{ rows: keyRows, ropeKeyBase: 0, ropeKeyRow: R, ropeKeyRows: keyLength, ropeKeyGap: 0 },
          expandedBase: scratch.ropeBase,
        },
        { 1: this.uploadTensor("bK", inputs.bK!), 2: expanded },
        [rope.workgroups(problem, keyRows), 1],
      );
    }
    const inQuery = problem.rope === "in_query";
    const shape: attend.MatrixAttendShape = {
      ...{ qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V, rope: problem.rope },
      query: this.element(P, inQuery ? R : 0),
      output: this.element(V),
      ropeQuery: this.element(R),
      terms: scoreTerms(problem, setup.half ? "f16" : "f32"),
      sinkQuads: problem.sinks === 0 ? 0 : Math.ceil(H / 4),
      lse: true,
    };
    const blocks = schedule(problem, setup.attend.blockQ, { start: 0, end: rows });
    const queryWidth = inQuery ? P + R : P;
    const at = attendBindings;
    await this.step("attend", attend.wgsl(setup.attend, shape, setup.backend), {
      ...this.scoreParams(),
      ...{ firstHead: 0, firstKvHead: 0, groupKvHeads: G, valuesBase: scratch.valuesBase, firstBlock: 0 },
      ...{ groupSize: H / G, P, R, V, queryBase: 0, queryRow: H * queryWidth, queryHead: queryWidth, queryGap: 0 },
      ...{ outputBase: 0, outputRow: H * V, outputHead: V, outputGap: 0 },
      ...{ ropeKeyBase: scratch.ropeBase, ropeKeyRow: paddedWidth(R), ropeKeyGap: 0 },
      ...{ ropeQueryBase: 0, ropeQueryRow: R, ropeQueryGap: 0 },
      ...{ lseBase: 0, lseItem: H * queryLength, lseHead: queryLength },
    }, {
      [at.blocks]: this.upload("blocks", blocks),
      [at.query]: this.uploadTensor("query", inputs.query),
      [at.expanded]: expanded,
      [at.output]: this.buffer("output", elementCount(outputShape(problem)) * (setup.half ? 2 : 4)),
      ...(problem.rope === "shared" && { [at.bQ]: this.uploadTensor("bQ", inputs.bQ!) }),
      [at.lse]: this.buffer("lse", elementCount(lseShape(problem)) * 4),
      ...(problem.scoreTerm === "bias" && { [at.term]: this.uploadTensor("bias", inputs.bias!) }),
      ...(problem.scoreTerm === "mask" &&
        { [at.term]: this.upload("mask", (inputs.attentionMask as MaskTensor).data) }),
      ...(problem.sinks > 0 && { [at.sinks]: this.upload("sinks", this.sinks(), BufferUsage.UNIFORM) }),
    }, [H, blocks.length / blockWords]);
  }

  /** Compiles and binds the gradients of attention: "∂query", and "∂expanded", which is ∂K, ∂V and ∂rope by key row. */
  async backward(gradOutput: Tensor): Promise<void> {
    const { problem, setup } = this;
    const { batch, keyLength, queryLength, queryHeads: H, kvHeads: G } = problem;
    const { qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = problem;
    const rows = batch * queryLength;
    const keyRows = batch * keyLength;
    const output = this.named.get("output")!;
    const grads = this.uploadTensor("gradOutput", gradOutput);
    const stats = this.buffer("stats", rows * H * 8);
    const dense = { outputBase: 0, outputRow: H * V, outputHead: V, outputGap: 0 };
    const ofGrad = { gradBase: 0, gradRow: H * V, gradHead: V, gradGap: 0 };
    await this.step(
      "stats",
      rowStats.wgsl({ output: this.element(V), gradOutput: this.element(V) }),
      {
        ...{ rows, firstRow: 0, queryLength, V, firstTile: 0, ...dense, ...ofGrad },
        ...{ lseBase: 0, lseItem: H * queryLength, lseHead: queryLength },
      },
      { 1: output, 2: grads, 3: this.named.get("lse"), 4: stats },
      [Math.ceil(rows / rowStats.rowsPerWorkgroup), H],
    );
    const inQuery = problem.rope === "in_query";
    const queryWidth = inQuery ? P + R : P;
    const scratch = matrixScratch(problem, keyRows, G);
    const expanded = this.named.get("expanded")!;
    const staged = this.buffer("staged", stagedBytes(problem, rows, H));
    const params = {
      ...this.scoreParams(),
      ...{ firstHead: 0, headCount: 1, firstKvHead: 0, groupKvHeads: G, valuesBase: scratch.valuesBase },
      ...{ ropeBase: scratch.ropeBase, firstBlock: 0, groupSize: H / G, P, R, V, rangeRows: rows },
      ...{ queryBase: 0, queryRow: H * queryWidth, queryHead: queryWidth, queryGap: 0, ...ofGrad },
      ...{ ropeQueryBase: 0, ropeQueryRow: R, ropeQueryGap: 0 },
      ...{ gradientBase: 0, gradientItem: 0, gradientHead: P + R, gradientRow: H * (P + R) },
      ...{ gradientValues: keyRows * G * P, gradientRope: keyRows * G * (P + V), accumulate: 0, columnTiles: 1 },
    };
    await this.step("magnitude", magnitude.wgsl(this.element(V)), params, {
      [magnitude.magnitudeBindings.gradOutput]: grads,
      [magnitude.magnitudeBindings.expanded]: expanded,
      [magnitude.magnitudeBindings.staged]: staged,
    }, magnitude.workgroups);
    const shape: stage.MatrixStageShape = {
      ...{ qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V, rope: problem.rope },
      ...{ query: this.element(P, inQuery ? R : 0), gradOutput: this.element(V), ropeQuery: this.element(R) },
    };
    await this.step("stage", stage.wgsl(shape), params, {
      [stage.stageBindings.query]: this.named.get("query"),
      [stage.stageBindings.gradOutput]: grads,
      [stage.stageBindings.staged]: staged,
      ...(problem.rope === "shared" && { [stage.stageBindings.bQ]: this.named.get("bQ") }),
    }, [stage.workgroups, 1]);
    const gradients = {
      query: this.buffer("∂query", rows * H * (P + R) * 4),
      keys: this.buffer("∂expanded", keyRows * G * (P + V + R) * 4),
    };
    for (const target of ["query", "keys"] as const) {
      const tile = setup.grad![target];
      const owner = target === "query" ? "queries" : "keys";
      const blocks = schedule(problem, tile.rows, { start: 0, end: rows }, owner);
      const gradShape: grad.MatrixGradShape = {
        ...{ qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V },
        terms: scoreTerms(problem, setup.half ? "f16" : "f32"),
        gradient: [P, R, V].every((width) => width % 4 === 0) ? "vec4<f32>" : "f32",
      };
      const at = grad.matrixGradBindings;
      await this.step(
        `∂${target}`,
        grad.wgsl(target, tile, gradShape, setup.backend),
        { ...params, headCount: target === "query" ? 1 : H / G },
        {
          [at.blocks]: this.upload(`blocks of ∂${target}`, blocks),
          [at.staged]: staged,
          [at.stats]: stats,
          [at.expanded]: expanded,
          [at.gradient]: gradients[target],
          ...(problem.scoreTerm !== "none" && { [at.term]: this.named.get(problem.scoreTerm) }),
        },
        [target === "query" ? H : G, blocks.length / blockWords],
      );
    }
  }

  /** Compiles and binds the projections of ∂K and ∂V: "∂keyValue", "∂wKc" and "∂wVc". */
  async projections(): Promise<void> {
    const { problem, setup } = this;
    const { batch, keyLength, kvHeads: G, kvLoraRank: L, qkNopeHeadDim: P, vHeadDim: V } = problem;
    const rows = batch * keyLength;
    const expanded = this.named.get("∂expanded")!;
    const most = this.buffer("maxima", maxima.maximaBytes);
    const ends = { keysEnd: rows * G * P, valuesBase: rows * G * P, valuesEnd: rows * G * (P + V) };
    await this.step("maxima", maxima.wgsl(), ends, { 1: expanded, 2: most }, maxima.workgroups);
    const latents = this.buffer("∂keyValue", rows * L * 4);
    for (const side of ["keys", "values"] as const) {
      const isKeys = side === "keys";
      const columns = G * (isKeys ? P : V);
      const base = isKeys ? 0 : rows * G * P;
      const weight = this.named.get(isKeys ? "Keys" : "Values")!;
      const ofExpanded = storageElement("f32", columns % 4 === 0 && base % 4 === 0);
      const gradient = (width: number) => storageElement("f32", width % 4 === 0) as "f32" | "vec4<f32>";
      const run = async (
        which: "latents" | "weights",
        shape: project.MatrixExpandBackwardShape,
        params: Readonly<Record<string, number>>,
        buffers: readonly GPUBuffer[],
      ) => {
        const tile = setup.project![which];
        const code = project.wgsl(which, tile, shape, setup.backend);
        const bindings = { 1: buffers[0], 2: buffers[1], 3: buffers[2], [project.maximaBinding]: most };
        await this.step(
          `project${isKeys ? "Keys" : "Values"}To${which}`,
          code,
          { firstTile: 0, leftItemRows: keyLength, leftGap: 0, gradientBase: 0, ...params },
          bindings,
          [Math.ceil(params.columns / tile.blockN), Math.ceil(params.rows / tile.blockM)],
        );
      };
      await run(
        "latents",
        { side, left: ofExpanded, right: this.element(columns), gradient: gradient(L), gapped: false },
        {
          ...{ rows, columns: L, depth: columns, leftBase: base, leftRow: columns, rightBase: 0, rightRow: columns },
          ...{ gradientRow: L, accumulate: Number(!isKeys) },
        },
        [expanded, weight, latents],
      );
      await run(
        "weights",
        { side, left: this.element(L), right: ofExpanded, gradient: gradient(columns), gapped: false },
        {
          ...{ rows: L, columns, depth: rows, leftBase: 0, leftRow: L, rightBase: base, rightRow: columns },
          ...{ gradientRow: columns, accumulate: 0 },
        },
        [this.named.get("keyValue")!, expanded, this.buffer(isKeys ? "∂wKc" : "∂wVc", L * columns * 4)],
      );
    }
  }

  encode(encoder: GPUCommandEncoder, only?: readonly string[], timestampWrites?: GPUComputePassTimestampWrites): void {
    const pass = encoder.beginComputePass({ timestampWrites });
    for (const { name, pipeline, bindGroup, workgroups } of this.steps) {
      if (only !== undefined && !only.includes(name)) continue;
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, bindGroup);
      pass.dispatchWorkgroups(...workgroups);
    }
    pass.end();
  }

  /** Runs the steps once. */
  run(only?: readonly string[]): void {
    const encoder = this.context.device.createCommandEncoder();
    this.encode(encoder, only);
    this.context.device.queue.submit([encoder.finish()]);
  }

  /** Milliseconds of one run, on average over `repeats`. */
  async time(repeats: number, only?: readonly string[]): Promise<number> {
    const record = (encoder: GPUCommandEncoder, writes?: GPUComputePassTimestampWrites) =>
      this.encode(encoder, only, writes);
    return await timeOnGpu(this.context, record, repeats) / repeats;
  }

  /** The bytes of a buffer. */
  async read(name: string): Promise<ArrayBuffer> {
    const { device } = this.context;
    const source = this.named.get(name)!;
    const copy = device.createBuffer({ size: source.size, usage: BufferUsage.MAP_READ | BufferUsage.COPY_DST });
    const encoder = device.createCommandEncoder();
    encoder.copyBufferToBuffer(source, 0, copy, 0, source.size);
    device.queue.submit([encoder.finish()]);
    await settled(device, copy.mapAsync(1));
    const bytes = copy.getMappedRange().slice(0);
    copy.destroy();
    return bytes;
  }

  /** Frees the buffers. */
  dispose(): void {
    for (const buffer of this.buffers) buffer.destroy();
  }
}
