// A path through the kernels: an element type, on matrix units or without. The operation restricted to a path's
// configurations is a kernel like any other, so that the tuner finds the fastest of them.

import { FlashMLA, type FlashMLAConfig, FlashMLAError, type MlaInvocation, type Tuner } from "../mod.ts";
import type { Capabilities } from "../src/gpu/capabilities.ts";
import type { CeilingName } from "./ceilings.ts";

/** A path. */
export interface KernelPath {
  readonly name: string;
  /** Element type of inputs and output. */
  readonly dtype: "f32" | "f16";
  /** Whether products run on matrix units. */
  readonly matrix: boolean;
  /** The ceiling that its arithmetic has: plain kernels multiply halves in f32, too. */
  readonly ceiling: CeilingName;
}

/** The paths that a device has. */
export function kernelPaths({ f16, matrixUnits }: Capabilities): KernelPath[] {
  const hasMatrixUnits = f16 && matrixUnits !== null && matrixUnits !== "emulated";
  return [
    { name: "plain f32", dtype: "f32", matrix: false, ceiling: "f32" },
    ...f16 ? [{ name: "plain f16", dtype: "f16", matrix: false, ceiling: "f32" } as const] : [],
    ...hasMatrixUnits ? [{ name: "matrix f16", dtype: "f16", matrix: true, ceiling: "matrix" } as const] : [],
  ];
}

/** The operation with the configurations of one path. */
export class PathKernel extends FlashMLA {
  readonly #matrix: boolean;

  /** @param path The path. */
  constructor(path: KernelPath) {
    super();
    this.#matrix = path.matrix;
  }

  /** The path's configurations, the best guess first. */
  override candidateCfgs(invocation: MlaInvocation): readonly FlashMLAConfig[] {
    const found = super.candidateCfgs(invocation).filter(({ matrixUnits }) => matrixUnits === this.#matrix);
    if (found.length > 0) return found;
    throw new FlashMLAError("no-config", "this device has no configuration of the path for such a problem");
  }

  /** The best guess of the path. */
  override heuristicCfg(invocation: MlaInvocation): FlashMLAConfig {
    return this.candidateCfgs(invocation)[0];
  }

  /**
   * The fastest configuration of the path, in a few words how many others it was measured against, and what was wrong with
   * those that gave wrong results.
   */
  async tuned(
    invocation: MlaInvocation,
    tuner: Tuner,
    validateBackward: boolean,
  ): Promise<{ readonly cfg: FlashMLAConfig; readonly chosenBy: string; readonly miscomputed: readonly string[] }> {
    const candidates = this.candidateCfgs(invocation);
    const { cfg, timings, withoutBackward } = await tuner.tune(this, invocation, candidates, undefined, {
      validateBackward,
    });
    const timed = timings.filter(({ ms }) => ms !== null).length;
    const miscomputed = timings.flatMap(({ rejected }) => rejected?.startsWith("wrong ") ? [rejected] : []);
    const forwardOnly = withoutBackward === undefined ? "" : ", forward only";
    return { cfg, chosenBy: `tuned, ${timed} of ${timings.length}${forwardOnly}`, miscomputed };
  }
}

/** A configuration in a few signs: rows × keys, warps and rows of an invocation, and how it stages. */
export function configText(cfg: FlashMLAConfig): string {
  const { blockQ, blockK, numWarps, rowsPerThread, numStages, blockDepth, probKeys, expandBlock } = cfg;
  const tile = `${blockQ}×${blockK} ${numWarps}w${rowsPerThread}`;
  if (cfg.matrixUnits) return tile;
  return `${tile} ${numStages}×${blockDepth} p${probKeys} e${expandBlock}${cfg.subgroups ? " shuffled" : ""}`;
}
