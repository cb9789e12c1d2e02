// A file on a server, by requests for ranges of it.

import { allocate, type ByteSource, bytesSource } from "./byte_source.ts";
import { cannotRead, failedToRead, shown } from "./refusal.ts";

/** A function like `fetch`, which is called with a range in the headers. */
export type FetchRange = (url: string, init: { readonly headers: Record<string, string> }) => Promise<Response>;

/** Files up to this size are taken whole from servers that know no ranges: indexes have up to some 10 MB. */
const WHOLE_BYTES = 16 * 2 ** 20;

/** The first request asks for the length of the header, and learns the size of the file from the same answer. */
const FIRST_BYTES = 8;

/**
 * Opens a file on a server.
 *
 * @param url Its URL, of `http:` or `https:`.
 * @param fetchRange What sends the requests.
 * @returns The source.
 * @throws {FlashMLAError} When the server has no such file, or would send all of a large one instead of a range.
 */
export async function httpSource(url: URL, fetchRange: FetchRange): Promise<ByteSource> {
  const name = withoutSecrets(url);
  const request = async (start: number, end: number): Promise<Response> => {
    // Ranges of what was compressed on the way would be ranges of other bytes.
    const headers = { "Range": `bytes=${start}-${end - 1}`, "Accept-Encoding": "identity" };
    try {
      return await fetchRange(url.href, { headers });
    } catch (cause) {
      cannotRead(name, `the request failed: ${(cause as Error)?.message ?? shown(cause)}`, cause);
    }
  };

  const first = await request(0, FIRST_BYTES);
  if (first.status === 200) return bytesSource(await wholeBody(name, first), name);
  if (first.status === 416) {
    // No byte of a file can be had only if there is none.
    await first.body?.cancel();
    return bytesSource(new Uint8Array(0), name);
  }
  const { size } = await checkedRange(name, first, 0, FIRST_BYTES);
  const tag = first.headers.get("etag");
  const head = await bodyOf(name, first, Math.min(FIRST_BYTES, size));
  return {
    name,
    size,
    async read(start, end) {
      if (end <= head.length) return head.slice(start, end);
      const response = await request(start, end);
      const range = await checkedRange(name, response, start, end);
      const itsTag = response.headers.get("etag");
      // Servers of another origin have to list ETag before a browser shows it, and not every server has tags.
      if (range.size !== size || (tag !== null && itsTag !== null && itsTag !== tag)) {
        await response.body?.cancel();
        const which = (size: number, tag: string | null) =>
          `${size} bytes${tag === null ? "" : `, ETag ${shown(tag)}`}`;
        cannotRead(
          name,
          `it changed while it was read: expected ${which(size, tag)}, got ${which(range.size, itsTag)}`,
        );
      }
      return await bodyOf(name, response, end - start);
    },
    close: () => Promise.resolve(),
  };
}

/** A URL as messages have it: links to private files carry their permission in the query. */
function withoutSecrets({ protocol, host, pathname }: URL): string {
  return `${protocol}//${host}${pathname}`;
}

/** Throws unless the answer is the range asked for; gives the size of the whole. */
async function checkedRange(name: string, response: Response, start: number, end: number): Promise<{ size: number }> {
  const why = () => {
    const { status, headers } = response;
    if (status === 200) return "expected a range (status 206), got all of it (status 200)";
    if (status !== 206) return `expected a range (status 206), got status ${status}`;
    const range = headers.get("content-range");
    if (range === null) {
      return "the answer has no Content-Range; a server of another origin has to list it in Access-Control-Expose-Headers";
    }
    const [, first, last, size] = (/^bytes (\d+)-(\d+)\/(\d+)$/.exec(range) ?? []).map(Number);
    if (!Number.isSafeInteger(size)) return `expected Content-Range: bytes FIRST-LAST/SIZE, got ${shown(range)}`;
    if (first === start && last === Math.min(end, size) - 1) return { size };
    return `expected bytes ${start} to ${end}, got Content-Range: ${shown(range)}`;
  };
  const answer = why();
  if (typeof answer === "object") return answer;
  await response.body?.cancel();
  cannotRead(name, answer);
}

/** A body that has to have so many bytes; no more of it is taken. */
async function bodyOf(name: string, response: Response, length: number): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = allocate(name, length);
  let filled = 0;
  const isWhole = await eachChunk(name, response, (chunk) => {
    if (filled + chunk.length > length) return false;
    bytes.set(chunk, filled);
    filled += chunk.length;
    return true;
  });
  if (isWhole && filled === length) return bytes;
  cannotRead(name, `expected ${length} bytes of a range, got ${isWhole ? filled : "more"}`);
}

/** The body of an answer that ignored the range, unless it is large. */
async function wholeBody(name: string, response: Response): Promise<Uint8Array> {
  const chunks: Uint8Array[] = [];
  let length = 0;
  const announced = Number(response.headers.get("content-length") ?? 0);
  const isWhole = announced <= WHOLE_BYTES && await eachChunk(name, response, (chunk) => {
    chunks.push(chunk);
    return (length += chunk.length) <= WHOLE_BYTES;
  });
  if (!isWhole) {
    if (announced > WHOLE_BYTES) await response.body?.cancel();
    const size = announced > 0 ? `all ${announced} bytes` : `more than ${WHOLE_BYTES} bytes`;
    cannotRead(name, `the server ignores ranges (status 200) and would send ${size}; a server with ranges is needed`);
  }
  const bytes = allocate(name, length);
  let at = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, at);
    at += chunk.length;
  }
  return bytes;
}

/** Hands on a body piece by piece, until `take` wants no more; then the rest is cancelled. Gives whether all was taken. */
async function eachChunk(name: string, response: Response, take: (chunk: Uint8Array) => boolean): Promise<boolean> {
  if (response.body === null) return true;
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return true;
      if (!take(value)) {
        await reader.cancel();
        return false;
      }
    }
  } catch (cause) {
    failedToRead(name, cause);
  }
}
