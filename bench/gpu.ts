// Every shape under every path of this machine's adapter, beside what the device can do at most: milliseconds, TFLOP/s,
// shares of the ceilings, which the same run measures, spread, compile time.
//
//   deno task bench:gpu                            a table, bench/out/gpu.json and bench/out/gpu.svg (a roofline)
//   FLASH_MLA_ENGINE=dawn deno task bench:gpu      on Dawn, with matrix units where the card has them
//   deno task bench:gpu --only="S 4096, causal"    rows whose shape, path and step have these words
//   deno task bench:gpu --quick                    three shapes
//   deno task bench:gpu --heuristic                with the configurations of first calls, unmeasured
//   deno task bench:gpu --tune-ms=5000             with more time for tuning each row; 1,500 ms otherwise
//   deno task bench:gpu --length=512               all lengths scaled, so that the longest is this
//   deno task bench:gpu --json=FILE --svg=FILE     writes there
//   deno task bench:gpu --before=FILE              compares with an earlier run's JSON
//
// FLOPs and bytes are those of the operation (work.ts). "first" is a whole first call on a new device, "compile" its
// compiling; * where the tuner had compiled the kernels before, which the driver may remember. Rows are written as they
// come: a run that is stopped keeps them.

import { Tuner } from "../mod.ts";
import { currentRuntime } from "../src/environment.ts";
import { timingMethod } from "../src/gpu/timing.ts";
import { median } from "../src/tune/clock_probe.ts";
import { argument, flag } from "./arguments.ts";
import { changes, changesText, probesOf } from "./before_after.ts";
import { openBenchDevice } from "./bench_device.ts";
import { type BenchRow, isFailed, type MeasuredRow } from "./bench_row.ts";
import { type Ceilings, measureCeilings } from "./ceilings.ts";
import { type KernelPath, kernelPaths } from "./kernel_path.ts";
import { measureShape, type Measuring } from "./measured_shape.ts";
import { roofline, type RooflinePoint } from "./roofline.ts";
import { ceilingsText, shapeText, tableHead } from "./row_table.ts";
import { type BenchShape, gpuShapes, isDifferentiated } from "./shapes.ts";

/** What the JSON holds. */
interface BenchRun {
  readonly date: string;
  /** Null outside of a checkout; ends with `with changes` where files differ from it. */
  readonly commit: string | null;
  readonly adapter: string;
  readonly engine: string;
  readonly runtime: string;
  readonly timing: string;
  readonly configurations: "tuned" | "heuristic";
  readonly seconds: number;
  readonly ceilings: Ceilings;
  readonly rows: readonly BenchRow[];
}

const started = performance.now();
const json = argument("json") ?? "bench/out/gpu.json";
const svg = argument("svg") ?? "bench/out/gpu.svg";
const only = argument("only") ?? "";
const beforeFile = argument("before");
// Read first: it may be the file that is about to be written.
const before = beforeFile === undefined ? null : JSON.parse(await Deno.readTextFile(beforeFile)) as BenchRun;

let context = await openBenchDevice();
const { adapter, engine, software } = context.capabilities;
const timing = await timingMethod(context);
const length = Number(argument("length") ?? (software ? 256 : 4096));
const heuristic = flag("heuristic");
const commit = await commitName();
const date = new Date().toISOString();
console.log(`${adapter}, ${engine}, timed by ${timing}, configurations ${heuristic ? "by the heuristic" : "tuned"}`);

const ceilings = await measureCeilings(context);
console.log(ceilingsText(ceilings));
tellTime("ceilings");

const calls: Measuring["calls"] = (shape, path) =>
  (["forward", ...isDifferentiated(shape, length) ? ["forward+backward" as const] : []] as const)
    .filter((call) => `${shape.name}, ${path.name}, ${call}`.includes(only));
const tuner = heuristic ? null : new Tuner({ totalBudgetMs: Number(argument("tune-ms") ?? 1500) });
const paths = kernelPaths(context.capabilities);
const rows: BenchRow[] = [];
console.log(`\n${tableHead}`);
for (const shape of gpuShapes(flag("quick"), length)) {
  if (!paths.some((path) => calls(shape, path).length > 0)) continue;
  const measured = await rowsOf(shape);
  rows.push(...measured);
  console.log(shapeText(shape.name, measured));
  await write();
  tellTime(shape.name);
  // A kernel that a driver stopped takes its device along, but not the rows to come.
  if (context.lost() !== null) context = await openBenchDevice();
}
await write();
if (before !== null) compare(before);
context.device.destroy();

/** A shape's rows; where even its inputs cannot be had, rows that say so. */
async function rowsOf(shape: BenchShape): Promise<BenchRow[]> {
  try {
    return await measureShape({ context, ceilings, tuner, calls }, shape, paths);
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    return paths.flatMap((path: KernelPath) =>
      calls(shape, path).map((step) => ({ shape: shape.name, path: path.name, step, error: message }))
    );
  }
}

async function write(): Promise<void> {
  const seconds = Math.round((performance.now() - started) / 1000);
  const run: BenchRun = {
    ...{ date, commit, adapter, engine, runtime: `${currentRuntime().name} ${currentRuntime().version}`, timing },
    ...{ configurations: heuristic ? "heuristic" : "tuned", seconds, ceilings, rows },
  };
  await replace(json, `${JSON.stringify(run, null, 2)}\n`);
  const points = rows.filter((row): row is MeasuredRow => !isFailed(row)).map((row): RooflinePoint => ({
    series: row.path,
    intensity: row.intensity,
    tflops: row.tflops,
    label: `${row.shape}, ${row.path}, ${row.step}: ${row.ms.toFixed(3)} ms, ${row.tflops.toFixed(1)} TFLOP/s`,
  }));
  if (points.length === 0 || ceilings.arithmetic.length === 0 || ceilings.copyGbps === null) return;
  const chart = roofline({
    title: "Prefill under the roofline",
    subtitle: `${adapter}, ${engine}`,
    bandwidth: ceilings.copyGbps,
    roofs: ceilings.arithmetic.map(({ title, tflops }) => ({ name: title, tflops })),
    points,
  });
  await replace(svg, chart);
}

/** Writes a file beside its place first: one that is stopped half way leaves the last one. */
async function replace(path: string, text: string): Promise<void> {
  const folder = path.includes("/") ? path.slice(0, path.lastIndexOf("/")) : ".";
  if (folder !== "") await Deno.mkdir(folder, { recursive: true });
  await Deno.writeTextFile(`${path}.part`, text);
  await Deno.rename(`${path}.part`, path);
}

function compare(earlier: BenchRun): void {
  console.log(`\nbefore: ${earlier.commit ?? "no commit"}, ${earlier.date}, configurations ${earlier.configurations}`);
  console.log(`after:  ${commit ?? "no commit"}, ${date}`);
  if (earlier.adapter !== adapter || earlier.engine !== engine) {
    console.log(`not the same device: before ${earlier.adapter}, ${earlier.engine}`);
  }
  const clocks = [earlier.rows, rows].map((some) => median(probesOf(some)));
  if (Math.abs(clocks[0] / clocks[1] - 1) > 0.02) {
    console.log(`not the same clock: probes of ${clocks.map((ms) => ms.toFixed(4)).join(" and ")} ms`);
  }
  // What this run was not asked for is not missing.
  const shapes = new Map(gpuShapes(flag("quick"), length).map((shape) => [shape.name, shape]));
  const asked = ({ shape, path, step }: BenchRow) => {
    const call = step === "forward+backward" ? step : "forward";
    return shapes.has(shape) && `${shape}, ${path}, ${call}`.includes(only);
  };
  console.log(changesText(changes(earlier.rows.filter(asked), rows)));
}

function tellTime(what: string): void {
  console.error(`${((performance.now() - started) / 1000).toFixed(1)} s: ${what}`);
}

/** The checked-out commit. */
async function commitName(): Promise<string | null> {
  const git = async (...args: string[]) => {
    const { success, stdout } = await new Deno.Command("git", { args, stderr: "null" }).output();
    return success ? new TextDecoder().decode(stdout).trim() : null;
  };
  try {
    const head = await git("rev-parse", "--short", "HEAD");
    const changed = head !== null && await git("status", "--porcelain", "--untracked-files=no");
    return head !== null && changed ? `${head} with changes` : head;
  } catch {
    return null;
  }
}
