// Measuring GPU work: timestamp queries where they are real, the host clock otherwise.

import { BufferUsage } from "./buffers.ts";
import type { GpuContext } from "./device.ts";
import { settled } from "./settled.ts";

/** Records one run; gives `timestampWrites` to the passes it is told to. */
export type Recorder = (encoder: GPUCommandEncoder, timestampWrites?: GPUComputePassTimestampWrites) => void;

/** How a duration was read. */
export type TimingMethod = "timestamp" | "wall";

const methods = new WeakMap<GpuContext, Promise<TimingMethod>>();

/** How this device's work is timed. The first question runs a short calibration. */
export function timingMethod(context: GpuContext): Promise<TimingMethod> {
  let method = methods.get(context);
  if (method === undefined) {
    method = context.capabilities.timestamps !== "none" ? calibrate(context) : Promise.resolve("wall");
    methods.set(context, method);
    method.catch(() => methods.delete(context));
  }
  return method;
}

/**
 * Runs recorded work `repeats` times in one submission.
 *
 * @returns Milliseconds for all of them together.
 */
export async function timeOnGpu(context: GpuContext, record: Recorder, repeats: number): Promise<number> {
  return await timingMethod(context) === "timestamp"
    ? await timeByTimestamps(context, record, repeats)
    : await timeByWall(context, record, repeats);
}

async function timeByWall(context: GpuContext, record: Recorder, repeats: number): Promise<number> {
  const encoder = context.device.createCommandEncoder({ label: "flash-mla timing" });
  for (let i = 0; i < repeats; i++) record(encoder);
  await settled(context.device, context.device.queue.onSubmittedWorkDone());
  const start = performance.now();
  context.device.queue.submit([encoder.finish()]);
  await settled(context.device, context.device.queue.onSubmittedWorkDone());
  return performance.now() - start;
}

async function timeByTimestamps(context: GpuContext, record: Recorder, repeats: number): Promise<number> {
  const { device, buffers } = context;
  const querySet = device.createQuerySet({ type: "timestamp", count: 2 });
  const resolved = device.createBuffer({ size: 16, usage: BufferUsage.QUERY_RESOLVE | BufferUsage.COPY_SRC });
  const readback = buffers.acquire("readback", 16);
  try {
    const encoder = device.createCommandEncoder({ label: "flash-mla timing" });
    for (let i = 0; i < repeats; i++) {
      const begin = i === 0 ? { beginningOfPassWriteIndex: 0 } : {};
      const end = i === repeats - 1 ? { endOfPassWriteIndex: 1 } : {};
      const bounds = i === 0 || i === repeats - 1 ? { querySet, ...begin, ...end } : undefined;
      record(encoder, bounds);
    }
    encoder.resolveQuerySet(querySet, 0, 2, resolved, 0);
    encoder.copyBufferToBuffer(resolved, 0, readback, 0, 16);
    device.queue.submit([encoder.finish()]);
    await settled(device, readback.mapAsync(1, 0, 16));
    const [begin, end] = new BigUint64Array(readback.getMappedRange(0, 16));
    readback.unmap();
    buffers.release("readback", readback);
    return Number(end - begin) / 1e6;
  } catch (error) {
    // It may be mapped or waiting for it: nobody may get it from the pool.
    buffers.discard(readback);
    throw error;
  } finally {
    resolved.destroy();
    querySet.destroy();
  }
}

/** Iterations of the calibration and clock kernels: about 0.1 ms on a data-centre card at full clock. */
const probeIterations = 32768;

const probeCode = `// A chain of dependent multiply-adds: its time follows the clock and nothing else.
@group(0) @binding(0) var<storage, read_write> sink: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  var x = f32(id.x);
  for (var i = 0u; i < ${probeIterations}u; i += 4u) {
    x = fma(x, 0.999, 0.5);
    x = fma(x, 1.001, -0.5);
    x = fma(x, 0.998, 0.25);
    x = fma(x, 1.002, -0.25);
  }
  sink[id.x] = x;
}
`;

/** Workgroups of the probe: few, so that it measures the clock of a loaded device and not its width. */
const probeWorkgroups = 16;

async function withProbe<Result>(context: GpuContext, use: (record: Recorder) => Promise<Result>): Promise<Result> {
  const pipeline = await context.pipelines.get("clock probe", probeCode);
  const size = probeWorkgroups * 64 * 4;
  const sink = context.buffers.acquire("storage", size);
  try {
    const bindGroup = context.device.createBindGroup({
      layout: pipeline.getBindGroupLayout(0),
      entries: [{ binding: 0, resource: { buffer: sink, size } }],
    });
    return await use((encoder, timestampWrites) => {
      const pass = encoder.beginComputePass({ timestampWrites });
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, bindGroup);
      pass.dispatchWorkgroups(probeWorkgroups);
      pass.end();
    });
  } finally {
    context.buffers.release("storage", sink);
  }
}

/** Milliseconds of a kernel of fixed length, or null where only the host clock is to be had: it would show noise. */
export async function clockProbe(context: GpuContext): Promise<number | null> {
  if (await timingMethod(context) === "wall") return null;
  return await withProbe(context, (record) => timeByTimestamps(context, record, 1));
}

/**
 * Timestamps are believed when they agree with the host clock over a stretch that is long beside polling delays: some
 * engines hand out raw ticks, some quantise, some return zeros.
 */
function calibrate(context: GpuContext): Promise<TimingMethod> {
  return withProbe(context, async (record) => {
    let repeats = 1;
    for (;;) {
      const wall = await timeByWall(context, record, repeats);
      if (wall < 100 && repeats < 4096) {
        repeats = Math.min(4096, Math.ceil(repeats * Math.min(16, Math.max(2, 150 / wall))));
        continue;
      }
      const ticks = await timeByTimestamps(context, record, repeats);
      return ticks > 0.6 * wall && ticks < 1.25 * wall ? "timestamp" : "wall";
    }
  });
}
