// Dawn, Chromium's WebGPU, from the npm package "webgpu": what Bun and Node compute with, and Deno on request. It is an
// optional package, imported by a name that only the running program knows, so that it is no part of this one's graph.

import { currentRuntime, readEnvironment, workingDirectory } from "../environment.ts";
import { FlashMLAError } from "../op/errors.ts";

/** The variable that names another module than the package `webgpu`: a specifier, a URL or a path. */
export const MODULE_VARIABLE = "FLASH_MLA_WEBGPU_MODULE";

/** What Deno fetches; Bun and Node take what is installed. */
const denoSpecifier = "npm:webgpu@0.6.2";

interface DawnModule {
  create(flags: string[]): GPU;
  readonly globals?: { readonly GPUDevice?: unknown };
}

/**
 * Every `GPU` that Dawn has given out, by module and flags. They are never let go of: Node, Bun and Deno crash inside Dawn
 * when one is collected while a device of it lives. On a global, so that two copies of this library share them. None of
 * them keeps a process from ending: with webgpu 0.6.2, all three leave with status 0 while devices live, and not before
 * a call that nobody awaits has settled.
 */
const keptKey = Symbol.for("flash-mla.dawn");

/** The classes of devices by which Dawn's are told from others. */
const deviceClasses = new Set<unknown>();

/** What npm's `webgpu` marks its device class with, also when the caller imported the package. */
const deviceMark = Symbol.for("webgpu.deviceDestroyUnmapsBuffers");

/** How Dawn is set up. */
export interface DawnOptions {
  /** Whether to allow what Dawn calls unsafe: features that are no standard yet, such as subgroup matrices. */
  readonly experimental?: boolean;
}

/**
 * Dawn's entry point, set up for compute. Equal options give the same one.
 *
 * @param options What to allow.
 * @throws {FlashMLAError} With code `unsupported-platform` where the package is missing or does not load.
 */
export async function dawnGpu(options: DawnOptions = {}): Promise<GPU> {
  const specifier = moduleSpecifier();
  const enabled = [
    // NVIDIA's driver computes f16 right; Dawn leaves it off for a conformance test of rounding.
    "vulkan_enable_f16_on_nvidia",
    ...options.experimental ? ["allow_unsafe_apis"] : [],
  ];
  // Rounded to 65,536 ns otherwise, which is longer than a small kernel runs.
  const flags = [`enable-dawn-features=${enabled.join(",")}`, "disable-dawn-features=timestamp_quantization"];
  const module = await loadDawn(specifier);
  if (module.globals?.GPUDevice !== undefined) deviceClasses.add(module.globals.GPUDevice);
  const host = globalThis as { [keptKey]?: Map<string, GPU> };
  const kept = host[keptKey] ??= new Map();
  const key = [specifier, ...flags].join(" ");
  let gpu = kept.get(key);
  if (gpu === undefined) kept.set(key, gpu = module.create(flags));
  return gpu;
}

/** Whether a device is Dawn's, from npm. */
export function isDawnDevice(device: GPUDevice): boolean {
  if (deviceMark in device) return true;
  return [...deviceClasses].some((type) => typeof type === "function" && device instanceof type);
}

/** The version of the package, or an empty string where it does not say. */
export async function dawnVersion(): Promise<string> {
  const specifier = moduleSpecifier();
  const manifest = specifier.includes("://") ? new URL("./package.json", specifier).href : `${specifier}/package.json`;
  try {
    const { default: { name, version } } = await import(/* @vite-ignore */ /* webpackIgnore: true */ manifest, {
      with: { type: "json" },
    });
    return name === "webgpu" && typeof version === "string" ? version : "";
  } catch {
    return "";
  }
}

async function loadDawn(specifier: string): Promise<DawnModule> {
  try {
    // Bundlers are to leave this import to the program that runs.
    const module = await import(/* @vite-ignore */ /* webpackIgnore: true */ specifier);
    if (typeof module.create !== "function") throw new TypeError("the module has no function create()");
    return module;
  } catch (error) {
    const reason = error instanceof Error ? error.message.split("\n")[0] : String(error);
    const advice = currentRuntime().name === "Deno"
      ? "run Deno with --allow-ffi, --allow-read and --allow-env, with access to the npm registry the first time"
      : "run `npm install webgpu` (or `bun add webgpu`)";
    throw new FlashMLAError(
      "unsupported-platform",
      `Cannot load WebGPU from "${specifier}": ${reason}; ${advice}, or set ${MODULE_VARIABLE} to where the package is`,
      { cause: error },
    );
  }
}

/** What to import: a specifier or a URL as it is, a path as a file URL, a folder by its index.js. */
function moduleSpecifier(): string {
  const named = readEnvironment(MODULE_VARIABLE);
  if (named === undefined || named === "") return currentRuntime().name === "Deno" ? denoSpecifier : "webgpu";
  if (!/^(\.{0,2}[/\\]|[A-Za-z]:[/\\])/.test(named)) return named;
  const absolute = named.startsWith(".") ? `${workingDirectory()}/${named}` : named;
  const file = /\.[cm]?[jt]s$/.test(absolute) ? absolute : `${absolute}/index.js`;
  const path = file.replaceAll("\\", "/").split("/").map(encodeURIComponent).join("/").replace(/^\/?/, "/");
  return new URL(`file://${path.replace(/^\/([A-Za-z])%3A\//, "/$1:/")}`).href;
}
