/// <reference lib="dom" />
// What the page runs on: platform, adapter and engine, and, without WebGPU, why there is none.

import { detectPlatform, type Platform } from "../../mod.ts";

/** What the page runs on. */
export interface Surroundings {
  readonly platform: Platform;
  /** The adapter in its own words, or the lack of one. */
  readonly adapter: string;
  /** Whether the adapter runs on the processor. */
  readonly software: boolean;
  /** The browser, and its WebGPU where that is known. */
  readonly engine: string;
  /** Why there is no WebGPU; null where there is. */
  readonly whyNone: string | null;
}

/** Finds out. Takes as long as the library takes to open a device. */
export async function surroundings(): Promise<Surroundings> {
  const platform = await detectPlatform("flash_mla");
  const engine = engineName();
  if (platform !== "webgpu") {
    return { platform, adapter: "none", software: true, engine, whyNone: await whyNoWebGpu() };
  }
  const info = (await navigator.gpu.requestAdapter({ powerPreference: "high-performance" }))?.info;
  const adapter = info?.description || [info?.vendor, info?.architecture, info?.device].filter(Boolean).join(" ") ||
    "not named by the browser";
  const software = info?.isFallbackAdapter === true || /llvmpipe|lavapipe|swiftshader|basic render/i.test(adapter);
  return { platform, adapter, software, engine, whyNone: null };
}

async function whyNoWebGpu(): Promise<string> {
  if (!isSecureContext) {
    return "Browsers offer WebGPU to pages from https or localhost only, and this one is from neither.";
  }
  if (!("gpu" in navigator)) return "This browser has no WebGPU, or it is switched off.";
  if (await navigator.gpu.requestAdapter() === null) {
    return "This browser has WebGPU, but found no adapter for it: there is no GPU, or its driver is blocked.";
  }
  return "This browser has a WebGPU adapter, but gave no device for it.";
}

function engineName(): string {
  const agent = navigator.userAgent;
  const version = (pattern: RegExp) => agent.match(pattern)?.[1];
  const firefox = version(/Firefox\/(\d+)/);
  if (firefox !== undefined) return `Firefox ${firefox} (wgpu)`;
  const chromium = version(/Chrome\/(\d+)/);
  if (chromium !== undefined) return `Chromium ${chromium} (Dawn)`;
  const safari = version(/Version\/([\d.]+).* Safari\//);
  return safari === undefined ? agent : `Safari ${safari} (WebKit)`;
}
