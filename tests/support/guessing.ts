// An executor that takes the heuristic's configuration at once, where a test is not about tuning.

import { ConfigSelectorChain, Executor, type FlashMLAConfig, type MlaCall, type SelectionEvent } from "../../mod.ts";
import type { AnyTensor } from "../../src/op/tensor.ts";

/** What its chain said, in order. */
export type Events = SelectionEvent<FlashMLAConfig>[];

/** An executor that guesses, and what it says. */
export function guessing(): { executor: Executor<MlaCall, FlashMLAConfig, AnyTensor>; events: Events } {
  const events: Events = [];
  const chain = new ConfigSelectorChain<MlaCall, FlashMLAConfig, AnyTensor>({
    policy: { cacheMissFallback: "heuristics" },
    onEvent: (event) => events.push(event),
  });
  return { executor: new Executor(chain), events };
}
