import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { candidateConfigs } from "../src/gpu/attention_configs.ts";
import { whyInvalid } from "../src/gpu/attention_plan.ts";
import { type Capabilities, defaultLimits } from "../src/gpu/capabilities.ts";
import type { FlashMLAConfig } from "../src/op/config.ts";
import { mlaProblem } from "../src/op/mla_problem.ts";
import { referenceMlaAttention } from "../src/reference/mla_attention.ts";
import { attentionUnder, skip, testContext } from "./support/gpu.ts";
import { assertClose } from "./support/metrics.ts";
import { type ProblemShape, randomCall } from "./support/random_problem.ts";

const shape: ProblemShape = {
  batch: 1,
  queryLength: 170,
  keyLength: 203,
  kvHeads: 1,
  headsPerKvHead: 2,
  kvLoraRank: 36,
  qkNopeHeadDim: 20,
  qkRopeHeadDim: 12,
  vHeadDim: 72,
  rope: "in_query",
  causal: true,
  softmaxScale: null,
  cuSeqlens: null,
  values: "plain",
  seed: 7,
};
const call = randomCall(shape);
const problem = mlaProblem(call.inputs, call.options);
const large: Capabilities = {
  engine: "test",
  adapter: "a large card",
  software: false,
  f16: true,
  subgroups: null,
  timestamps: "exact",
  subgroupMatrices: [],
  matrixUnits: null,
  limits: { ...defaultLimits, maxComputeWorkgroupStorageSize: 49152, maxComputeInvocationsPerWorkgroup: 1024 },
};
const small: Capabilities = { ...large, adapter: "the least WebGPU allows", limits: defaultLimits };
const software: Capabilities = { ...large, software: true };

const tiles = (configs: readonly FlashMLAConfig[]) =>
  new Set(configs.map(({ blockQ, blockK }) => `${blockQ}×${blockK}`));

const device = skip === false ? (await testContext()).capabilities : null;

describe("candidateConfigs()", () => {
  for (const capabilities of [large, small, software]) {
    test(`gives runnable, distinct configurations on ${capabilities.adapter}, software ${capabilities.software}`, () => {
      const configs = candidateConfigs(problem, capabilities);
      assert(configs.length >= 3);
      assertEquals(new Set(configs.map((config) => JSON.stringify(config))).size, configs.length);
      for (const config of configs) assertEquals(whyInvalid(config, problem, capabilities), null);
    });
  }

  test("has ejkernel's tile pairs where they fit", () => {
    for (const pair of ["64×64", "128×128", "256×256"]) assert(tiles(candidateConfigs(problem, large)).has(pair), pair);
    assert(tiles(candidateConfigs(problem, small)).has("64×64"));
    assert(!tiles(candidateConfigs(problem, small)).has("256×256"));
  });

  test("depends on lengths only through their powers of two", () => {
    const other = { ...problem, queryLength: 255, keyLength: 129 };
    assertEquals(candidateConfigs(other, large), candidateConfigs(problem, large));
  });

  test("spends no large tiles on few queries", () => {
    for (const { blockQ } of candidateConfigs({ ...problem, queryLength: 1 }, large)) assert(blockQ <= 32);
  });
});

describe("every candidate gives the oracle's answer", { skip }, () => {
  // A software adapter compiles each of a card's candidates for half a minute: there, its own and two of the others.
  const own = device === null ? [] : candidateConfigs(problem, device);
  const others = [small, large].flatMap((capabilities) => candidateConfigs(problem, capabilities));
  const configs = (device?.software ? [...own, ...others.filter(({ blockQ }) => blockQ <= 16)] : [...own, ...others])
    .filter((config) => whyInvalid(config, problem, device ?? small) === null);
  const distinct = [...new Map(configs.map((config) => [JSON.stringify(config), config])).values()];
  const expected = referenceMlaAttention(call.inputs, problem);
  for (const config of distinct) {
    const { blockQ, blockK, numWarps, rowsPerThread, numStages, blockDepth, probKeys } = config;
    test(`${blockQ} × ${blockK}, ${numWarps} warps of ${rowsPerThread} rows, ${numStages} × ${blockDepth}, ${probKeys}`, async () => {
      await testContext();
      assertClose(await attentionUnder(config)(call.inputs, call.options), expected, { relL2: 1e-5 });
    });
  }

  test("looped instead of unrolled", async () => {
    await testContext();
    const config = { ...candidateConfigs(problem, software)[1], unrollDepth: false };
    assertClose(await attentionUnder(config)(call.inputs, call.options), expected, { relL2: 1e-5 });
  });
});
