/// <reference lib="dom" />
// The oracle's worker: runs the reference platform, which would keep the page from answering for seconds.

import { mlaAttention } from "../../mod.ts";
import type { OracleAnswer, OracleFailure, OracleQuestion } from "./oracle.ts";

addEventListener("message", async ({ data }: MessageEvent<OracleQuestion>) => {
  try {
    const answer = await answerTo(data);
    postMessage(answer, { transfer: [answer.output.data.buffer] });
  } catch (error) {
    // A rejection in a worker is nothing that its page hears of.
    postMessage({ failure: String(error) } satisfies OracleFailure);
  }
});

async function answerTo({ inputs, repeats }: OracleQuestion): Promise<OracleAnswer> {
  const times: number[] = [];
  for (;;) {
    const start = performance.now();
    const output = await mlaAttention(inputs, { platform: "reference" });
    times.push(performance.now() - start);
    if (times.length >= repeats) return { output, times };
  }
}
