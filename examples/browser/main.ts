/// <reference lib="dom" />
// The page: finds an adapter, measures, and shows what came of it.
//
//   deno task browser            serves it
//   …/?longest=64                measures up to 64 tokens
//
// What a run found, or why it failed, is in globalThis.__flashMlaResult when it is over.

import { FlashMLAError } from "../../mod.ts";
import { Measurement, type Row, tolerance } from "./measurement.ts";
import { byId, drawChart, hideRows, showRows } from "./results_view.ts";
import { type Surroundings, surroundings } from "./surroundings.ts";
import { headsInWords } from "./v2_lite.ts";
import { tokensInWords } from "./wording.ts";

/** What a run found, for programs. */
interface Result {
  /** Whether every length was measured, and every result that the oracle was asked for agrees with it. */
  readonly ok: boolean;
  readonly platform: string;
  readonly adapter: string;
  readonly engine: string;
  /** The largest relL2 that counts as agreement. */
  readonly tolerance: number;
  readonly rows: readonly Row[];
  /** Why the run ended early, or null. */
  readonly error: { readonly code: string; readonly message: string } | null;
}

const lengths = [16, 32, 64, 128, 256, 512, 1024, 2048];
/** Lengths that take under half a minute each on SwiftShader with two cores. */
const softwareLongest = 256;

const form = byId("controls") as HTMLFormElement;
const longest = byId("longest") as HTMLSelectElement;
const button = byId("start") as HTMLButtonElement;
const progress = byId("progress") as HTMLProgressElement;

let rows: Row[] = [];
let running: AbortController | null = null;
let label = "";
const measurement = new Measurement((step) => {
  running?.signal.throwIfAborted();
  say(`${label}: ${step} …`);
});

const around = await surroundings();
introduce(around);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running !== null) return stop();
  run();
});
new ResizeObserver(() => drawChart(rows)).observe(byId("chart"));
await run();

/** Fills in what does not change between runs. */
function introduce({ platform, adapter, software, engine, whyNone }: Surroundings): void {
  const facts: Record<string, string> = {
    Platform: platform === "webgpu" ? "WebGPU, kernels in WGSL, float32" : "reference, plain TypeScript, no GPU",
    Adapter: software && whyNone === null ? `${adapter} (software: it runs on the processor)` : adapter,
    Engine: engine,
    Problem: headsInWords,
  };
  for (const [name, value] of Object.entries(facts)) {
    const [term, description] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    description.textContent = value;
    byId("facts").append(term, description);
  }
  if (whyNone !== null) {
    byId("notice").hidden = false;
    byId("notice").textContent = `${whyNone} The reference runs instead, in a worker: the same formula in plain ` +
      "TypeScript on one thread. Its times say nothing about a GPU.";
  }
  longest.append(...lengths.map((length) => new Option(tokensInWords(length), String(length))));
  const asked = new URLSearchParams(location.search).get("longest") ?? "";
  const usual = software ? softwareLongest : lengths[lengths.length - 1];
  longest.value = String(lengths.includes(Number(asked)) ? asked : usual);
  longest.disabled = button.disabled = false;
}

async function run(): Promise<void> {
  const { platform, adapter, engine } = around;
  const chosen = lengths.filter((length) => length <= Number(longest.value));
  history.replaceState(null, "", `?longest=${longest.value}`);
  delete (globalThis as { __flashMlaResult?: Result }).__flashMlaResult;
  begin(chosen);
  let error: Result["error"] = null;
  try {
    for await (const row of measurement.run(platform, chosen)) {
      rows.push(row);
      showRows(rows);
      progress.value = rows.length;
      label = tokensInWords(chosen[rows.length] ?? row.tokens);
    }
    say(`Done: ${rows.length === 1 ? "one length" : `${rows.length} lengths`} measured.`);
  } catch (reason) {
    error = explain(reason);
  }
  const agree = rows.every(({ relL2 }) => relL2 === null || relL2 <= tolerance);
  end({ ok: error === null && rows.length > 0 && agree, platform, adapter, engine, tolerance, rows, error });
}

function begin(chosen: readonly number[]): void {
  running = new AbortController();
  rows = [];
  label = tokensInWords(chosen[0]);
  hideRows();
  byId("failure").hidden = true;
  button.textContent = "Stop";
  longest.disabled = true;
  progress.hidden = false;
  progress.max = chosen.length;
  progress.value = 0;
}

function end(result: Result): void {
  running = null;
  progress.hidden = true;
  button.textContent = "Run again";
  button.disabled = longest.disabled = false;
  byId("json").textContent = JSON.stringify(result, null, 2);
  Object.assign(globalThis, { __flashMlaResult: result });
}

/** A step that is under way cannot be interrupted: the run ends before the next one. */
function stop(): void {
  running?.abort();
  button.disabled = true;
  say("Stopping after this step …");
}

/** Says why a run ended early. */
function explain(reason: unknown): Result["error"] {
  if (running?.signal.aborted) {
    say("Stopped.");
    return { code: "stopped", message: "The run was stopped." };
  }
  const message = reason instanceof Error ? reason.message : String(reason);
  const code = reason instanceof FlashMLAError ? reason.code : "unexpected";
  const [heading, details] = [document.createElement("strong"), document.createElement("p")];
  heading.textContent = code === "device" ? "The GPU failed." : "The run failed.";
  details.textContent = message;
  byId("failure").replaceChildren(heading, code === "device" ? " “Run again” opens it anew." : "", details);
  byId("failure").hidden = false;
  say(`Failed at ${label}.`);
  return { code, message };
}

let ticking: ReturnType<typeof setInterval> | undefined;

/** Says what is being done and, for people who wait, for how long; screen readers hear only the words. */
function say(words: string): void {
  const clock = byId("clock");
  byId("status").textContent = words;
  clock.textContent = "";
  clearInterval(ticking);
  if (!words.endsWith("…")) return;
  const since = performance.now();
  ticking = setInterval(() => clock.textContent = `${Math.round((performance.now() - since) / 1000)} s`, 1000);
}
