// Every preset's layer, with its heads made few and its widths small: what its config says of rope, norms and scales is kept.

import { describe, test } from "node:test";
import { assertEquals } from "@std/assert";
import { MlaAttention, mlaModelConfig, presets } from "../mod.ts";
import { inChunks, randomStates, upTo } from "./support/layer_runs.ts";
import { assertClose } from "./support/metrics.ts";
import { plainLayer, randomWeights } from "./support/random_layer.ts";

const small = {
  ...{ hidden_size: 24, num_attention_heads: 3, kv_lora_rank: 12, qk_nope_head_dim: 6, v_head_dim: 5 },
};

describe("MlaAttention with the config of", () => {
  for (const { name, config: file } of Object.values(presets)) {
    test(name, async () => {
      // MiniCPM3 has a divisor for each of its 16 pairs.
      const rotated = file.model_type === "minicpm3" ? 32 : 4;
      const fields = {
        ...{ ...file, ...small, qk_rope_head_dim: rotated },
        q_lora_rank: file.q_lora_rank === null ? null : 10,
      };
      const config = mlaModelConfig(fields);
      const weights = randomWeights(config, 1);
      const hiddenStates = randomStates(2, 1, 7, config.hiddenSize);
      const rows = upTo(0, 7).map((end) => [...hiddenStates.data.subarray((end - 1) * 24, end * 24)]);
      const expected = { data: Float32Array.from(plainLayer(rows, weights, config).flat()), shape: [1, 7, 24] };
      const layer = await MlaAttention.load(fields, weights, { platform: "reference" });
      assertEquals(layer.config, config);
      using cache = await layer.createCache({ batch: 1, length: 7 });
      assertClose(await inChunks(layer, hiddenStates, [4, 5, 6, 7], { cache }), expected, { relL2: 2e-5 }, name);
    });
  }
});
