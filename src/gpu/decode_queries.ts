// What attention reads beside the cache: query rows, absorbed or as the caller has them, and the sinks.

import { sinksPerHead } from "../op/score_options.ts";
import { denseStrides, isGpuTensor } from "../op/tensor.ts";
import { boundTensor } from "./bound_tensor.ts";
import { type DecodeCall, productGrid, stridingWorkgroups, tokensOf } from "./decode_call.ts";
import { absorbQuerySource, sinksSource } from "./kernel_sources.ts";
import type { KernelStep } from "./kernel_steps.ts";
import * as absorb from "./kernels/absorb_query.ts";
import { quadElements, rowQuads, type RowStorage } from "./kernels/absorbed_operands.ts";
import * as sinksKernel from "./kernels/sinks.ts";
import { checkBinding } from "./limit_checks.ts";
import { sinkSums } from "./sink_sums.ts";

/** Query rows that are ready to be bound. */
export interface QueryRows {
  readonly binding: GPUBufferBinding;
  /** Quads from the binding's start to the first row. */
  readonly base: number;
  readonly storage: RowStorage;
}

/** Query rows as the kernel reads them: the caller's where they are so already. */
export function queryRows(call: DecodeCall, wanted: RowStorage | "either", before: KernelStep[]): QueryRows {
  const { context, problem, inputs, steps } = call;
  const { query, wKc } = inputs;
  const { queryHeads, queryLength, kvHeads, kvLoraRank, qkNopeHeadDim, qkRopeHeadDim } = problem;
  const { limits } = context.capabilities;
  const bound = boundTensor(steps, "query", query, limits);
  const { storage } = bound.elements;
  const perQuad = quadElements(storage);
  const width = query.shape[3];
  const isDense = bound.strides.every((stride, axis) =>
    stride === denseStrides(query.shape)[axis] || query.shape[axis] === 1
  );
  const isAligned = width % perQuad === 0 && bound.base % perQuad === 0;
  if (wKc === undefined && isDense && isAligned && (wanted === "either" || wanted === storage)) {
    return { binding: bound.binding, base: bound.base / perQuad, storage };
  }
  const result: RowStorage = wanted === "halves" ? "halves" : "floats";
  const weight = wKc === undefined ? null : boundTensor(steps, "wKc", wKc, limits);
  const quads = rowQuads(problem, result);
  const size = tokensOf(problem) * queryHeads * quads * 16;
  checkBinding("the absorbed query", size, limits);
  const binding = { buffer: steps.borrow(size), size };
  const [item, row, head] = bound.strides;
  before.push({
    label: "absorb query",
    code: absorbQuerySource({
      query: bound.elements,
      weight: weight && weight.elements,
      result,
      kvLoraRank,
      qkNopeHeadDim: qkNopeHeadDim ?? 0,
      qkRopeHeadDim,
    }),
    bindings: {
      0: steps.params(
        Uint32Array.of(
          ...[tokensOf(problem), queryLength, queryHeads, kvHeads, bound.base, item, row, head, weight?.base ?? 0],
        ),
      ),
      [absorb.absorbQueryBindings.query]: bound.binding,
      ...(weight && { [absorb.absorbQueryBindings.weight]: weight.binding }),
      [absorb.absorbQueryBindings.rows]: binding,
    },
    workgroups: weight === null
      ? [Math.min(stridingWorkgroups, Math.ceil(tokensOf(problem) * queryHeads * quads * quadElements(result) / 256))]
      : productGrid(problem, quads * quadElements(result), limits),
  });
  return { binding, base: 0, storage: result };
}

/** The sinks' sums as a uniform, or null without sinks. */
export async function sinkRow(call: DecodeCall, before: KernelStep[]): Promise<GPUBufferBinding | null> {
  const { context, problem, inputs, steps } = call;
  const { softmaxAux } = inputs;
  const { queryHeads, sinks } = problem;
  if (softmaxAux === undefined) return null;
  const size = Math.ceil(queryHeads / 4) * 16;
  const readable = isGpuTensor(softmaxAux) && (softmaxAux.dtype === "f32" || context.capabilities.f16);
  if (!isGpuTensor(softmaxAux) || !readable) {
    const sums = new Float32Array(size / 4);
    sums.set(await sinkSums(softmaxAux, queryHeads));
    return { buffer: steps.upload(sums.buffer, "storageAndUniform"), size };
  }
  const { binding, base, strides } = boundTensor(
    steps,
    "softmaxAux",
    softmaxAux,
    context.capabilities.limits,
  );
  const own = { buffer: steps.borrow(size, "storageAndUniform"), size };
  const perHead = sinksPerHead(softmaxAux.shape, queryHeads) ? strides[0] : 0;
  before.push({
    label: "sinks",
    code: sinksSource(softmaxAux.dtype),
    bindings: {
      0: steps.params(Uint32Array.of(queryHeads, sinks, base, perHead)),
      1: binding,
      2: own,
    },
    workgroups: [Math.ceil(queryHeads / sinksKernel.workgroupSize)],
  });
  return own;
}
