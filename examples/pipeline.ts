// Four layers of a language model that stay on the GPU: a prompt, then tokens one by one against a growing KV cache. The
// layers are recorded into one submission a step; pipeline_gpu.ts is what to copy from. The same model also runs in host
// arrays: on the reference, to check the result, and with only its attention on the GPU, to compare the times.
//
//   deno run -A examples/pipeline.ts      or bun, or node: those need `npm install webgpu`
//     --large   DeepSeek-V2-Lite's sizes instead of small ones
//     --json    the last line of stdout is one JSON object

import process from "node:process";
import {
  ConfigSelectorChain,
  deviceCapabilities,
  Executor,
  FlashMLAError,
  type MlaExecutor,
  openDevice,
} from "../mod.ts"; // in your project: "@flash-mla/webgpu"
import { gpuPipeline } from "./pipeline_gpu.ts";
import { runOnHost } from "./pipeline_host.ts";
import { large, randomModel, small } from "./pipeline_model.ts";
import { relL2 } from "./relative_error.ts";

const tolerance = 1e-4;
const model = randomModel(process.argv.includes("--large") ? large : small);
const { layers, hidden, heads, promptTokens, steps } = model.sizes;

const device = await openDevice().catch((error: unknown) => {
  if (!(error instanceof FlashMLAError)) throw error;
  console.error(error.message);
  process.exit(1);
});
// Without this, a mistake in kernels of one's own is silent, and the results are zeros.
device.onuncapturederror = ({ error }) => console.error(error.message);
const { adapter, engine } = await deviceCapabilities(device);

// Without measuring: a cache that grows past a power of two would be measured anew there.
const executor: MlaExecutor = new Executor(
  new ConfigSelectorChain({ policy: { cacheMissFallback: "heuristics" } }),
);

const pipeline = await gpuPipeline(model, { device, executor });
await pipeline.run(); // compiles
const gpu = await pipeline.run();
pipeline.dispose();
const host = await runOnHost(model, { device, executor });
const oracle = await runOnHost(model, { platform: "reference" });

const error = relL2(gpu.output.data, oracle.output.data);
const hostError = relL2(host.output.data, oracle.output.data);
const ok = error < tolerance && hostError < tolerance;

const median = (values: readonly number[]) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)];
const msPerStepHost = median(host.stepMs);
const ms = (value: number) => `${value.toFixed(2)} ms`;
console.log(`adapter    ${adapter}, ${engine}`);
console.log(
  `model      ${layers} layers, ${hidden} wide, ${heads} heads; ${promptTokens} tokens, then ${steps} one by one`,
);
console.log(`on the GPU ${ms(gpu.stepMs)} a step, the prompt ${ms(gpu.promptMs)}, in ${gpu.submissions} submissions`);
console.log(`           ${gpu.bytesReadBack} bytes read back: the final hidden states, once`);
console.log(`host       ${ms(msPerStepHost)} a step, ${ms(median(host.attentionMs))} of it in mlaAttention (medians)`);
console.log(`relL2      ${error.toExponential(2)} against the reference, ${ok ? "within" : "OVER"} ${tolerance}`);
if (process.argv.includes("--json")) {
  console.log(JSON.stringify({
    ok,
    engine,
    adapter,
    relL2: error,
    layers,
    promptTokens,
    steps,
    submissions: gpu.submissions,
    bytesReadBack: gpu.bytesReadBack,
    msPerStepGpu: gpu.stepMs,
    msPerStepHost,
    msPerStepHostAttention: median(host.attentionMs),
  }));
}
device.destroy();
process.exitCode = ok ? 0 : 1;
