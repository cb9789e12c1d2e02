// A real browser on the example page: headless Chromium with its software adapter, driven by playwright-core under Deno.

import { execFileSync, spawn } from "node:child_process";
import process from "node:process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import type { Page } from "playwright-core";

const root = fileURLToPath(new URL("../..", import.meta.url));
const deno = (globalThis as { Deno?: { execPath(): string } }).Deno?.execPath();
const chromium = deno === undefined ? "" : chromiumPath();

/** Why browser tests cannot run here, or false. */
export const skip: string | false = deno === undefined
  ? "needs Deno"
  : chromium === "" && "no Chromium to be had: see what tools/chromium.sh says";

/** What has Chromium run WebGPU on the processor. */
export const softwareWebGpu: readonly string[] = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];

/** A visit to the page. */
export interface Visit {
  /** The tab, still empty. */
  readonly page: Page;
  /** The page's address. */
  readonly url: string;
  /** What the tab complained about: errors and warnings on its console, exceptions, files not found. */
  readonly complaints: readonly string[];
}

/**
 * Starts server and browser, visits, and ends both.
 *
 * @param flags Chromium's flags.
 * @param visit What to do there.
 */
export async function visiting(flags: readonly string[], visit: (visit: Visit) => Promise<void>): Promise<void> {
  const { chromium: playwright } = await import("playwright-core");
  const server = spawn(deno!, ["task", "--quiet", "browser", "--port", "0"], {
    cwd: root,
    stdio: ["ignore", "pipe", "inherit"],
  });
  try {
    const url = await firstLine(server.stdout);
    // Chromium's own sandbox refuses to run as root, and needs namespaces that containers often lack.
    const browser = await playwright.launch({ executablePath: chromium, chromiumSandbox: false, args: [...flags] });
    try {
      const page = await browser.newPage();
      const complaints: string[] = [];
      page.on("console", (message) => {
        if (["error", "warning"].includes(message.type())) complaints.push(`${message.type()}: ${message.text()}`);
      });
      page.on("pageerror", (error) => complaints.push(`exception: ${error}`));
      await visit({ page, url, complaints });
    } finally {
      await browser.close();
    }
  } finally {
    server.kill();
    if (server.exitCode === null && server.signalCode === null) await new Promise((end) => server.once("exit", end));
  }
}

async function firstLine(stream: NodeJS.ReadableStream): Promise<string> {
  for await (const line of createInterface({ input: stream })) return line;
  throw new Error("deno task browser ended before it said where it serves");
}

/** The program, fetched into .chromium/ where the machine has none; empty where there is none to be had. */
function chromiumPath(): string {
  if (process.platform === "win32") return process.env.CHROME_PATH ?? "";
  return execFileSync("bash", ["tools/chromium.sh"], {
    cwd: root,
    encoding: "utf8",
    stdio: ["ignore", "pipe", "inherit"],
  })
    .trim();
}
