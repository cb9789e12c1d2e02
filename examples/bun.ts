#!/usr/bin/env bun
// Multi-head Latent Attention in Bun, on Dawn from npm, with tensors in half precision.
//
//   bun add webgpu
//   bun examples/bun.ts          for people
//   bun examples/bun.ts --json   the last line of stdout is one JSON object

import process from "node:process";
// In your project: "@flash-mla/webgpu"
import { deviceCapabilities, FlashMLAError, mlaAttention, openDevice, type Tensor, tensor } from "../mod.ts";
import { relL2 } from "./relative_error.ts";
import { v2LiteInputs } from "./v2_lite_inputs.ts";

// Without a device of ours, a call runs on the reference where there is no WebGPU. The error says what to install.
const device = await openDevice().catch((error: unknown) => {
  if (!(error instanceof FlashMLAError)) throw error;
  console.error(error.message);
  process.exit(1);
});

const tolerance = 3e-3;
const tokens = 32;
const { query, keyValue, wKc, wVc, bK } = v2LiteInputs(tokens);
const halves = ({ data, shape }: Tensor) => tensor(new Float16Array(data), shape, { dtype: "f16" });
const inputs = {
  query: halves(query),
  keyValue: halves(keyValue),
  wKc: halves(wKc),
  wVc: halves(wVc),
  bK: halves(bK!),
};

// The result is written here; without `out` it would be a new tensor like the query, in halves.
const out = tensor(new Float32Array(tokens * 16 * 128), [1, tokens, 16, 128]);
await mlaAttention(inputs, { device, causal: true, out }); // chooses a configuration and compiles
const start = performance.now();
await mlaAttention(inputs, { device, causal: true, out });
const ms = performance.now() - start;

// The reference computes in float32 on the same rounded inputs.
const expected = tensor(new Float32Array(out.data.length), out.shape);
await mlaAttention(inputs, { causal: true, platform: "reference", out: expected });
const error = relL2(out.data, expected.data);
const ok = error <= tolerance;

const { adapter, engine, f16 } = await deviceCapabilities(device);
console.log(`adapter  ${adapter}, ${engine}`);
console.log(`inputs   ${inputs.query.dtype}, ${f16 ? "and so are the kernels' loads" : "converted to float32"}`);
console.log(`result   [${out.shape}] in ${ms.toFixed(1)} ms`);
console.log(`relL2    ${error.toExponential(2)} against the reference, ${ok ? "within" : "OVER"} ${tolerance}`);
if (process.argv.includes("--json")) {
  console.log(JSON.stringify({ ok, adapter, engine, dtype: inputs.query.dtype, tokens, ms, relL2: error }));
}
process.exitCode = ok ? 0 : 1;
