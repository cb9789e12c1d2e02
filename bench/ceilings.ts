// What a device can do at most, measured by loops that do nothing else: multiply-adds in registers in f32 and f16, products
// on matrix units, and a copy.
//
//   Each invocation keeps 8 vec4 sums, 32 chains that do not wait for each other; each subgroup of the matrix loop keeps
//   2 × 4 fragments of sums, fed by 2 left and 4 right fragments that were loaded once. Factors come from a buffer and all
//   sums reach one, so that nothing can be folded or dropped. 4,096 workgroups of 256: 31 on each of an H100's 132
//   multiprocessors, many times what is resident. A loop's body is long (512 multiply-adds, 32 products), since engines
//   add checks of their own to every iteration.

import type { Capabilities } from "../src/gpu/capabilities.ts";
import type { GpuContext } from "../src/gpu/device.ts";
import { KernelSteps } from "../src/gpu/kernel_steps.ts";
import {
  fragmentSize,
  type MatrixBackend,
  type MatrixMemory,
  matrixUnit,
  subgroupSize,
} from "../src/gpu/kernels/matrix_unit.ts";
import { indent, unroll } from "../src/gpu/kernels/register_tile.ts";
import { clockProbe, timeOnGpu } from "../src/gpu/timing.ts";
import { copyBandwidth } from "./copy_bandwidth.ts";
import { measureSteadily } from "./steady_timing.ts";

/** What a ceiling bounds. */
export type CeilingName = "f32" | "f16" | "matrix";

/** A measured ceiling of arithmetic. */
export interface Ceiling {
  readonly name: CeilingName;
  /** In words. */
  readonly title: string;
  readonly tflops: number;
  /** How far the samples lie apart, relative to their median. */
  readonly spread: number;
  /** Milliseconds of the clock probe behind the last sample; null without timestamps. */
  readonly probeMs: number | null;
}

/** All ceilings of a device; an arithmetic that it lacks is missing, one that failed says why. */
export interface Ceilings {
  readonly arithmetic: readonly Ceiling[];
  /** GB/s of a copy by a kernel, read and write counted; null where it failed. */
  readonly copyGbps: number | null;
  /** Why ceilings are missing. */
  readonly errors: readonly string[];
}

const workgroupSize = 256;
const subgroups = workgroupSize / subgroupSize;
const inputQuads = 1024;
const chains = 8;
const unrolled = 16;
const [rows, columns, rounds] = [2, 4, 4];

const bindings = `@group(0) @binding(0) var<storage, read_write> sink: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>, ${inputQuads}>;
@group(0) @binding(2) var<uniform> iterations: vec4<u32>; // in x`;

/** FLOPs that a workgroup does in one iteration of its loop. */
const flopsPerIteration: Readonly<Record<CeilingName, number>> = {
  f32: 2 * 4 * chains * unrolled * workgroupSize,
  f16: 2 * 4 * chains * unrolled * workgroupSize,
  matrix: 2 * fragmentSize ** 3 * rows * columns * rounds * subgroups,
};

/** A loop of multiply-adds. */
export function multiplyAddLoop(type: "f32" | "f16"): string {
  const step = unroll(chains, (i) => `sum${i} = fma(sum${i}, factor, term);`);
  return `${type === "f16" ? "enable f16;\n" : ""}${bindings}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let factor = vec4<${type}>(inputs[0]);
  let term = vec4<${type}>(inputs[1]);
${indent(unroll(chains, (i) => `var sum${i} = vec4<${type}>(inputs[(id.x + ${i}u) % ${inputQuads}u]);`), 2)}
  for (var i = 0u; i < iterations.x; i += 1u) {
${indent(unroll(unrolled, () => step), 4)}
  }
  sink[id.x] = vec4<f32>(${Array.from({ length: chains }, (_, i) => `sum${i}`).join(" + ")});
}
`;
}

/** A loop of products of fragments. */
export function matrixLoop(backend: MatrixBackend): string {
  const unit = matrixUnit(backend);
  const quadsOfFactor = 2 * fragmentSize;
  const quadsOfSum = 4 * fragmentSize;
  const factors: MatrixMemory = { name: "factors", kind: "halves", quads: (rows + columns) * quadsOfFactor };
  const product: MatrixMemory = { name: "product", kind: "floats", quads: subgroups * quadsOfSum };
  const left = unit.fragments("left", "left", rows, 1);
  const sums = unit.fragments("sum", "result", rows, columns);
  const right = Array.from(
    { length: columns },
    (_, c) => unit.right(`right${c}`, factors, `${(rows + c) * quadsOfFactor}u`, 2, "row"),
  );
  const leftAt = (r: number) => left.at(`${r}u`, "0u");
  const sumAt = (r: number, c: number) => sums.at(`${r}u`, `${c}u`);
  const each = (piece: (r: number, c: number) => string) => unroll(rows, (r) => unroll(columns, (c) => piece(r, c)));
  const own = `subgroup * ${quadsOfSum}u`;
  const body = unroll(rounds, () => each((r, c) => unit.accumulate(sumAt(r, c), leftAt(r), right[c])));
  // Signs of both kinds: sums stay small, and registers toggle as they do in earnest.
  const quad = "packHalves(inputs[2u * t] - 0.5, inputs[2u * t + 1u] - 0.5)";
  return `${unit.directives}${bindings}
${unit.declarations([factors, product])}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(local_invocation_index) t: u32) {
${unit.prologue}
  if (t < ${factors.quads}u) {
    let quad = ${quad};
${indent(unit.writeQuad(factors, "t", "quad"), 4)}
  }
  workgroupBarrier();
${indent(left.declaration, 2)}
${indent(sums.declaration, 2)}
${indent(unroll(rows, (r) => `${leftAt(r)} = ${unit.loadLeft(factors, `${r * quadsOfFactor}u`, 2)};`), 2)}
${indent(right.map(({ code }) => code).join("\n"), 2)}
${indent(each((r, c) => `${sumAt(r, c)} = ${unit.zero};`), 2)}
  for (var i = 0u; i < iterations.x; i += 1u) {
${indent(body, 4)}
  }
  var total = vec4<f32>();
${
    indent(
      each((r, c) =>
        `${unit.storeResult(product, own, 4, sumAt(r, c))}
workgroupBarrier();
total += ${unit.readQuad(product, `${own} + 2u * lane`)};
total += ${unit.readQuad(product, `${own} + 2u * lane + 1u`)};
workgroupBarrier();`
      ),
      2,
    )
  }
  sink[id.x] = total;
}
`;
}

/** The loops that a device can run. */
function loopsOf({ f16, matrixUnits }: Capabilities): { name: CeilingName; title: string; code: string }[] {
  return [
    { name: "f32", title: "f32 multiply-adds", code: multiplyAddLoop("f32") },
    ...f16 ? [{ name: "f16" as const, title: "f16 multiply-adds", code: multiplyAddLoop("f16") }] : [],
    ...matrixUnits === null || matrixUnits === "emulated"
      ? []
      : [{ name: "matrix" as const, title: "matrix units, f16 to f32", code: matrixLoop(matrixUnits) }],
  ];
}

/** Milliseconds of a sample, which is one dispatch. */
const sampleMs = 20;

/** A loop that is ready to run. */
export interface PreparedLoop {
  /** Milliseconds of so many dispatches. */
  time(repeats: number): Promise<number>;
  /** Sets the iterations of a dispatch. */
  iterate(iterations: number): void;
  /** A vec4 of sums of each invocation. */
  readonly sink: GPUBuffer;
  dispose(): void;
}

/**
 * Makes a loop ready to run.
 *
 * @param context The device.
 * @param label Its name in messages.
 * @param code Its WGSL.
 * @param workgroups How many workgroups run it.
 */
export async function prepareLoop(
  context: GpuContext,
  label: string,
  code: string,
  workgroups: number,
): Promise<PreparedLoop> {
  const steps = new KernelSteps(context);
  const { queue } = context.device;
  // In [0.25, 0.75): x·factor + term converges, to neither zero nor infinity.
  let state = 7;
  const inputs = Float32Array.from({ length: 4 * inputQuads }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return 0.25 + state / 2 ** 33;
  });
  const given = steps.upload(inputs.buffer);
  const iterations = steps.params(Uint32Array.of(1, 0, 0, 0));
  const sink = steps.borrow(workgroups * workgroupSize * 16);
  try {
    await steps.bind("measure a ceiling", [{
      ...{ label, code, workgroups: [workgroups] },
      bindings: {
        0: { buffer: sink, size: workgroups * workgroupSize * 16 },
        1: { buffer: given, size: inputs.byteLength },
        2: iterations,
      },
    }]);
  } catch (error) {
    steps.discard();
    throw error;
  }
  return {
    sink,
    iterate: (count) => queue.writeBuffer(iterations.buffer, 0, Uint32Array.of(count, 0, 0, 0)),
    time: (repeats) =>
      timeOnGpu(context, (encoder, timestampWrites) => steps.encode(encoder, { timestampWrites }), repeats),
    dispose: () => steps.dispose(),
  };
}

async function arithmeticCeiling(
  context: GpuContext,
  { name, title, code }: { readonly name: CeilingName; readonly title: string; readonly code: string },
): Promise<Ceiling> {
  const workgroups = context.capabilities.software ? 16 : 4096;
  const loop = await prepareLoop(context, title, code, workgroups);
  try {
    // Long enough that starting and ending a dispatch is no part of it; bounded, since drivers stop what takes seconds.
    let iterations = 4;
    for (;;) {
      loop.iterate(iterations);
      await loop.time(1);
      const ms = await loop.time(1);
      if (ms > 0.7 * sampleMs || iterations >= 2 ** 20) break;
      iterations = Math.ceil(iterations * Math.min(16, Math.max(1.5, sampleMs / Math.max(ms, 1e-3))));
    }
    const [ms, spread] = await measureSteadily(context, loop.time, sampleMs, 7);
    const tflops = workgroups * iterations * flopsPerIteration[name] / ms / 1e9;
    return { name, title, tflops, spread, probeMs: await clockProbe(context) };
  } finally {
    loop.dispose();
  }
}

/** Measures every ceiling of a device. One that fails is left out, with its reason. */
export async function measureCeilings(context: GpuContext): Promise<Ceilings> {
  const arithmetic: Ceiling[] = [];
  const errors: string[] = [];
  for (const loop of loopsOf(context.capabilities)) {
    try {
      arithmetic.push(await arithmeticCeiling(context, loop));
    } catch (error) {
      errors.push(`${loop.title}: ${error instanceof Error ? error.message : error}`);
    }
  }
  const copy = await copyBandwidth(context).catch((error: Error) => {
    errors.push(`copy: ${error.message}`);
    return null;
  });
  return { arithmetic, copyGbps: copy?.gbps ?? null, errors };
}
