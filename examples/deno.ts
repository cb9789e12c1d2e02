#!/usr/bin/env -S deno run -A
// Multi-head Latent Attention in Deno, whose WebGPU is built in.
//
//   deno run -A examples/deno.ts          for people; in a project of your own add --unstable-kv, so that what was
//                                         measured is kept in a file
//   deno run -A examples/deno.ts --json   the last line of stdout is one JSON object

import { defaultExecutor, flashMLA, mlaAttention } from "../mod.ts"; // in your project: "@flash-mla/webgpu"
import { relL2 } from "./relative_error.ts";
import { v2LiteInputs } from "./v2_lite_inputs.ts";

const tolerance = 1e-5;
const tokens = 32;
const inputs = v2LiteInputs(tokens);
const options = { causal: true };

// Neither is needed for the call below. The first run measures configurations, later ones remember.
const { target } = await flashMLA.prepare({ inputs, options });
const { cfg, source } = await defaultExecutor().choose(flashMLA, { inputs, options });

await mlaAttention(inputs, options); // compiles
const start = performance.now();
const output = await mlaAttention(inputs, options);
const ms = performance.now() - start;

const expected = await mlaAttention(inputs, { ...options, platform: "reference" });
const error = relL2(output.data, expected.data);
const ok = error <= tolerance;

console.log(`adapter  ${target.description}`);
console.log(`config   ${cfg.blockQ} queries × ${cfg.blockK} keys, ${cfg.numWarps} warps, from ${source}`);
console.log(`result   [${output.shape}] in ${ms.toFixed(1)} ms`);
console.log(`relL2    ${error.toExponential(2)} against the reference, ${ok ? "within" : "OVER"} ${tolerance}`);
if (Deno.args.includes("--json")) {
  console.log(JSON.stringify({ ok, adapter: target.description, cfg, source, tokens, ms, relL2: error }));
}
if (!ok) Deno.exit(1);
