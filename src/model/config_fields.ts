// Fields of a parsed config.json: each is what the models' code expects of it, or the file is refused by name.

import { FlashMLAError } from "../op/errors.ts";
import { kindOf } from "../op/tensor.ts";

/** A parsed `config.json`, or the part of one that says what an attention layer is. */
export type ModelConfigFile = Readonly<Record<string, unknown>>;

/** Refuses a config, saying why. */
export function cannotRead(why: string): never {
  throw new FlashMLAError("invalid-input", `Cannot read model config: ${why}`);
}

/** Whether a value is an object with fields. */
export function isFields(value: unknown): value is ModelConfigFile {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Whether a field is absent; files write null for that too. */
export function isAbsent(config: ModelConfigFile, name: string): boolean {
  return config[name] === undefined || config[name] === null;
}

/**
 * A whole number.
 *
 * @param config The file.
 * @param name The field.
 * @param least The smallest that is allowed.
 */
export function integerField(config: ModelConfigFile, name: string, least = 1): number {
  const value = config[name];
  if (value === undefined) cannotRead(`${name} is missing; expected a whole number from ${least}`);
  if (!Number.isSafeInteger(value) || (value as number) < least) {
    cannotRead(`${name} must be a whole number from ${least}, got ${kindOf(value)}`);
  }
  return value as number;
}

/**
 * A number above 0.
 *
 * @param config The file, or an object of it.
 * @param name The field.
 * @param within Name of the object, for the message.
 */
export function positiveField(config: ModelConfigFile, name: string, within = ""): number {
  const value = config[name];
  if (value === undefined) cannotRead(`${within}${name} is missing; expected a number above 0`);
  if (typeof value !== "number" || !Number.isFinite(value) || value <= 0) {
    cannotRead(`${within}${name} must be a number above 0, got ${kindOf(value)}`);
  }
  return value;
}

/** A whole number from 1, or what to assume where the field is absent. */
export function integerOr<T>(config: ModelConfigFile, name: string, otherwise: T): number | T {
  return isAbsent(config, name) ? otherwise : integerField(config, name);
}

/** A number above 0, or what to assume where the field is absent. */
export function positiveOr<T>(config: ModelConfigFile, name: string, otherwise: T, within = ""): number | T {
  return isAbsent(config, name) ? otherwise : positiveField(config, name, within);
}

/** An object with at least one field, or null where the field is absent; models' code takes an empty one for absent. */
export function fieldsOrNull(config: ModelConfigFile, name: string): ModelConfigFile | null {
  if (isAbsent(config, name)) return null;
  const value = config[name];
  if (!isFields(value)) cannotRead(`${name} must be an object, got ${kindOf(value)}`);
  return Object.keys(value).length === 0 ? null : value;
}

/** True or false, or what to assume where the field is absent. */
export function flagOr(config: ModelConfigFile, name: string, otherwise: boolean): boolean {
  if (isAbsent(config, name)) return otherwise;
  const value = config[name];
  if (typeof value !== "boolean") cannotRead(`${name} must be true or false, got ${kindOf(value)}`);
  return value;
}

/** The same, where the models' code takes null for false. */
export function flagOrNull(config: ModelConfigFile, name: string, otherwise: boolean): boolean {
  return config[name] === null ? false : flagOr(config, name, otherwise);
}
