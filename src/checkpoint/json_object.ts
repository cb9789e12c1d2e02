// Objects of JSON out of files that nobody vouches for.

import { cannotRead, shown } from "./refusal.ts";

/**
 * Parses bytes as a JSON object whose keys, and those of the objects right below it, come once.
 *
 * @param source The source in words.
 * @param part What of the source the bytes are, for messages.
 * @param bytes UTF-8.
 * @returns The object.
 * @throws {FlashMLAError} When they are something else.
 */
export function parseJsonObject(source: string, part: string, bytes: Uint8Array): Record<string, unknown> {
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (cause) {
    cannotRead(source, `expected ${part} in UTF-8, got other bytes`, cause);
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    cannotRead(source, `expected ${part} in JSON, got ${shown(text)}`, cause);
  }
  const object = asObject(value) ?? cannotRead(source, `expected ${part} to be a JSON object, got ${shown(value)}`);
  const repeated = repeatedKey(text);
  if (repeated !== undefined) cannotRead(source, `${part} has ${shown(repeated)} twice`);
  return object;
}

/**
 * A value as an object with keys.
 *
 * @param value What JSON.parse() gave.
 * @returns The object, or undefined when it is null, an array or no object.
 */
export function asObject(value: unknown): Record<string, unknown> | undefined {
  const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
  return isObject ? value as Record<string, unknown> : undefined;
}

/** A key that an object of the two outermost levels has twice, of which JSON.parse() keeps the last and says nothing. */
function repeatedKey(text: string): string | undefined {
  const keys: Set<string>[] = [];
  let depth = 0;
  let lastString = "";
  for (let at = 0; at < text.length; at++) {
    switch (text[at]) {
      case '"': {
        const end = endOfString(text, at);
        lastString = text.slice(at, end);
        at = end - 1;
        break;
      }
      case "{":
      case "[":
        if (depth < 2) keys[depth] = new Set();
        depth++;
        break;
      case "}":
      case "]":
        depth--;
        break;
      case ":": {
        if (depth > 2) break;
        // Parsed: "a" and "\u0061" are the same key.
        const key = JSON.parse(lastString) as string;
        if (keys[depth - 1].has(key)) return key;
        keys[depth - 1].add(key);
      }
    }
  }
  return undefined;
}

/** One past the closing quote of a string that begins at a place. */
function endOfString(text: string, start: number): number {
  for (let at = start + 1;; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === '"') return at + 1;
  }
}
