// Where attention leaves its rows, and what turns them into the result.

import { elementBytes, elementCount, type GpuTensor } from "../op/tensor.ts";
import { boundTensor } from "./bound_tensor.ts";
import { type DecodeCall, productGrid, stridingWorkgroups, tokensOf } from "./decode_call.ts";
import { projectOutputSource } from "./kernel_sources.ts";
import type { KernelStep } from "./kernel_steps.ts";
import { resultQuads, type RowStorage } from "./kernels/absorbed_operands.ts";
import * as project from "./kernels/project_output.ts";
import * as store from "./kernels/store_rows.ts";
import { checkBinding } from "./limit_checks.ts";

/** A dense tensor that takes results. */
export interface ResultPlace {
  readonly binding: GPUBufferBinding;
  /** Elements from the binding's start to the tensor. */
  readonly base: number;
}

/** Rows that attention writes. */
export interface ResultRows {
  readonly binding: GPUBufferBinding;
  /** Quads of four elements from the binding's start to the first row. */
  readonly base: number;
  readonly storage: RowStorage;
}

/** The rows that attention writes: of the result itself, or of memory from which kernels behind it make the result. */
export function resultRows(call: DecodeCall, output: GpuTensor, after: KernelStep[]): ResultRows {
  return call.inputs.wVc === undefined
    ? storedRows(call, output, resultQuads(call.problem) * 4, after)
    : projectedRows(call, output, after);
}

/** The dense tensor that takes the result, as a binding. */
export function resultPlace(call: Pick<DecodeCall, "context">, output: GpuTensor): ResultPlace {
  const { context } = call;
  const { buffer, offset = 0, dtype, shape } = output;
  const start = Math.floor(offset / 256) * 256;
  const size = Math.ceil((offset - start + elementCount(shape) * elementBytes(dtype)) / 4) * 4;
  checkBinding("the result", size, context.capabilities.limits);
  return { binding: { buffer, offset: start, size }, base: (offset - start) / elementBytes(dtype) };
}

/** Rows of the result's width, in the result itself where whole quads fit; else stored from memory of ours afterwards. */
function storedRows(call: DecodeCall, output: GpuTensor, stride: number, after: KernelStep[]): ResultRows {
  const { context, problem, steps } = call;
  const { binding, base } = resultPlace(call, output);
  const width = output.shape[3];
  const storage: RowStorage = output.dtype === "f16" ? "halves" : "floats";
  const quadBytes = 4 * elementBytes(output.dtype);
  if (width % 4 === 0 && base % 4 === 0 && binding.size! % quadBytes === 0) {
    return { binding, base: base / 4, storage };
  }
  const rows = tokensOf(problem) * problem.queryHeads;
  const size = Math.max(16, rows * stride * 4);
  checkBinding("the result", size, context.capabilities.limits);
  const own = { buffer: steps.borrow(size), size };
  const words = output.dtype === "f16" ? base / 2 : base;
  after.push({
    label: "store rows",
    code: store.wgsl(storage),
    bindings: {
      0: steps.params(Uint32Array.of(rows * width, width, stride, words)),
      1: own,
      2: binding,
    },
    workgroups: [Math.min(stridingWorkgroups, Math.ceil(rows * width / store.workgroupSize))],
  });
  return { binding: own, base: 0, storage: "floats" };
}

/** Latent rows that are projected into the result afterwards. */
function projectedRows(call: DecodeCall, output: GpuTensor, after: KernelStep[]): ResultRows {
  const { context, problem, inputs, steps } = call;
  const { limits } = context.capabilities;
  const { queryHeads, kvHeads, kvLoraRank, vHeadDim } = problem;
  const size = tokensOf(problem) * queryHeads * resultQuads(problem) * 16;
  checkBinding("the attended latents", size, limits);
  const attended = { buffer: steps.borrow(size), size };
  const weight = boundTensor(steps, "wVc", inputs.wVc!, limits);
  const stored: KernelStep[] = [];
  const isDirect = output.dtype === "f32";
  const place = isDirect ? resultPlace(call, output) : null;
  const into: ResultRows = place === null
    ? storedRows(call, output, vHeadDim, stored)
    : { binding: place.binding, base: 0, storage: "floats" };
  after.push({
    label: "project output",
    code: projectOutputSource({
      attended: "floats",
      weight: weight.elements,
      result: into.storage,
      kvLoraRank,
      vHeadDim,
    }),
    bindings: {
      0: steps.params(
        Uint32Array.of(tokensOf(problem), queryHeads, kvHeads, weight.base, place?.base ?? into.base * 4),
      ),
      [project.projectOutputBindings.attended]: attended,
      [project.projectOutputBindings.weight]: weight.binding,
      [project.projectOutputBindings.output]: into.binding,
    },
    workgroups: productGrid(problem, vHeadDim, limits),
  }, ...stored);
  return { binding: attended, base: 0, storage: "floats" };
}
