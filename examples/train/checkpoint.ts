// A checkpoint: all of a run in one safetensors file, so that it goes on as if it had never stopped.
//
//   metadata    format "flash-mla-train", version, settings (JSON), digest of the text, and a checksum of all that
//   arrays      model.NAME, mean.NAME and square.NAME of every weight (F32), random (U32), losses (F64),
//               heldOut (F64, [n, 2]: step and loss)

import { createHash } from "node:crypto";
import { closeSync, fsyncSync, openSync, readFileSync, renameSync, rmSync, writeSync } from "node:fs";
import process from "node:process";
import { noMoments } from "./adamw.ts";
import type { Corpus } from "./corpus.ts";
import { parametersOf } from "./parameters.ts";
import { Random } from "./random.ts";
import { type Elements, fromSafetensors, type Safetensors, toSafetensors } from "./safetensors.ts";
import type { Training, TrainingSettings } from "./training.ts";

const format = "flash-mla-train";
const version = "1";

/** Why a run cannot go on from a file. */
export class CheckpointError extends Error {
  override readonly name = "CheckpointError";
}

/** Writes a run to a file. Whoever reads the file at any time finds the old run or the new one, never half of one. */
export function saveCheckpoint(path: string, training: Training, corpus: Corpus): void {
  const bytes = encodeCheckpoint(training, corpus);
  const temporary = `${path}.${process.pid}.tmp`;
  try {
    const file = openSync(temporary, "w");
    try {
      for (let written = 0; written < bytes.length;) written += writeSync(file, bytes, written);
      fsyncSync(file);
    } finally {
      closeSync(file);
    }
    renameSync(temporary, path);
  } catch (error) {
    rmSync(temporary, { force: true });
    throw new CheckpointError(`Cannot write the checkpoint ${path}: ${(error as Error).message}`, { cause: error });
  }
}

/** What the command line says about a run that goes on. */
export interface ResumeWish {
  /** Steps in all; those that the run was begun with when absent. The learning rate follows them from here on. */
  readonly steps?: number;
  /** The seed, which has to be the run's own. */
  readonly seed?: number;
}

/**
 * Reads a run from a file.
 *
 * @throws {CheckpointError} When there is none, it is damaged, or it belongs to another program, text, seed, or has passed
 * the steps already.
 */
export function loadCheckpoint(path: string, corpus: Corpus, { steps, seed }: ResumeWish = {}): Training {
  let bytes: Uint8Array;
  try {
    bytes = readFileSync(path);
  } catch (error) {
    const why = (error as { code?: string }).code === "ENOENT" ? "there is none" : (error as Error).message;
    throw new CheckpointError(`Cannot resume from ${path}: ${why}`, { cause: error });
  }
  try {
    const training = decodeCheckpoint(bytes, corpus);
    const { settings, losses } = training;
    if (seed !== undefined && seed !== settings.seed) {
      throw new Error(`it was begun with seed ${settings.seed}, not ${seed}`);
    }
    if (steps !== undefined && steps < losses.length) {
      throw new Error(`it has taken ${losses.length} steps already, more than ${steps}`);
    }
    return { ...training, settings: { ...settings, steps: steps ?? settings.steps } };
  } catch (error) {
    throw new CheckpointError(`Cannot resume from ${path}: ${(error as Error).message}`, { cause: error });
  }
}

/** A run as the bytes of a file. */
export function encodeCheckpoint(training: Training, corpus: Corpus): Uint8Array<ArrayBuffer> {
  const { settings, parameters, moments, random, losses, heldOut } = training;
  const tensors = new Map<string, { data: Elements; shape: readonly number[] }>();
  for (const [group, array] of Object.entries({ model: parameters.values, ...moments })) {
    for (const { name, shape, offset, value } of parameters.all) {
      tensors.set(`${group}.${name}`, { data: array.subarray(offset, offset + value.length), shape });
    }
  }
  tensors.set("random", { data: random.state.slice(), shape: [4] });
  tensors.set("losses", { data: Float64Array.from(losses), shape: [losses.length] });
  const pairs = heldOut.flatMap(({ step, loss }) => [step, loss]);
  tensors.set("heldOut", { data: Float64Array.from(pairs), shape: [heldOut.length, 2] });
  const metadata = { format, version, settings: JSON.stringify(settings), text: corpus.digest };
  return toSafetensors({ metadata: { ...metadata, checksum: checksum({ metadata, tensors }) }, tensors });
}

/**
 * A run from the bytes of a file.
 *
 * @throws {Error} Saying what is wrong with them.
 */
export function decodeCheckpoint(bytes: Uint8Array, corpus: Corpus): Training {
  const { metadata, tensors } = fromSafetensors(bytes);
  if (metadata.format !== format) throw new Error("it is a safetensors file of another program");
  if (metadata.version !== version) throw new Error(`it has version ${metadata.version}, expected ${version}`);
  if (metadata.checksum !== checksum({ metadata, tensors })) {
    throw new Error("its checksum is wrong: the file is damaged");
  }
  if (metadata.text !== corpus.digest) throw new Error("it was trained on another text");

  const settings: TrainingSettings = JSON.parse(metadata.settings);
  const parameters = parametersOf(settings.sizes, corpus.alphabet.length);
  const moments = noMoments(parameters);
  const array = (name: string): Elements => {
    const tensor = tensors.get(name);
    if (tensor === undefined) throw new Error(`it has no ${name}`);
    return tensor.data;
  };
  for (const [group, target] of Object.entries({ model: parameters.values, ...moments })) {
    for (const { name, offset, value } of parameters.all) {
      const data = array(`${group}.${name}`);
      if (data.length !== value.length) {
        throw new Error(`${group}.${name} has ${data.length} elements, expected ${value.length}`);
      }
      target.set(data, offset);
    }
  }
  const pairs = array("heldOut");
  return {
    settings,
    parameters,
    moments,
    random: new Random(array("random") as Uint32Array),
    losses: [...array("losses")],
    heldOut: Array.from({ length: pairs.length / 2 }, (_, i) => ({ step: pairs[2 * i], loss: pairs[2 * i + 1] })),
  };
}

/** SHA-256 of what decides a run, so that no flipped bit goes unnoticed. */
function checksum({ metadata, tensors }: Safetensors): string {
  const hash = createHash("sha256").update(`${metadata.settings}\n${metadata.text}`);
  for (const [name, { data }] of tensors) {
    hash.update(name).update(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  }
  return hash.digest("hex");
}
