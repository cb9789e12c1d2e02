// Decoding on the platform "reference": the oracle of decoding against that of attention.

import { describe, test } from "node:test";
import { cacheProperties, decodeAt, decodeProperties } from "./support/decode_properties.ts";

const place = { platform: "reference" } as const;

describe("mlaDecode() on the reference", () => {
  for (const [name, check] of Object.entries(decodeProperties)) {
    test(name, () => check(decodeAt(place), { runs: 100 }));
  }
});

describe("LatentCache on the reference", () => {
  for (const [name, check] of Object.entries(cacheProperties)) {
    test(name, () => check(place, { runs: 60 }));
  }
});
