// What a call will dispatch, worked out on the host: head groups that keep the expanded keys and values within bounds,
// query ranges that keep every binding within the device's limits, and the dispatches themselves. No GPU is touched.

import type { FlashMLAConfig } from "../op/config.ts";
import type { MlaProblem } from "../op/mla_problem.ts";
import type { Capabilities } from "./capabilities.ts";
import { type Bound, DispatchList, type DispatchPlan } from "./dispatch_plan.ts";
import { addExpansion, expandedScratch, expansionKernels, headGroups, quads } from "./expansion.ts";
import { attendSource, matrixAttendSource, sinksSource } from "./kernel_sources.ts";
import * as attend from "./kernels/attend.ts";
import { attendBindings } from "./kernels/attend_operands.ts";
import * as expand from "./kernels/expand.ts";
import { matrixScratch } from "./kernels/matrix_scratch.ts";
import { scoreFloats, scoreTerms } from "./kernels/score_terms.ts";
import { workgroupSize as sinksWorkgroup } from "./kernels/sinks.ts";
import type { StorageElement } from "./kernels/storage_element.ts";
import { checkWindow } from "./limit_checks.ts";
import { attendTile, whyMatrixInvalid } from "./matrix_config.ts";
import {
  addMatrixExpansion,
  matrixExpansionKernels,
  matrixGroupHeads,
  matrixScratchBytes,
} from "./matrix_expansion.ts";
import {
  batchGap,
  denseLayouts,
  type OperandLayout,
  type OperandLayouts,
  plainWindow,
  rowWindow,
  type StorageType,
  termWindow,
} from "./operand_layout.ts";
import { chunks, rowWidth, splitQueries } from "./query_ranges.ts";
import { blockWords, schedule } from "./schedule.ts";
import { scoreWords, termHeads } from "./score_params.ts";

/** Why this configuration cannot run this problem on such a device, or null when it can. */
export function whyInvalid(config: FlashMLAConfig, problem: MlaProblem, capabilities: Capabilities): string | null {
  if (typeof config.matrixUnits !== "boolean") return `matrixUnits must be true or false, got ${config.matrixUnits}`;
  return (config.matrixUnits
    ? whyMatrixInvalid(config, problem, capabilities)
    : attend.whyInvalid(config, problem, capabilities)) ??
    expand.whyInvalid(expand.expandTile(config, capabilities.limits), capabilities.limits);
}

/**
 * Plans one call.
 *
 * @param problem The validated problem; batch, lengths and heads must not be empty.
 * @param config A configuration that {@link whyInvalid} accepts.
 * @param capabilities The device's capabilities.
 * @param layouts Where the tensors lie; dense float32 in memory of ours when absent.
 * @throws {FlashMLAError} With code `limit`, naming it, when an operand cannot be cut into pieces that fit.
 */
export function attentionPlan(
  problem: MlaProblem,
  config: FlashMLAConfig,
  capabilities: Capabilities,
  layouts: OperandLayouts = denseLayouts(problem),
): DispatchPlan {
  const { limits } = capabilities;
  const { batch, keyLength, queryLength, queryHeads, kvHeads, rope, sinks } = problem;
  const { qkNopeHeadDim, qkRopeHeadDim, vHeadDim } = problem;
  const { query, bQ, bK, output } = layouts as Required<OperandLayouts>;
  const { lse } = layouts;
  const term = layouts.bias ?? layouts.attentionMask;
  const termName = layouts.bias === undefined ? "attentionMask" : "bias";
  const expansion = config.matrixUnits
    ? matrixExpansion(problem, capabilities, layouts)
    : plainExpansion(problem, config, capabilities, layouts);
  const keyRows = batch * keyLength;
  // Matrix units find rotary keys in scratch.
  const ropeKeys = rope === "none" || config.matrixUnits
    ? null
    : checkWindow("bK", rowWindow(bK, keyLength, 0, keyRows, qkRopeHeadDim), limits);
  const logSums = lse === undefined
    ? null
    : checkWindow("the log-sum-exp", plainWindow(lse, batch, queryHeads, queryLength), limits);
  const sinkQuads = sinks === 0 ? 0 : Math.ceil(queryHeads / 4);
  const queryRanges = splitQueries(problem, layouts, limits);
  const blocks = queryRanges.map((rows) => schedule(problem, config.blockQ, rows));

  const list = new DispatchList();
  if (sinks > 0) addSinks(list, problem, layouts.softmaxAux!, sinkQuads);
  for (const group of headGroups(problem, expansion)) {
    const { valuesBase, ropeBase } = expansion.add(list, group);
    const groupHeads = { start: group.first * (queryHeads / kvHeads), count: group.heads * (queryHeads / kvHeads) };
    queryRanges.forEach((rows, range) => {
      const rowsOf = (what: string, layout: OperandLayout, width: number) =>
        checkWindow(what, rowWindow(layout, queryLength, rows.start, rows.end, width), limits);
      const queries = rowsOf("query", query, rowWidth(query, problem, "query"));
      const outputs = rowsOf("the output", output, rowWidth(output, problem, "output"));
      const ropeQueries = rope === "shared" ? rowsOf("bQ", bQ, qkRopeHeadDim) : null;
      const count = blocks[range].length / blockWords;
      for (
        const [offset, heads] of chunks(groupHeads.count, termHeads(term, problem, rows, groupHeads.count, limits))
      ) {
        const firstHead = groupHeads.start + offset;
        const window = term && termWindow(term, problem, rows, { start: firstHead, end: firstHead + heads });
        for (const [firstBlock, tiles] of chunks(count, limits.maxComputeWorkgroupsPerDimension)) {
          const bound: (Bound | null)[] = [
            [attendBindings.blocks, "blocks", { offset: 0, size: blocks[range].byteLength }],
            [attendBindings.query, "query", queries],
            [attendBindings.expanded, "expanded", { offset: 0, size: expansion.bytes }],
            [attendBindings.output, "output", outputs],
            ropeKeys && [attendBindings.bK, "bK", ropeKeys],
            ropeQueries && [attendBindings.bQ, "bQ", ropeQueries],
            logSums && [attendBindings.lse, "lse", logSums],
            window ? [attendBindings.term, termName, window] : null,
            sinkQuads === 0 ? null : [attendBindings.sinks, "sinks", { offset: 0, size: sinkQuads * 16 }],
          ];
          list.add(
            { kernel: "attend", range, workgroups: [heads, tiles] },
            bound.filter((operand) => operand !== null),
            scoreFloats(problem),
            [
              ...scoreWords(problem, rows, term && window ? { layout: term, window } : null),
              ...[firstHead, group.first, group.heads, valuesBase, firstBlock, queryHeads / kvHeads],
              ...[qkNopeHeadDim, qkRopeHeadDim, vHeadDim],
              ...[queries.base, query.row, query.head, batchGap(query, queryLength)],
              ...[outputs.base, output.row, output.head, batchGap(output, queryLength)],
              ...(ropeKeys === null ? [ropeBase, 0, 0] : [ropeKeys.base, bK.row, batchGap(bK, keyLength)]),
              ...(ropeQueries === null ? [0, 0, 0] : [ropeQueries.base, bQ.row, batchGap(bQ, queryLength)]),
              ...(logSums === null ? [0, 0, 0] : [logSums.base, lse!.batch, lse!.head]),
            ],
          );
        }
      }
    });
  }

  const shape = {
    vHeadDim,
    rope,
    query: quads(query, qkNopeHeadDim, rope === "in_query" ? qkRopeHeadDim : 0),
    output: quads(output, vHeadDim),
    ropeQuery: rope === "shared" ? quads(bQ, qkRopeHeadDim) : "f32" as const,
    terms: scoreTerms(problem, layouts.bias?.dtype === "f16" ? "f16" : "f32"),
    sinkQuads,
    lse: lse !== undefined,
  };
  return {
    kernels: {
      ...(sinks > 0 && { sinks: sinksSource(layouts.softmaxAux!.dtype as StorageType) }),
      ...expansion.kernels,
      attend: config.matrixUnits
        ? matrixAttendSource(
          attendTile(config),
          { ...shape, qkNopeHeadDim, qkRopeHeadDim },
          capabilities.matrixUnits!,
        )
        : attendSource(config, {
          ...shape,
          expanded: expansion.element,
          ropeKey: rope === "none" ? "f32" : quads(bK, qkRopeHeadDim),
        }, capabilities),
    },
    dispatches: list.dispatches,
    params: list.packParams(),
    layouts,
    queryRanges,
    schedules: { blocks },
    scratch: { expanded: expansion.bytes, ...(sinks > 0 && { sinks: sinkQuads * 16 }) },
  };
}

/** How a plan has latents expanded. */
interface Expansion {
  /** KV heads of a group. */
  readonly groupKvHeads: number;
  /** Bytes of scratch. */
  readonly bytes: number;
  /** How plain kernels load it. */
  readonly element: StorageElement;
  /** The kernels. */
  readonly kernels: Readonly<Record<string, string>>;
  /** Adds the dispatches of a group; elements from the first key to the first value and to the first rotary key. */
  add(
    list: DispatchList,
    group: { readonly first: number; readonly heads: number },
  ): { readonly valuesBase: number; readonly ropeBase: number };
}

function plainExpansion(
  problem: MlaProblem,
  config: FlashMLAConfig,
  capabilities: Capabilities,
  layouts: OperandLayouts,
): Expansion {
  const scratch = expandedScratch(problem, capabilities.limits);
  return {
    ...scratch,
    kernels: expansionKernels(problem, config, capabilities, layouts),
    add(list, group) {
      addExpansion(list, problem, config, capabilities, layouts, scratch, group);
      return { valuesBase: scratch.values.offset / 4, ropeBase: 0 };
    },
  };
}

function matrixExpansion(problem: MlaProblem, capabilities: Capabilities, layouts: OperandLayouts): Expansion {
  const groupKvHeads = matrixGroupHeads(problem, capabilities.limits);
  return {
    groupKvHeads,
    bytes: matrixScratchBytes(problem, groupKvHeads),
    element: "vec4<f16>",
    kernels: matrixExpansionKernels(problem, capabilities, layouts),
    add(list, group) {
      addMatrixExpansion(list, problem, capabilities, layouts, group);
      return matrixScratch(problem, problem.batch * problem.keyLength, group.heads);
    },
  };
}

/** Adds the dispatch that sums the sinks of each head. */
function addSinks(
  list: DispatchList,
  { sinks, queryHeads }: MlaProblem,
  layout: OperandLayout,
  sinkQuads: number,
): void {
  const window = plainWindow({ ...layout, row: 1 }, 1, queryHeads, sinks);
  list.add(
    { kernel: "sinks", range: 0, workgroups: [Math.ceil(queryHeads / sinksWorkgroup), 1] },
    [[1, "softmaxAux", window], [2, "sinks", { offset: 0, size: sinkQuads * 16 }]],
    [],
    [queryHeads, sinks, window.base, layout.head],
  );
}
