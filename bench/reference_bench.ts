// The oracle's speed: what a test against it costs. `deno bench bench/reference_bench.ts`, with `--json` for programs.

import { mlaProblem } from "../src/op/mla_problem.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { type ProblemShape, randomCall } from "../tests/support/random_problem.ts";

const shapes: Record<string, Partial<ProblemShape>> = {
  "V2-Lite heads, S=128": { queryLength: 128, keyLength: 128 },
  "V2-Lite heads, S=512": { queryLength: 512, keyLength: 512 },
  "V2-Lite heads, one query over 2048 keys": { queryLength: 1, keyLength: 2048 },
  "V2-Lite heads, 4 packed sequences of 128": {
    queryLength: 512,
    keyLength: 512,
    cuSeqlens: [0, 128, 256, 384, 512],
  },
  "MiniCPM3 heads, S=128": {
    queryLength: 128,
    keyLength: 128,
    kvHeads: 40,
    kvLoraRank: 256,
    qkNopeHeadDim: 64,
    qkRopeHeadDim: 32,
    vHeadDim: 64,
  },
};

for (const [name, dimensions] of Object.entries(shapes)) {
  for (const causal of [false, true]) {
    const { inputs, options } = randomCall({
      batch: 1,
      queryLength: 0,
      keyLength: 0,
      kvHeads: 16,
      headsPerKvHead: 1,
      kvLoraRank: 512,
      qkNopeHeadDim: 128,
      qkRopeHeadDim: 64,
      vHeadDim: 128,
      rope: "in_query",
      softmaxScale: null,
      cuSeqlens: null,
      values: "small",
      seed: 1,
      causal,
      ...dimensions,
    });
    const problem = mlaProblem(inputs, options);
    Deno.bench({
      name: causal ? "causal" : "full",
      group: name,
      baseline: !causal,
      n: 5,
      warmup: 1,
      fn: () => {
        referenceMlaAttention(inputs, problem);
      },
    });
  }
}
