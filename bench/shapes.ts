// The shapes that the benchmarks share: real models' head dimensions.

import { type AnyTensor, type HostInputs, type MlaInputs, toHalves } from "../mod.ts";
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
  /** KV heads, where query heads share them. */
  readonly kvHeads?: number;
  /** Offsets of packed sequences. */
  readonly cuSeqlens?: readonly number[];
}

type Heads = Pick<BenchShape, "heads" | "kvLoraRank" | "qkNopeHeadDim" | "qkRopeHeadDim" | "vHeadDim">;

const models: Record<string, Heads> = {
  "DeepSeek-V2-Lite": { heads: 16, kvLoraRank: 512, qkNopeHeadDim: 128, qkRopeHeadDim: 64, vHeadDim: 128 },
  "DeepSeek-V3": { heads: 128, kvLoraRank: 512, qkNopeHeadDim: 128, qkRopeHeadDim: 64, vHeadDim: 128 },
  "MiniCPM3": { heads: 40, kvLoraRank: 256, qkNopeHeadDim: 64, qkRopeHeadDim: 32, vHeadDim: 64 },
  "128/128 unrotated": { heads: 16, kvLoraRank: 512, qkNopeHeadDim: 128, qkRopeHeadDim: 0, vHeadDim: 128 },
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

/**
 * Shapes for whole runs of `bench:gpu`: models' heads, causal and full, and each option that schedules blocks otherwise.
 *
 * @param quick Only those that most depends on.
 * @param length Scales all lengths, so that the longest is this.
 */
export function gpuShapes(quick: boolean, length: number = 4096): BenchShape[] {
  const scaled = (at4096: number) => Math.max(1, Math.round(at4096 * length / 4096));
  const [long, short, odd] = [length, scaled(2048), scaled(4000) | 1];
  const lite = (length: number, causal: boolean) => shape("DeepSeek-V2-Lite", length, causal);
  const first = [lite(long, true), lite(short, false), shape("DeepSeek-V3", long, true)];
  if (quick) return first;
  const grouped = shape("DeepSeek-V2-Lite", long, true);
  // One sequence of one token, and ends that fall on no tile.
  const cuSeqlens = [0, scaled(1000), scaled(1000) + 1, scaled(2500) + 1, long];
  return [
    ...first,
    ...[lite(short, true), lite(long, false), lite(odd, true), windowed(lite(long, true), scaled(512))],
    { ...lite(long, true), name: `DeepSeek-V2-Lite, B 1, S ${long} in 4 sequences, causal`, cuSeqlens },
    { ...grouped, name: `${grouped.name}, 4 KV heads`, kvHeads: 4 },
    ...[shape("DeepSeek-V3", short, true), shape("DeepSeek-V3", long, false)],
    ...[shape("MiniCPM3", short, true), shape("MiniCPM3", long, true)],
    ...[shape("GLM-4.7-Flash", short, true), shape("GLM-4.7-Flash", long, true)],
    ...[shape("128/128 unrotated", long, true), shape("128/128 unrotated", long, false)],
  ];
}

/** The shape of `bench:gpu` whose gradients are measured, too: the first one. */
export function isDifferentiated({ name }: BenchShape, length: number = 4096): boolean {
  return name === gpuShapes(true, length)[0].name;
}

/** Normal inputs of a shape, weights scaled as a trained projection's are. */
export function benchInputs(shape: BenchShape): HostInputs;
export function benchInputs(shape: BenchShape, dtype: "f32" | "f16"): MlaInputs;
export function benchInputs(shape: BenchShape, dtype: "f32" | "f16" = "f32"): MlaInputs {
  const { batch, queryLength, keyLength, heads, kvHeads = heads, cuSeqlens } = shape;
  const { kvLoraRank: L, qkNopeHeadDim: P, qkRopeHeadDim: R, vHeadDim: V } = shape;
  const random = normals(1);
  const tensor = (scale: number, ...axes: number[]): AnyTensor => {
    const length = axes.reduce((a, b) => a * b);
    // 64 Ki distinct values are random enough for timing, and 100 M draws would take longer than the benchmark.
    const distinct = Float32Array.from({ length: Math.min(length, 65521) }, () => random() * scale);
    if (dtype === "f32") return { data: repeated(distinct, new Float32Array(length)), shape: axes };
    const { data } = toHalves({ data: distinct, shape: [distinct.length] });
    const bits = new Uint16Array(data.buffer, data.byteOffset, data.length);
    return { data: repeated(bits, new Uint16Array(length)), shape: axes, dtype };
  };
  return {
    query: tensor(1, batch, queryLength, heads, P + R),
    keyValue: tensor(1, batch, keyLength, L),
    wKc: tensor(L ** -0.5, L, kvHeads, P),
    wVc: tensor(L ** -0.5, L, kvHeads, V),
    ...(R > 0 && { bK: tensor(1, batch, keyLength, R) }),
    ...(cuSeqlens && { cuSeqlens }),
  };
}

/** Fills an array with another one over and over. */
function repeated<Data extends Float32Array | Uint16Array>(piece: Data, whole: Data): Data {
  for (let i = 0; i < whole.length; i += piece.length) whole.set(piece.subarray(0, whole.length - i), i);
  return whole;
}
