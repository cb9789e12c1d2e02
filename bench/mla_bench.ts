// The oracle against the GPU, whole calls with host arrays: `deno task bench`, `deno bench --json bench/mla_bench.ts`.

import { defaultExecutor, detectPlatform, flashMLA, mlaAttention } from "../mod.ts";
import { benchInputs, oracleShapes } from "./shapes.ts";

const onGpu = await detectPlatform("flash_mla") === "webgpu";

for (const shape of oracleShapes()) {
  const inputs = benchInputs(shape);
  const { name: group, causal } = shape;
  Deno.bench({ name: `oracle: ${group}`, group, n: 3, warmup: 1, baseline: true }, async () => {
    await mlaAttention(inputs, { causal, platform: "reference" });
  });
  // Tuned before the benchmark runs: what is timed is a warm call.
  if (onGpu) await defaultExecutor().choose(flashMLA, { inputs, options: { causal, platform: "webgpu" } });
  Deno.bench({ name: `webgpu: ${group}`, group, ignore: !onGpu }, async () => {
    await mlaAttention(inputs, { causal, platform: "webgpu" });
  });
}
