// The main job: Multi-head Latent Attention with DeepSeek-V2-Lite's head dimensions, checked against an outside oracle
// (ejkernel under JAX, recorded in tests/golden) and against this library's own, then on a longer sequence.
//
//   deno task demo            for people
//   deno task demo --json     the last line of stdout is one JSON object for programs

import {
  type AnyTensor,
  ConfigSelectorChain,
  detectPlatform,
  Executor,
  flashMLA,
  type FlashMLAConfig,
  type HostInputs,
  type MlaCall,
  type MlaInvocation,
  PersistentCache,
  type Tensor,
} from "../mod.ts";
import { goldenCases } from "../tests/support/golden.ts";
import { relL2 } from "../tests/support/metrics.ts";
import { normals } from "../tests/support/random_problem.ts";

/** relL2 that float32 may differ by from another float32 implementation, and from the double-precision oracle. */
const tolerances = { golden: 3e-5, oracle: 1e-5 };
const longerLength = 1536;

const json = Deno.args.includes("--json");
const say = (line = "") => console.log(line);

interface Measured {
  readonly cfg: FlashMLAConfig;
  readonly source: string;
  readonly output: Tensor;
  readonly chooseMs: number;
  readonly callMs: number;
  readonly kernelMs: number;
}

const executor = new Executor<MlaCall, FlashMLAConfig, AnyTensor>(
  new ConfigSelectorChain({
    persistent: new PersistentCache("mla"),
    policy: { validateBackward: false }, // nothing here asks for gradients: their kernels need not be compiled
    onEvent: (event) => {
      if (event.type === "autotune_start") {
        console.error(`measuring ${event.candidates} configurations (a software adapter compiles each for seconds) …`);
      }
    },
  }),
);

/** Chooses a configuration, then times warm calls with everything in them (the median of three), and the kernels alone. */
async function measure(call: MlaCall): Promise<Measured> {
  const [{ cfg, source }, chooseMs] = await timed(() => executor.choose(flashMLA, call));
  await executor.run(flashMLA, call, { cfg });
  const runs: [output: Tensor, ms: number][] = [];
  for (let i = 0; i < 3; i++) runs.push(await timed(() => executor.run(flashMLA, call, { cfg }) as Promise<Tensor>));
  const [output, callMs] = runs.toSorted(([, a], [, b]) => a - b)[1];
  const trial = await flashMLA.trial(await flashMLA.prepare(call), cfg);
  const kernelMs = await trial.time(1).finally(() => trial.dispose());
  return { cfg, source, output, chooseMs, callMs, kernelMs };
}

async function oracle({ inputs, options }: MlaCall): Promise<[output: Tensor, ms: number]> {
  const call = { inputs, options: { ...options, platform: "reference" as const } };
  const invocation: MlaInvocation = await flashMLA.prepare(call);
  return await timed(() => flashMLA.run(invocation, flashMLA.heuristicCfg(invocation)) as Promise<Tensor>);
}

async function timed<T>(work: () => Promise<T>): Promise<[result: T, ms: number]> {
  const start = performance.now();
  return [await work(), performance.now() - start];
}

/** Random inputs with DeepSeek-V2-Lite's head dimensions: 16 heads, L 512, P 128, R 64, V 128. */
function longerInputs(length: number): HostInputs {
  const random = normals(1);
  const tensor = (scale: number, ...shape: number[]): Tensor => ({
    data: Float32Array.from({ length: shape.reduce((a, b) => a * b) }, () => random() * scale),
    shape,
  });
  return {
    query: tensor(1, 1, length, 16, 192),
    keyValue: tensor(1, 1, length, 512),
    wKc: tensor(512 ** -0.5, 512, 16, 128),
    wVc: tensor(512 ** -0.5, 512, 16, 128),
    bK: tensor(1, 1, length, 64),
  };
}

const ms = (value: number) => `${value < 10 ? value.toFixed(2) : value.toFixed(0)} ms`;

function report(title: string, measured: Measured, oracleMs: number, errors: Record<string, number>): void {
  const { cfg, source, chooseMs, callMs, kernelMs } = measured;
  say(title);
  say(
    `  config   blockQ ${cfg.blockQ}, blockK ${cfg.blockK}, ${cfg.numWarps} warps of ${cfg.rowsPerThread} rows, ` +
      `${cfg.numStages} stage(s) of depth ${cfg.blockDepth}; from ${source} in ${ms(chooseMs)}`,
  );
  say(
    `  time     call ${ms(callMs)}, kernels ${ms(kernelMs)}, oracle ${ms(oracleMs)} (${
      (oracleMs / callMs).toFixed(1)
    }×)`,
  );
  for (const [name, error] of Object.entries(errors)) {
    const tolerance = tolerances[name as keyof typeof tolerances];
    say(
      `  relL2    ${error.toExponential(2)} against the ${name}, ${
        error <= tolerance ? "within" : "OVER"
      } ${tolerance}`,
    );
  }
  say();
}

const platform = await detectPlatform("flash_mla");
const [golden] = goldenCases().filter(({ name }) => name === "v2_lite_dims");
const goldenCall: MlaCall = { inputs: golden.inputs, options: { ...golden.options, platform } };
const adapter = (await flashMLA.prepare(goldenCall)).target.description;
say(`platform ${platform}`);
say(`adapter  ${adapter}`);
if (platform === "reference") {
  say("         No WebGPU adapter was found. Install the GPU's Vulkan, Metal or DirectX 12 driver, or, on Debian and");
  say("         Ubuntu, give this shell a software adapter first:  . tools/software_vulkan.sh");
}
say();

const first = await measure(goldenCall);
const [goldenOracle, goldenOracleMs] = await oracle(goldenCall);
const goldenErrors = {
  golden: relL2(first.output.data, golden.expected.data),
  oracle: relL2(first.output.data, goldenOracle.data),
};
const tokens = golden.inputs.query.shape[1];
report(`DeepSeek-V2-Lite head dimensions, ${tokens} tokens, recorded inputs`, first, goldenOracleMs, goldenErrors);

const longerCall: MlaCall = { inputs: longerInputs(longerLength), options: { platform } };
const longer = await measure(longerCall);
const [longerOracle, longerOracleMs] = platform === "reference"
  ? [longer.output, longer.callMs]
  : await oracle(longerCall);
const longerErrors = { oracle: relL2(longer.output.data, longerOracle.data) };
report(`DeepSeek-V2-Lite, 16 heads, ${longerLength} tokens, random inputs`, longer, longerOracleMs, longerErrors);

const ok = goldenErrors.golden <= tolerances.golden &&
  Math.max(goldenErrors.oracle, longerErrors.oracle) <= tolerances.oracle;
say(ok ? "ok" : "FAILED: an error is over its tolerance");
if (json) {
  say(JSON.stringify({
    platform,
    adapter,
    config: first.cfg,
    source: first.source,
    ms: first.callMs,
    relError: goldenErrors.golden,
    tolerance: tolerances.golden,
    ok,
    kernelMs: first.kernelMs,
    oracleMs: goldenOracleMs,
    longer: {
      tokens: longerLength,
      config: longer.cfg,
      source: longer.source,
      ms: longer.callMs,
      kernelMs: longer.kernelMs,
      oracleMs: longerOracleMs,
      speedup: longerOracleMs / longer.callMs,
      relError: longerErrors.oracle,
      tolerance: tolerances.oracle,
    },
  }));
}
Deno.exit(ok ? 0 : 1);
