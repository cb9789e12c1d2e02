// What queries are multiplied by, position by position.

import type { MlaModelConfig } from "./attention_config.ts";

/**
 * The factor on the query of each position: `queryScale · (1 + beta · ln(1 + ⌊position / length⌋))`.
 *
 * @param config The layer.
 * @param positions The positions.
 * @returns A factor for each, or null where all are `queryScale`.
 */
export function queryFactors(
  { queryScale, queryTemperature }: Pick<MlaModelConfig, "queryScale" | "queryTemperature">,
  positions: ArrayLike<number>,
): Float32Array<ArrayBuffer> | null {
  if (queryTemperature === null) return null;
  const { beta, length } = queryTemperature;
  return Float32Array.from(
    positions,
    (position) => queryScale * (1 + beta * Math.log(1 + Math.floor(position / length))),
  );
}
