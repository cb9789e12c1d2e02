import { ArgumentError } from "../train/train_arguments.ts";

/** What the command line asks for. */
export interface GenerateArguments {
  /** How many tokens to generate. */
  readonly tokens: number;
  /** A file that train.ts has written; random weights when absent. */
  readonly checkpoint?: string;
  /** What the text begins with. */
  readonly prompt: string;
  /** Below 1, what is likely becomes likelier; 0 always takes the likeliest. */
  readonly temperature: number;
  /** Decides what is drawn, and random weights. */
  readonly seed: number;
  readonly platform: "auto" | "webgpu" | "reference";
  /** Ends with a line of JSON. */
  readonly json: boolean;
  /** Says what there is to say on the command line, and nothing else. */
  readonly help: boolean;
}

/** What `--help` prints. */
export const usage = `Generates text with a cache of latents in pages, and checks it against recomputing everything.

  --tokens=200          how many tokens to generate
  --checkpoint=PATH     checkpoint.safetensors as examples/train.ts leaves it; else random weights
  --prompt=TEXT         what the text begins with
  --temperature=0.7     0 always takes the likeliest token
  --seed=1              decides what is drawn, and random weights
  --platform=auto       or webgpu, or reference
  --json                the last line of stdout is one JSON object
  --help                prints this

Ends with 0 when the same tokens came out three ways, with 1 when not.`;

/**
 * Reads the command line.
 *
 * @throws {ArgumentError} Naming the argument, what was expected and what came.
 */
export function generateArguments(given: readonly string[]): GenerateArguments {
  const read: { -readonly [name in keyof GenerateArguments]: GenerateArguments[name] } = {
    tokens: 200,
    prompt: "Elizabeth looked at Mr. Darcy, and said that ",
    temperature: 0.7,
    seed: 1,
    platform: "auto",
    json: false,
    help: false,
  };
  for (const argument of given) {
    const [, name, value] = /^--([a-z]+)(?:=(.*))?$/s.exec(argument) ?? [];
    // Two, because what is timed are the steps between tokens.
    if (name === "tokens" && value !== undefined) read.tokens = integer(name, value, 2);
    else if (name === "seed" && value !== undefined) read.seed = integer(name, value, 0);
    else if (name === "temperature" && value !== undefined) read.temperature = temperature(value);
    else if (name === "platform" && value !== undefined) read.platform = platform(value);
    else if ((name === "prompt" || name === "checkpoint") && value) read[name] = value;
    else if ((name === "json" || name === "help") && value === undefined) read[name] = true;
    else fail(`unknown argument "${argument}"; --help lists those that are known`);
  }
  return read;
}

function fail(why: string): never {
  throw new ArgumentError(`Cannot generate: ${why}`);
}

function integer(name: string, value: string, least: number): number {
  const number = Number(value);
  if (!/^\d+$/.test(value) || number < least || number >= 2 ** 31) {
    fail(`--${name} must be an integer from ${least}, got "${value}"`);
  }
  return number;
}

function temperature(value: string): number {
  if (!/^\d+(\.\d+)?$/.test(value)) fail(`--temperature must be a number from 0, got "${value}"`);
  return Number(value);
}

function platform(value: string): "auto" | "webgpu" | "reference" {
  if (value === "auto" || value === "webgpu" || value === "reference") return value;
  return fail(`--platform must be auto, webgpu or reference, got "${value}"`);
}
