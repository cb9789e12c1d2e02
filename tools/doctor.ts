// Says whether this machine can run the library on a GPU, and what would make it run better.
//
//   deno task doctor      bun tools/doctor.ts      --json: the last line of stdout is one JSON object for programs
//
// Exits with 0 when a small call on the process's own device, real or in software, agrees with the reference; else with 1.

import process from "node:process";
import {
  type Capabilities,
  describeCapabilities,
  detectPlatform,
  deviceCapabilities,
  flashMLA,
  mlaAttention,
  PersistentCache,
  type Tensor,
} from "../mod.ts";
import { currentRuntime } from "../src/environment.ts";
import { hintsFor } from "./doctor_hints.ts";

/** relL2 that two float32 implementations may differ by. */
const tolerance = 1e-5;

const { name, version } = currentRuntime();
const runtime = `${name} ${version}`;
const system = `${process.platform} ${process.arch}`;

const { capabilities, refusal } = await device();
const { platform, why } = await automatic();
const check = capabilities === null ? null : await smallCall(capabilities);
const cache = await new PersistentCache("mla", { onEvent: () => {} }).health();
const hints = hintsFor({ runtime: name, capabilities, refusal, cache });
if (check?.failure) hints.unshift(`The GPU does not compute attention: ${check.failure}`);
const ok = check !== null && check.failure === null;

const lines = [
  ["runtime", `${runtime} on ${system}`],
  ["platform", `${platform ?? "none"}: ${why}`],
  ["cache", `${cache.location}: ${cache.detail}`],
  [
    "small call",
    check === null ? "not run" : check.failure ?? `relL2 ${check.relL2.toExponential(1)}, ${ms(check.ms)}`,
  ],
];
for (const [label, value] of lines) console.log(`${label.padEnd(18)} ${value}`);
if (capabilities !== null) console.log(`\n${describeCapabilities(capabilities)}`);
if (hints.length > 0) console.log(`\n${hints.map((hint) => `- ${hint}`).join("\n")}`);
console.log(`\n${verdict()}`);
if (process.argv.includes("--json")) {
  const { engine = null, adapter = null } = capabilities ?? {};
  console.log(
    JSON.stringify({ ok, runtime, system, engine, adapter, capabilities, cache, platform, why, check, hints }),
  );
}
process.exit(ok ? 0 : 1);

async function device(): Promise<{ capabilities: Capabilities | null; refusal: string | null }> {
  try {
    return { capabilities: await deviceCapabilities(), refusal: null };
  } catch (error) {
    return { capabilities: null, refusal: messageOf(error) };
  }
}

/** What a call that names no platform runs on. */
async function automatic(): Promise<{ platform: string | null; why: string }> {
  try {
    const platform = await detectPlatform("flash_mla");
    if (platform !== "webgpu") return { platform, why: "there is no GPU device, so calls run in plain TypeScript" };
    return { platform, why: `there is a${capabilities?.software ? " software" : ""} GPU device that computes right` };
  } catch (error) {
    return { platform: null, why: messageOf(error) };
  }
}

/** Seven queries of the heads' usual shape in small, on the GPU and on the reference. */
async function smallCall(capabilities: Capabilities) {
  let state = 1;
  const random = () => (state = (Math.imul(state, 1103515245) + 12345) >>> 0) / 2 ** 31 - 1;
  const tensor = (...shape: number[]): Tensor => ({
    data: Float32Array.from({ length: shape.reduce((a, b) => a * b) }, random),
    shape,
  });
  const inputs = {
    query: tensor(1, 7, 2, 24),
    keyValue: tensor(1, 40, 32),
    wKc: tensor(32, 2, 16),
    wVc: tensor(32, 2, 16),
    bK: tensor(1, 40, 8),
  };
  const run = async (platform: "webgpu" | "reference") => {
    const options = { platform, causal: true };
    // Whatever the caches hold, and without measuring.
    const cfg = flashMLA.heuristicCfg(await flashMLA.prepare({ inputs, options }));
    return (await mlaAttention(inputs, { ...options, cfg })).data;
  };
  try {
    const expected = await run("reference");
    await run("webgpu");
    const start = performance.now();
    const output = await run("webgpu");
    const ms = performance.now() - start;
    const squares = (values: Float32Array) => values.reduce((sum, value) => sum + value * value, 0);
    const relL2 = Math.sqrt(squares(output.map((value, i) => value - expected[i])) / squares(expected));
    const failure = relL2 <= tolerance ? null : `relL2 ${relL2.toExponential(1)} is over ${tolerance}`;
    return { relL2, ms, failure };
  } catch (error) {
    return { relL2: NaN, ms: NaN, failure: `${capabilities.adapter}: ${messageOf(error)}` };
  }
}

function verdict(): string {
  if (!ok) return "FAILED: calls cannot run on a GPU here";
  return capabilities?.software ? "ok: calls run on a software adapter" : "ok: calls run on the GPU";
}

function ms(value: number): string {
  return `${value.toFixed(1)} ms`;
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
