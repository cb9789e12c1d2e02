// The layer against Hugging Face transformers: a prefill, then step by step with the cache.

import { describe, test } from "node:test";
import { assertEquals } from "@std/assert";
import { type Formulation, MlaAttention } from "../mod.ts";
import { skip, smallConfig, smallDecodeConfig, testContext } from "./support/gpu.ts";
import { layerGoldens } from "./support/layer_golden.ts";
import { inChunks, upTo } from "./support/layer_runs.ts";
import { assertClose } from "./support/metrics.ts";

for (const platform of ["reference", "webgpu"] as const) {
  describe(`MlaAttention on ${platform} agrees with Hugging Face transformers`, {
    skip: platform === "webgpu" && skip,
  }, () => {
    const tuning = platform === "webgpu" ? { cfg: smallConfig, decodeCfg: smallDecodeConfig } : {};
    for (const { name, config, weights, hiddenStates, expected, prefill } of layerGoldens()) {
      for (const formulation of ["auto", "absorbed", "expanded"] satisfies (Formulation | "auto")[]) {
        test(`${name}, prefill and then step by step, ${formulation}`, async () => {
          if (platform === "webgpu") await testContext();
          using layer = await MlaAttention.load(config, weights, { platform });
          const [batch, length] = hiddenStates.shape;
          using cache = await layer.createCache({ batch, length, pageSize: 4 });
          const ends = [prefill, ...upTo(prefill, length)];
          const output = await inChunks(layer, hiddenStates, ends, { ...tuning, cache, formulation });
          assertClose(output, expected, { relL2: 2e-6 }, name);
          assertEquals([...cache.lengths], Array.from({ length: batch }, () => length));
        });
      }
    }
  });
}
