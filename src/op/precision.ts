// How exact the factors of a call's products must be.

import { cannotRun as fail } from "./errors.ts";
import type { MlaMathOptions, MlaProblem, TensorName } from "./mla_problem.ts";
import { kindOf } from "./tensor.ts";

/** The tensors whose elements are multiplied with each other. A bias and sinks are added: they are never rounded. */
const multiplied: readonly TensorName[] = ["query", "keyValue", "wKc", "wVc", "bQ", "bK"];

/** The precision of the products; exact when none is asked for. */
export function checkPrecision(precision: MlaMathOptions["precision"]): MlaProblem["precision"] {
  if (precision === undefined) return "f32";
  if (precision === "f32" || precision === "f16") return precision;
  return fail(`precision must be "f32" or "f16", got ${kindOf(precision)}`);
}

/** The tensor that keeps a call's products from being of halves: it has more precision, and nobody gave leave to round it. */
export function exactFactor({ dtype, precision }: Pick<MlaProblem, "dtype" | "precision">): TensorName | undefined {
  if (precision === "f16") return undefined;
  if (typeof dtype === "string") return dtype === "f16" ? undefined : "query";
  return multiplied.find((name) => dtype[name] !== undefined && dtype[name] !== "f16");
}
