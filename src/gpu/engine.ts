// WebGPU's implementations: where a program finds one, which of them a device belongs to, and what each does otherwise
// than the others.

import { currentRuntime, readEnvironment } from "../environment.ts";
import { FlashMLAError } from "../op/errors.ts";
import { dawnGpu, type DawnOptions, dawnVersion, isDawnDevice } from "./dawn.ts";

/** The variable that chooses the engine of the process's own device. */
export const ENGINE_VARIABLE = "FLASH_MLA_ENGINE";

/** The runtime's own WebGPU (`navigator.gpu`), or Dawn from the npm package `webgpu`. */
export type EngineName = "native" | "dawn";

/** A WebGPU implementation as kernels and capabilities see it. */
export interface Engine {
  /** Name and version, such as `wgpu (Deno 2.9.6)`. */
  readonly name: string;
  /** Whether WGSL says `enable subgroups;`. */
  readonly subgroupsDirective: boolean;
  /** `OpenGL` where the device is known to run on that; empty elsewhere. */
  readonly graphicsApi: "OpenGL" | "";
}

/**
 * A WebGPU entry point.
 *
 * @param engine Which; by default what `FLASH_MLA_ENGINE` names, else the runtime's own, else Dawn.
 * @param options How Dawn is set up.
 * @throws {FlashMLAError} With code `unsupported-platform`, saying what this runtime needs, where there is none; with
 * code `invalid-input` when the variable names no engine.
 */
export async function findGpu(engine?: EngineName, options: DawnOptions = {}): Promise<GPU> {
  const { gpu } = (globalThis as { navigator?: { gpu?: GPU } }).navigator ?? {};
  const runtime = currentRuntime().name;
  const wanted = engine ?? engineFromEnvironment() ??
    (gpu !== undefined || runtime === "Deno" || runtime === "browser" ? "native" : "dawn");
  if (wanted === "dawn") return await dawnGpu(options);
  if (gpu !== undefined) return gpu;
  const advice = {
    Deno: "run Deno 2.9 or later",
    browser: "use a browser that has WebGPU, and serve the page over https or from localhost",
    Bun: 'run `bun add webgpu` and use engine "dawn"',
    Node: 'run `npm install webgpu` and use engine "dawn"',
  }[runtime];
  throw new FlashMLAError(
    "unsupported-platform",
    `Cannot use platform "webgpu": this runtime has no navigator.gpu; ${advice}`,
  );
}

/** What to do where an engine finds no adapter, or none that computes. */
export function adapterAdvice(): string {
  const drivers = "install the GPU's Vulkan, Metal or DirectX 12 driver, or Mesa's lavapipe for a software adapter";
  return {
    Deno: `${drivers}; with DENO_WEBGPU_BACKEND=vulkan Deno uses Vulkan alone`,
    Bun: drivers,
    Node: drivers,
    browser: "switch on hardware acceleration, or use a browser and a system that have WebGPU",
  }[currentRuntime().name];
}

/** Features that an engine's `requestDevice` takes though its adapters do not list them. */
export function hiddenFeatures(gpu: GPU): readonly string[] {
  const host = globalThis as { navigator?: { gpu?: GPU } };
  // Deno 2.9: no WebGPU name for them in adapter.features, but asking gives a device whose kernels may use them.
  return currentRuntime().name === "Deno" && gpu === host.navigator?.gpu ? ["subgroups"] : [];
}

/** The engine that a device belongs to, whoever opened it. */
export async function engineOf(device: GPUDevice): Promise<Engine> {
  const { name, version } = currentRuntime();
  const host = globalThis as { GPUDevice?: unknown; navigator?: { userAgent?: string } };
  const standard = { subgroupsDirective: true, graphicsApi: "" } as const;
  if (isDawnDevice(device)) {
    const dawn = await dawnVersion();
    return { ...standard, name: `Dawn (webgpu${dawn === "" ? "" : ` ${dawn}`}, ${name} ${version})` };
  }
  if (name === "browser") return { ...standard, name: browserName(host.navigator?.userAgent ?? "") };
  const native = typeof host.GPUDevice === "function" && device instanceof host.GPUDevice;
  if (name !== "Deno" || !native) return { ...standard, name: `unknown engine (${name} ${version})` };
  const { subgroupMinSize, subgroupMaxSize } = device.adapterInfo ?? {};
  return {
    name: `wgpu (Deno ${version})`,
    // Naga, wgpu's compiler, refuses it.
    subgroupsDirective: false,
    // wgpu names an adapter alike on Vulkan and on OpenGL; only the latter leaves the sizes at all that WebGPU allows.
    graphicsApi: subgroupMinSize === 4 && subgroupMaxSize === 128 ? "OpenGL" : "",
  };
}

/**
 * Family and version of a browser, by its user agent: Chromium's many names share one engine.
 *
 * @param userAgent `navigator.userAgent`.
 */
export function browserName(userAgent: string): string {
  const families = [["Firefox", /Firefox\/(\d+)/], ["Chromium", /Chrom(?:e|ium)\/(\d+)/], [
    "Safari",
    /Version\/(\d+(?:\.\d+)?).*Safari/,
  ]] as const;
  for (const [family, pattern] of families) {
    const found = userAgent.match(pattern);
    if (found !== null) return `${family} ${found[1]}`;
  }
  return userAgent || "unknown engine";
}

function engineFromEnvironment(): EngineName | undefined {
  const named = readEnvironment(ENGINE_VARIABLE);
  if (named === undefined || named === "") return undefined;
  if (named === "native" || named === "dawn") return named;
  throw new FlashMLAError(
    "invalid-input",
    `Cannot use ${ENGINE_VARIABLE}=${named}: expected "native" (the runtime's own WebGPU) or "dawn" (npm's webgpu)`,
  );
}
