// What stands in the way of speed or of memory on this machine, and what to do about it.

import type { CacheHealth, Capabilities } from "../mod.ts";

/** What the doctor found out. */
export interface Findings {
  /** The runtime's name, such as `Deno`. */
  readonly runtime: string;
  /** The device that calls without one run on, or null. */
  readonly capabilities: Capabilities | null;
  /** Why there is no device, or null. */
  readonly refusal: string | null;
  /** The cache of tuned configurations. */
  readonly cache: CacheHealth;
}

/**
 * One sentence or two for each thing that is missing; nothing where all is well.
 *
 * @param findings What was found.
 */
export function hintsFor({ runtime, capabilities, refusal, cache }: Findings): string[] {
  const hints: string[] = [];
  if (refusal !== null) hints.push(`No GPU: ${refusal}.`);
  if (capabilities !== null) hints.push(...deviceHints(runtime, capabilities));
  if (cache.state === "off") {
    hints.push("The configuration cache is off: every process measures anew. Unset FLASH_MLA_CACHE to keep a file.");
  } else if (cache.state === "memory") {
    hints.push(`Tuned configurations are kept in memory only, and every process measures anew: ${cache.detail}`);
  } else if (cache.state !== "ok") {
    hints.push(cache.detail);
  }
  return hints;
}

function deviceHints(runtime: string, capabilities: Capabilities): string[] {
  const { adapter, engine, software, f16, subgroups, timestamps } = capabilities;
  const isDawn = engine.startsWith("Dawn");
  const hints: string[] = [];
  if (software) {
    hints.push("The adapter computes in software, on the CPU: install the GPU's driver if this machine has a GPU.");
  }
  if (adapter.endsWith(" over OpenGL")) {
    hints.push(
      "Deno runs on OpenGL, without half precision and subgroups: install the GPU's Vulkan driver (or Mesa's lavapipe), " +
        "and set DENO_WEBGPU_BACKEND=vulkan so that Deno says when it is missing.",
    );
  } else {
    if (!f16 && isDawn && /nvidia/i.test(adapter)) {
      hints.push(
        "No half precision: Dawn has it on NVIDIA only behind a switch that openDevice() sets; if this device is from " +
          "there, install the npm package webgpu 0.6.2.",
      );
    } else if (!f16) {
      hints.push("No half precision (shader-f16): update the GPU's driver, or use an adapter that has it.");
    }
    if (subgroups === null) {
      hints.push("No subgroups that the kernels could use: they exchange values through workgroup memory instead.");
    }
  }
  if (timestamps === "none") {
    hints.push("No timestamp queries: the tuner measures with the host's clock, and takes longer.");
  } else if (timestamps === "quantised") {
    const advice = runtime === "browser" ? "start Chromium with WebGPU's developer features" : "update the engine";
    hints.push(`Timestamps are rounded to coarse steps, so the tuner repeats short kernels: ${advice} for exact ones.`);
  }
  return hints;
}
