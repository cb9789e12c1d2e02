// What a caller names as a source, opened: by what it is, and for paths and URLs by what they look like.

import { blobSource, type ByteSource, bytesSource, type RangeReader, readerSource } from "./byte_source.ts";
import { fileOrWeightsIn, filePath, fileSource, pathBeside } from "./file_source.ts";
import { type FetchRange, httpSource } from "./http_source.ts";
import { cannotRead, shown } from "./refusal.ts";

/** A source of one file. */
export type FileLike = Uint8Array | Blob | string | URL | RangeReader;

/** An opened source. */
export interface OpenedSource {
  /** Its bytes. */
  readonly source: ByteSource;
  /** Whether its name is that of an index. */
  readonly isIndex: boolean;
  /** Opens a file of the same folder, where there are folders. */
  readonly beside?: (name: string) => Promise<ByteSource>;
}

/**
 * Opens a source.
 *
 * @param given What the caller passed.
 * @param fetchRange What sends requests for URLs.
 * @returns The source.
 * @throws {FlashMLAError} When it is none, or cannot be opened.
 */
export async function openSource(given: FileLike, fetchRange: FetchRange): Promise<OpenedSource> {
  if (given instanceof Uint8Array) return { source: bytesSource(given), isIndex: false };
  if (typeof given === "string") {
    // A scheme of one letter is a drive of Windows.
    if (!/^[a-z][a-z0-9+.-]+:\/\/|^file:/i.test(given)) return await openPath(await filePath(given));
    return await openUrl(URL.canParse(given) ? new URL(given) : cannotRead(shown(given), "it is no URL"), fetchRange);
  }
  if (given instanceof URL) return await openUrl(given, fetchRange);
  if (isBlob(given)) return { source: blobSource(given), isIndex: isIndexName((given as { name?: unknown }).name) };
  if (typeof given?.read === "function") return { source: readerSource(given), isIndex: false };
  const expected = "a Uint8Array, a Blob, a path, a URL, { size?, read } or an index { weight_map }";
  cannotRead(shown(given), `expected ${expected}`);
}

async function openPath(path: string): Promise<OpenedSource> {
  const file = await fileOrWeightsIn(path);
  return {
    source: await fileSource(file),
    isIndex: isIndexName(file),
    beside: async (name) => await fileSource(await pathBeside(file, name)),
  };
}

async function openUrl(url: URL, fetchRange: FetchRange): Promise<OpenedSource> {
  if (url.protocol === "file:") return await openPath(await filePath(url));
  if (url.protocol !== "http:" && url.protocol !== "https:") {
    cannotRead(shown(url.href), "expected a URL of http, https or file; of others, pass the Blob that fetch() gives");
  }
  return {
    source: await httpSource(url, fetchRange),
    isIndex: isIndexName(url.pathname),
    beside: async (name) => {
      // Encoded, so that no name can turn into a query or another folder.
      const relative = name.split("/").map(encodeURIComponent).join("/");
      return await httpSource(new URL(relative, url), fetchRange);
    },
  };
}

function isIndexName(name: unknown): boolean {
  return typeof name === "string" && /\.index\.json$/i.test(name);
}

/** By what it can do: a Blob of another window, or of a library, is no instance of this one's. */
function isBlob(value: unknown): value is Blob {
  const { size, slice, arrayBuffer } = (value ?? {}) as Record<string, unknown>;
  return typeof size === "number" && typeof slice === "function" && typeof arrayBuffer === "function";
}
