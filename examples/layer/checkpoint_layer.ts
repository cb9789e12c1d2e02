// One attention layer of a checkpoint on disk: config.json, and of all tensors only those of the layer.

import { existsSync, readFileSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { type HostTensor, readSafetensors } from "../../mod.ts"; // in your project: "@flash-mla/webgpu"

/** A checkpoint that is not there, or not what it should be. */
export class CheckpointError extends Error {
  override readonly name = "CheckpointError";
}

/** What the layer is loaded from. */
export interface CheckpointLayer {
  /** The parsed config.json. */
  readonly config: Record<string, unknown>;
  /** The layer's tensors by their names in the checkpoint. */
  readonly weights: ReadonlyMap<string, HostTensor>;
}

/**
 * Reads a layer.
 *
 * @param path A folder, or a safetensors file or index in one.
 * @param layer The layer's number.
 * @throws {CheckpointError} When there is no config.json, or the checkpoint has no such layer.
 */
export async function checkpointLayer(path: string, layer: number): Promise<CheckpointLayer> {
  const fail = (why: string): never => {
    throw new CheckpointError(`Cannot read the checkpoint ${path}: ${why}`);
  };
  if (!existsSync(path)) fail("there is none");
  const folder = statSync(path).isDirectory() ? path : dirname(path);
  const file = join(folder, "config.json");
  if (!existsSync(file)) fail(`${file} is missing, which says what model it is`);
  let config: unknown;
  try {
    config = JSON.parse(readFileSync(file, "utf8"));
  } catch {
    fail(`${file} is no JSON`);
  }
  const checkpoint = await readSafetensors(path);
  try {
    const own = (name: string) => new RegExp(`(^|\\.)layers\\.${layer}\\.self_attn\\.`).test(name);
    if (!checkpoint.names.some(own)) {
      const layers = checkpoint.names.flatMap((name) =>
        /(?:^|\.)layers\.(\d+)\.self_attn\./.exec(name)?.slice(1) ?? []
      );
      const numbers = [...new Set(layers.map(Number))].sort((a, b) => a - b);
      const there = numbers.length === 0 ? "no attention layers" : `layers ${numbers[0]} to ${numbers.at(-1)}`;
      fail(`it has no tensors of layers.${layer}.self_attn; there are ${there}`);
    }
    return { config: config as Record<string, unknown>, weights: await checkpoint.tensors(own) };
  } finally {
    await checkpoint.close();
  }
}
