// The kernels on matrix units, natively: compile time, error against float64 on a few rows, milliseconds, TFLOP/s.
//
//   FLASH_MLA_ENGINE=dawn deno run -A bench/matrix.ts [--only=NAME] [--length=4096] [--heads=16]
//
// Outputs start out as NaN; each variant is checked before it is timed; the clock is probed beside every sample.

import { gpuContext, openDevice } from "../src/gpu/device.ts";
import type { MatrixAttendTile } from "../src/gpu/kernels/matrix_attend_layout.ts";
import type { MatrixGradTile } from "../src/gpu/kernels/matrix_attend_backward.ts";
import type { MatrixExpandTile } from "../src/gpu/kernels/matrix_expand.ts";
import type { MatrixBackend } from "../src/gpu/kernels/matrix_unit.ts";
import { subgroupMatrixFeature } from "../src/gpu/request_device.ts";
import { clockProbe } from "../src/gpu/timing.ts";
import { toFloats } from "../src/op/half.ts";
import { type HostInputs, type MlaMathOptions, mlaProblem } from "../src/op/mla_problem.ts";
import { elementCount, type Tensor } from "../src/op/tensor.ts";
import { referenceMlaAttentionWithLse } from "../src/reference/mla_attention.ts";
import { referenceMlaAttentionBackward } from "../src/reference/mla_attention_backward.ts";
import { MatrixCall, type MatrixSetup } from "../tests/support/matrix_call.ts";
import { argument } from "./arguments.ts";
import { steadyClock } from "./steady_timing.ts";

const only = argument("only") ?? "";
const S = Number(argument("length") ?? 4096);
const H = Number(argument("heads") ?? 16);
const [L, P, R, V] = [512, 128, 64, 128];

/** Dawn without the checks of indices that the library leaves on: what they cost. */
async function unchecked(): Promise<GPU> {
  const { create } = await import(Deno.env.get("FLASH_MLA_WEBGPU_MODULE") ?? "npm:webgpu@0.6.2");
  const enabled = "allow_unsafe_apis,vulkan_enable_f16_on_nvidia,disable_robustness,disable_workgroup_init";
  const flags = [`enable-dawn-features=${enabled}`, "disable-dawn-features=timestamp_quantization"];
  // Dawn crashes when it is collected.
  return (globalThis as { keptGpu?: GPU }).keptGpu = create(flags) as GPU;
}

const engine = Deno.args.includes("--unchecked") ? await unchecked() : "dawn";
const context = await gpuContext(await openDevice({ engine, features: [subgroupMatrixFeature] }));
console.log(`${context.capabilities.adapter}, ${context.capabilities.engine}, S ${S}, H ${H}`);
console.log(JSON.stringify(context.capabilities.subgroupMatrices.filter((m) => m.resultComponentType === "f32")));

let state = 7;
/** In [0, 1): a linear congruence, whose high bits are random enough for timing and errors. */
function uniform(): number {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 2 ** 32;
}

/** Sums of uniform numbers: near enough to a normal distribution, and quick; rounded to halves. */
function draw(scale: number, ...shape: number[]): Tensor {
  const data = new Float32Array(elementCount(shape));
  for (let i = 0; i < data.length; i++) {
    data[i] = Math.f16round(scale * 1.732 * (uniform() + uniform() + uniform() + uniform() - 2));
  }
  return { data, shape };
}

const inputs: HostInputs = {
  query: draw(1, 1, S, H, P + R),
  keyValue: draw(1, 1, S, L),
  wKc: draw(1 / Math.sqrt(L), L, H, P),
  wVc: draw(1 / Math.sqrt(L), L, H, V),
  bK: draw(1, 1, S, R),
};

/** Attention of one row and head in double precision; keys and values are only as many as the row sees. */
function exactRow(row: number, head: number, causal: boolean): Float64Array {
  const { query, keyValue, wKc, wVc, bK } = inputs as Required<HostInputs>;
  const keys = causal ? row + 1 : S;
  const q = query.data.subarray((row * H + head) * (P + R), (row * H + head + 1) * (P + R));
  // q · K = c · (wKc · q): the absorbed form takes 2·L operations a key.
  const absorbed = new Float64Array(L);
  for (let l = 0; l < L; l++) {
    for (let p = 0; p < P; p++) absorbed[l] += q[p] * wKc.data[(l * H + head) * P + p];
  }
  const score = new Float64Array(keys);
  for (let j = 0; j < keys; j++) {
    let sum = 0;
    for (let l = 0; l < L; l++) sum += absorbed[l] * keyValue.data[j * L + l];
    for (let r = 0; r < R; r++) sum += q[P + r] * bK.data[j * R + r];
    score[j] = sum / Math.sqrt(P + R);
  }
  const top = score.reduce((a, b) => Math.max(a, b), -Infinity);
  const mean = new Float64Array(L);
  let total = 0;
  for (let j = 0; j < keys; j++) {
    const p = Math.exp(score[j] - top);
    total += p;
    for (let l = 0; l < L; l++) mean[l] += p * keyValue.data[j * L + l];
  }
  const out = new Float64Array(V);
  for (let l = 0; l < L; l++) {
    for (let v = 0; v < V; v++) out[v] += mean[l] / total * wVc.data[(l * H + head) * V + v];
  }
  return out;
}

const checked = [[0, 0], [1, 3], [130, H - 1], [S / 2 + 17, 5], [S - 1, 0], [S - 2, H - 1]];
const exact = new Map([true, false].map((causal) => [
  causal,
  checked.map(([row, head]) => exactRow(row, head, causal)),
]));

async function measured(call: MatrixCall, names: readonly string[]): Promise<string> {
  const work = async () => call.time(Math.max(1, Math.ceil(60 / await call.time(1, names))), names);
  await steadyClock(context, work, 3, 6000);
  const repeats = Math.max(1, Math.ceil(25 / await call.time(1, names)));
  const samples: number[] = [];
  for (let i = 0; i < 7; i++) samples.push(await call.time(repeats, names));
  samples.sort((a, b) => a - b);
  const probe = await clockProbe(context) ?? 0;
  return `${samples[3].toFixed(3)} ms (spread ${((samples[6] / samples[0] - 1) * 100).toFixed(1)} %, probe ${
    probe.toFixed(4)
  })`;
}

const relative = (actual: ArrayLike<number>, expected: ArrayLike<number>) => {
  let error = 0, norm = 0;
  for (let i = 0; i < expected.length; i++) {
    error += (actual[i] - expected[i]) ** 2;
    norm += expected[i] ** 2;
  }
  return Math.sqrt(error / norm).toExponential(2);
};

/** Errors of every gradient at a small size, whose oracle takes a second. */
async function gradientErrors(setup: MatrixSetup, causal: boolean): Promise<string> {
  const [S, H] = [333, 2];
  const small: HostInputs = {
    query: draw(1, 1, S, H, P + R),
    keyValue: draw(1, 1, S, L),
    wKc: draw(1 / Math.sqrt(L), L, H, P),
    wVc: draw(1 / Math.sqrt(L), L, H, V),
    bK: draw(1, 1, S, R),
  };
  const gradOutput = draw(1e-3, 1, S, H, V);
  const problem = mlaProblem(small, { causal });
  const exact = referenceMlaAttentionBackward(small, problem, gradOutput);
  const call = await MatrixCall.create(context, problem, small, setup);
  await call.backward(gradOutput);
  await call.projections();
  call.run();
  const query = new Float32Array(await call.read("∂query")).subarray(0, S * H * (P + R));
  const expanded = new Float32Array(await call.read("∂expanded")).subarray(S * H * (P + V));
  const bK = new Float64Array(S * R);
  for (let i = 0; i < S * H * R; i++) bK[Math.floor(i / (H * R)) * R + i % R] += expanded[i];
  const errors = [`query ${relative(query, exact.query!.data)}`, `bK ${relative(bK, exact.bK!.data)}`];
  for (const name of ["keyValue", "wKc", "wVc"] as const) {
    errors.push(`${name} ${relative(new Float32Array(await call.read(`∂${name}`)), exact[name]!.data)}`);
  }
  call.dispose();
  return errors.join(", ");
}

interface Variant {
  readonly name: string;
  readonly attend: MatrixAttendTile;
  readonly expand: MatrixExpandTile;
  readonly grad?: MatrixGradTile;
  readonly gradKeys?: MatrixGradTile;
  readonly latents?: MatrixExpandTile;
  readonly weights?: MatrixExpandTile;
  readonly backend?: MatrixBackend;
  readonly causal?: boolean;
}
const attend: MatrixAttendTile = { blockQ: 128, blockK: 32, subgroups: 8, rowFragments: 2, pinned: true };
const expand: MatrixExpandTile = { blockM: 128, blockN: 256, depth: 32, rowFragments: 4, columnFragments: 4 };
const project: MatrixExpandTile = { blockM: 64, blockN: 128, depth: 32, rowFragments: 2, columnFragments: 2 };
const wide: MatrixExpandTile = { ...project, blockM: 128, rowFragments: 4 };
const deep: MatrixExpandTile = { ...project, depth: 64 };
const grad: MatrixGradTile = { rows: 64, columns: 32, rowFragments: 2, pinned: true };
const variants: Variant[] = [
  { name: "chosen", attend, expand, grad, latents: wide, weights: deep },
  { name: "unpinned", attend: { ...attend, pinned: false }, expand, grad: { ...grad, pinned: false } },
  { name: "full", attend, expand, grad, latents: wide, weights: deep, causal: false },
];

/** Small calls with every option, held against the oracle. */
async function checks(): Promise<void> {
  const [B, Sq, Sk, H, G, L, P, R, V] = [2, 137, 170, 4, 2, 40, 20, 12, 24];
  const some = (shared: boolean): HostInputs => ({
    query: draw(1, B, Sq, H, shared ? P : P + R),
    keyValue: draw(1, B, Sk, L),
    wKc: draw(1, L, G, P),
    wVc: draw(1, L, G, V),
    bK: draw(1, B, Sk, R),
    ...(shared && { bQ: draw(1, B, Sq, R) }),
  });
  const packed: HostInputs = {
    query: draw(1, 1, 300, H, P + R),
    keyValue: draw(1, 1, 300, L),
    wKc: draw(1, L, G, P),
    wVc: draw(1, L, G, V),
    bK: draw(1, 1, 300, R),
    cuSeqlens: [0, 5, 5, 145, 300],
  };
  const data = Uint8Array.from({ length: Sq * Sk }, () => uniform() < 0.7 ? 1 : 0);
  const cases: [string, HostInputs, MlaMathOptions][] = [
    ["causal", some(false), { causal: true, softmaxScale: 0.05 }],
    ["logits of thousands", some(false), { softmaxScale: 20 }],
    ["shared rope, packed", packed, { causal: true, softmaxScale: 0.05 }],
    ["every option", some(true), {
      ...{ slidingWindow: [50, 9], logitsSoftCap: 3, dropout: { rate: 0.2, seed: 9 }, softmaxAux: draw(1, H) },
      attentionMask: { data, shape: [1, 1, Sq, Sk] },
    }],
  ];
  for (const backend of ["template", "flag"] as const) {
    for (const [name, call, options] of cases) {
      if (backend === "flag" && name !== "causal") continue;
      const problem = mlaProblem(call, options);
      const all = { ...call, ...options } as HostInputs;
      const gradOutput = draw(1e-6, problem.batch, problem.queryLength, H, V);
      const setup: MatrixSetup = {
        ...{ backend, half: false, attend, expand, grad: { query: grad, keys: grad } },
        project: { latents: project, weights: project },
      };
      const run = await MatrixCall.create(context, problem, all, setup);
      await run.backward(gradOutput);
      await run.projections();
      run.run();
      const { output, lse } = referenceMlaAttentionWithLse(all, problem);
      const exact = { output, lse, ...referenceMlaAttentionBackward(all, problem, gradOutput) };
      const errors: string[] = [];
      for (const name of ["output", "lse", "query", "keyValue", "wKc", "wVc"] as const) {
        const read = new Float32Array(await run.read(name === "output" || name === "lse" ? name : `∂${name}`));
        // ∂query has the rotary part behind the other one in every mode.
        if (name === "query" && call.bQ !== undefined) continue;
        errors.push(`${name} ${relative(read, exact[name]!.data)}`);
      }
      console.log(`check ${name}, ${backend}: ${errors.join(", ")}`);
      run.dispose();
    }
  }
}
if (Deno.args.includes("--check")) await checks();

const gradOutput = draw(1e-3, 1, S, H, V);

for (
  const {
    name,
    backend = "template",
    causal = true,
    grad,
    gradKeys = grad,
    latents = project,
    weights = project,
    ...tiles
  } of variants
) {
  if (!name.includes(only)) continue;
  try {
    const problem = mlaProblem(inputs, { causal });
    const setup: MatrixSetup = {
      ...{ ...tiles, backend, half: true },
      ...(grad !== undefined && { grad: { query: grad, keys: gradKeys! }, project: { latents, weights } }),
    };
    const start = performance.now();
    const call = await MatrixCall.create(context, problem, inputs, setup);
    if (grad !== undefined) {
      await call.backward(gradOutput);
      await call.projections();
    }
    const compile = performance.now() - start;
    call.run();
    // Timestamps are believed where they agree with the host's clock: an idle card's first kernels do not.
    for (const until = performance.now() + 700; performance.now() < until; await call.read("lse")) call.run();
    const bits = new Uint16Array(await call.read("output"));
    const output = toFloats({ data: bits, shape: [bits.length], dtype: "f16" }).data;
    const nan = output.reduce((count, x) => count + (x !== x ? 1 : 0), 0);
    let error = 0, norm = 0;
    checked.forEach(([row, head], n) => {
      exact.get(causal)![n].forEach((x, v) => {
        error += (x - output[(row * H + head) * V + v]) ** 2;
        norm += x * x;
      });
    });
    const pairs = causal ? S * (S + 1) / 2 : S * S;
    const attendMs = await measured(call, ["attend"]);
    const expandMs = await measured(call, ["expandKeys", "expandValues", "rope"]);
    const forward = ["expandKeys", "expandValues", "rope", "attend"];
    const allMs = await measured(call, forward);
    console.log(
      `${name}: prepared in ${compile.toFixed(0)} ms, error ${Math.sqrt(error / norm).toExponential(2)}, ${nan} NaN
  attend ${attendMs}, ${(2 * pairs * H * (P + R + V) / parseFloat(attendMs) / 1e9).toFixed(0)} TFLOP/s
  expand ${expandMs}, ${(2 * S * L * H * (P + V) / parseFloat(expandMs) / 1e9).toFixed(0)} TFLOP/s
  all    ${allMs}`,
    );
    if (grad !== undefined) {
      for (
        const names of [
          ...[["∂query"], ["∂keys"], ["stats", "magnitude", "stage"]],
          ...[["maxima"], ["projectKeysTolatents", "projectValuesTolatents"], [
            "projectKeysToweights",
            "projectValuesToweights",
          ]],
        ]
      ) {
        const ms = await measured(call, names);
        const flops = names[0] === "∂query" ? 2 * (P + R) + V : 2 * (P + R + V);
        console.log(
          `  ${names} ${ms}${
            !names[0].startsWith("∂") ? "" : `, ${(2 * pairs * H * flops / parseFloat(ms) / 1e9).toFixed(0)} TFLOP/s`
          }`,
        );
      }
      console.log(
        `  forward and backward, all but the sum over heads ${await measured(
          call,
          call.steps.map(({ name }) => name),
        )}`,
      );
      console.log(`  errors: ${await gradientErrors(setup, causal)}`);
    }
    call.dispose();
  } catch (error) {
    console.log(`${name}: ${String(error).slice(0, 3000)}`);
  }
}
