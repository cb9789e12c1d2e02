// What a call will dispatch, worked out on the host: head groups that keep the expanded keys and values within bounds,
// query ranges that keep every binding within the device's limits, and the dispatches themselves. No GPU is touched.

import type { FlashMLAConfig } from "../op/config.ts";
import { FlashMLAError } from "../op/errors.ts";
import type { MlaProblem } from "../op/mla_problem.ts";
import type { GpuLimits } from "./capabilities.ts";
import * as attend from "./kernels/attend.ts";
import * as expand from "./kernels/expand.ts";
import { blockWords, type RowRange, schedule } from "./schedule.ts";

/** Bytes of expanded keys and values that are kept at a time, unless one head alone needs more. */
export const scratchLimit = 256 * 2 ** 20;

/** Bytes between two parameter blocks: WebGPU's strictest alignment of a uniform binding. */
export const paramsStride = 256;

/** Bytes of one parameter block, at least as many as the largest of the kernels' `Params`. */
export const paramsBytes = 48;

/** The operands that the plan's dispatches bind. */
export type Operand =
  | "params"
  | "blocks"
  | "query"
  | "keyValue"
  | "wKc"
  | "wVc"
  | "bQ"
  | "bK"
  | "keys"
  | "values"
  | "output";

/** One dispatch. */
export interface Dispatch {
  /** Which of the plan's kernels runs. */
  readonly kernel: "expandKeys" | "expandValues" | "attend";
  /** Operands by binding index; index 0 is the parameter block. */
  readonly bindings: readonly { readonly binding: number; readonly operand: Operand }[];
  /** Index of the dispatch's parameter block. */
  readonly params: number;
  /** Index into {@link AttentionPlan.queryRanges}; 0 for the expansions. */
  readonly range: number;
  /** Workgroups along x and y. */
  readonly workgroups: readonly [number, number];
}

/** A query range with its schedule. */
export interface QueryRange extends RowRange {
  /** The schedule buffer's words. */
  readonly blocks: Uint32Array<ArrayBuffer>;
}

/** All that it takes to run one call, beside the data. */
export interface AttentionPlan {
  /** WGSL of each kernel. */
  readonly kernels: Readonly<Record<Dispatch["kernel"], string>>;
  /** The dispatches in order; those of one head group reuse the scratch of the one before. */
  readonly dispatches: readonly Dispatch[];
  /** The parameter blocks, {@link paramsStride} bytes apart. */
  readonly params: ArrayBuffer;
  /** Ranges of query rows that are uploaded, computed and read back as one. */
  readonly queryRanges: readonly QueryRange[];
  /** Bytes of expanded keys of one head group. */
  readonly keysBytes: number;
  /** Bytes of expanded values of one head group. */
  readonly valuesBytes: number;
}

/** Why this configuration cannot run this problem on such a device, or null when it can. */
export function whyInvalid(config: FlashMLAConfig, problem: MlaProblem, limits: GpuLimits): string | null {
  return attend.whyInvalid(config, problem, limits) ??
    expand.whyInvalid(expand.expandTile(config, limits), limits);
}

/**
 * Plans one call.
 *
 * @param problem The validated problem; batch, lengths and heads must not be empty.
 * @param config A configuration that {@link whyInvalid} accepts.
 * @param limits The device's limits.
 * @throws {FlashMLAError} With code `limit`, naming it, when an operand cannot be cut into pieces that fit.
 */
export function attentionPlan(problem: MlaProblem, config: FlashMLAConfig, limits: GpuLimits): AttentionPlan {
  const { batch, keyLength, queryHeads, kvHeads, kvLoraRank, qkNopeHeadDim, qkRopeHeadDim, vHeadDim } = problem;
  const keyRows = batch * keyLength;
  const headsPerKv = queryHeads / kvHeads;
  checkBinding("keyValue", keyRows * kvLoraRank * 4, limits);
  checkBinding("wKc", kvLoraRank * kvHeads * qkNopeHeadDim * 4, limits);
  checkBinding("wVc", kvLoraRank * kvHeads * vHeadDim * 4, limits);
  checkBinding("bK", keyRows * qkRopeHeadDim * 4, limits);

  const headBytes = keyRows * Math.max(qkNopeHeadDim, vHeadDim) * 4;
  checkBinding("the expanded keys or values of one head", headBytes, limits);
  const groupKvHeads = Math.max(
    1,
    Math.min(
      kvHeads,
      Math.floor(scratchLimit / (keyRows * (qkNopeHeadDim + vHeadDim) * 4)),
      Math.floor(limits.maxStorageBufferBindingSize / headBytes),
      Math.floor(limits.maxComputeWorkgroupsPerDimension / headsPerKv),
    ),
  );
  if (headsPerKv > limits.maxComputeWorkgroupsPerDimension) {
    throw limitError(`${headsPerKv} query heads per KV head`, "maxComputeWorkgroupsPerDimension", limits);
  }

  const queryRanges = splitQueries(problem, limits).map((rows) => ({
    ...rows,
    blocks: schedule(problem, config.blockQ, rows),
  }));
  const tile = expand.expandTile(config, limits);
  const dispatches: Dispatch[] = [];
  const params: { readonly floats: readonly number[]; readonly words: readonly number[] }[] = [];
  const add = (dispatch: Omit<Dispatch, "params">, floats: readonly number[], words: readonly number[]) => {
    dispatches.push({ ...dispatch, params: params.length });
    params.push({ floats, words });
  };

  for (let first = 0; first < kvHeads; first += groupKvHeads) {
    const heads = Math.min(groupKvHeads, kvHeads - first);
    for (const side of ["keys", "values"] as const) {
      const headDim = side === "keys" ? qkNopeHeadDim : vHeadDim;
      const rowTiles = Math.ceil(keyRows / tile.blockM);
      const columnTiles = Math.ceil((heads * headDim) / tile.blockN);
      if (columnTiles > limits.maxComputeWorkgroupsPerDimension) {
        throw limitError(`${columnTiles} column tiles of ${side}`, "maxComputeWorkgroupsPerDimension", limits);
      }
      for (const [firstTile, tiles] of chunks(rowTiles, limits.maxComputeWorkgroupsPerDimension)) {
        add(
          {
            kernel: side === "keys" ? "expandKeys" : "expandValues",
            bindings: [
              { binding: 0, operand: "params" },
              { binding: 1, operand: "keyValue" },
              { binding: 2, operand: side === "keys" ? "wKc" : "wVc" },
              { binding: 3, operand: side },
            ],
            range: 0,
            workgroups: [columnTiles, tiles],
          },
          [],
          [keyRows, heads * headDim, first * headDim, firstTile, kvLoraRank, kvHeads * headDim],
        );
      }
    }
    queryRanges.forEach(({ blocks }, range) => {
      const count = blocks.length / blockWords;
      for (const [firstBlock, tiles] of chunks(count, limits.maxComputeWorkgroupsPerDimension)) {
        add(
          {
            kernel: "attend",
            bindings: attendBindings(problem),
            range,
            workgroups: [heads * headsPerKv, tiles],
          },
          [problem.softmaxScale * Math.LOG2E],
          [
            first * headsPerKv,
            heads,
            firstBlock,
            queryHeads,
            headsPerKv,
            qkNopeHeadDim,
            qkRopeHeadDim,
            vHeadDim,
          ],
        );
      }
    });
  }

  return {
    kernels: {
      expandKeys: expand.wgsl(tile, { kvLoraRank, headDim: qkNopeHeadDim }),
      expandValues: expand.wgsl(tile, { kvLoraRank, headDim: vHeadDim }),
      attend: attend.wgsl(config, problem),
    },
    dispatches,
    params: packParams(params),
    queryRanges,
    keysBytes: keyRows * groupKvHeads * qkNopeHeadDim * 4,
    valuesBytes: keyRows * groupKvHeads * vHeadDim * 4,
  };
}

function attendBindings(problem: MlaProblem): Dispatch["bindings"] {
  const operands: Operand[] = ["params", "blocks", "query", "keys", "values", "output"];
  if (problem.rope !== "none") operands.push("bK");
  if (problem.rope === "shared") operands.push("bQ");
  return operands.map((operand, binding) => ({ binding, operand }));
}

/** Ranges of query rows whose queries and outputs each fit one binding. */
function splitQueries(problem: MlaProblem, limits: GpuLimits): RowRange[] {
  const { batch, queryLength, queryHeads, qkNopeHeadDim, qkRopeHeadDim, vHeadDim, rope } = problem;
  const queryWidth = qkNopeHeadDim + (rope === "in_query" ? qkRopeHeadDim : 0);
  const rowBytes = queryHeads * Math.max(queryWidth, vHeadDim) * 4;
  checkBinding("one row of query or output", rowBytes, limits);
  const rows = batch * queryLength;
  const perRange = Math.floor(limits.maxStorageBufferBindingSize / rowBytes);
  return Array.from({ length: Math.ceil(rows / perRange) }, (_, i) => ({
    start: i * perRange,
    end: Math.min((i + 1) * perRange, rows),
  }));
}

function chunks(count: number, atMost: number): [first: number, length: number][] {
  return Array.from(
    { length: Math.ceil(count / atMost) },
    (_, i) => [i * atMost, Math.min(atMost, count - i * atMost)],
  );
}

function packParams(
  blocks: readonly { readonly floats: readonly number[]; readonly words: readonly number[] }[],
): ArrayBuffer {
  const packed = new ArrayBuffer(blocks.length * paramsStride);
  blocks.forEach(({ floats, words }, i) => {
    new Float32Array(packed, i * paramsStride, floats.length).set(floats);
    new Uint32Array(packed, i * paramsStride + floats.length * 4, words.length).set(words);
  });
  return packed;
}

function checkBinding(what: string, bytes: number, limits: GpuLimits): void {
  if (bytes > limits.maxStorageBufferBindingSize) {
    throw limitError(`${what} needs ${bytes} bytes`, "maxStorageBufferBindingSize", limits);
  }
}

function limitError(what: string, limit: keyof GpuLimits, limits: GpuLimits): FlashMLAError {
  return new FlashMLAError("limit", `Cannot run MLA on this device: ${what}, ${limit} is ${limits[limit]}`);
}
