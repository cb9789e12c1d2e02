#!/usr/bin/env node
// Multi-head Latent Attention in Node, on Dawn from npm, with weights that are uploaded once and 16-bit tensors.
//
//   npm install webgpu
//   node examples/node.ts          Node 22.18 and later; before, compile it to JavaScript
//   node examples/node.ts --json   the last line of stdout is one JSON object

import process from "node:process";
// In your project: "@flash-mla/webgpu"
import { deviceCapabilities, FlashMLAError, mlaAttention, openDevice, type Tensor, tensor, toGpu } from "../mod.ts";
import { relL2 } from "./relative_error.ts";
import { v2LiteInputs } from "./v2_lite_inputs.ts";

// Without a device of ours, a call runs on the reference where there is no WebGPU. The error says what to install.
const device = await openDevice().catch((error: unknown) => {
  if (!(error instanceof FlashMLAError)) throw error;
  console.error(error.message);
  process.exit(1);
});

/** Half precision where this Node has a `Float16Array` (24 and later); else bfloat16, the upper halves of float32. */
function narrow({ data, shape }: Tensor) {
  if (typeof Float16Array === "function") return tensor(new Float16Array(data), shape, { dtype: "f16" });
  const words = new Uint32Array(data.buffer, data.byteOffset, data.length);
  return tensor(Uint16Array.from(words, (word) => (word + 0x8000) >>> 16), shape, { dtype: "bf16" });
}

const tolerance = 3e-3;
const tokens = 32;
const { query, keyValue, wKc, wVc, bK } = v2LiteInputs(tokens);
const inputs = { query: narrow(query), keyValue: narrow(keyValue), bK: narrow(bK!) };
const weights = { wKc: narrow(wKc), wVc: narrow(wVc) };
const resident = { wKc: await toGpu(weights.wKc, device), wVc: await toGpu(weights.wVc, device) };

// The result is written here; without `out` it would be a new tensor like the query.
const out = tensor(new Float32Array(tokens * 16 * 128), [1, tokens, 16, 128]);
await mlaAttention({ ...inputs, ...resident }, { causal: true, out }); // chooses a configuration and compiles
const start = performance.now();
await mlaAttention({ ...inputs, ...resident }, { causal: true, out });
const ms = performance.now() - start;
resident.wKc.dispose();
resident.wVc.dispose();

// The reference computes in float32 on the same rounded inputs.
const expected = tensor(new Float32Array(out.data.length), out.shape);
await mlaAttention({ ...inputs, ...weights }, { causal: true, platform: "reference", out: expected });
const error = relL2(out.data, expected.data);
const ok = error <= tolerance;

const { adapter, engine } = await deviceCapabilities(device);
console.log(`adapter  ${adapter}, ${engine}`);
console.log(`inputs   ${inputs.query.dtype}`);
console.log(`result   [${out.shape}] in ${ms.toFixed(1)} ms`);
console.log(`relL2    ${error.toExponential(2)} against the reference, ${ok ? "within" : "OVER"} ${tolerance}`);
if (process.argv.includes("--json")) {
  console.log(JSON.stringify({ ok, adapter, engine, dtype: inputs.query.dtype, tokens, ms, relL2: error }));
}
process.exitCode = ok ? 0 : 1;
