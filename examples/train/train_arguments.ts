/** Why a command line is not understood. */
export class ArgumentError extends Error {
  override readonly name = "ArgumentError";
}

/** What the command line asks for. */
export interface TrainArguments {
  /** Steps in all; the default, or those of the checkpoint, when absent. */
  readonly steps?: number;
  /** The seed; the default, or that of the checkpoint, when absent. */
  readonly seed?: number;
  readonly platform: "auto" | "webgpu" | "reference";
  /** The folder for checkpoint and curve; one for temporary files when absent. */
  readonly out?: string;
  /** Goes on from the checkpoint in that folder. */
  readonly resume: boolean;
  /** Ends with a line of JSON. */
  readonly json: boolean;
}

/**
 * Reads the command line.
 *
 * @throws {ArgumentError} Naming the argument, what was expected and what came.
 */
export function trainArguments(given: readonly string[]): TrainArguments {
  const read: { -readonly [name in keyof TrainArguments]: TrainArguments[name] } = {
    platform: "auto",
    resume: false,
    json: false,
  };
  for (const argument of given) {
    const [, name, value] = /^--([a-z]+)(?:=(.*))?$/s.exec(argument) ?? [];
    if (name === "steps" && value !== undefined) read.steps = integer(name, value, 1);
    else if (name === "seed" && value !== undefined) read.seed = integer(name, value, 0);
    else if (name === "platform" && value !== undefined) read.platform = platform(value);
    else if (name === "out" && value) read.out = value;
    else if ((name === "resume" || name === "json") && value === undefined) read[name] = true;
    else {
      throw new ArgumentError(
        `Cannot train: unknown argument "${argument}"; known are --steps=N, --seed=N, --platform=auto|webgpu|reference, --out=FOLDER, ` +
          `--resume, --json`,
      );
    }
  }
  return read;
}

function integer(name: string, value: string, least: number): number {
  const number = Number(value);
  if (!/^\d+$/.test(value) || number < least || number >= 2 ** 31) {
    throw new ArgumentError(`Cannot train: --${name} must be an integer from ${least}, got "${value}"`);
  }
  return number;
}

function platform(value: string): "auto" | "webgpu" | "reference" {
  if (value === "auto" || value === "webgpu" || value === "reference") return value;
  throw new ArgumentError(`Cannot train: --platform must be auto, webgpu or reference, got "${value}"`);
}
