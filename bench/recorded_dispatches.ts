// What one call dispatches, caught on its way to the device, so that each kernel can be timed by itself with the call's own
// buffers and elements in them.

import type { GpuContext } from "../src/gpu/device.ts";
import { settled } from "../src/gpu/settled.ts";
import { timeOnGpu } from "../src/gpu/timing.ts";
import type { Timed } from "./steady_timing.ts";

/** One dispatch. */
export interface RecordedDispatch {
  /** The kernel's name. */
  readonly label: string;
  readonly pipeline: GPUComputePipeline;
  readonly bindGroup: GPUBindGroup;
  readonly workgroups: readonly number[];
}

/** The dispatches of a call, and the memory that they work on. */
export interface RecordedCall {
  readonly dispatches: readonly RecordedDispatch[];
  /** Milliseconds of so many runs of some of them, in one pass each. */
  time(only?: (dispatch: RecordedDispatch) => boolean): Timed;
  /** Gives the memory back. */
  dispose(): void;
}

/**
 * Runs a call and keeps its dispatches. Its memory stays lent until they are disposed of; no other call may run meanwhile.
 *
 * @param context The device.
 * @param call The call.
 */
export async function recorded(context: GpuContext, call: () => Promise<unknown>): Promise<RecordedCall> {
  const { device, buffers } = context;
  const dispatches: RecordedDispatch[] = [];
  const kept: Parameters<typeof buffers.release>[] = [];
  const open = device.createCommandEncoder;
  const release = buffers.release;
  device.createCommandEncoder = function (this: GPUDevice, descriptor?: GPUCommandEncoderDescriptor) {
    const encoder = open.call(this, descriptor);
    const begin = encoder.beginComputePass;
    encoder.beginComputePass = function (this: GPUCommandEncoder, descriptor?: GPUComputePassDescriptor) {
      return watched(begin.call(this, descriptor), dispatches);
    };
    return encoder;
  };
  buffers.release = (usage, buffer) => void kept.push([usage, buffer]);
  const restore = () => {
    delete (device as { createCommandEncoder?: unknown }).createCommandEncoder;
    delete (buffers as { release?: unknown }).release;
  };
  try {
    await call();
    await settled(device, device.queue.onSubmittedWorkDone());
  } finally {
    restore();
  }
  return {
    dispatches,
    time: (only = () => true) => {
      const chosen = dispatches.filter(only);
      return (repeats) =>
        timeOnGpu(context, (encoder, timestampWrites) => {
          const pass = encoder.beginComputePass({ timestampWrites });
          for (const { pipeline, bindGroup, workgroups: [x, y, z] } of chosen) {
            pass.setPipeline(pipeline);
            pass.setBindGroup(0, bindGroup);
            pass.dispatchWorkgroups(x, y, z);
          }
          pass.end();
        }, repeats);
    },
    dispose: () => kept.splice(0).forEach(([usage, buffer]) => release.call(buffers, usage, buffer)),
  };
}

/** A pass whose dispatches are noted as they are recorded. */
function watched(pass: GPUComputePassEncoder, into: RecordedDispatch[]): GPUComputePassEncoder {
  const { setPipeline, setBindGroup, dispatchWorkgroups } = pass;
  let pipeline: GPUComputePipeline;
  let bindGroup: GPUBindGroup;
  pass.setPipeline = (given) => {
    pipeline = given;
    setPipeline.call(pass, given);
  };
  pass.setBindGroup = ((index: number, given: GPUBindGroup) => {
    bindGroup = given;
    setBindGroup.call(pass, index, given);
  }) as GPUComputePassEncoder["setBindGroup"];
  pass.dispatchWorkgroups = (x, y = 1, z = 1) => {
    const label = (bindGroup.label || pipeline.label).replace("flash-mla ", "");
    into.push({ label, pipeline, bindGroup, workgroups: [x, y, z] });
    dispatchWorkgroups.call(pass, x, y, z);
  };
  return pass;
}
