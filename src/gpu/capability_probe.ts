// What a device really does, found by running small kernels on it once: engines list features that compute wrong, leave out
// features that work, and hand out adapters that compute nothing.
//
//   one submission, one kernel to a pass, each pass between two timestamps: Deno looks at a finished map every 10 ms only
//   what does not compile is left out; every result starts as zeros and is compared with numbers that are exact

import { FlashMLAError } from "../op/errors.ts";
import { settled } from "./settled.ts";
import { BufferUsage } from "./buffers.ts";
import type { Engine } from "./engine.ts";
import {
  arithmetic,
  arithmeticIsRight,
  halves,
  halvesAreRight,
  matrixProduct,
  matrixProductIsRight,
  type ProbeKernel,
  subgroups,
  subgroupSizes,
} from "./probe_kernels.ts";

/** What the kernels of a probe found. */
export interface ProbeFindings {
  /** Whether plain f32 and u32 arithmetic, workgroup memory and barriers give the right numbers. */
  readonly computes: boolean;
  /** Whether half precision does. */
  readonly f16: boolean;
  /** Sizes of the subgroups seen, ascending; empty where they are missing or not as our kernels need them. */
  readonly subgroupSizes: readonly number[];
  /** The syntax in which subgroup matrices of 16 × 16 × 16 halves gave the right products, or null. */
  readonly matrixUnits: "template" | "flag" | null;
  /** Timestamps at both ends of every pass, in nanoseconds; empty without the feature. */
  readonly ticks: readonly bigint[];
}

/** Syntaxes of subgroup matrices, the newest first. */
const matrixSyntaxes = ["template", "flag"] as const;

/** Workgroup sizes that subgroups are looked at with: some compilers choose the subgroup's size by them. */
const subgroupWorkgroups = [64, 256];

/**
 * Runs the probe's kernels.
 *
 * @param device The device.
 * @param engine What is known of its engine.
 * @returns What they found. Their memory is freed.
 * @throws {FlashMLAError} With code `device` when the device refuses to run them.
 */
export async function probe(device: GPUDevice, engine: Engine): Promise<ProbeFindings> {
  const asked: ProbeKernel[] = [arithmetic];
  const groups = subgroupWorkgroups.map((size) => subgroups(size, engine.subgroupsDirective));
  if (device.features.has("shader-f16")) asked.push(halves);
  if (device.features.has("subgroups")) asked.push(...groups);

  const compiled = await Promise.all(asked.map((kernel) => compile(device, kernel)));
  const jobs = compiled.filter((job) => job !== null);
  const matrices = matrixSyntaxes.map((syntax) => ({ syntax, kernel: matrixProduct(syntax) }));
  if ((device.features as ReadonlySet<string>).has("chromium-experimental-subgroup-matrix")) {
    // One after another: Dawn prints a warning of the older syntax where the newer one compiles, too.
    for (const { kernel } of matrices) {
      const job = await compile(device, kernel);
      if (job === null) continue;
      jobs.push(job);
      break;
    }
  }
  const { results, ticks } = await run(device, jobs);
  const wordsOf = (kernel: ProbeKernel) => results.get(kernel) ?? null;

  const plain = wordsOf(arithmetic);
  const half = wordsOf(halves);
  const sizes = groups.map((kernel, i) => {
    const words = wordsOf(kernel);
    return words === null ? [] : subgroupSizes(subgroupWorkgroups[i], words);
  });
  return {
    computes: plain !== null && arithmeticIsRight(plain),
    f16: half !== null && halvesAreRight(half),
    matrixUnits: matrices.find(({ kernel }) => {
      const words = wordsOf(kernel);
      return words !== null && matrixProductIsRight(words);
    })?.syntax ?? null,
    subgroupSizes: sizes.every((seen) => seen.length > 0) ? [...new Set(sizes.flat())].sort((a, b) => a - b) : [],
    ticks,
  };
}

interface Job {
  readonly kernel: ProbeKernel;
  readonly pipeline: GPUComputePipeline;
}

/** The kernel made ready, or null when it does not compile. Nothing is awaited inside of the error scope. */
async function compile(device: GPUDevice, kernel: ProbeKernel): Promise<Job | null> {
  device.pushErrorScope("validation");
  const module = device.createShaderModule({ label: "flash-mla probe", code: kernel.code });
  const scope = device.popErrorScope();
  const compute = { module, entryPoint: "main" };
  const made = device.createComputePipelineAsync({ label: "flash-mla probe", layout: "auto", compute });
  const [error, pipeline] = await settled(device, Promise.all([scope, made.catch(() => null)]));
  return error === null && pipeline !== null ? { kernel, pipeline } : null;
}

interface ProbeResults {
  readonly results: ReadonlyMap<ProbeKernel, Uint32Array<ArrayBuffer>>;
  readonly ticks: bigint[];
}

async function run(device: GPUDevice, jobs: readonly Job[]): Promise<ProbeResults> {
  const resultBytes = jobs.reduce((sum, { kernel }) => sum + kernel.words * 4, 0);
  const owned: { destroy(): void }[] = [];
  try {
    let readback: GPUBuffer;
    let scope: Promise<GPUError | null>;
    device.pushErrorScope("validation");
    try {
      readback = submit(device, jobs, owned);
    } finally {
      scope = device.popErrorScope();
    }
    const mapped = readback.mapAsync(1);
    mapped.catch(() => {});
    const error = await scope;
    if (error !== null) {
      throw new FlashMLAError("device", `The GPU device could not run its probe: ${error.message}`, { cause: error });
    }
    await settled(device, mapped);
    const bytes = readback.getMappedRange().slice(0);
    readback.unmap();

    const results = new Map<ProbeKernel, Uint32Array<ArrayBuffer>>();
    let offset = 0;
    for (const { kernel } of jobs) {
      results.set(kernel, new Uint32Array(bytes, offset, kernel.words));
      offset += kernel.words * 4;
    }
    return { results, ticks: [...new BigUint64Array(bytes, resultBytes)] };
  } finally {
    for (const resource of owned) resource.destroy();
  }
}

/**
 * Runs the kernels, and has what they wrote copied into one buffer: results in order, then the timestamps.
 *
 * @param device The device.
 * @param jobs The kernels.
 * @param owned Takes everything that is to be destroyed afterwards.
 */
function submit(device: GPUDevice, jobs: readonly Job[], owned: { destroy(): void }[]): GPUBuffer {
  const buffer = (size: number, usage: number) => {
    const made = device.createBuffer({ label: "flash-mla probe", size, usage });
    owned.push(made);
    return made;
  };
  let querySet: GPUQuerySet | null = null;
  const count = device.features.has("timestamp-query") ? 2 * jobs.length : 0;
  if (count > 0) owned.push(querySet = device.createQuerySet({ type: "timestamp", count }));
  const resultBytes = jobs.reduce((sum, { kernel }) => sum + kernel.words * 4, 0);
  const readback = buffer(resultBytes + 8 * count, BufferUsage.MAP_READ | BufferUsage.COPY_DST);

  const encoder = device.createCommandEncoder({ label: "flash-mla probe" });
  let offset = 0;
  jobs.forEach(({ kernel, pipeline }, i) => {
    const storage = () => buffer(kernel.words * 4, BufferUsage.STORAGE | BufferUsage.COPY_SRC);
    const bound = kernel.scratch ? [storage(), storage()] : [storage()];
    const pass = encoder.beginComputePass({
      label: "flash-mla probe",
      ...querySet === null
        ? {}
        : { timestampWrites: { querySet, beginningOfPassWriteIndex: 2 * i, endOfPassWriteIndex: 2 * i + 1 } },
    });
    pass.setPipeline(pipeline);
    const entries = bound.map((made, binding) => ({ binding, resource: { buffer: made } }));
    pass.setBindGroup(0, device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }));
    pass.dispatchWorkgroups(kernel.workgroups);
    pass.end();
    encoder.copyBufferToBuffer(bound[0], 0, readback, offset, kernel.words * 4);
    offset += kernel.words * 4;
  });
  if (querySet !== null) {
    const resolved = buffer(8 * count, BufferUsage.QUERY_RESOLVE | BufferUsage.COPY_SRC);
    encoder.resolveQuerySet(querySet, 0, count, resolved, 0);
    encoder.copyBufferToBuffer(resolved, 0, readback, offset, 8 * count);
  }
  device.queue.submit([encoder.finish()]);
  return readback;
}
