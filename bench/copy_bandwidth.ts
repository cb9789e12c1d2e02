// The bandwidth of a device, by a copy with a kernel: an engine's own copies may be slower.

import { emptyOnGpu } from "../mod.ts";
import type { GpuContext } from "../src/gpu/device.ts";
import { timeOnGpu } from "../src/gpu/timing.ts";
import { measureSteadily } from "./steady_timing.ts";

/** A copy of vec4s by 8,192 workgroups, each invocation a grid apart from its next element. */
const copyCode = `@group(0) @binding(0) var<storage, read> source: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> copied: array<vec4<f32>>;
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < arrayLength(&source); i += groups.x * 256u) { copied[i] = source[i]; }
}
`;

/**
 * Measures a copy of 1 GiB, or as much as one binding may cover.
 *
 * @param context The device.
 * @returns GB/s, read and write counted, and the spread of the samples.
 */
export async function copyBandwidth(
  context: GpuContext,
): Promise<{ readonly gbps: number; readonly ms: number; readonly spread: number }> {
  const { limits, software } = context.capabilities;
  const size = Math.min(limits.maxStorageBufferBindingSize, software ? 2 ** 26 : 2 ** 30) & -4096;
  using from = await emptyOnGpu([size / 4], { device: context.device });
  using to = await emptyOnGpu([size / 4], { device: context.device });
  const pipeline = await context.pipelines.get("copy", copyCode);
  const bindGroup = context.device.createBindGroup({
    layout: pipeline.getBindGroupLayout(0),
    entries: [from, to].map(({ buffer }, binding) => ({ binding, resource: { buffer, size } })),
  });
  const [ms, spread] = await measureSteadily(
    context,
    (repeats) =>
      timeOnGpu(context, (encoder, timestampWrites) => {
        const pass = encoder.beginComputePass({ timestampWrites });
        pass.setPipeline(pipeline);
        pass.setBindGroup(0, bindGroup);
        pass.dispatchWorkgroups(8192);
        pass.end();
      }, repeats),
    30,
    5,
  );
  return { gbps: 2 * size / ms / 1e6, ms, spread };
}
