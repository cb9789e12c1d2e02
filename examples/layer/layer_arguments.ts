import { ArgumentError } from "../train/train_arguments.ts";

/** What the command line asks for. */
export interface LayerArguments {
  /** A folder with config.json and the checkpoint, or a file beside a config.json; one that is written when absent. */
  readonly checkpoint?: string;
  /** Which of its layers. */
  readonly layer: number;
  /** Tokens of the prompt. */
  readonly prompt: number;
  /** Tokens to decode behind it. */
  readonly steps: number;
  /** How weights are stored. */
  readonly dtype: "f32" | "f16";
  readonly platform: "auto" | "webgpu" | "reference";
  /** Seconds that the reference may take. */
  readonly seconds: number;
  /** Decides the hidden states, and the weights of a checkpoint that is written. */
  readonly seed: number;
  /** Ends with a line of JSON. */
  readonly json: boolean;
  /** Says what there is to say on the command line, and nothing else. */
  readonly help: boolean;
}

/** What `--help` prints. */
export const usage = `Runs the attention layer of a checkpoint, and checks it against the reference platform.

  --checkpoint=PATH     a folder with config.json and safetensors as Hugging Face has them, or a safetensors file beside
                        a config.json; else a small one is written first
  --layer=0             which of its layers
  --prompt=128          tokens of the prompt: random hidden states
  --steps=64            tokens to decode behind it
  --dtype=f32           or f16: how weights and cache are stored
  --platform=auto       or webgpu, or reference
  --seconds=60          how long the reference may take; what it has done by then is compared
  --seed=1              decides the hidden states, and the weights of a checkpoint that is written
  --json                the last line of stdout is one JSON object
  --help                prints this

Ends with 0 when the output agrees with the reference's, with 1 when not.`;

/**
 * Reads the command line.
 *
 * @throws {ArgumentError} Naming the argument, what was expected and what came.
 */
export function layerArguments(given: readonly string[]): LayerArguments {
  const read: { -readonly [name in keyof LayerArguments]: LayerArguments[name] } = {
    layer: 0,
    prompt: 128,
    steps: 64,
    dtype: "f32",
    platform: "auto",
    seconds: 60,
    seed: 1,
    json: false,
    help: false,
  };
  for (const argument of given) {
    const [, name, value] = /^--([a-z]+)(?:=(.*))?$/s.exec(argument) ?? [];
    if ((name === "prompt" || name === "steps" || name === "seconds") && value !== undefined) {
      read[name] = integer(name, value, 1);
    } else if ((name === "layer" || name === "seed") && value !== undefined) read[name] = integer(name, value, 0);
    else if (name === "dtype" && value !== undefined) read.dtype = oneOf(name, value, ["f32", "f16"]);
    else if (name === "platform" && value !== undefined) {
      read.platform = oneOf(name, value, ["auto", "webgpu", "reference"]);
    } else if (name === "checkpoint" && value) read.checkpoint = value;
    else if ((name === "json" || name === "help") && value === undefined) read[name] = true;
    else fail(`unknown argument "${argument}"; --help lists those that are known`);
  }
  return read;
}

function fail(why: string): never {
  throw new ArgumentError(`Cannot run the layer: ${why}`);
}

function integer(name: string, value: string, least: number): number {
  const number = Number(value);
  if (!/^\d+$/.test(value) || number < least || number >= 2 ** 31) {
    fail(`--${name} must be an integer from ${least}, got "${value}"`);
  }
  return number;
}

function oneOf<const Value extends string>(name: string, value: string, known: readonly Value[]): Value {
  if ((known as readonly string[]).includes(value)) return value as Value;
  return fail(`--${name} must be ${known.slice(0, -1).join(", ")} or ${known.at(-1)}, got "${value}"`);
}
