/// <reference lib="dom" />
// The oracle's worker: runs the reference platform, which would keep the page from answering for seconds.

import { mlaAttention } from "../../mod.ts";
import type { OracleAnswer, OracleQuestion } from "./oracle.ts";

addEventListener("message", async ({ data: { inputs, repeats } }: MessageEvent<OracleQuestion>) => {
  const times: number[] = [];
  for (;;) {
    const start = performance.now();
    const output = await mlaAttention(inputs, { platform: "reference" });
    times.push(performance.now() - start);
    if (times.length < repeats) continue;
    const answer: OracleAnswer = { output, times };
    postMessage(answer, { transfer: [output.data.buffer] });
    return;
  }
});
