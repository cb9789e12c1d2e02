// The platform "reference": the oracle, as the registry sees it.

import type { FlashMLAConfig } from "../op/config.ts";
import type { MlaImplementation, MlaTarget } from "../op/implementation.ts";
import { referenceMlaAttention } from "./mla_attention.ts";

/** The oracle has no tiles: one row against one key at a time, in order. */
const onlyConfig: FlashMLAConfig = {
  blockQ: 1,
  blockK: 1,
  numWarps: 1,
  numStages: 1,
  rowsPerThread: 1,
  blockDepth: 1,
  probKeys: 1,
  unrollDepth: false,
  expandBlock: 1,
  platform: "reference",
  backend: "any",
};

const target: MlaTarget = {
  platform: "reference",
  description: "plain TypeScript on the CPU",
  fingerprint: "reference",
  whyInvalid: () => null,
  heuristicCfg: () => onlyConfig,
  candidateCfgs: () => [onlyConfig],
  run: (problem, inputs) => Promise.resolve(referenceMlaAttention(inputs, problem)),
  trial: (problem, inputs) =>
    Promise.resolve({
      timingMethod: "wall",
      output: () => Promise.resolve(referenceMlaAttention(inputs, problem)),
      time(repeats) {
        const start = performance.now();
        for (let i = 0; i < repeats; i++) referenceMlaAttention(inputs, problem);
        return Promise.resolve(performance.now() - start);
      },
      dispose() {},
    }),
  probe: () => Promise.resolve(null),
};

/** The operation in plain TypeScript. */
export const referenceImplementation: MlaImplementation = {
  platform: "reference",
  backend: "any",
  isAvailable: () => Promise.resolve(true),
  open: () => Promise.resolve(target),
};
