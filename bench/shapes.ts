// The shapes that the benchmarks share: real models' head dimensions.

import type { HostInputs } from "../mod.ts";
import { normals } from "../tests/support/random_problem.ts";

/** One shape of a benchmark. */
export interface BenchShape {
  readonly name: string;
  readonly batch: number;
  readonly queryLength: number;
  readonly keyLength: number;
  readonly heads: number;
  readonly kvLoraRank: number;
  readonly qkNopeHeadDim: number;
  readonly qkRopeHeadDim: number;
  readonly vHeadDim: number;
  readonly causal: boolean;
  /** Keys that a query sees to either side; all when absent. */
  readonly slidingWindow?: number;
}

type Heads = Pick<BenchShape, "heads" | "kvLoraRank" | "qkNopeHeadDim" | "qkRopeHeadDim" | "vHeadDim">;

const models: Record<string, Heads> = {
  "DeepSeek-V2-Lite": { heads: 16, kvLoraRank: 512, qkNopeHeadDim: 128, qkRopeHeadDim: 64, vHeadDim: 128 },
  "DeepSeek-V3": { heads: 128, kvLoraRank: 512, qkNopeHeadDim: 128, qkRopeHeadDim: 64, vHeadDim: 128 },
  "MiniCPM3": { heads: 40, kvLoraRank: 256, qkNopeHeadDim: 64, qkRopeHeadDim: 32, vHeadDim: 64 },
  "GLM-4.7-Flash": { heads: 20, kvLoraRank: 512, qkNopeHeadDim: 192, qkRopeHeadDim: 64, vHeadDim: 256 },
};

function shape(
  model: string,
  length: number,
  causal: boolean,
  queryLength: number = length,
  batch: number = 1,
): BenchShape {
  const queries = queryLength === length ? "" : `, ${queryLength} queries`;
  const name = `${model}, B ${batch}, S ${length}${queries}, ${causal ? "causal" : "full"}`;
  return { name, batch, queryLength, keyLength: length, causal, ...models[model] };
}

/** A shape under a sliding window. */
function windowed(shape: BenchShape, slidingWindow: number): BenchShape {
  return { ...shape, name: `${shape.name}, window ${slidingWindow}`, slidingWindow };
}

/** Shapes for the kernels alone; few and small ones where a CPU does the work. */
export function attentionShapes(software: boolean): BenchShape[] {
  if (software) return [shape("DeepSeek-V2-Lite", 512, true), shape("DeepSeek-V2-Lite", 512, false)];
  return [
    shape("DeepSeek-V2-Lite", 512, true),
    shape("DeepSeek-V2-Lite", 2048, true),
    shape("DeepSeek-V2-Lite", 2048, false),
    shape("DeepSeek-V2-Lite", 4096, true),
    shape("DeepSeek-V2-Lite", 8192, true),
    shape("DeepSeek-V2-Lite", 512, true, 512, 16),
    shape("DeepSeek-V2-Lite", 4096, true, 64),
    shape("DeepSeek-V3", 2048, true),
    shape("MiniCPM3", 2048, true),
    shape("GLM-4.7-Flash", 2048, true),
    ...[4096, 32768].map((length) => windowed(shape("DeepSeek-V2-Lite", length, true), 512)),
    shape("DeepSeek-V2-Lite", 32768, true),
  ];
}

/** Shapes small enough for the oracle. */
export function oracleShapes(): BenchShape[] {
  return [
    shape("DeepSeek-V2-Lite", 128, true),
    shape("DeepSeek-V2-Lite", 512, true),
    shape("DeepSeek-V2-Lite", 512, false),
    shape("MiniCPM3", 128, true),
  ];
}

/** Normal inputs of a shape, weights scaled as a trained projection's are. */
export function benchInputs(shape: BenchShape): HostInputs {
  const { batch, queryLength, keyLength, heads, kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } =
    shape;
  const random = normals(1);
  const tensor = (scale: number, ...axes: number[]) => {
    const data = new Float32Array(axes.reduce((a, b) => a * b));
    // 64 Ki distinct values are random enough for timing, and 100 M draws would take longer than the benchmark.
    const distinct = Math.min(data.length, 65521);
    for (let i = 0; i < distinct; i++) data[i] = random() * scale;
    for (let i = distinct; i < data.length; i += distinct) data.copyWithin(i, 0, Math.min(distinct, data.length - i));
    return { data, shape: axes };
  };
  return {
    query: tensor(1, batch, queryLength, heads, P + R),
    keyValue: tensor(1, batch, keyLength, L),
    wKc: tensor(L ** -0.5, L, heads, P),
    wVc: tensor(L ** -0.5, L, heads, V),
    bK: tensor(1, batch, keyLength, R),
  };
}
