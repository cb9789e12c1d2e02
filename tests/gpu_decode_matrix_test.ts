// Decoding on matrix units, planned and bound as any other: on devices without, the units are emulated.

import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { type DecodeConfig, type MlaDecodeCall, MlaDecodeInvocation, mlaDecodeKernel, openDevice } from "../mod.ts";
import type { DecodeInputs } from "../src/op/decode_implementation.ts";
import { candidateConfigs, whyInvalid } from "../src/gpu/decode_configs.ts";
import { type GpuContext, gpuContext } from "../src/gpu/device.ts";
import { subgroupMatrixFeature } from "../src/gpu/request_device.ts";
import { webgpuDecodeTarget } from "../src/gpu/webgpu_decoding.ts";
import { decodeProblem } from "../src/op/decode_problem.ts";
import type { DecodeCallShape } from "./support/decode_call.ts";
import { decodeBy, decodeInBuffers, decodeProperties } from "./support/decode_properties.ts";
import { skipEmulation as skip, testContext } from "./support/gpu.ts";

/** A device with matrix units, where there is one. */
const native = skip === false
  ? await openDevice({ features: [subgroupMatrixFeature] }).then((device) => gpuContext(device), () => null)
  : null;

/** A context whose kernels find matrix units: a device's own, or emulated ones. */
async function matrixContext(): Promise<GpuContext> {
  const context = native?.capabilities.matrixUnits ? native : await testContext();
  context.buffers.poison = true;
  const { capabilities } = context;
  return { ...context, capabilities: { ...capabilities, matrixUnits: capabilities.matrixUnits ?? "emulated" } };
}

/** Few fragments to a subgroup: the emulation compiles in seconds. */
const cfg: DecodeConfig = {
  blockRows: 16,
  blockK: 16,
  numWarps: 2,
  subgroups: false,
  matrixUnits: true,
  pinned: false,
  workgroups: 8,
  platform: "webgpu",
  backend: "gpu",
};

/** Calls of one kind, whose widths are no multiples of a fragment; elements are small, since products round to halves. */
function narrow(shape: DecodeCallShape): DecodeCallShape {
  return {
    ...shape,
    ...{ kvLoraRank: 20, qkRopeHeadDim: 5, qkNopeHeadDim: 6, vHeadDim: 7, dtype: "f16", query: "f16", pageSize: 4 },
    ...{
      kvHeads: Math.min(2, shape.kvHeads),
      headsPerKvHead: Math.min(shape.kvHeads > 1 ? 2 : 4, shape.headsPerKvHead),
      small: true,
    },
    ...{ logitsSoftCap: shape.logitsSoftCap ?? 2, sinks: shape.sinks === "none" ? "[H, n]" : shape.sinks },
  };
}

const plans: Readonly<Record<string, number>> = {
  "decoding is attention over the same rows": 40,
  "pages lie anywhere, without a difference to the bit": 10,
  "keys are split into any number of parts": 10,
  "with splitKeys a sequence is computed alike to the bit in any batch": 10,
  "NaN in a row reaches the queries that see it, and no other": 20,
};

describe("decoding on matrix units", { skip }, () => {
  for (const [name, runs] of Object.entries(plans)) {
    test(name, async () => {
      const target = webgpuDecodeTarget(await matrixContext());
      await decodeProperties[name](decodeBy(target, cfg), { runs, narrow, halves: true });
    });
  }

  // One buffer of latents; and invocations that share the sums of a score's parts.
  for (const tile of [{ blockK: 32, numWarps: 2 }, { blockK: 16, numWarps: 4 }]) {
    const name = "NaN in a row reaches the queries that see it, and no other";
    test(`${tile.blockK} keys and ${tile.numWarps} subgroups: ${name}`, async () => {
      const target = webgpuDecodeTarget(await matrixContext());
      await decodeProperties[name](decodeBy(target, { ...cfg, ...tile }), { runs: 20, narrow, halves: true });
    });
  }

  test("decoding from several buffers is attention over the same rows", async () => {
    const decode = decodeInBuffers(await matrixContext(), cfg, 5);
    await decodeProperties["decoding is attention over the same rows"](decode, { runs: 10, narrow, halves: true });
  });

  test("is for a cache of halves, and for devices that have units", async () => {
    const { capabilities } = await matrixContext();
    const problemOf = (dtype: "f32" | "f16") =>
      decodeProblem(
        {
          query: { data: new Float32Array(16 * 25), shape: [1, 1, 16, 25] },
          blockTable: { data: new Int32Array(1), shape: [1, 1] },
          seqLens: [4],
        },
        { pages: 1, pageSize: 4, keyLength: 0, width: 25, kvLoraRank: 20, dtype },
        { softmaxScale: 1 },
      );
    assertEquals(whyInvalid(cfg, problemOf("f16"), capabilities), null);
    const why = whyInvalid(cfg, problemOf("f32"), capabilities);
    assert(why?.includes('matrixUnits is true, which is for a cache of dtype "f16"'), `${why}`);
    const without = whyInvalid(cfg, problemOf("f16"), { ...capabilities, matrixUnits: null });
    assert(without?.includes("the device has none"), `${without}`);
    const able = { ...capabilities, software: false, matrixUnits: "template" as const };
    assertEquals(candidateConfigs(problemOf("f16"), able)[0].matrixUnits, true);
    assertEquals(candidateConfigs(problemOf("f32"), able).some(({ matrixUnits }) => matrixUnits), false);

    // Candidates on units are checked against a plain one.
    const target = webgpuDecodeTarget({ ...await matrixContext(), capabilities: able });
    const init = { opId: "", version: "", call: {} as MlaDecodeCall, device: "", signature: null, bucket: "" };
    const invocation = new MlaDecodeInvocation(init, {} as DecodeInputs, problemOf("f16"), target);
    assertEquals(mlaDecodeKernel.heuristicCfg(invocation).matrixUnits, true);
    assertEquals(mlaDecodeKernel.baselineCfg(invocation).matrixUnits, false);
  });
});
