// How a checkpoint is refused: one error, which names the source, and texts of files cut to what a message can hold.

import { FlashMLAError } from "../op/errors.ts";
import { kindOf } from "../op/tensor.ts";

/** Characters of a file's own text in a message: a damaged header can have a name of 100 MB. */
const SHOWN_CHARACTERS = 100;

/**
 * Refuses a source.
 *
 * @param source The source in words, as {@link ByteSource.name} has it.
 * @param why What was expected and what came.
 * @param cause What the runtime threw, if it did.
 */
export function cannotRead(source: string, why: string, cause?: unknown): never {
  const options = cause === undefined ? undefined : { cause };
  throw new FlashMLAError("invalid-input", `Cannot read safetensors from ${source}: ${why}`, options);
}

/**
 * Refuses a source because the runtime failed to read it; an error that says so already stays as it is.
 *
 * @param source The source in words.
 * @param cause What the runtime threw.
 */
export function failedToRead(source: string, cause: unknown): never {
  if (cause instanceof FlashMLAError) throw cause;
  cannotRead(source, cause instanceof Error ? cause.message : shown(cause), cause);
}

/**
 * A value out of a file, for a message.
 *
 * @param value Any value.
 * @returns What it is, in at most about a hundred characters.
 */
export function shown(value: unknown): string {
  if (Array.isArray(value)) return `[${cut(value.slice(0, SHOWN_CHARACTERS).map(shownElement).join(","))}]`;
  return typeof value === "string" ? JSON.stringify(cut(value)) : cut(kindOf(value));
}

function shownElement(value: unknown): string {
  return typeof value === "number" ? String(value) : Array.isArray(value) ? "[…]" : shown(value);
}

function cut(text: string): string {
  return text.length > SHOWN_CHARACTERS ? `${text.slice(0, SHOWN_CHARACTERS)}…` : text;
}
