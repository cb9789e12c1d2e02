// Measurements in words.

import type { ConfigSource, FlashMLAConfig } from "../../mod.ts";
import { type Row, tolerance } from "./measurement.ts";

/** A duration with its unit, which no line break parts from it: `0.45 ms`, `96.0 ms`, `1.26 s`. */
export function duration(ms: number): string {
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)}\u00a0s`;
  return `${ms.toFixed(ms < 10 ? 2 : ms < 100 ? 1 : 0)}\u00a0ms`;
}

/** A number of tokens as people write it. */
export function tokensInWords(tokens: number): string {
  return `${tokens.toLocaleString("en")}\u00a0tokens`;
}

/** The tile of a configuration. */
export function configInWords({ blockQ, blockK, numWarps, rowsPerThread }: FlashMLAConfig): string {
  return `${blockQ} queries × ${blockK} keys, ${numWarps} ${
    numWarps === 1 ? "warp" : "warps"
  } of ${rowsPerThread} rows`;
}

/** Where a configuration came from. */
export function sourceInWords(source: ConfigSource, timed: Row["timed"]): string {
  const words: Record<ConfigSource, string> = {
    autotune: "measured just now" + (timed === null ? "" : `; ${timed[0]} of ${timed[1]} candidates in time`),
    memory: "measured before, on this page",
    persistent: "measured on an earlier visit",
    heuristic: "rule of thumb: the only candidate",
    overlay: "set by an overlay",
    override: "set by the caller",
  };
  return words[source];
}

/** An error and whether it is tolerated; or why there is none. */
export function errorInWords(relL2: number | null): string {
  if (relL2 === null) return "oracle left out: over 2 s";
  return `${relL2.toExponential(1)}, ${relL2 <= tolerance ? "agrees" : `OVER ${tolerance.toExponential(0)}`}`;
}

/** A whole run in two sentences. */
export function summary(rows: readonly Row[]): string {
  const checked = rows.filter(({ relL2 }) => relL2 !== null);
  const last = rows[rows.length - 1];
  if (checked.length === 0) {
    return `The reference, in plain TypeScript on one thread, takes ${duration(last.ms)} at ${
      tokensInWords(last.tokens)
    }. ` +
      "There is nothing to compare it with: it is the oracle.";
  }
  const wrong = checked.filter(({ relL2 }) => !(relL2! <= tolerance));
  const worst = Math.max(...checked.map(({ relL2 }) => relL2!)).toExponential(1);
  const verdict = wrong.length > 0
    ? `WRONG: ${wrong.length} of ${checked.length} results differ from the oracle by more than a relL2 of ` +
      `${tolerance.toExponential(0)}, by ${worst} at most.`
    : `${
      checked.length === 1 ? "The result agrees" : `All ${checked.length} results agree`
    } with the oracle: relL2 is ` +
      `${worst} at most, ${tolerance.toExponential(0)} is tolerated.`;
  const { tokens, ms, oracleMs } = checked[checked.length - 1];
  const ratio = oracleMs! / ms;
  const compared = ratio >= 1 ? `${ratio.toFixed(1)} times as fast` : `${(1 / ratio).toFixed(1)} times as slow`;
  return `${verdict} At ${tokensInWords(tokens)} a call takes ${duration(ms)} and the oracle ${duration(oracleMs!)}: ` +
    `WebGPU is ${compared}.`;
}
